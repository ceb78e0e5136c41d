"""The life of a job: no move outside the table, none without its event, none by somebody who is late."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from itertools import pairwise, product
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import SERIES, STUDY, add_job, add_series, events, history, row, state_of

from dicomnode import jobs as job_table
from dicomnode.db import JobKind, JobState, jobs, now
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
    (S.COMMITTING, S.DISPATCHING),
    (S.COMMITTING, S.DONE),
    (S.COMMITTING, S.FAILED),
    (S.COMMITTING, S.CANCELLED),
    (S.FAILED, S.QUEUED),
    (S.CANCELLED, S.QUEUED),
    (S.CANCELLED, S.DISPATCHING),
    (S.FAILED, S.DISPATCHING),
    (S.SKIPPED, S.QUEUED),
}
"""The whole life of a job, written down a second time."""
WORKER = "host-1-abc"
MAX_CRASHES = 3


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
