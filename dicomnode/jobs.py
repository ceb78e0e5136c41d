"""Jobs: one transition table, one `advance` that writes state and event together and refuses a stale caller.

Nothing else in the project writes ``jobs.state``. Every function here is idempotent over the tables, because the engine
calls at least once: a second caller finds the row moved on, changes nothing and is told so.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from dicomnode.db import (
    BEGUN,
    DeliveryState,
    JobKind,
    JobState,
    TransferState,
    deliveries,
    job_events,
    job_instances,
    jobs,
    now,
    transfers,
)
from dicomnode.errors import NodeError

log = logging.getLogger(__name__)

FINAL = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED, JobState.SKIPPED, JobState.WITHHELD})

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset(
        {
            JobState.QUEUED,  # the attempt was lost (dead worker, full disk): later again
            JobState.DISPATCHING,
            JobState.SKIPPED,  # the gate said no
            JobState.WITHHELD,  # the guard said no
            JobState.FAILED,
            JobState.CANCELLED,
        }
    ),
    JobState.DISPATCHING: frozenset({JobState.COMMITTING, JobState.DONE, JobState.FAILED, JobState.CANCELLED}),
    JobState.COMMITTING: frozenset(
        {
            JobState.DISPATCHING,  # a destination does not have all that it accepted
            JobState.DONE,
            JobState.FAILED,
            JobState.CANCELLED,
        }
    ),
    JobState.FAILED: frozenset({JobState.QUEUED, JobState.DISPATCHING}),  # only an operator's retry
    JobState.DONE: frozenset(),
    JobState.CANCELLED: frozenset({JobState.QUEUED, JobState.DISPATCHING}),  # likewise
    JobState.SKIPPED: frozenset({JobState.QUEUED}),  # likewise
    JobState.WITHHELD: frozenset(),
}

SENDING = frozenset({JobState.DISPATCHING, JobState.COMMITTING})
"""While a job has deliveries to make."""
_RETRIABLE = frozenset({JobState.FAILED, JobState.CANCELLED, JobState.SKIPPED})
_LOST_ATTEMPT_PAUSE = timedelta(seconds=2)
_NO_INFRASTRUCTURE_PAUSE = timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class Job:
    """One row of ``jobs``, as far as the code asks for it."""

    id: str
    kind: JobKind
    series_uid: str
    study_uid: str
    generation: int
    route: str
    state: JobState
    reason: str
    priority: int
    pipeline: str | None
    uses: str | None
    strength: float | None
    blend: float | None
    pipeline_hash: str | None
    fingerprint: str | None
    superseded_by: str | None
    runs: int
    crashes: int
    enqueued: int
    worker: str | None
    cancel_requested: bool
    created_at: datetime


_COLUMNS = [jobs.c[field.name] for field in fields(Job)]


def _job(row: sa.RowMapping) -> Job:
    values = dict(row)
    values["kind"] = JobKind(values["kind"])
    values["state"] = JobState(values["state"])
    return Job(**values)


def job_id(*parts: str) -> str:
    """Identity of a job: the same series, slices, route and pipeline are the same job, however often received."""
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:40]


def fingerprint(digests: Iterable[tuple[str, str]]) -> str:
    """Digest of a set of slices: their sorted (SOPInstanceUID, data set SHA-256) pairs."""
    text = "\n".join(f"{uid} {digest}" for uid, digest in sorted(digests))
    return hashlib.sha256(text.encode()).hexdigest()


def get(connection: sa.Connection, identity: str) -> Job | None:
    """The job of that id, if there is one."""
    row = connection.execute(sa.select(*_COLUMNS).where(jobs.c.id == identity)).mappings().one_or_none()
    return None if row is None else _job(row)


def create(
    connection: sa.Connection,
    *,
    identity: str,
    state: JobState,
    reason: str,
    sop_instance_uids: Collection[str] = (),
    **values: Any,
) -> bool:
    """Insert a job with its first event and its input; False if the job exists already (the same work again)."""
    at = now()
    row = {"id": identity, "state": state, "reason": reason, "created_at": at, "updated_at": at, **values}
    if state in FINAL:
        row["finished_at"] = at
    inserted = connection.execute(
        insert(jobs).values(n_in=len(sop_instance_uids), **row).on_conflict_do_nothing(index_elements=[jobs.c.id])
    ).rowcount
    if not inserted:
        return False
    if sop_instance_uids:
        connection.execute(
            sa.insert(job_instances),
            [{"job_id": identity, "sop_instance_uid": uid} for uid in sorted(sop_instance_uids)],
        )
    add_event(connection, identity, state, reason)
    return True


def add_event(connection: sa.Connection, identity: str, state: JobState, what: str, worker: str | None = None) -> None:
    """A line in the job's history; for things that happen without a change of state."""
    connection.execute(sa.insert(job_events).values(job_id=identity, at=now(), state=state, what=what, worker=worker))


def advance(
    connection: sa.Connection,
    identity: str,
    to: JobState,
    reason: str,
    *,
    expected: Collection[JobState],
    where: Collection[sa.ColumnElement[bool]] = (),
    worker: str | None = None,
    **values: Any,
) -> bool:
    """Move a job, and write the event, in the caller's transaction.

    Returns
    -------
    bool
        False if the job is not in an `expected` state (or `where` does not hold): somebody was faster, or the caller
        is stale. Nothing was changed then.

    Raises
    ------
    ValueError
        If the transition table has no such move; a programming error.
    """
    illegal = [state for state in expected if to not in TRANSITIONS[state]]
    if illegal:
        raise ValueError(f"no transition from {', '.join(illegal)} to {to}")
    at = now()
    if to in FINAL:
        values["finished_at"] = at
    moved = connection.execute(
        sa.update(jobs)
        .where(jobs.c.id == identity, jobs.c.state.in_(expected), *where)
        .values(state=to, reason=reason, updated_at=at, **values)
    ).rowcount
    if not moved:
        return False
    add_event(connection, identity, to, reason, worker)
    log.info("job %s: %s, %s", identity[:12], to, reason)
    return True


def begin(database: sa.Engine, identity: str, run: int, worker: str, max_crashes: int) -> Job | None:
    """Start attempt number `run` (from 0) of a queued job; None if there is nothing (more) to do.

    If this very attempt is running already, the engine calls again. If another `worker` ran it, that one has died: it
    costs one of `max_crashes`, so that a series which kills its process is not tried for ever. If it was this one, the
    database failed under it, which is not the fault of the series.
    """
    with database.begin() as connection:
        job = get(connection, identity)
        if job is None or job.cancel_requested:
            return None
        if job.state is JobState.QUEUED and job.runs == run:
            if not advance(
                connection,
                identity,
                JobState.RUNNING,
                f"attempt {run + 1} begun",
                expected={JobState.QUEUED},
                where=[jobs.c.runs == run],
                worker=worker,
                runs=run + 1,
                started_at=now(),
                progress=0.0,
            ):
                return None
        elif job.state is JobState.RUNNING and job.runs == run + 1:
            died = job.worker != worker
            if died and not _count_crash(connection, job, "the node ended during the attempt", max_crashes):
                return None
            add_event(connection, identity, JobState.RUNNING, f"attempt {run + 1} begun again", worker)
        else:
            return None
        connection.execute(sa.update(jobs).where(jobs.c.id == identity).values(worker=worker))
        return get(connection, identity)


def lost_attempt(database: sa.Engine, identity: str, why: str, max_crashes: int) -> None:
    """The compute child died: one attempt is lost; the job waits for the next or, after too many, has failed."""
    with database.begin() as connection:
        job = get(connection, identity)
        if job is not None and _count_crash(connection, job, why, max_crashes):
            requeue(connection, identity, why, _LOST_ATTEMPT_PAUSE)


def no_infrastructure(database: sa.Engine, identity: str, why: str) -> None:
    """Our own ground gave way (disk full, database locked), not the series: try again later, without a count."""
    with database.begin() as connection:
        requeue(connection, identity, why, _NO_INFRASTRUCTURE_PAUSE)


def requeue(connection: sa.Connection, identity: str, why: str, pause: timedelta) -> bool:
    """Put a running job back into the queue, due after `pause`."""
    return advance(
        connection,
        identity,
        JobState.QUEUED,
        why,
        expected={JobState.RUNNING},
        next_try_at=now() + pause,
        enqueued=0,
        progress=0.0,
    )


def put_back(connection: sa.Connection, identity: str, runs: int) -> None:
    """Make an attempt due again that ended without a trace, unless its job moved on."""
    same = (jobs.c.id == identity, jobs.c.runs == runs)
    if not advance(
        connection,
        identity,
        JobState.QUEUED,
        "the attempt ended without a result",
        expected={JobState.RUNNING},
        where=same,
        enqueued=0,
        next_try_at=None,
    ):
        connection.execute(
            sa.update(jobs).where(*same, jobs.c.state == JobState.QUEUED).values(enqueued=jobs.c.enqueued + 1)
        )


def _count_crash(connection: sa.Connection, job: Job, why: str, max_crashes: int) -> bool:
    crashes = job.crashes + 1
    connection.execute(sa.update(jobs).where(jobs.c.id == job.id).values(crashes=crashes))
    if crashes < max_crashes:
        return True
    advance(
        connection,
        job.id,
        JobState.FAILED,
        f"{why}; {crashes} attempts ended so: this series is not tried again",
        expected={JobState.RUNNING},
    )
    return False


def supersede(connection: sa.Connection, series_uid: str, route: str, by: str) -> None:
    """A series that grew has a new job; older ones of the same route say so, and what is not through is cancelled."""
    older = connection.execute(
        sa.select(jobs.c.id, jobs.c.state).where(
            jobs.c.series_uid == series_uid,
            jobs.c.route == route,
            jobs.c.kind == JobKind.PIPELINE,
            jobs.c.id != by,
            jobs.c.superseded_by.is_(None),
        )
    ).all()
    for row in older:
        state = JobState(row.state)
        connection.execute(
            sa.update(jobs)
            .where(jobs.c.id == row.id)
            .values(superseded_by=by, cancel_requested=state not in FINAL, updated_at=now())
        )
        add_event(connection, row.id, state, f"superseded by job {by}")
        log.info("job %s: superseded by job %s", row.id[:12], by[:12])


def cancel(connection: sa.Connection, identity: str) -> bool:
    """Close a job that asked for it, after what it ran was stopped; its open deliveries end too."""
    job = get(connection, identity)
    if job is None or job.state in FINAL:
        return False
    connection.execute(
        sa.update(deliveries)
        .where(
            deliveries.c.job_id == identity,
            deliveries.c.state.in_([*BEGUN, *BEGUN.values()]),
        )
        .values(state=DeliveryState.CANCELLED, updated_at=now())
    )
    reason = f"superseded by job {job.superseded_by}" if job.superseded_by else "cancelled on request"
    return advance(connection, identity, JobState.CANCELLED, reason, expected={job.state})


def retry(connection: sa.Connection, identity: str) -> None:
    """An operator's second try: judge again what the gate refused, compute again, or send again what was not accepted.

    Raises
    ------
    NodeError
        With the reason why this job is not tried again.
    """
    row = connection.execute(
        sa.select(jobs.c.state, jobs.c.superseded_by, jobs.c.kind, jobs.c.uses).where(jobs.c.id == identity)
    ).one_or_none()
    if row is None:
        raise NodeError(f"no job {identity}")
    if row.superseded_by is not None:
        raise NodeError(f"job {identity} was superseded by job {row.superseded_by}; try that one")
    state = JobState(row.state)
    if state not in _RETRIABLE:
        raise NodeError(f"job {identity} is {state}; only failed, cancelled and skipped jobs are tried again")
    if row.kind == JobKind.PIPELINE and row.uses is None:
        if state is JobState.SKIPPED:
            raise NodeError(f"job {identity} took no route to a pipeline; correct the routes and send the series again")
        raise NodeError(f"job {identity} is a series that was not judged; send the series again")
    planned = connection.execute(
        sa.update(deliveries)
        .where(
            deliveries.c.job_id == identity,
            deliveries.c.state.in_([DeliveryState.FAILED, DeliveryState.CANCELLED]),
        )
        .values(state=DeliveryState.WAITING, next_try_at=None, failures=0, rejections=0, enqueued=0, created_at=now())
    ).rowcount
    connection.execute(
        sa.update(transfers)
        .where(transfers.c.job_id == identity, transfers.c.state == TransferState.REFUSED)
        .values(state=TransferState.WAITING, tries=0)
    )
    advance(
        connection,
        identity,
        JobState.DISPATCHING if planned else JobState.QUEUED,
        "tried again on request",
        expected={state},
        crashes=0,
        enqueued=0,
        next_try_at=None,
        finished_at=None,
        cancel_requested=False,
    )
