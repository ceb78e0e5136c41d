"""The durable queue: calls `process(job_id, run)` and `deliver(job_id, destination, attempt)` at least once.

Only this module and liveness.py know DBOS. It keeps nothing but ids; our tables are the truth. Its rules, each learnt
from a measured accident (docs/architecture.md, "The engine"):

- a fresh executor id for every start; a vanished one is taken over by liveness.py;
- one attempt per workflow: the next is a new one, enqueued when its row is due, so no slot is held by a pause;
- the application version is a constant: the default is a hash of the code, and after an update old work would wait
  for ever;
- nothing is submitted from an association's thread: a locked database must not stop reception.
"""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Callable

import sqlalchemy as sa
from dbos import DBOS

from dicomnode.liveness import Liveness

APPLICATION_VERSION = "1"
"""Changes only together with a migration of work in flight."""
COMPUTE_QUEUE = "compute"
SEND_QUEUE = "send"
_ENDED = frozenset({"SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"})
_TAKEOVERS = 1_000_000
"""The engine's own limit on takeovers, out of the way: our rows count crashes."""


class Engine:
    """The embedded engine; one at a time per process (DBOS keeps one global instance).

    Parameters
    ----------
    database
        Our engine on the SQLite file; DBOS shares it, so its settings (WAL, synchronous FULL) hold for both.
    process, deliver
        The two things it calls. They must be idempotent over our tables and must not raise for what they foresee.
    poll_s, beat_s, dead_after_s
        Seconds between looks at the queues, between heartbeats, and of silence that means death.
    """

    def __init__(
        self,
        database: sa.Engine,
        process: Callable[[str, int], None],
        deliver: Callable[[str, str, int], None],
        *,
        poll_s: float = 0.25,
        beat_s: float = 5.0,
        dead_after_s: float = 30.0,
    ) -> None:
        self.executor_id = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._database = database
        self._poll_s = poll_s
        self._beat_s = beat_s
        self._dead_after_s = dead_after_s
        self._active: set[str] = set()
        self._active_lock = threading.Lock()
        DBOS(
            config={
                "name": "dicomnode",
                "system_database_engine": database,
                "system_database_url": database.url.render_as_string(hide_password=False),
                "executor_id": self.executor_id,
                "application_version": APPLICATION_VERSION,
                "log_level": "WARNING",
            }
        )

        @DBOS.workflow(name="process", max_recovery_attempts=_TAKEOVERS)
        def _process(job_id: str, run: int) -> None:
            with self._running():
                process(job_id, run)

        @DBOS.workflow(name="deliver", max_recovery_attempts=_TAKEOVERS)
        def _deliver(job_id: str, destination: str, attempt: int) -> None:
            with self._running():
                deliver(job_id, destination, attempt)

    def start(self, *, alone: bool) -> None:
        """Begin to run work. `alone`: no other process may be using this database, so all other ids are dead."""
        DBOS.launch()
        DBOS.register_queue(
            COMPUTE_QUEUE, worker_concurrency=1, polling_interval_sec=self._poll_s, on_conflict="always_update"
        )
        DBOS.register_queue(
            SEND_QUEUE, partition_concurrency=1, polling_interval_sec=self._poll_s, on_conflict="always_update"
        )
        self._liveness = Liveness(
            self._database,
            self.executor_id,
            self._now_active,
            beat_s=self._beat_s,
            dead_after_s=self._dead_after_s,
        )
        self._liveness.declare_dead(everybody_else=alone)
        self._liveness.start()

    def stop(self, timeout_s: int) -> None:
        """Take no new work, wait up to `timeout_s` for what runs, leave the rest to the next start."""
        self._liveness.stop()
        DBOS.destroy(workflow_completion_timeout_sec=timeout_s, destroy_registry=True)
        self._liveness.leave()

    def submit_process(self, key: str, job_id: str, run: int, *, priority: int) -> None:
        """Enqueue an attempt; the same `key` again changes nothing. `priority` 1 goes first."""
        DBOS.enqueue_workflow_with_options(
            {"workflow_name": "process", "workflow_id": key, "queue_name": COMPUTE_QUEUE, "priority": priority},
            job_id,
            run,
        )

    def submit_deliver(self, key: str, job_id: str, destination: str, attempt: int, *, priority: int) -> None:
        """Enqueue an attempt to deliver; attempts to one destination run one after the other."""
        DBOS.enqueue_workflow_with_options(
            {
                "workflow_name": "deliver",
                "workflow_id": key,
                "queue_name": SEND_QUEUE,
                "queue_partition_key": destination,
                "priority": priority,
            },
            job_id,
            destination,
            attempt,
        )

    def ended(self, key: str) -> bool:
        """True if the attempt came to an end, well or not; False while it waits or runs, or if it is unknown."""
        status = DBOS.get_workflow_status(key)
        return status is not None and status.status in _ENDED

    def _running(self) -> _Running:
        return _Running(self._active, self._active_lock)

    def _now_active(self) -> set[str]:
        with self._active_lock:
            return set(self._active)


class _Running:
    """Remembers which workflow this thread runs, for liveness."""

    def __init__(self, active: set[str], lock: threading.Lock) -> None:
        self._active = active
        self._lock = lock
        self._identity = DBOS.workflow_id or ""

    def __enter__(self) -> None:
        with self._lock:
            self._active.add(self._identity)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._active.discard(self._identity)
