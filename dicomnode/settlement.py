"""The state of a job that sends follows from its deliveries.

Called in the transaction of whatever moved a delivery or closed a series. A job has four ways from here: nothing is
open and all was accepted (DONE), nothing is open and something was not (FAILED), all was accepted and reports on
storage commitment are awaited (COMMITTING), or a destination does not keep what it accepted (DISPATCHING again).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from dicomnode import jobs as job_table
from dicomnode.db import DeliveryState, JobKind, JobState, SeriesState, deliveries, jobs, series
from dicomnode.jobs import SENDING, advance


def may_grow() -> sa.ColumnElement[bool]:
    """Of a row of ``jobs``: it forwards the originals of a series that is still open."""
    return sa.and_(
        jobs.c.kind == JobKind.ORIGINALS,
        sa.exists().where(
            series.c.series_uid == jobs.c.series_uid,
            series.c.state == SeriesState.OPEN,
            series.c.generation == jobs.c.generation,
        ),
    )


def settle(connection: sa.Connection, identity: str) -> None:
    """Give a job the state of its deliveries: DONE only if every one was accepted, or committed, whole.

    A job that forwards originals stays open while its series may still grow.
    """
    job = job_table.get(connection, identity)
    if job is None or job.state not in SENDING:
        return
    rows = connection.execute(
        sa.select(deliveries.c.destination, deliveries.c.state, deliveries.c.reason)
        .where(deliveries.c.job_id == identity)
        .order_by(deliveries.c.destination)
    ).all()
    by_state: dict[str, list[str]] = {}
    for row in rows:
        by_state.setdefault(row.state, []).append(row.destination)
    if by_state.keys() & {DeliveryState.WAITING, DeliveryState.SENDING}:
        if job.state is JobState.COMMITTING:
            why = "; ".join(f"{row.destination}: {row.reason}" for row in rows if row.state == DeliveryState.WAITING)
            advance(connection, identity, JobState.DISPATCHING, why, expected={JobState.COMMITTING})
        return
    if connection.execute(sa.select(may_grow()).where(jobs.c.id == identity)).scalar_one():
        return
    if open_commitments := _names(by_state, DeliveryState.COMMITTING, DeliveryState.REQUESTING):
        if job.state is JobState.DISPATCHING:
            why = f"storage commitment by {open_commitments} to come"
            advance(connection, identity, JobState.COMMITTING, why, expected={JobState.DISPATCHING})
        return
    through = (DeliveryState.SENT, DeliveryState.COMMITTED)
    failed = [f"{row.destination}: {row.reason}" for row in rows if row.state not in through]
    if failed:
        advance(connection, identity, JobState.FAILED, "; ".join(failed), expected=SENDING)
        return
    ends = {"accepted": _names(by_state, DeliveryState.SENT), "committed": _names(by_state, DeliveryState.COMMITTED)}
    said = " and ".join(f"{end} by {names}" for end, names in ends.items() if names)
    reason = f"every instance {said}" if said else "nothing to send"
    advance(connection, identity, JobState.DONE, reason, expected=SENDING, progress=1.0)


def _names(by_state: Mapping[str, Sequence[str]], *states: DeliveryState) -> str:
    return ", ".join(sorted(name for state in states for name in by_state.get(state, ())))
