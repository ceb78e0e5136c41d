"""What a job's deliveries make of it."""

from __future__ import annotations

from itertools import product

import pytest
import sqlalchemy as sa
from tables import add_delivery, add_job, state_of

from dicomnode.db import DeliveryState, JobKind, JobState, SeriesState, jobs
from dicomnode.db import series as series_table
from dicomnode.settlement import settle

S = JobState
D = DeliveryState
_OPEN, _BAD = {D.WAITING, D.SENDING}, {D.FAILED, D.CANCELLED}
_ASKED, _GOOD = {D.COMMITTING, D.REQUESTING}, {D.SENT, D.COMMITTED}


@pytest.mark.parametrize("before", [S.DISPATCHING, S.COMMITTING])
@pytest.mark.parametrize("states", [(), *product(D), *product(D, D)])
def test_a_job_is_done_exactly_when_all_is_accepted(
    connection: sa.Connection, states: tuple[D, ...], before: JobState
) -> None:
    add_job(connection, state=before)
    for number, state in enumerate(states):
        add_delivery(connection, f"pacs {number}", state, "why" if state in _BAD else "")
    settle(connection, "job")
    if _OPEN & set(states):
        expected = S.DISPATCHING
    elif _ASKED & set(states):
        expected = S.COMMITTING
    elif _BAD & set(states):
        expected = S.FAILED
    else:
        expected = S.DONE
    assert state_of(connection) is expected
    assert (state_of(connection) is S.DONE) == all(state in _GOOD for state in states)
    if expected is S.FAILED:
        reason = connection.execute(sa.select(jobs.c.reason)).scalar_one()
        assert all((f"pacs {n}: why" in reason) == (state in _BAD) for n, state in enumerate(states))


def test_a_job_that_awaits_commitment_does_not_claim_what_another_destination_refused(
    connection: sa.Connection,
) -> None:
    add_job(connection, state=S.DISPATCHING)
    add_delivery(connection, "archive", D.COMMITTING)
    add_delivery(connection, "pacs", D.FAILED, "1 of 3 refused")
    settle(connection, "job")
    reason = connection.execute(sa.select(jobs.c.reason)).scalar_one()
    assert (state_of(connection), reason) == (S.COMMITTING, "storage commitment by archive to come")


@pytest.mark.parametrize("state", sorted(set(JobState) - {S.DISPATCHING, S.COMMITTING}))
def test_only_a_job_that_sends_is_settled(connection: sa.Connection, state: JobState) -> None:
    add_job(connection, state=state)
    add_delivery(connection, "pacs", D.SENT)
    settle(connection, "job")
    assert state_of(connection) is state


@pytest.mark.parametrize(
    ("series_state", "generation", "expected"),
    [
        (SeriesState.OPEN, 1, S.DISPATCHING),
        (SeriesState.OPEN, 2, S.DONE),
        (SeriesState.CLOSED, 1, S.DONE),
        (SeriesState.CLOSED, 2, S.DONE),
    ],
)
def test_originals_are_not_all_sent_while_the_series_may_grow(
    connection: sa.Connection, series_state: SeriesState, generation: int, expected: JobState
) -> None:
    add_job(connection, state=S.DISPATCHING, kind=JobKind.ORIGINALS)
    connection.execute(sa.update(series_table).values(state=series_state, generation=generation))
    add_delivery(connection, "pacs", D.SENT)
    settle(connection, "job")
    assert state_of(connection) is expected
