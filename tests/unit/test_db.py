"""The tables: made by the migrations alone, safe across a power cut, without a word about the patient."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from tables import add_series

from dicomnode.db import OURS, alembic_config, metadata, migrate, now, open_database

REVIEWED = {
    "series": "series_uid study_uid state generation n_instances n_conflicts evidence first_at last_at",
    "instances": "series_uid sop_instance_uid sop_class_uid study_uid transfer_syntax_uid path size_bytes sha256 "
    "calling_ae called_ae received_at",
    "jobs": "id kind series_uid study_uid generation calling_ae route route_reason state reason priority pipeline uses "
    "strength blend pipeline_hash fingerprint derived_series_uid superseded_by runs crashes enqueued next_try_at "
    "cancel_requested worker progress n_in n_out measured created_at started_at finished_at updated_at",
    "job_instances": "job_id sop_instance_uid",
    "job_events": "id job_id at state what worker",
    "deliveries": "job_id destination state reason attempts failures rejections enqueued next_try_at created_at "
    "updated_at",
    "transfers": "job_id destination sop_instance_uid sop_class_uid transfer_syntax_uid path sha256 state status "
    "detail tries unanswered updated_at",
    "commitments": "transaction_uid job_id destination status asked_at reported_at",
    "workers": "id host pid beat",
}
"""Every column was looked at: none takes a name, number or date of a patient. A new one is added here after the same
look."""


def test_the_migrations_make_exactly_these_tables(database: sa.Engine) -> None:
    def ours(_object: object, name: str | None, kind: str, *_: object) -> bool:
        return kind != "table" or name in OURS

    with database.connect() as connection:
        connection.execute(sa.text("CREATE TABLE workflow_status (id TEXT)"))  # the engine's own, in the same file
        context = MigrationContext.configure(
            connection, opts={"include_object": ours, "compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, metadata) == []


def test_the_migrations_make_the_same_constraints(database: sa.Engine, tmp_path: Path) -> None:
    """compare_metadata does not look at primary and foreign keys of SQLite; SQLAlchemy's reflection does."""
    direct = sa.create_engine(f"sqlite:///{tmp_path / 'direct.db'}")
    metadata.create_all(direct)
    migrated, made = sa.inspect(database), sa.inspect(direct)
    for table in OURS:
        assert migrated.get_pk_constraint(table) == made.get_pk_constraint(table)
        key = str
        assert sorted(migrated.get_foreign_keys(table), key=key) == sorted(made.get_foreign_keys(table), key=key)
        assert sorted(migrated.get_indexes(table), key=key) == sorted(made.get_indexes(table), key=key)
        nullable = [(c["name"], c["nullable"]) for c in migrated.get_columns(table)]
        assert nullable == [(c["name"], c["nullable"]) for c in made.get_columns(table)]
    direct.dispose()


def test_migrating_again_changes_nothing_and_back_leaves_nothing(database: sa.Engine) -> None:
    with database.begin() as connection:
        add_series(connection)
    migrate(database)
    config = alembic_config()
    with database.begin() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM series")).scalar_one() == 1
        connection.execute(sa.text("DELETE FROM series"))
    with database.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert set(sa.inspect(database).get_table_names()) <= {"alembic_version"}


def test_no_column_may_name_a_patient() -> None:
    assert {name: set(columns.split()) for name, columns in REVIEWED.items()} == {
        name: {column.name for column in table.columns} for name, table in metadata.tables.items()
    }


def test_every_connection_keeps_a_committed_row_across_a_power_cut(database: sa.Engine) -> None:
    """Several at once, so that none is one that was set up before. 2 is FULL."""
    connections = [database.connect() for _ in range(4)]
    for connection in connections:
        values = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
        assert values == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
    for connection in connections:
        connection.close()


def test_a_row_must_refer_to_something(database: sa.Engine) -> None:
    with pytest.raises(sa.exc.IntegrityError, match="FOREIGN KEY"), database.begin() as connection:
        connection.execute(
            sa.insert(metadata.tables["job_instances"]).values(job_id="nobody", sop_instance_uid="1.2.3")
        )


def test_readers_look_while_a_writer_holds_the_lock(database: sa.Engine, tmp_path: Path) -> None:
    with database.begin() as connection:
        add_series(connection)
    writer = sqlite3.connect(tmp_path / "node.db", isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    begun = time.monotonic()
    with database.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM series")).scalar_one() == 1
    assert time.monotonic() - begun < 1
    writer.close()


def test_a_writer_waits_for_the_lock(database: sa.Engine, tmp_path: Path) -> None:
    holder = sqlite3.connect(tmp_path / "node.db", isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    threading.Timer(0.5, holder.rollback).start()
    begun = time.monotonic()
    with database.begin() as connection:
        add_series(connection)
    assert 0.4 < time.monotonic() - begun < 20
    holder.close()


def test_the_folder_of_the_file_is_made(tmp_path: Path) -> None:
    open_database(f"sqlite:///{tmp_path / 'var' / 'lib' / 'node.db'}").dispose()
    assert (tmp_path / "var" / "lib" / "node.db").exists()


def test_times_are_utc_without_a_zone() -> None:
    assert now().tzinfo is None
    assert abs(now().timestamp() - time.timezone - time.time()) < 3700
