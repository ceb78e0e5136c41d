"""The dispatcher: what is due is handed over once, under a key that the row determines, whatever fails under it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from peers import wait_for
from tables import CT, EXPLICIT, add_job, row

from dicomnode import dispatcher as module
from dicomnode import jobs as job_table
from dicomnode.db import DeliveryState, JobKind, JobState, SeriesState, deliveries, jobs, now, series
from dicomnode.delivery import plan
from dicomnode.dispatcher import Dispatcher
from dicomnode.jobs import FINAL
from dicomnode.scu import Outgoing


class Engine:
    """Notes what it is handed; runs nothing."""

    def __init__(self) -> None:
        self.submitted: list[tuple[Any, ...]] = []
        self.over: set[str] = set()
        self.failures = 0

    def _take(self, *what: Any) -> None:
        if self.failures:
            self.failures -= 1
            raise sa.exc.OperationalError("INSERT", {}, Exception("database or disk is full"))
        self.submitted.append(what)

    def submit_process(self, key: str, job_id: str, run: int, *, priority: int) -> None:
        self._take(key, job_id, run, priority)

    def submit_deliver(self, key: str, job_id: str, destination: str, attempt: int, *, priority: int) -> None:
        self._take(key, job_id, destination, attempt, priority)

    def ended(self, key: str) -> bool:
        return key in self.over


class Worker:
    """Notes the state in which a job was when its child was to be stopped."""

    def __init__(self, database: sa.Engine) -> None:
        self.database = database
        self.cancelled: list[tuple[str, str]] = []

    def cancel(self, job_id: str) -> bool:
        self.cancelled.append((job_id, row(self.database, "jobs", id=job_id)["state"]))
        return True


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def worker(database: sa.Engine) -> Worker:
    return Worker(database)


@pytest.fixture
def dispatcher(database: sa.Engine, engine: Any, worker: Any, monkeypatch: pytest.MonkeyPatch) -> Dispatcher:
    monkeypatch.setattr(module, "_CHECK_EVERY_S", 0.0)
    return Dispatcher(database, engine, worker)


def dispatching(database: sa.Engine, *destinations: str) -> None:
    with database.begin() as connection:
        add_job(connection, state=JobState.DISPATCHING, priority=7)
        item = Outgoing("1.1", CT, EXPLICIT, Path("/spool/a"), "0" * 64)
        plan(connection, "job", destinations, [item], Path("/spool"))


def test_a_due_job_is_handed_over_once(database: sa.Engine, dispatcher: Dispatcher, engine: Engine) -> None:
    with database.begin() as connection:
        add_job(connection, priority=7)
    for _ in range(3):
        dispatcher.look()
    assert engine.submitted == [("job:run0:0", "job", 0, 7)]


def test_due_deliveries_are_handed_over_once_each(database: sa.Engine, dispatcher: Dispatcher, engine: Engine) -> None:
    dispatching(database, "a", "b")
    for _ in range(3):
        dispatcher.look()
    assert sorted(engine.submitted) == [("job:a:0:0", "job", "a", 0, 7), ("job:b:0:0", "job", "b", 0, 7)]


def test_the_same_row_gives_the_same_key_to_a_new_process(
    database: sa.Engine, dispatcher: Dispatcher, engine: Engine, worker: Any
) -> None:
    dispatching(database, "a")
    dispatcher.look()
    Dispatcher(database, engine, worker).look()
    assert engine.submitted[0] == engine.submitted[1]


def test_what_waits_is_handed_over_when_its_time_has_come(
    database: sa.Engine, dispatcher: Dispatcher, engine: Engine
) -> None:
    with database.begin() as connection:
        add_job(connection, next_try_at=now() + timedelta(hours=1))
    dispatcher.look()
    assert engine.submitted == []
    with database.begin() as connection:
        connection.execute(sa.update(jobs).values(next_try_at=now() - timedelta(seconds=1), runs=2))
    dispatcher.look()
    assert engine.submitted == [("job:run2:0", "job", 2, 100)]


def test_a_pause_of_a_delivery_survives_a_restart(
    database: sa.Engine, dispatcher: Dispatcher, engine: Engine, worker: Any
) -> None:
    dispatching(database, "a")
    with database.begin() as connection:
        connection.execute(sa.update(deliveries).values(next_try_at=now() + timedelta(hours=1), attempts=4))
    dispatcher.look()
    Dispatcher(database, engine, worker).look()
    assert engine.submitted == []
    with database.begin() as connection:
        connection.execute(sa.update(deliveries).values(next_try_at=now()))
    dispatcher.look()
    assert engine.submitted == [("job:a:4:0", "job", "a", 4, 7)]


@pytest.mark.parametrize("state", sorted(set(JobState) - {JobState.QUEUED, JobState.DISPATCHING}))
def test_nothing_else_is_handed_over(
    database: sa.Engine, dispatcher: Dispatcher, engine: Engine, state: JobState
) -> None:
    with database.begin() as connection:
        add_job(connection, state=state, runs=1)
    dispatcher.look()
    assert engine.submitted == []


def test_what_could_not_be_handed_over_is_tried_again(
    database: sa.Engine, dispatcher: Dispatcher, engine: Engine
) -> None:
    """The disk is full when the engine is to write its own row."""
    with database.begin() as connection:
        add_job(connection)
    engine.failures = 1
    with pytest.raises(sa.exc.OperationalError):
        dispatcher.look()
    dispatcher.look()
    assert engine.submitted == [("job:run0:0", "job", 0, 100)]


def test_an_attempt_that_ended_before_it_began_gets_a_successor(
    database: sa.Engine, dispatcher: Dispatcher, engine: Engine
) -> None:
    with database.begin() as connection:
        add_job(connection)
    dispatcher.look()
    engine.over.add("job:run0:0")
    dispatcher.look()
    dispatcher.look()
    assert [what[0] for what in engine.submitted] == ["job:run0:0", "job:run0:1"]


def test_an_attempt_that_ended_without_a_result_is_tried_again(
    database: sa.Engine, dispatcher: Dispatcher, engine: Engine, worker: Any
) -> None:
    """The database failed under the running attempt; another process finds the row, after a restart."""
    with database.begin() as connection:
        add_job(connection)
    dispatcher.look()
    assert job_table.begin(database, "job", 0, "me", 3) is not None
    dispatcher.look()
    assert row(database, "jobs")["state"] == JobState.RUNNING, "as long as the engine says that it runs"
    engine.over.add("job:run0:0")
    later = Dispatcher(database, engine, worker)
    later.look()
    later.look()
    job = row(database, "jobs")
    assert (job["state"], job["crashes"]) == (JobState.QUEUED, 0)
    assert [what[0] for what in engine.submitted] == ["job:run0:0", "job:run1:0"]


def test_a_delivery_that_ended_without_a_result_is_tried_again(
    database: sa.Engine, dispatcher: Dispatcher, engine: Engine
) -> None:
    dispatching(database, "a")
    dispatcher.look()
    with database.begin() as connection:
        connection.execute(sa.update(deliveries).values(state=DeliveryState.SENDING, attempts=1))
    dispatcher.look()
    engine.over.add("job:a:0:0")
    dispatcher.look()
    dispatcher.look()
    assert [what[0] for what in engine.submitted] == ["job:a:0:0", "job:a:1:1"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_request_for_commitment_that_ended_without_a_result_is_made_again(
    database: sa.Engine, dispatcher: Dispatcher, engine: Engine, begun: bool
) -> None:
    dispatching(database, "a")
    state = DeliveryState.REQUESTING if begun else DeliveryState.COMMITTING
    with database.begin() as connection:
        connection.execute(sa.update(deliveries).values(state=state, attempts=1 + begun))
        connection.execute(sa.update(jobs).values(state=JobState.COMMITTING))
    dispatcher.look()
    assert [what[0] for what in engine.submitted] == ([] if begun else ["job:a:1:0"])
    engine.over.add("job:a:1:0")
    dispatcher.look()
    dispatcher.look()
    assert row(database, "deliveries")["state"] == DeliveryState.COMMITTING
    assert engine.submitted[-1][0] == ("job:a:2:1" if begun else "job:a:1:1")


def test_commitment_to_originals_is_asked_for_when_their_series_is_closed(
    database: sa.Engine, dispatcher: Dispatcher, engine: Engine
) -> None:
    dispatching(database, "a")
    with database.begin() as connection:
        connection.execute(sa.update(deliveries).values(state=DeliveryState.COMMITTING, attempts=1))
        connection.execute(sa.update(jobs).values(kind=JobKind.ORIGINALS))
        connection.execute(sa.update(series).values(state=SeriesState.OPEN))
    dispatcher.look()
    assert engine.submitted == []
    with database.begin() as connection:
        connection.execute(sa.update(series).values(state=SeriesState.CLOSED))
    dispatcher.look()
    assert [what[0] for what in engine.submitted] == ["job:a:1:0"]


# ── cancel ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING, JobState.DISPATCHING])
def test_cancel_first_stops_the_child_then_frees(
    database: sa.Engine, dispatcher: Dispatcher, engine: Engine, worker: Worker, state: JobState
) -> None:
    with database.begin() as connection:
        add_job(connection, state=state, cancel_requested=True)
    dispatcher.look()
    assert worker.cancelled == [("job", state)], "the row was still in its state when the child was stopped"
    assert row(database, "jobs")["state"] == JobState.CANCELLED
    assert engine.submitted == []
    dispatcher.look()
    assert len(worker.cancelled) == 1


@pytest.mark.parametrize("state", sorted(FINAL))
def test_what_is_through_is_not_cancelled(
    database: sa.Engine, dispatcher: Dispatcher, worker: Worker, state: JobState
) -> None:
    with database.begin() as connection:
        add_job(connection, state=state, cancel_requested=True)
    dispatcher.look()
    assert worker.cancelled == []
    assert row(database, "jobs")["state"] == state


# ── the thread ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "error", [sa.exc.OperationalError("SELECT", {}, Exception("locked")), sa.exc.TimeoutError("no free connection")]
)
def test_the_thread_survives_a_database_that_fails(
    database: sa.Engine, dispatcher: Dispatcher, engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.01)
    look, failures = dispatcher.look, [error, error]

    def failing() -> None:
        if failures:
            raise failures.pop()
        look()

    monkeypatch.setattr(dispatcher, "look", failing)
    with database.begin() as connection:
        add_job(connection)
    dispatcher.start()
    wait_for(lambda: engine.submitted)
    dispatcher.stop()
    assert engine.submitted == [("job:run0:0", "job", 0, 100)]
