"""The tables. They are the truth; the engine only moves work (docs/architecture.md).

One SQLite file holds ours and the engine's. No pixel data and nothing that names a patient is in it: UIDs only.
All times are UTC. Schema changes are Alembic migrations in dicomnode/migrations; a test compares them with this file.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig
from sqlalchemy import Boolean, Column, DateTime, Float, ForeignKey, Index, Integer, String, Table, Text

UID = String(64)
_BUSY_TIMEOUT_MS = 30_000

metadata = sa.MetaData()


class SeriesState(StrEnum):
    """OPEN while slices may still come, CLOSED once judged complete; a late slice opens it again."""

    OPEN = "OPEN"
    CLOSED = "CLOSED"


class JobState(StrEnum):
    """Life of a job; the table of legal moves is in jobs.py."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    DISPATCHING = "DISPATCHING"
    COMMITTING = "COMMITTING"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    SKIPPED = "SKIPPED"
    WITHHELD = "WITHHELD"


class DeliveryState(StrEnum):
    """Life of a delivery to one destination."""

    WAITING = "WAITING"
    SENDING = "SENDING"
    SENT = "SENT"
    """All accepted by a destination that is not asked for storage commitment."""
    COMMITTING = "COMMITTING"
    """All accepted; commitment is to be asked for or its report is awaited, until `next_try_at`."""
    REQUESTING = "REQUESTING"
    """An attempt asks for commitment now."""
    COMMITTED = "COMMITTED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


BEGUN = {DeliveryState.SENDING: DeliveryState.WAITING, DeliveryState.REQUESTING: DeliveryState.COMMITTING}
"""State of a delivery during an attempt → its state before; a delivery in any other state is through."""


class TransferState(StrEnum):
    """Life of one instance on its way to one destination."""

    WAITING = "WAITING"
    OFFERED = "OFFERED"
    """Handed to an attempt that has not ended; if its process died, the peer may or may not have it."""
    ACCEPTED = "ACCEPTED"
    COMMITTED = "COMMITTED"
    """The destination reported that it has taken responsibility for it (PS3.4 annex J)."""
    REFUSED = "REFUSED"


class JobKind(StrEnum):
    """What a job sends: what a pipeline derived, or the originals as they came."""

    PIPELINE = "PIPELINE"
    ORIGINALS = "ORIGINALS"


series = Table(
    "series",
    metadata,
    Column("series_uid", UID, primary_key=True),
    Column("study_uid", UID, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("generation", Integer, nullable=False, default=1),
    Column("n_instances", Integer, nullable=False, default=0),
    Column("n_conflicts", Integer, nullable=False, default=0),
    Column("evidence", Text, comment="why the series was judged complete, or what is missing"),
    Column("first_at", DateTime, nullable=False),
    Column("last_at", DateTime, nullable=False),
)

instances = Table(
    "instances",
    metadata,
    Column("series_uid", UID, ForeignKey("series.series_uid"), primary_key=True),
    Column("sop_instance_uid", UID, primary_key=True),
    Column("sop_class_uid", UID, nullable=False),
    Column("study_uid", UID, nullable=False),
    Column("transfer_syntax_uid", UID, nullable=False),
    Column("path", Text, nullable=False, comment="relative to the spool"),
    Column("size_bytes", Integer, nullable=False),
    Column("sha256", String(64), nullable=False, comment="of the data set as received"),
    Column("calling_ae", String(16), nullable=False),
    Column("called_ae", String(16), nullable=False),
    Column("received_at", DateTime, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("series_uid", UID, ForeignKey("series.series_uid"), nullable=False, index=True),
    Column("study_uid", UID, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("calling_ae", String(16), nullable=False),
    Column("route", String(64), nullable=False, comment="empty: no route matched"),
    Column("route_reason", Text, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("reason", Text, nullable=False, comment="of the last transition"),
    Column("priority", Integer, nullable=False),
    Column("pipeline", String(64), comment="key in config.yaml"),
    Column("uses", String(64), comment="installed pipeline"),
    Column("strength", Float),
    Column("blend", Float),
    Column("pipeline_hash", String(64)),
    Column("fingerprint", String(64), comment="digest of the sorted SOP instance UIDs and data set digests"),
    Column("derived_series_uid", UID),
    Column("superseded_by", String(40)),
    Column("runs", Integer, nullable=False, default=0, comment="attempts begun"),
    Column("crashes", Integer, nullable=False, default=0, comment="attempts that ended with a dead process"),
    Column("enqueued", Integer, nullable=False, default=0, comment="times handed to the engine for the next attempt"),
    Column("next_try_at", DateTime),
    Column("cancel_requested", Boolean, nullable=False, default=False),
    Column("worker", String(80)),
    Column("progress", Float, nullable=False, default=0.0, comment="0 to 1"),
    Column("n_in", Integer, nullable=False, default=0),
    Column("n_out", Integer, nullable=False, default=0),
    Column("measured", sa.JSON, comment="seconds per stage, noise before and after in HU, guard figures"),
    Column("created_at", DateTime, nullable=False),
    Column("started_at", DateTime),
    Column("finished_at", DateTime),
    Column("updated_at", DateTime, nullable=False),
)

job_instances = Table(
    "job_instances",
    metadata,
    Column("job_id", String(40), ForeignKey("jobs.id"), primary_key=True),
    Column("sop_instance_uid", UID, primary_key=True),
)

job_events = Table(
    "job_events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("job_id", String(40), ForeignKey("jobs.id"), nullable=False, index=True),
    Column("at", DateTime, nullable=False),
    Column("state", String(16), nullable=False, comment="state after the event"),
    Column("what", Text, nullable=False),
    Column("worker", String(80)),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("job_id", String(40), ForeignKey("jobs.id"), primary_key=True),
    Column("destination", String(64), primary_key=True),
    Column("state", String(16), nullable=False, index=True),
    Column("reason", Text, nullable=False, default=""),
    Column("attempts", Integer, nullable=False, default=0, comment="attempts begun"),
    Column("failures", Integer, nullable=False, default=0, comment="attempts in a row without progress"),
    Column("rejections", Integer, nullable=False, default=0, comment="of them, rejected for good, in a row"),
    Column("enqueued", Integer, nullable=False, default=0, comment="times handed to the engine for the next attempt"),
    Column("next_try_at", DateTime),
    Column("created_at", DateTime, nullable=False),
    Column("updated_at", DateTime, nullable=False),
)

transfers = Table(
    "transfers",
    metadata,
    Column("job_id", String(40), primary_key=True),
    Column("destination", String(64), primary_key=True),
    Column("sop_instance_uid", UID, primary_key=True),
    Column("sop_class_uid", UID, nullable=False),
    Column("transfer_syntax_uid", UID, nullable=False),
    Column("path", Text, nullable=False, comment="relative to the spool"),
    Column("sha256", String(64), nullable=False, comment="of the data set in the file, looked at before it is sent"),
    Column("state", String(16), nullable=False),
    Column("status", Integer, comment="last C-STORE status"),
    Column("detail", Text),
    Column("tries", Integer, nullable=False, default=0, comment="refusals that may pass"),
    Column("unanswered", Boolean, nullable=False, default=False, comment="an attempt ended without an answer"),
    Column("updated_at", DateTime, nullable=False),
    sa.ForeignKeyConstraint(["job_id", "destination"], ["deliveries.job_id", "deliveries.destination"]),
    Index("ix_transfers_open", "job_id", "destination", "state"),
)

commitments = Table(
    "commitments",
    metadata,
    Column("transaction_uid", UID, primary_key=True),
    Column("job_id", String(40), nullable=False),
    Column("destination", String(64), nullable=False),
    Column("status", Integer, comment="of the N-ACTION response; none came if empty"),
    Column("asked_at", DateTime, nullable=False),
    Column("reported_at", DateTime),
    sa.ForeignKeyConstraint(["job_id", "destination"], ["deliveries.job_id", "deliveries.destination"]),
    Index("ix_commitments_delivery", "job_id", "destination"),
)

workers = Table(
    "workers",
    metadata,
    Column("id", String(80), primary_key=True),
    Column("host", String(200), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("beat", Integer, nullable=False, comment="seconds since 1970, by the database's clock"),
)

OURS = frozenset(metadata.tables)
"""Names of our tables; the engine keeps its own in the same file."""


def now() -> datetime:
    """Current time, UTC, naive, as stored in every DateTime column."""
    return datetime.now(UTC).replace(tzinfo=None)


def open_database(url: str) -> sa.Engine:
    """Engine on the SQLite file of `url`, made and migrated to the newest schema.

    WAL lets readers (command line, dashboards) look while we write; ``synchronous=FULL`` keeps a committed
    transaction across a power cut. Writers take the lock at once (IMMEDIATE) instead of failing half-way.
    """
    address = sa.make_url(url)
    if address.database and address.database != ":memory:":
        Path(address.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(address)

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        connection.isolation_level = "IMMEDIATE"
        connection.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    migrate(engine)
    return engine


def alembic_config() -> AlembicConfig:
    """Alembic's settings; migrations travel inside the package."""
    config = AlembicConfig()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def migrate(engine: sa.Engine) -> None:
    """Bring the schema to the newest revision."""
    config = alembic_config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
