"""Hands due rows to the engine, and carries out cancellations.

The rows say what is to be done and when; this thread looks at them and enqueues what is due under a key that the row
determines, so that doing it twice changes nothing. This is also what heals a crash between a row and its enqueueing,
and it keeps the engine out of the association threads.
"""

from __future__ import annotations

import logging
import threading
import time

import sqlalchemy as sa

from dicomnode import jobs as job_table
from dicomnode.db import DeliveryState, JobState, deliveries, jobs, now
from dicomnode.engine import Engine
from dicomnode.jobs import FINAL
from dicomnode.worker import Worker

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_CHECK_EVERY_S = 15.0
"""How often keys handed over earlier are checked for having ended without moving their row."""


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
            except sa.exc.DBAPIError as error:
                log.error("cannot look for due work now, will try again: %s", error)

    def look(self) -> None:
        """Do once what there is to do."""
        self._cancel_asked()
        due: dict[str, tuple[sa.Table, sa.ColumnElement[bool]]] = {}
        at = now()
        with self._database.connect() as connection:
            queued = connection.execute(
                sa.select(jobs.c.id, jobs.c.runs, jobs.c.enqueued, jobs.c.priority).where(
                    jobs.c.state == JobState.QUEUED,
                    sa.not_(jobs.c.cancel_requested),
                    sa.or_(jobs.c.next_try_at.is_(None), jobs.c.next_try_at <= at),
                )
            ).all()
            waiting = connection.execute(
                sa.select(
                    deliveries.c.job_id,
                    deliveries.c.destination,
                    deliveries.c.attempts,
                    deliveries.c.enqueued,
                    jobs.c.priority,
                )
                .join(jobs, jobs.c.id == deliveries.c.job_id)
                .where(
                    deliveries.c.state == DeliveryState.WAITING,
                    jobs.c.state == JobState.DISPATCHING,
                    sa.not_(jobs.c.cancel_requested),
                    sa.or_(deliveries.c.next_try_at.is_(None), deliveries.c.next_try_at <= at),
                )
            ).all()
        for row in queued:
            key = f"{row.id}:run{row.runs}:{row.enqueued}"
            due[key] = (jobs, jobs.c.id == row.id)
            if key not in self._handed_over:
                self._engine.submit_process(key, row.id, row.runs, priority=row.priority)
                self._handed_over[key] = time.monotonic()
        for delivery in waiting:
            key = f"{delivery.job_id}:{delivery.destination}:{delivery.attempts}:{delivery.enqueued}"
            due[key] = (
                deliveries,
                sa.and_(deliveries.c.job_id == delivery.job_id, deliveries.c.destination == delivery.destination),
            )
            if key not in self._handed_over:
                self._engine.submit_deliver(
                    key, delivery.job_id, delivery.destination, delivery.attempts, priority=delivery.priority
                )
                self._handed_over[key] = time.monotonic()
        self._replace_ended(due)

    def _replace_ended(self, due: dict[str, tuple[sa.Table, sa.ColumnElement[bool]]]) -> None:
        """A key whose attempt ended without moving its row (the database failed under it) gets a successor."""
        for key in [key for key in self._handed_over if key not in due]:
            del self._handed_over[key]
        for key, since in list(self._handed_over.items()):
            if time.monotonic() - since < _CHECK_EVERY_S:
                continue
            self._handed_over[key] = time.monotonic()
            if self._engine.ended(key):
                table, mine = due[key]
                log.warning("%s ended without a result; it is enqueued again", key)
                with self._database.begin() as connection:
                    connection.execute(sa.update(table).where(mine).values(enqueued=table.c.enqueued + 1))

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
