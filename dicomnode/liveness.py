"""Takes over the work of a process that vanished.

The engine recovers what *its own* executor id left behind. Every start of a node has a new id, so that two processes
can never share one (the second would run the first one's jobs again). So somebody must notice a dead id: a heartbeat
row per process, by the database's clock, and the engine's public calls.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Collection

import sqlalchemy as sa
from dbos import DBOS

from dicomnode.db import workers

log = logging.getLogger(__name__)

FENCED_EXIT_CODE = 75
"""EX_TEMPFAIL: a peer declared this process dead and took over its work; the supervisor starts it again."""
_ORPHAN_BEATS = 5
"""A workflow of ours that no thread runs for so many beats lost its checkpoint (full disk): run it again."""


class Liveness(threading.Thread):
    """Heartbeat of this process, and takeover of those whose heart stopped.

    Parameters
    ----------
    database
        Holds the ``workers`` table.
    me
        Executor id of this process.
    active
        Ids of the workflows that threads of this process run now.
    beat_s, dead_after_s
        Seconds between beats and of silence that means death; the database's clock has a resolution of 1 s,
        so `dead_after_s` below 4 would kill the living.
    """

    def __init__(
        self,
        database: sa.Engine,
        me: str,
        active: Callable[[], Collection[str]],
        *,
        beat_s: float,
        dead_after_s: float,
    ) -> None:
        super().__init__(name="liveness", daemon=True)
        self._database = database
        self._me = me
        self._active = active
        self._beat_s = beat_s
        self._dead_after_s = int(dead_after_s)
        self._stop_asked = threading.Event()
        self._unowned: Counter[str] = Counter()
        with database.begin() as connection:
            connection.execute(
                sa.insert(workers).values(id=me, host=socket.gethostname(), pid=os.getpid(), beat=_clock())
            )

    def run(self) -> None:
        """Beat until stopped."""
        while not self._stop_asked.wait(self._beat_s):
            try:
                self._beat()
                self._take_over_dead()
                self._resume_orphans()
            except sa.exc.SQLAlchemyError as error:
                # A full or locked database: the next beat tries again. A peer may fence us meanwhile; that is right.
                log.warning("heartbeat failed: %s", error)

    def stop(self) -> None:
        """Stop beating."""
        self._stop_asked.set()
        self.join()

    def leave(self) -> None:
        """Say that this process is gone: whoever comes next takes over at once what is unfinished."""
        with self._database.begin() as connection:
            connection.execute(sa.update(workers).where(workers.c.id == self._me).values(beat=0))

    def declare_dead(self, everybody_else: bool = False) -> None:
        """Mark all other processes dead; called at start by a node that holds the spool's lock and so is alone."""
        if everybody_else:
            with self._database.begin() as connection:
                connection.execute(sa.update(workers).where(workers.c.id != self._me).values(beat=0))
        self._take_over_dead()

    def _beat(self) -> None:
        with self._database.begin() as connection:
            alive = connection.execute(
                sa.update(workers).where(workers.c.id == self._me).values(beat=_clock())
            ).rowcount
        if not alive:
            log.critical("another process declared this one dead and took over its work; leaving")
            os._exit(FENCED_EXIT_CODE)

    def _take_over_dead(self) -> None:
        silent = workers.c.beat < _clock() - self._dead_after_s
        with self._database.begin() as connection:
            dead = connection.execute(sa.select(workers.c.id).where(silent, workers.c.id != self._me)).scalars().all()
        for worker in dead:
            # Resumed before the row goes: a crash between the two makes the next process do it again, harmlessly.
            for workflow in DBOS.list_workflows(
                status="PENDING", executor_id=[worker], load_input=False, load_output=False
            ):
                log.warning("taking over %s from vanished worker %s", workflow.workflow_id, worker)
                DBOS.resume_workflows([workflow.workflow_id], queue_name=workflow.queue_name)
            with self._database.begin() as connection:
                connection.execute(sa.delete(workers).where(workers.c.id == worker, silent))

    def _resume_orphans(self) -> None:
        running = set(self._active())
        mine = {
            workflow.workflow_id: workflow.queue_name
            for workflow in DBOS.list_workflows(
                status="PENDING", executor_id=[self._me], load_input=False, load_output=False
            )
            if workflow.workflow_id not in running
        }
        self._unowned = Counter({identity: self._unowned[identity] + 1 for identity in mine})
        for identity, beats in self._unowned.items():
            if beats >= _ORPHAN_BEATS:
                log.warning("resuming %s, which no thread runs", identity)
                DBOS.resume_workflows([identity], queue_name=mine[identity])


def _clock() -> sa.ColumnElement[int]:
    """Seconds since 1970 by the database's clock, the one clock that all processes share."""
    return sa.cast(sa.func.strftime("%s", "now"), sa.Integer)
