"""Hands due rows to the engine, and carries out cancellations.

The rows say what is to be done and when; this thread looks at them and enqueues what is due under a key that the row
determines, so that doing it twice changes nothing. This is also what heals a crash between a row and its enqueueing,
and it keeps the engine out of the association threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from dicomnode import jobs as job_table
from dicomnode.db import BEGUN, DeliveryState, JobState, deliveries, jobs, now
from dicomnode.delivery import put_back
from dicomnode.engine import Engine
from dicomnode.jobs import FINAL
from dicomnode.settlement import may_grow
from dicomnode.worker import Worker

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_CHECK_EVERY_S = 15.0
"""How often keys handed over earlier are checked for having ended without moving their row."""


@dataclass(frozen=True, slots=True)
class _Attempt:
    key: str
    begun: bool
    submit: Callable[[], None]
    put_back: Callable[[sa.Connection], None]
    """Makes the row due again under a new key, unless it moved meanwhile."""


class Dispatcher:
    """One thread per node."""

    def __init__(self, database: sa.Engine, engine: Engine, worker: Worker) -> None:
        self._database = database
        self._engine = engine
        self._worker = worker
        self._handed_over: dict[str, float] = {}
        """Key → monotonic time, of this process; saves asking the engine again every time."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End; what is due then is found at the next start."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(_LOOK_EVERY_S):
            try:
                self.look()
            except sa.exc.SQLAlchemyError as error:
                log.error("cannot look for due work now, will try again: %s", error)

    def look(self) -> None:
        """Do once what there is to do."""
        self._cancel_asked()
        attempts = self._attempts()
        for attempt in attempts:
            if attempt.key not in self._handed_over:
                if not attempt.begun:
                    attempt.submit()
                self._handed_over[attempt.key] = time.monotonic()
        for key in self._handed_over.keys() - {attempt.key for attempt in attempts}:
            del self._handed_over[key]
        self._replace_ended(attempts)

    def _attempts(self) -> list[_Attempt]:
        """Attempts that are due, and those that were begun and are not through."""
        at = now()
        with self._database.connect() as connection:
            computing = connection.execute(
                sa.select(jobs.c.id, jobs.c.state, jobs.c.runs, jobs.c.enqueued, jobs.c.priority).where(
                    jobs.c.state.in_([JobState.QUEUED, JobState.RUNNING]),
                    sa.not_(jobs.c.cancel_requested),
                    sa.or_(jobs.c.state == JobState.RUNNING, jobs.c.next_try_at.is_(None), jobs.c.next_try_at <= at),
                )
            ).all()
            sending = connection.execute(
                sa.select(deliveries, jobs.c.priority)
                .join(jobs, jobs.c.id == deliveries.c.job_id)
                .where(
                    deliveries.c.state.in_([*BEGUN, *BEGUN.values()]),
                    jobs.c.state.in_(job_table.SENDING),
                    sa.not_(jobs.c.cancel_requested),
                    sa.or_(
                        deliveries.c.state.in_(BEGUN),
                        deliveries.c.next_try_at.is_(None),
                        deliveries.c.next_try_at <= at,
                    ),
                    # One request for storage commitment when all is there, instead of one for each burst of images.
                    sa.or_(deliveries.c.state != DeliveryState.COMMITTING, sa.not_(may_grow())),
                )
            ).all()
        return [self._compute_attempt(row) for row in computing] + [self._send_attempt(row) for row in sending]

    def _compute_attempt(self, row: Any) -> _Attempt:
        begun = row.state == JobState.RUNNING
        run = row.runs - begun
        key = f"{row.id}:run{run}:{row.enqueued}"
        return _Attempt(
            key,
            begun,
            lambda: self._engine.submit_process(key, row.id, run, priority=row.priority),
            lambda connection: job_table.put_back(connection, row.id, row.runs),
        )

    def _send_attempt(self, row: Any) -> _Attempt:
        begun = row.state in BEGUN
        number = row.attempts - begun
        key = f"{row.job_id}:{row.destination}:{number}:{row.enqueued}"
        return _Attempt(
            key,
            begun,
            lambda: self._engine.submit_deliver(key, row.job_id, row.destination, number, priority=row.priority),
            lambda connection: put_back(connection, row.job_id, row.destination, row.attempts),
        )

    def _replace_ended(self, attempts: list[_Attempt]) -> None:
        """An attempt that ended without moving its row (the database failed under it) gets a successor."""
        for attempt in attempts:
            if time.monotonic() - self._handed_over[attempt.key] < _CHECK_EVERY_S:
                continue
            self._handed_over[attempt.key] = time.monotonic()
            if self._engine.ended(attempt.key):
                log.warning("%s ended without a result; it is tried again", attempt.key)
                with self._database.begin() as connection:
                    attempt.put_back(connection)

    def _cancel_asked(self) -> None:
        with self._database.connect() as connection:
            asked = (
                connection.execute(
                    sa.select(jobs.c.id).where(jobs.c.cancel_requested, jobs.c.state.not_in(list(FINAL)))
                )
                .scalars()
                .all()
            )
        for identity in asked:
            # First the child: a workflow that is told to go leaves its slot at once, while its thread runs on.
            self._worker.cancel(identity)
            with self._database.begin() as connection:
                job_table.cancel(connection, identity)
