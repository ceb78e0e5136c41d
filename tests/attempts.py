"""A queued job of six slices, and a worker that answers as the test says, for tests of what becomes of an attempt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from ct_builder import uid
from tables import add_job, add_series, config_of

from dicomnode.compute import Compute
from dicomnode.config import Config
from dicomnode.denoise import Report
from dicomnode.spool import dataset_digest
from dicomnode.worker import Outcome, Request

COUNT = 6
UIDS = [uid("series", "instance", k) for k in range(COUNT)]


def config_with_route() -> Config:
    """One route with two destinations."""
    return config_of(
        destinations={"a": 104, "b": 105},
        routes=[{"name": "ct", "pipeline": "identity", "send_to": ["a", "b"]}],
        compute={"max_worker_deaths": 3},
    )


PATHS = {one: f"instances/series-{k:04d}.dcm" for k, one in enumerate(UIDS)}


def make_job(database: sa.Engine, uses: str = "identity", identity: str = "job", *, spool: Path | None = None) -> None:
    """Make it of `PATHS`, received as they now lie in `spool`, where an attempt comes to read them."""
    with database.begin() as connection:
        if not connection.execute(sa.text("SELECT count(*) FROM instances")).scalar_one():
            digests = {path: dataset_digest(spool / path) for path in PATHS.values()} if spool else None
            add_series(connection, paths=PATHS, sha256=digests)
        add_job(connection, identity, uses=uses, sop_instance_uids=UIDS)


class Scripted:
    """A worker that answers from a list."""

    def __init__(self, *outcomes: Outcome | Exception) -> None:
        self.outcomes = list(outcomes)
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.during: Callable[[Request, Report], None] = lambda request, report: None

    def run(self, request: Request, report: Report) -> Outcome:
        self.requests.append(request)
        self.during(request, report)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def cancel(self, job_id: str) -> bool:
        self.cancelled.append(job_id)
        return True


def compute_with(config: Config, database: sa.Engine, spool: Path, worker: Any) -> Compute:
    return Compute(config, database, spool, worker, "me")
