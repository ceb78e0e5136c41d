"""How a job comes to its end, and what cancelling, trying again and a series that grew make of it."""

from __future__ import annotations

import sqlite3
from itertools import product
from pathlib import Path

import pytest
import sqlalchemy as sa
from tables import SERIES, add_job, history, rows, state_of

from dicomnode import jobs as job_table
from dicomnode.db import DeliveryState, JobKind, JobState, SeriesState, TransferState, deliveries, jobs, now, transfers
from dicomnode.db import series as series_table
from dicomnode.errors import NodeError
from dicomnode.jobs import FINAL

S = JobState
D = DeliveryState
_OPEN, _BAD = {D.WAITING, D.SENDING}, {D.FAILED, D.CANCELLED}
_ASKED, _GOOD = {D.COMMITTING, D.REQUESTING}, {D.SENT, D.COMMITTED}


# ── settle ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def add_delivery(connection: sa.Connection, destination: str, state: DeliveryState, reason: str = "") -> None:
    at = now()
    connection.execute(
        sa.insert(deliveries).values(
            job_id="job", destination=destination, state=state, reason=reason, created_at=at, updated_at=at
        )
    )


@pytest.mark.parametrize("states", [(), *product(D), *product(D, D)])
def test_a_job_is_done_exactly_when_all_is_accepted(connection: sa.Connection, states: tuple[D, ...]) -> None:
    add_job(connection, state=S.DISPATCHING)
    for number, state in enumerate(states):
        add_delivery(connection, f"pacs {number}", state, "why" if state in _BAD else "")
    job_table.settle(connection, "job")
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


@pytest.mark.parametrize("state", sorted(set(JobState) - {S.DISPATCHING, S.COMMITTING}))
def test_only_a_job_that_sends_is_settled(connection: sa.Connection, state: JobState) -> None:
    add_job(connection, state=state)
    add_delivery(connection, "pacs", D.SENT)
    job_table.settle(connection, "job")
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
    job_table.settle(connection, "job")
    assert state_of(connection) is expected


# ── cancel, retry, supersede ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("state", list(JobState))
def test_cancel_ends_what_is_not_at_its_end(connection: sa.Connection, state: JobState) -> None:
    add_job(connection, state=state)
    for delivery in D:
        add_delivery(connection, delivery, delivery)
    assert job_table.cancel(connection, "job") == (state not in FINAL)
    found = dict(map(tuple, connection.execute(sa.select(deliveries.c.destination, deliveries.c.state))))
    if state in FINAL:
        assert state_of(connection) is state
        assert found == {one: one for one in D}
    else:
        assert state_of(connection) is S.CANCELLED
        assert found == {one: D.CANCELLED if one in _OPEN | _ASKED else one for one in D}


@pytest.mark.parametrize(
    ("superseded_by", "reason"), [(None, "cancelled on request"), ("new", "superseded by job new")]
)
def test_a_cancelled_job_says_who_wanted_it(connection: sa.Connection, superseded_by: str | None, reason: str) -> None:
    add_job(connection, superseded_by=superseded_by, cancel_requested=True)
    job_table.cancel(connection, "job")
    assert connection.execute(sa.select(jobs.c.reason)).scalar_one() == reason


def test_retry_computes_again_what_failed_in_computing(connection: sa.Connection) -> None:
    add_job(connection, state=S.FAILED, runs=3, crashes=3, cancel_requested=True, next_try_at=now())
    job_table.retry(connection, "job")
    job = connection.execute(sa.select(jobs)).mappings().one()
    assert (job["state"], job["runs"], job["crashes"], job["next_try_at"]) == (S.QUEUED, 3, 0, None)
    assert job["finished_at"] is None
    assert not job["cancel_requested"], "an old wish to cancel must not end the second try at once"


def test_retry_sends_again_only_what_was_not_accepted(connection: sa.Connection) -> None:
    add_job(connection, state=S.FAILED)
    add_delivery(connection, "good", D.SENT)
    add_delivery(connection, "bad", D.FAILED, "refused")
    for destination, uid, state in (
        ("good", "1", TransferState.ACCEPTED),
        ("bad", "1", TransferState.ACCEPTED),
        ("bad", "2", TransferState.REFUSED),
    ):
        connection.execute(
            sa.insert(transfers).values(
                job_id="job",
                destination=destination,
                sop_instance_uid=uid,
                sop_class_uid="1",
                transfer_syntax_uid="1",
                path=uid,
                sha256="0" * 64,
                state=state,
                tries=5,
                updated_at=now(),
            )
        )
    job_table.retry(connection, "job")
    assert state_of(connection) is S.DISPATCHING
    assert dict(map(tuple, connection.execute(sa.select(deliveries.c.destination, deliveries.c.state)))) == {
        "good": D.SENT,
        "bad": D.WAITING,
    }
    found = connection.execute(sa.select(transfers.c.destination, transfers.c.sop_instance_uid, transfers.c.state))
    assert set(map(tuple, found)) == {
        ("good", "1", TransferState.ACCEPTED),
        ("bad", "1", TransferState.ACCEPTED),
        ("bad", "2", TransferState.WAITING),
    }


@pytest.mark.parametrize("state", sorted(set(JobState) - {S.FAILED, S.CANCELLED}))
def test_only_what_failed_or_was_cancelled_is_tried_again(connection: sa.Connection, state: JobState) -> None:
    add_job(connection, state=state)
    with pytest.raises(NodeError, match=f"is {state}"):
        job_table.retry(connection, "job")
    with pytest.raises(NodeError, match="no job nobody"):
        job_table.retry(connection, "nobody")
    assert state_of(connection) is state


def test_a_cancelled_job_is_tried_again(connection: sa.Connection) -> None:
    add_job(connection, state=S.CANCELLED, cancel_requested=True)
    job_table.retry(connection, "job")
    assert state_of(connection) is S.QUEUED


def test_a_superseded_job_never_comes_back(connection: sa.Connection) -> None:
    """Else an incomplete derived series would reach the PACS after the complete one."""
    add_job(connection, state=S.FAILED, superseded_by="newer")
    with pytest.raises(NodeError, match="superseded by job newer"):
        job_table.retry(connection, "job")
    assert state_of(connection) is S.FAILED


@pytest.mark.parametrize("state", list(JobState))
def test_an_older_job_of_a_series_that_grew_is_flagged_and_stopped(connection: sa.Connection, state: JobState) -> None:
    add_job(connection, "old", state)
    add_job(connection, "new")
    add_job(connection, "other route", state, route="other")
    add_job(connection, "originals", state, kind=JobKind.ORIGINALS)
    job_table.supersede(connection, SERIES, "ct", "new")
    found = {one.id: one for one in connection.execute(sa.select(jobs)).all()}
    assert found["old"].superseded_by == "new"
    assert found["old"].cancel_requested == (state not in FINAL)
    assert found["old"].state == state
    assert history(connection, "old") == [state, state]
    for other in ("new", "other route", "originals"):
        assert found[other].superseded_by is None
        assert not found[other].cancel_requested


def test_what_is_written_can_be_read_without_our_code(database: sa.Engine, tmp_path: Path) -> None:
    with database.begin() as connection:
        add_job(connection, sop_instance_uids=["1.1"])
    with sqlite3.connect(f"file:{tmp_path / 'node.db'}?mode=ro", uri=True) as plain:
        assert plain.execute("SELECT id, state, kind, n_in FROM jobs").fetchall() == [("job", "QUEUED", "PIPELINE", 1)]
    plain.close()
    assert rows(database, "job_instances") == [{"job_id": "job", "sop_instance_uid": "1.1"}]
