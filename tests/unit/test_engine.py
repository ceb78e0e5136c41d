"""The engine in processes of its own: everything runs at least once, in order, whoever dies."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_app import DEAD_AFTER_S
from peers import wait_for
from tables import database_in

from dicomnode import engine as engine_module
from dicomnode.liveness import FENCED_EXIT_CODE

APP = Path(__file__).parents[1] / "engine_app.py"


class App:
    """One engine process."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        with (folder / f"stderr-{name}").open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(APP), f"sqlite:///{folder / 'node.db'}", str(folder), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.executor_id = self._answer().removeprefix("ready ")

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, (self.folder / f"stderr-{self.name}").read_text()[-3000:]
        return line

    def tell(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def hold(self) -> None:
        (self.folder / f"hold-{self.name}").touch()

    def let_go(self) -> None:
        (self.folder / f"hold-{self.name}").unlink(missing_ok=True)

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self._answer() == "stopped"
        assert self.process.wait(20) == 0

    def end(self) -> None:
        """Gone, whatever it does."""
        self.process.kill()
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue


class Stage:
    """The folder that the processes of a test share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.apps: list[App] = []
        database_in(folder).dispose()

    def app(self, name: str, *, held: bool = False) -> App:
        if held:
            (self.folder / f"hold-{name}").touch()
        self.apps.append(App(self.folder, name))
        return self.apps[-1]

    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []

    def wait_log(self, line: str, timeout_s: float = 20) -> None:
        wait_for(lambda: line in self.log(), timeout_s, f"{line!r} among {self.log()}")

    def workers(self) -> list[str]:
        with sqlite3.connect(f"file:{self.folder / 'node.db'}?mode=ro", uri=True) as connection:
            found = [one for (one,) in connection.execute("SELECT id FROM workers")]
        connection.close()
        return found

    def writable(self) -> bool:
        """Does nobody hold the write lock?"""
        connection = sqlite3.connect(self.folder / "node.db", timeout=0.2, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
            return True
        except sqlite3.OperationalError:
            return False
        finally:
            connection.close()


def _stage(folder: Path) -> Iterator[Stage]:
    made = Stage(folder)
    yield made
    for app in made.apps:
        app.end()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    yield from _stage(tmp_path)


# ── order and identity ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def orderly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stage, App]]:
    """One process after a queue of work: a held job, then others behind it, two destinations, one failure."""
    for made in _stage(tmp_path_factory.mktemp("orderly")):
        app = made.app("one", held=True)
        app.tell("process key-held held 0 10")
        made.wait_log("begin one held 0")
        for line in (
            "process key-routine routine 0 10",
            "process key-routine routine 0 10",
            "process key-urgent urgent 0 1",
            "process key-broken broken 0 10",
            "deliver a-0 job a 0 10",
            "deliver a-1 job a 1 10",
            "deliver b-0 job b 0 10",
        ):
            app.tell(line)
        made.wait_log("begin one job a 0")
        made.wait_log("begin one job b 0")
        yield made, app


def test_the_engine_keeps_its_promises_in_one_process(orderly: tuple[Stage, App]) -> None:
    stage, app = orderly
    # One computation at a time, one delivery per destination at a time, destinations beside each other.
    assert sorted(stage.log()) == ["begin one held 0", "begin one job a 0", "begin one job b 0"]
    assert app.tell("ended key-held") == "False", "it runs"
    assert app.tell("ended key-urgent") == "False", "it waits"
    assert app.tell("ended nobody") == "False", "it is unknown"
    app.let_go()
    for line in ("begin one broken 0", "end one routine 0", "end one job a 1"):
        stage.wait_log(line)
    wait_for(lambda: app.tell("ended key-broken") == "True", what="a failed attempt to count as ended")
    assert app.tell("ended key-held") == "True"
    computed = [line for line in stage.log() if line.startswith("begin") and " job " not in line]
    # The urgent one overtakes; the same key twice runs once.
    assert computed == ["begin one held 0", "begin one urgent 0", "begin one routine 0", "begin one broken 0"]
    # A key that is through is through.
    app.tell("process key-routine routine 0 10")
    app.tell("process key-last last 0 10")
    stage.wait_log("end one last 0")
    assert stage.log().count("begin one routine 0") == 1


def test_executor_ids_are_fresh_per_start(orderly: tuple[Stage, App]) -> None:
    """A process that starts beside another must not take the other's running work for its own."""
    stage, first = orderly
    first.hold()
    first.tell("process key-later later 0 10")
    stage.wait_log("begin one later 0")
    second = stage.app("two")
    assert first.executor_id != second.executor_id
    assert set(stage.workers()) == {first.executor_id, second.executor_id}
    # It runs what comes now, and has not begun what runs elsewhere.
    second.tell("process key-new new 0 10")
    stage.wait_log("end two new 0")
    assert [line for line in stage.log() if "later" in line] == ["begin one later 0"]
    second.stop()
    first.let_go()
    stage.wait_log("end one later 0")
    first.stop()


def test_the_engine_keeps_its_rows_through_our_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the same SQLAlchemy engine, so that WAL and synchronous=FULL hold for both."""
    configured: list[dict[str, object]] = []

    class Library:
        def __init__(self, *, config: dict[str, object]) -> None:
            configured.append(config)

        @staticmethod
        def workflow(**_: object) -> Callable[[object], object]:
            return lambda function: function

    monkeypatch.setattr(engine_module, "DBOS", Library)
    database = database_in(tmp_path)
    engines = [engine_module.Engine(database, lambda *_: None, lambda *_: None) for _ in range(2)]
    assert all(config["system_database_engine"] is database for config in configured)
    # A constant: the default is a hash of the code, and after an update work in flight would wait for ever.
    assert {config["application_version"] for config in configured} == {"1"}
    assert [config["executor_id"] for config in configured] == [one.executor_id for one in engines]
    assert len({one.executor_id for one in engines}) == 2


# ── takeover ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def takeover(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stage, Callable[[str], App]]]:
    """Three engines on one file: one is killed, one frozen, both in the middle of work; the third looks on."""
    for made in _stage(tmp_path_factory.mktemp("takeover")):
        killed = made.app("killed", held=True)
        killed.tell("process key-1 job1 0 10")
        killed.tell("deliver key-2 job2 pacs 0 10")
        made.wait_log("begin killed job1 0")
        made.wait_log("begin killed job2 pacs 0")
        frozen = made.app("frozen", held=True)
        frozen.tell("process key-3 job3 0 10")
        made.wait_log("begin frozen job3 0")
        heir = made.app("heir")
        killed.process.send_signal(signal.SIGKILL)
        killed.process.wait(10)
        while True:
            frozen.process.send_signal(signal.SIGSTOP)
            if made.writable():
                break
            # Frozen with the lock in its hands: that blocks everybody, and is another story.
            frozen.process.send_signal(signal.SIGCONT)
        apps = {app.name: app for app in (killed, frozen, heir)}
        yield made, apps.__getitem__


def test_the_work_of_a_vanished_process_is_taken_over(
    takeover: tuple[Stage, Callable[[str], App]],
) -> None:
    stage, _ = takeover
    for line in ("end heir job1 0", "end heir job2 pacs 0"):
        stage.wait_log(line, DEAD_AFTER_S + 20)
    assert not any(line.startswith("end killed") for line in stage.log())


def test_a_process_that_was_declared_dead_leaves_at_once(
    takeover: tuple[Stage, Callable[[str], App]],
) -> None:
    stage, app = takeover
    stage.wait_log("end heir job3 0", DEAD_AFTER_S + 20)
    wait_for(lambda: stage.workers() == [app("heir").executor_id], what="only the living to be listed")
    frozen = app("frozen").process
    frozen.send_signal(signal.SIGCONT)
    assert frozen.wait(20) == FENCED_EXIT_CODE
    assert "end frozen job3 0" not in stage.log()
    assert stage.log().count("begin heir job3 0") == 1
