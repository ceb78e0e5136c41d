"""One attempt to compute a job: what the engine calls as `process`."""

from __future__ import annotations

import logging
import time
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from dicomnode import jobs as job_table
from dicomnode.config import Config
from dicomnode.db import JobState, instances, job_instances, jobs, now
from dicomnode.delivery import plan
from dicomnode.denoise import Manifest, Progress, remove_partial, seconds_in_words
from dicomnode.errors import WorkerDied, fault, ground_gave_way
from dicomnode.jobs import Job
from dicomnode.scu import Outgoing
from dicomnode.worker import Outcome, Request, Worker

log = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 1.0


class Compute:
    """Runs jobs in the worker and writes down how they ended; made once per node."""

    def __init__(self, config: Config, database: sa.Engine, spool: Path, worker: Worker, me: str) -> None:
        self._config = config
        self._database = database
        self._spool = spool
        self._worker = worker
        self._me = me
        self._stopping = False

    def stop(self) -> None:
        """The child's next death is ours, not the job's."""
        self._stopping = True

    def process(self, job_id: str, run: int) -> None:
        """Attempt number `run` (from 0) of a queued pipeline job."""
        job = job_table.begin(self._database, job_id, run, self._me, self._config.compute.max_worker_deaths)
        if job is None:
            return
        try:
            self._attempt(job)
        except sa.exc.SQLAlchemyError:
            raise  # the dispatcher finds an attempt without a result and tries it again
        except Exception as error:  # a fault of ours is to be seen at the job, not repeated for ever
            if isinstance(error, OSError) and ground_gave_way(error):
                job_table.no_infrastructure(self._database, job.id, f"{type(error).__name__}: {error}")
                return
            reason = f"a fault of the node: {fault(error)}"
            log.error("job %s: %s", job.id[:12], reason)
            with self._database.begin() as connection:
                job_table.advance(connection, job.id, JobState.FAILED, reason, expected={JobState.RUNNING})

    def _attempt(self, job: Job) -> None:
        out = self._spool / "derived" / job.id
        shown = _Shown(self._database, self._worker, job.id)
        try:
            outcome = self._worker.run(self._request(job, out), shown)
        except WorkerDied as death:
            remove_partial(out)
            shown.end()
            if self._stopping:
                with self._database.begin() as connection:
                    job_table.requeue(connection, job.id, "the node was stopped", timedelta())
            elif not self._cancelled(job.id):
                job_table.lost_attempt(self._database, job.id, str(death), self._config.compute.max_worker_deaths)
            return
        shown.end()
        self._conclude(job, out, outcome, shown.measured)

    def _conclude(self, job: Job, out: Path, outcome: Outcome, measured: dict[str, Any]) -> None:
        if outcome.kind == "no-infrastructure":
            job_table.no_infrastructure(self._database, job.id, outcome.detail)
            return
        running = {JobState.RUNNING}
        with self._database.begin() as connection:
            if outcome.kind == "refused":
                job_table.advance(connection, job.id, JobState.SKIPPED, outcome.detail, expected=running)
            elif outcome.kind == "withheld":
                job_table.advance(
                    connection,
                    job.id,
                    JobState.WITHHELD,
                    outcome.detail,
                    expected=running,
                    measured={**measured, "guard": outcome.figures},
                )
            elif outcome.kind == "failed":
                job_table.advance(connection, job.id, JobState.FAILED, outcome.detail, expected=running)
            else:
                self._dispatch(connection, job, Manifest.read(out))

    def _dispatch(self, connection: sa.Connection, job: Job, manifest: Manifest) -> None:
        route = next((route for route in self._config.routes if route.name == job.route), None)
        if route is None:
            job_table.advance(
                connection,
                job.id,
                JobState.FAILED,
                f"route {job.route} is no longer in config.yaml; put it back and retry the job",
                expected={JobState.RUNNING},
            )
            return
        moved = job_table.advance(
            connection,
            job.id,
            JobState.DISPATCHING,
            f"{len(manifest.instances)} instances derived",
            expected={JobState.RUNNING},
            worker=self._me,
            n_out=len(manifest.instances),
            progress=1.0,
            pipeline_hash=manifest.pipeline_hash,
            derived_series_uid=manifest.derived_series_uid,
            measured={
                "seconds": manifest.seconds,
                "noise_before_hu": manifest.noise_before_hu,
                "noise_after_hu": manifest.noise_after_hu,
                "precision": manifest.precision,
                "backend": manifest.backend,
                "reason": manifest.reason,
                "guard": manifest.guard,
            },
        )
        if moved:
            items = [
                Outgoing(one.sop_instance_uid, one.sop_class_uid, one.transfer_syntax_uid, one.path, one.sha256)
                for one in manifest.instances
            ]
            plan(connection, job.id, route.send_to, items, self._spool)

    def _request(self, job: Job, out: Path) -> Request:
        with self._database.connect() as connection:
            received = connection.execute(
                sa.select(instances.c.path, instances.c.sha256)
                .join(job_instances, job_instances.c.sop_instance_uid == instances.c.sop_instance_uid)
                .where(job_instances.c.job_id == job.id, instances.c.series_uid == job.series_uid)
                .order_by(instances.c.path)
            ).all()
        assert job.uses is not None
        assert job.strength is not None
        assert job.blend is not None
        assert job.fingerprint is not None
        return Request(
            job_id=job.id,
            paths=tuple(str(self._spool / one.path) for one in received),
            out=str(out),
            uses=job.uses,
            strength=job.strength,
            blend=job.blend,
            fingerprint=job.fingerprint,
            created_at=job.created_at.replace(tzinfo=UTC).astimezone().isoformat(),
            settings=self._config.derivation.model_dump(),
            sha256=tuple(one.sha256 for one in received),
        )

    def _cancelled(self, job_id: str) -> bool:
        with self._database.connect() as connection:
            job = job_table.get(connection, job_id)
        return job is None or job.cancel_requested


class _Shown:
    """Shows in the row of a job how far its attempt is; a listener of `Worker.run`."""

    def __init__(self, database: sa.Engine, worker: Worker, job_id: str) -> None:
        self._database = database
        self._worker = worker
        self._job_id = job_id
        self._written_at = 0.0
        self._last: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        """Write it down, but not more often than anybody looks."""
        self._last = progress
        if time.monotonic() - self._written_at < _PROGRESS_EVERY_S:
            return
        self._written_at = time.monotonic()
        try:
            with self._database.begin() as connection:
                running = self._write(connection, progress)
        except sa.exc.SQLAlchemyError as error:
            log.warning("progress of job %s not shown: %s", self._job_id[:12], error)
            return
        if not running:
            # Cancelled after the attempt began and before the child had the work, which nobody could stop then.
            self._worker.cancel(self._job_id)

    @property
    def measured(self) -> dict[str, Any]:
        """What is known of the attempt, for the row."""
        return {} if self._last is None else {"seconds": self._last.seconds}

    def end(self) -> None:
        """Write down how far the attempt came and how long it took, also as an event; its end is the next one."""
        if self._last is None:
            return
        with self._database.begin() as connection:
            if self._write(connection, self._last):
                what = f"{self._last.slices} of {self._last.of} slices; {seconds_in_words(self._last.seconds)}"
                job_table.add_event(connection, self._job_id, JobState.RUNNING, what)

    def _write(self, connection: sa.Connection, progress: Progress) -> bool:
        """False if the job runs no longer."""
        return bool(
            connection.execute(
                sa.update(jobs)
                .where(jobs.c.id == self._job_id, jobs.c.state == JobState.RUNNING)
                .values(progress=progress.slices / progress.of, measured=self.measured, updated_at=now())
            ).rowcount
        )
