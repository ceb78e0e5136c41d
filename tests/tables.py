"""A node's database in a file of the test's, and rows in it, as the tests of its parts need them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dicomnode import jobs as job_table
from dicomnode.config import Config
from dicomnode.db import (
    DeliveryState,
    JobKind,
    JobState,
    SeriesState,
    deliveries,
    instances,
    job_events,
    metadata,
    now,
    open_database,
    series,
)

SERIES = "1.2.3"
STUDY = "1.2"
CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"


_migrated: list[bytes] = []


def database_in(folder: Path) -> sa.Engine:
    """The database of a new node; the migrations run once and the file is copied."""
    path = folder / "node.db"
    if not _migrated:
        open_database(f"sqlite:///{path}").dispose()
        _migrated.append(path.read_bytes())
    path.write_bytes(_migrated[0])
    return open_database(f"sqlite:///{path}")


def config_of(*, destinations: Mapping[str, int] | None = None, **sections: Any) -> Config:
    """A configuration; `destinations` maps names to ports of this machine."""
    peers = {
        name: {
            "ae_title": "ORACLE",
            "host": "127.0.0.1",
            "port": port,
            "connect_timeout_s": 2,
            "acse_timeout_s": 2,
            "dimse_timeout_s": 2,
        }
        for name, port in (destinations or {}).items()
    }
    return Config.model_validate({"node": {}, "destinations": peers, **sections})


def add_series(
    connection: sa.Connection,
    series_uid: str = SERIES,
    *,
    state: SeriesState = SeriesState.CLOSED,
    paths: Mapping[str, str] | None = None,
    sha256: Mapping[str, str] | None = None,
) -> None:
    """A series, if it is not there, with an instance for each SOP Instance UID → path in the spool.

    `sha256` has digests by path, of those that any come to read.
    """
    connection.execute(
        sa.insert(series)
        .prefix_with("OR IGNORE")
        .values(series_uid=series_uid, study_uid=STUDY, state=state, first_at=now(), last_at=now())
    )
    for uid, path in (paths or {}).items():
        connection.execute(
            sa.insert(instances).values(
                series_uid=series_uid,
                sop_instance_uid=uid,
                sop_class_uid=CT,
                study_uid=STUDY,
                transfer_syntax_uid=EXPLICIT,
                path=path,
                size_bytes=1,
                sha256=(sha256 or {}).get(path, "0" * 64),
                calling_ae="SCANNER",
                called_ae="NODE",
                received_at=now(),
            )
        )


def add_job(
    connection: sa.Connection,
    identity: str = "job",
    state: JobState = JobState.QUEUED,
    *,
    sop_instance_uids: Collection[str] = (),
    **values: Any,
) -> str:
    """A job of `SERIES` in that state; its id."""
    add_series(connection, values.get("series_uid", SERIES))
    made = job_table.create(
        connection,
        identity=identity,
        state=state,
        reason="made by the test",
        sop_instance_uids=sop_instance_uids,
        **{
            "kind": JobKind.PIPELINE,
            "series_uid": SERIES,
            "study_uid": STUDY,
            "generation": 1,
            "calling_ae": "SCANNER",
            "route": "ct",
            "route_reason": "route ct: takes everything",
            "priority": 100,
            "pipeline": "identity",
            "uses": "identity",
            "strength": 1.0,
            "blend": 1.0,
            "fingerprint": "f" * 64,
            **values,
        },
    )
    assert made
    return identity


def add_delivery(connection: sa.Connection, destination: str, state: DeliveryState, reason: str = "") -> None:
    """A delivery of the job "job" in that state."""
    at = now()
    connection.execute(
        sa.insert(deliveries).values(
            job_id="job", destination=destination, state=state, reason=reason, created_at=at, updated_at=at
        )
    )


def state_of(connection: sa.Connection, identity: str = "job") -> JobState:
    """State of a job, as this transaction sees it."""
    job = job_table.get(connection, identity)
    assert job is not None
    return job.state


def history(connection: sa.Connection, identity: str = "job") -> list[str]:
    """States of a job, oldest first, as this transaction sees them."""
    return list(
        connection.execute(
            sa.text("SELECT state FROM job_events WHERE job_id = :id ORDER BY id"), {"id": identity}
        ).scalars()
    )


def row(database: sa.Engine, table: str, **where: object) -> dict[str, Any]:
    """The one row of a table that has these values."""
    with database.connect() as connection:
        chosen = metadata.tables[table]
        query = sa.select(chosen).where(*(chosen.c[name] == value for name, value in where.items()))
        return dict(connection.execute(query).mappings().one())


def rows(database: sa.Engine, table: str, order: str = "") -> list[dict[str, Any]]:
    """All rows of a table."""
    chosen = metadata.tables[table]
    query = sa.select(chosen).order_by(chosen.c[order]) if order else sa.select(chosen)
    with database.connect() as connection:
        return [dict(one) for one in connection.execute(query).mappings()]


def events(database: sa.Engine, job_id: str = "job") -> list[tuple[str, str]]:
    """(state, what) of a job's history, oldest first."""
    query = sa.select(job_events.c.state, job_events.c.what).where(job_events.c.job_id == job_id)
    with database.connect() as connection:
        return [(one.state, one.what) for one in connection.execute(query.order_by(job_events.c.id))]
