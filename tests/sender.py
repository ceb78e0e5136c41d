"""A job with its deliveries, and somebody who attempts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from ct_builder import uid
from scanner import image
from tables import CT, EXPLICIT, add_job, config_of, row

from dicomnode import jobs as job_table
from dicomnode.db import JobState
from dicomnode.delivery import Delivery, plan
from dicomnode.scu import Outgoing

COUNT = 4
UIDS = [uid("series", "instance", k) for k in range(COUNT)]
PROMPT = {"retry_first_s": 0.1, "retry_max_s": 0.1, "failure_status_tries": 3}


def outgoing(k: int, path: Path) -> Outgoing:
    return Outgoing(UIDS[k], CT, EXPLICIT, path, image(path).sha256)


class Sender:
    """A job with one delivery for each destination, and somebody who calls `deliver` as the engine would."""

    def __init__(self, database: sa.Engine, files: list[Path], destinations: dict[str, int], **settings: Any) -> None:
        self.database = database
        self.spool = files[0].parent
        self.config = config_of(destinations=destinations, delivery={**PROMPT, **settings})
        self.delivery = Delivery(self.config, database, self.spool)
        self.items = [outgoing(k, path) for k, path in enumerate(files)]
        with database.begin() as connection:
            add_job(connection, state=JobState.DISPATCHING)
            plan(connection, "job", list(destinations), self.items, self.spool)

    def attempt(self, destination: str = "pacs") -> dict[str, Any]:
        """The next attempt; the row after it."""
        self.delivery.deliver("job", destination, self.row(destination)["attempts"])
        return self.row(destination)

    def row(self, destination: str = "pacs") -> dict[str, Any]:
        return row(self.database, "deliveries", destination=destination)

    def states(self, destination: str = "pacs") -> list[str]:
        where = {"job_id": "job", "destination": destination}
        return [row(self.database, "transfers", sop_instance_uid=one, **where)["state"] for one in UIDS]

    @property
    def job(self) -> dict[str, Any]:
        return row(self.database, "jobs")

    def cancel_after_look(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Somebody else cancels the job right after it is looked at next."""
        get = job_table.get

        def get_then_cancel(connection: sa.Connection, identity: str) -> Any:
            job = get(connection, identity)
            monkeypatch.setattr(job_table, "get", get)
            with self.database.begin() as other:
                assert job_table.cancel(other, identity)
            return job

        monkeypatch.setattr(job_table, "get", get_then_cancel)
