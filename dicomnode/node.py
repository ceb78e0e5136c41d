"""The node: its parts made once, started from the ground up and stopped from the roof down.

::

    scp → spool → intake → jobs ← dispatcher → engine → compute (worker) → delivery, commitment (scu)
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import sqlalchemy as sa

from dicomnode.commitment import Commitment
from dicomnode.compute import Compute
from dicomnode.config import Config
from dicomnode.db import open_database
from dicomnode.delivery import Delivery
from dicomnode.dispatcher import Dispatcher
from dicomnode.engine import Engine
from dicomnode.errors import ConfigError, NodeError
from dicomnode.intake import Intake
from dicomnode.scp import StorageServer
from dicomnode.spool import Spool, hold
from dicomnode.worker import Worker, configured_worker
from pipelines.base import Options

log = logging.getLogger(__name__)

_STOP_WAIT_S = 10
_THREADS = ("listener", "intake", "dispatcher", "liveness")
"""Without any of these the node would take images and do nothing with them."""


class Node:
    """Everything that runs in one process. Only one of them may use a spool and a database.

    Raises
    ------
    ConfigError
        If a pipeline that a route names cannot be loaded.
    NodeError
        If another node uses the spool or the database.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._spool = Spool(config.node.spool)
        self.database: sa.Engine = open_database(config.node.database)
        self._database_lock = hold(Path(f"{self.database.url.database}.lock"))
        self._worker = configured_worker(config.compute)
        self._delivery = Delivery(config, self.database, self._spool.root)
        self._commitment = Commitment(config, self.database)
        self._engine = Engine(self.database, self._process, self._deliver)
        self._compute = Compute(config, self.database, self._spool.root, self._worker, self._engine.executor_id)
        hashes = pipeline_hashes(config, self._worker)
        self._intake = Intake(config, self.database, self._spool, self._open_associations, hashes)
        self._server = StorageServer(
            config, self._spool, self._intake.keywords, self._intake.stored, self._commitment.report
        )
        self._dispatcher = Dispatcher(self.database, self._engine, self._worker)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._server.port

    def start(self) -> None:
        """Heal what a crash left, then work, then listen: the first new image finds everything in place."""
        removed = self._spool.remove_partial()
        if removed:
            log.info("%d half-written files removed; they were never acknowledged", removed)
        self._intake.recover()
        self._engine.start(alone=True)
        self._dispatcher.start()
        self._intake.start()
        self._server.start()

    def check(self) -> None:
        """See that the node is still whole.

        Raises
        ------
        NodeError
            If a fault ended one of its threads. Nothing acknowledged is lost: a new process goes on with it.
        """
        running = {thread.name for thread in threading.enumerate()}
        ended = [name for name in _THREADS if name not in running]
        if ended:
            raise NodeError(f"a fault ended the thread {', '.join(ended)}, see the log; start the node again")

    def stop(self) -> None:
        """Stop listening, write down what is queued, give work back; nothing acknowledged is only in memory."""
        self._server.stop(_STOP_WAIT_S)
        self._intake.stop()
        self._dispatcher.stop()
        self._delivery.stop()
        self._commitment.stop()
        self._compute.stop()
        self._worker.stop()
        self._engine.stop(_STOP_WAIT_S)
        self.database.dispose()
        os.close(self._database_lock)
        self._spool.close()

    def _process(self, job_id: str, run: int) -> None:
        self._compute.process(job_id, run)

    def _deliver(self, job_id: str, destination: str, attempt: int) -> None:
        # The row says whose turn it is; for the other there is nothing to do.
        self._delivery.deliver(job_id, destination, attempt)
        self._commitment.request(job_id, destination, attempt)

    def _open_associations(self, series_uid: str) -> int:
        return self._server.open_associations(series_uid)


def pipeline_hashes(config: Config, worker: Worker) -> dict[str, str]:
    """Hash of each pipeline that a route names; `worker` loads them all, so this also proves that they load.

    Raises
    ------
    ConfigError
        With a line for each pipeline that cannot be loaded or cannot take its options.
    WorkerDied
    """
    hashes: dict[str, str] = {}
    problems: list[str] = []
    for name in sorted({route.pipeline for route in config.routes if route.pipeline is not None}):
        options = config.pipelines[name]
        try:
            hashes[name] = worker.describe(options.uses, Options(options.strength, options.blend))
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError(*problems)
    return hashes
