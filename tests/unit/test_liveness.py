"""The heartbeat and the takeover, on rows, without the engine's library."""

from __future__ import annotations

import time
from typing import Any

import pytest
import sqlalchemy as sa
from peers import wait_for
from tables import rows

from dicomnode import liveness as module
from dicomnode.db import workers
from dicomnode.liveness import FENCED_EXIT_CODE, Liveness


class Work:
    """Stands for the library: workflows by executor id, and which were resumed."""

    def __init__(self) -> None:
        self.pending: dict[str, list[str]] = {}
        self.resumed: list[tuple[str, str]] = []

    def list_workflows(self, *, status: str, executor_id: list[str], **_: Any) -> list[Any]:
        assert status == "PENDING"

        class One:
            def __init__(self, identity: str) -> None:
                self.workflow_id = identity
                self.queue_name = "compute"

        return [One(identity) for worker in executor_id for identity in self.pending.get(worker, [])]

    def resume_workflows(self, identities: list[str], *, queue_name: str) -> None:
        for identity in identities:
            self.resumed.append((identity, queue_name))
            for owned in self.pending.values():
                if identity in owned:
                    owned.remove(identity)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    made = Work()
    monkeypatch.setattr(module, "DBOS", made)
    return made


def alive(database: sa.Engine, me: str = "me", active: set[str] | None = None) -> Liveness:
    running = active if active is not None else set()
    return Liveness(database, me, lambda: running, beat_s=0.01, dead_after_s=4.0)


def neighbour(database: sa.Engine, silent_s: int) -> None:
    with database.begin() as connection:
        connection.execute(sa.insert(workers).values(id="other", host="h", pid=1, beat=int(time.time()) - silent_s))


@pytest.mark.parametrize(("silent_s", "dead"), [(0, False), (3, False), (6, True), (10**6, True)])
def test_silence_means_death(database: sa.Engine, work: Work, silent_s: int, dead: bool) -> None:
    work.pending = {"other": ["a", "b"], "me": ["c"]}
    neighbour(database, silent_s)
    alive(database).declare_dead()
    assert work.resumed == ([("a", "compute"), ("b", "compute")] if dead else [])
    assert {one["id"] for one in rows(database, "workers")} == ({"me"} if dead else {"me", "other"})


def test_who_is_alone_waits_for_nobody(database: sa.Engine, work: Work) -> None:
    work.pending = {"other": ["a"]}
    neighbour(database, 0)
    alive(database).declare_dead(everybody_else=True)
    assert work.resumed == [("a", "compute")]
    assert [one["id"] for one in rows(database, "workers")] == ["me"]


def test_whoever_leaves_is_dead_at_once(database: sa.Engine, work: Work) -> None:
    work.pending = {"leaver": ["a"]}
    alive(database, "leaver").leave()
    alive(database).declare_dead()
    assert work.resumed == [("a", "compute")]


def test_a_heart_beats_and_stops(database: sa.Engine, work: Work) -> None:
    thread = alive(database)
    with database.begin() as connection:
        connection.execute(sa.update(workers).values(beat=0))
    thread.start()
    wait_for(lambda: abs(rows(database, "workers")[0]["beat"] - time.time()) < 3)
    thread.stop()
    assert not thread.is_alive()


def test_a_process_whose_row_is_gone_leaves_at_once(
    database: sa.Engine, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(module.os, "_exit", codes.append)
    thread = alive(database)
    with database.begin() as connection:
        connection.execute(sa.delete(workers))
    thread.start()
    wait_for(lambda: codes)
    thread.stop()
    assert set(codes) == {FENCED_EXIT_CODE} == {75}


def test_work_of_ours_that_no_thread_runs_is_resumed(database: sa.Engine, work: Work) -> None:
    """Its checkpoint was lost to a full disk; what does run is left alone, and so is what was just taken."""
    work.pending = {"me": ["lost", "running"]}
    thread = alive(database, active={"running"})
    for _ in range(4):
        thread._resume_orphans()
        assert work.resumed == []
    thread._resume_orphans()
    assert work.resumed == [("lost", "compute")]
    for _ in range(10):
        thread._resume_orphans()
    assert work.resumed == [("lost", "compute")]


@pytest.mark.parametrize(
    "error", [sa.exc.OperationalError("UPDATE", {}, Exception("locked")), sa.exc.TimeoutError("no free connection")]
)
def test_the_heart_goes_on_after_the_database_failed(
    database: sa.Engine, work: Work, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    thread = alive(database)
    beat, failures = thread._beat, [error, error]

    def failing() -> None:
        if failures:
            raise failures.pop()
        beat()

    monkeypatch.setattr(thread, "_beat", failing)
    with database.begin() as connection:
        connection.execute(sa.update(workers).values(beat=0))
    thread.start()
    wait_for(lambda: rows(database, "workers")[0]["beat"] > 0)
    thread.stop()
