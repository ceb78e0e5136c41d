"""The life of a job: no move outside the table, none without its event, none by somebody who is late."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise, product
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import SERIES, STUDY, add_job, add_series, database_in, events, row, rows

from dicomnode import jobs as job_table
from dicomnode.db import DeliveryState, JobKind, JobState, SeriesState, TransferState, deliveries, jobs, now, transfers
from dicomnode.db import series as series_table
from dicomnode.errors import NodeError
from dicomnode.jobs import FINAL, TRANSITIONS, advance

S = JobState
MOVES = {
    (S.QUEUED, S.RUNNING),
    (S.QUEUED, S.FAILED),
    (S.QUEUED, S.CANCELLED),
    (S.RUNNING, S.QUEUED),
    (S.RUNNING, S.DISPATCHING),
    (S.RUNNING, S.SKIPPED),
    (S.RUNNING, S.WITHHELD),
    (S.RUNNING, S.FAILED),
    (S.RUNNING, S.CANCELLED),
    (S.DISPATCHING, S.COMMITTING),
    (S.DISPATCHING, S.DONE),
    (S.DISPATCHING, S.FAILED),
    (S.DISPATCHING, S.CANCELLED),
    (S.COMMITTING, S.DONE),
    (S.COMMITTING, S.FAILED),
    (S.COMMITTING, S.CANCELLED),
    (S.FAILED, S.QUEUED),
    (S.CANCELLED, S.QUEUED),
    (S.CANCELLED, S.DISPATCHING),
    (S.FAILED, S.DISPATCHING),
}
"""The whole life of a job, written down a second time."""
WORKER = "host-1-abc"
MAX_CRASHES = 3


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> sa.Engine:
    return database_in(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def connection(shared: sa.Engine) -> Iterator[sa.Connection]:
    """In a transaction that is rolled back: every test finds empty tables."""
    with shared.connect() as made:
        yield made
        made.rollback()


@pytest.fixture
def database(tmp_path: Path) -> sa.Engine:
    return database_in(tmp_path)


def state_of(connection: sa.Connection, identity: str = "job") -> JobState:
    job = job_table.get(connection, identity)
    assert job is not None
    return job.state


def history(connection: sa.Connection, identity: str = "job") -> list[str]:
    return list(
        connection.execute(
            sa.text("SELECT state FROM job_events WHERE job_id = :id ORDER BY id"), {"id": identity}
        ).scalars()
    )


# ── transitions ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_table_is_what_was_agreed() -> None:
    assert {(before, after) for before, moves in TRANSITIONS.items() for after in moves} == MOVES
    assert set(TRANSITIONS) == set(JobState)
    assert {S.DONE, S.FAILED, S.CANCELLED, S.SKIPPED, S.WITHHELD} == FINAL


@pytest.mark.parametrize(("before", "after"), list(product(JobState, JobState)))
def test_every_pair_of_states(connection: sa.Connection, before: JobState, after: JobState) -> None:
    add_job(connection, state=before)
    if (before, after) in MOVES:
        assert advance(connection, "job", after, "why", expected={before})
        assert state_of(connection) is after
        assert history(connection) == [before, after]
    else:
        with pytest.raises(ValueError, match=f"no transition from {before} to {after}"):
            advance(connection, "job", after, "why", expected={before})
        assert state_of(connection) is before
        assert history(connection) == [before]


_CALLS = st.lists(
    st.tuples(st.frozensets(st.sampled_from(list(JobState)), max_size=3), st.sampled_from(list(JobState))), max_size=25
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=_CALLS, first=st.sampled_from(list(JobState)))
def test_no_sequence_of_calls_leaves_the_table(
    shared: sa.Engine, calls: list[tuple[frozenset[JobState], JobState]], first: JobState
) -> None:
    with shared.connect() as connection:
        add_job(connection, state=first)
        expected_history = [first]
        for expected, after in calls:
            illegal = any((before, after) not in MOVES for before in expected)
            try:
                moved = advance(connection, "job", after, "why", expected=expected)
            except ValueError:
                assert illegal
                continue
            assert not illegal
            assert moved == (expected_history[-1] in expected)
            if moved:
                expected_history.append(after)
            assert state_of(connection) is expected_history[-1]
        assert history(connection) == expected_history
        assert all(pair in MOVES for pair in pairwise(expected_history))
        finished = connection.execute(sa.select(jobs.c.finished_at)).scalar_one()
        assert (finished is not None) >= (expected_history[-1] in FINAL)
        connection.rollback()


def test_a_stale_caller_is_told_and_changes_nothing(connection: sa.Connection) -> None:
    add_job(connection, state=S.RUNNING)
    assert advance(connection, "job", S.DISPATCHING, "first", expected={S.RUNNING})
    before = connection.execute(sa.select(jobs)).mappings().one()
    assert not advance(connection, "job", S.FAILED, "late", expected={S.RUNNING}, progress=0.5)
    assert not advance(connection, "nobody", S.FAILED, "late", expected={S.RUNNING})
    assert not advance(connection, "job", S.DONE, "where", expected={S.DISPATCHING}, where=[jobs.c.runs == 7])
    assert connection.execute(sa.select(jobs)).mappings().one() == before
    assert history(connection) == [S.RUNNING, S.DISPATCHING]


def test_state_and_event_are_one_transaction(database: sa.Engine) -> None:
    with database.begin() as connection:
        add_job(connection, state=S.RUNNING)
        connection.execute(
            sa.text("CREATE TRIGGER no_events BEFORE INSERT ON job_events BEGIN SELECT RAISE(ABORT, 'no event'); END")
        )
    with pytest.raises(sa.exc.IntegrityError, match="no event"), database.begin() as connection:
        advance(connection, "job", S.DISPATCHING, "why", expected={S.RUNNING})
    assert row(database, "jobs")["state"] == S.RUNNING


def test_nothing_but_jobs_py_writes_the_state() -> None:
    sources = Path(job_table.__file__).parent.glob("*.py")
    writers = {path.name for path in sources if "update(jobs)" in path.read_text()}
    for name in writers - {"jobs.py"}:
        text = (Path(job_table.__file__).parent / name).read_text()
        for update in text.split("update(jobs)")[1:]:
            assert "state=" not in update.split(".values(", 1)[1].split(")\n", 1)[0], name


# ── identity ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_job_is_made_once(connection: sa.Connection) -> None:
    add_series(connection)
    what = {
        "identity": "job",
        "kind": JobKind.PIPELINE,
        "series_uid": SERIES,
        "study_uid": STUDY,
        "generation": 1,
        "calling_ae": "A",
        "route": "ct",
        "route_reason": "",
        "priority": 1,
        "reason": "closed",
        "sop_instance_uids": ["1.2", "1.1"],
    }
    assert job_table.create(connection, state=S.QUEUED, **what)
    assert advance(connection, "job", S.RUNNING, "", expected={S.QUEUED})
    assert not job_table.create(connection, state=S.QUEUED, **what)
    assert state_of(connection) is S.RUNNING
    assert history(connection) == [S.QUEUED, S.RUNNING]
    assert connection.execute(sa.select(jobs.c.n_in)).scalar_one() == 2


def test_a_job_that_lacks_something_is_an_error_not_a_job_that_exists(connection: sa.Connection) -> None:
    with pytest.raises(sa.exc.IntegrityError):
        add_job(connection, calling_ae=None)


def test_the_fingerprint_is_of_the_set() -> None:
    pairs = [("1.2.1", "aa"), ("1.2.2", "bb")]
    expected = hashlib.sha256(b"1.2.1 aa\n1.2.2 bb").hexdigest()
    assert job_table.fingerprint(pairs) == job_table.fingerprint(reversed(pairs)) == expected
    assert job_table.fingerprint([("1.2.1", "aa"), ("1.2.2", "cc")]) != expected
    assert job_table.fingerprint(pairs[:1]) != expected


def test_the_id_of_a_job_is_made_of_its_work() -> None:
    assert job_table.job_id("a", "b") == hashlib.sha256(b"a|b").hexdigest()[:40]


# ── attempts ───────────────────────────────────────────────────────────────────────────────────────────────────────


def begin(database: sa.Engine, run: int, worker: str = WORKER) -> job_table.Job | None:
    return job_table.begin(database, "job", run, worker, MAX_CRASHES)


@pytest.fixture
def queued(database: sa.Engine) -> sa.Engine:
    with database.begin() as connection:
        add_job(connection)
    return database


def test_an_attempt_begins(queued: sa.Engine) -> None:
    job = begin(queued, 0)
    assert job is not None
    assert (job.state, job.runs, job.crashes) == (S.RUNNING, 1, 0)
    assert row(queued, "jobs")["worker"] == WORKER
    assert row(queued, "jobs")["started_at"] is not None
    assert events(queued)[-1] == (S.RUNNING, "attempt 1 begun")


@pytest.mark.parametrize("run", [1, 2, 7])
def test_another_attempt_than_the_next_does_not_begin(queued: sa.Engine, run: int) -> None:
    assert begin(queued, run) is None
    assert row(queued, "jobs")["state"] == S.QUEUED


def test_nothing_begins_that_is_gone_or_cancelled(queued: sa.Engine) -> None:
    assert job_table.begin(queued, "nobody", 0, WORKER, MAX_CRASHES) is None
    with queued.begin() as connection:
        connection.execute(sa.update(jobs).values(cancel_requested=True))
    assert begin(queued, 0) is None


@pytest.mark.parametrize("state", sorted(FINAL | {S.DISPATCHING, S.COMMITTING}))
def test_nothing_begins_in_another_state(database: sa.Engine, state: JobState) -> None:
    with database.begin() as connection:
        add_job(connection, state=state)
    assert begin(database, 0) is None
    assert row(database, "jobs")["state"] == state


def test_of_two_who_begin_at_once_one_is_told_no(queued: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both read QUEUED before either wrote."""
    get, raced = job_table.get, []

    def get_then_lose(connection: sa.Connection, identity: str) -> job_table.Job | None:
        job = get(connection, identity)
        if not raced:
            raced.append(True)
            assert begin(queued, 0, "faster") is not None
        return job

    monkeypatch.setattr(job_table, "get", get_then_lose)
    assert begin(queued, 0, "slower") is None
    assert row(queued, "jobs")["worker"] == "faster"
    assert row(queued, "jobs")["runs"] == 1


def test_a_process_that_died_in_the_attempt_costs_one_of_its_lives(queued: sa.Engine) -> None:
    begin(queued, 0, "first")
    for number in (1, 2):
        job = begin(queued, 0, f"successor {number}")
        assert job is not None
        assert (job.state, job.runs, job.crashes) == (S.RUNNING, 1, number)
        assert row(queued, "jobs")["worker"] == f"successor {number}"
    assert begin(queued, 0, "successor 3") is None
    assert row(queued, "jobs")["state"] == S.FAILED
    assert "3 attempts ended so" in row(queued, "jobs")["reason"]


def test_an_attempt_that_its_own_process_begins_again_costs_nothing(queued: sa.Engine) -> None:
    """The database failed under the attempt and the engine calls again: nobody died."""
    begin(queued, 0)
    for _ in range(5):
        job = begin(queued, 0)
        assert job is not None
        assert (job.state, job.crashes) == (S.RUNNING, 0)


def test_dead_children_are_counted_and_end_in_failed(queued: sa.Engine) -> None:
    for run in (0, 1):
        assert begin(queued, run) is not None
        job_table.lost_attempt(queued, "job", "killed", MAX_CRASHES)
        job = row(queued, "jobs")
        assert (job["state"], job["crashes"], job["progress"]) == (S.QUEUED, run + 1, 0.0)
        assert timedelta(0) < job["next_try_at"] - now() < timedelta(seconds=10)
    assert begin(queued, 2) is not None
    job_table.lost_attempt(queued, "job", "killed", MAX_CRASHES)
    assert (row(queued, "jobs")["state"], row(queued, "jobs")["runs"]) == (S.FAILED, 3)


def test_a_full_disk_is_not_the_fault_of_the_series(queued: sa.Engine) -> None:
    for run in range(MAX_CRASHES + 3):
        assert begin(queued, run) is not None
        job_table.no_infrastructure(queued, "job", "no space")
    job = row(queued, "jobs")
    assert (job["state"], job["crashes"]) == (S.QUEUED, 0)
    assert job["next_try_at"] > now()


def test_what_was_cancelled_meanwhile_stays_so(queued: sa.Engine) -> None:
    begin(queued, 0)
    with queued.begin() as connection:
        assert job_table.cancel(connection, "job")
    job_table.lost_attempt(queued, "job", "killed", MAX_CRASHES)
    job_table.no_infrastructure(queued, "job", "no space")
    with queued.begin() as connection:
        job_table.put_back(connection, "job", 1)
    assert row(queued, "jobs")["state"] == S.CANCELLED


# ── settle ─────────────────────────────────────────────────────────────────────────────────────────────────────────

D = DeliveryState
_OPEN, _BAD = {D.WAITING, D.SENDING}, {D.FAILED, D.CANCELLED}


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
    elif _BAD & set(states):
        expected = S.FAILED
    else:
        expected = S.DONE
    assert state_of(connection) is expected
    assert (state_of(connection) is S.DONE) == all(state is D.SENT for state in states)
    if expected is S.FAILED:
        reason = connection.execute(sa.select(jobs.c.reason)).scalar_one()
        assert all((f"pacs {n}: why" in reason) == (state in _BAD) for n, state in enumerate(states))


@pytest.mark.parametrize("state", sorted(set(JobState) - {S.DISPATCHING}))
def test_only_a_dispatching_job_is_settled(connection: sa.Connection, state: JobState) -> None:
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
