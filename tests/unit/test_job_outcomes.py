"""What cancelling, trying again and a series that grew make of a job."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from tables import SERIES, add_delivery, add_job, history, rows, state_of

from dicomnode import jobs as job_table
from dicomnode.db import DeliveryState, JobKind, JobState, TransferState, deliveries, jobs, now, transfers
from dicomnode.errors import NodeError
from dicomnode.jobs import FINAL

S = JobState
D = DeliveryState
_OPEN = {D.WAITING, D.SENDING, D.COMMITTING, D.REQUESTING}


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
        assert found == {one: D.CANCELLED if one in _OPEN else one for one in D}


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


@pytest.mark.parametrize("state", sorted(set(JobState) - {S.FAILED, S.CANCELLED, S.SKIPPED}))
def test_only_what_failed_was_cancelled_or_refused_is_tried_again(connection: sa.Connection, state: JobState) -> None:
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


def test_what_the_gate_refused_is_judged_again(connection: sa.Connection) -> None:
    """Sent again, the same slices on the same route are the same job: nothing else asks the decoder that came since."""
    add_job(connection, state=S.SKIPPED)
    job_table.retry(connection, "job")
    assert state_of(connection) is S.QUEUED


def test_what_took_no_route_is_not_tried_again(connection: sa.Connection) -> None:
    add_job(connection, state=S.SKIPPED, pipeline=None, uses=None)
    with pytest.raises(NodeError, match="took no route to a pipeline; correct the routes and send the series again"):
        job_table.retry(connection, "job")
    assert state_of(connection) is S.SKIPPED


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
