"""The compute child: loaded once, one request at a time, and dead without harm."""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from child import ignore
from peers import wait_for

from dicomnode.config import Compute
from dicomnode.denoise import Manifest, Progress
from dicomnode.errors import ConfigError, NodeError, WorkerDied
from dicomnode.worker import Outcome, Request, Worker, child_environment, configured_worker
from pipelines.base import Execution, Options, load, pipeline_hash


def alive(pid: int) -> bool:
    """Is there such a process that is no zombie?"""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_the_child_runs_the_network_as_configured(controls: Path) -> None:
    """On the device and in the precision, which are part of the hash; what cannot be is said when it is loaded."""
    made = Worker(1, "cpu", "fp32")
    expected = pipeline_hash(load("fast-2.5d", Execution("cpu", "fp32", 1)).card, Options())
    assert made.describe("fast-2.5d", Options()) == expected
    made.stop()
    made = Worker(1, "cuda", "int8")
    with pytest.raises(ConfigError, match=r"pipeline 'fast-2\.5d' cannot be loaded: ExecutionRefused: .*: set|install"):
        made.describe("fast-2.5d", Options())
    made.stop()


class Running:
    """A request under way in a thread of its own."""

    def __init__(self, worker: Worker, request: Request, controls: Path, report: Any = ignore) -> None:
        self.result: Outcome | BaseException | None = None
        (controls / "hold").touch()

        def run() -> None:
            try:
                self.result = worker.run(request, report)
            except BaseException as error:  # handed to the test
                self.result = error

        self.thread = threading.Thread(target=run)
        self.thread.start()
        wait_for(lambda: (controls / "running").exists() and (controls / "running").read_text(), 20)
        self.pid = int((controls / "running").read_text())

    def end(self) -> Outcome | BaseException | None:
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.result


def test_models_are_loaded_once_and_words_do_not_reach_the_protocol(
    worker: Worker, controls: Path, request_for: Callable[..., Request]
) -> None:
    told: list[Progress] = []
    described = worker.describe("test-talkative", Options())
    pid = worker.pid
    for job_id in ("first", "second"):
        outcome = worker.run(request_for("test-talkative", job_id), told.append)
        assert outcome == Outcome("done", figures={"pipeline_hash": described})
        assert len(Manifest.read(controls / "derived" / job_id).instances) == 6
    assert worker.pid == pid
    assert (controls / "loads").read_text() == "x"
    assert [(one.slices, one.of) for one in told] == [(k, 6) for k in (*range(7), 6)] * 2
    assert told[-1].seconds == pytest.approx(Manifest.read(controls / "derived" / "second").seconds, abs=0.5)


def test_what_describe_says_is_the_hash_of_card_and_options(worker: Worker) -> None:
    options = Options(blend=0.5)
    assert worker.describe("identity", options) == pipeline_hash(load("identity").card, options)
    assert worker.describe("identity", Options()) != worker.describe("identity", options)


def test_a_strength_out_of_range_is_refused_when_the_node_starts(worker: Worker) -> None:
    with pytest.raises(NodeError, match=r"^pipeline 'st3d': strength 1\.2 is out of range; st3d takes 0 to 1"):
        worker.describe("st3d", Options(strength=1.2))
    for name, strength in (("st3d", 0.7), ("fast-2.5d", 1.2)):
        assert worker.describe(name, Options(strength=strength)) != worker.describe(name, Options())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test-unloadable", "RuntimeError: no weights here"),
        ("test-absent", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("nobody", "UnknownPipeline: no pipeline 'nobody'"),
    ],
)
def test_a_pipeline_that_cannot_be_loaded_is_named_with_its_error(worker: Worker, name: str, reason: str) -> None:
    with pytest.raises(NodeError, match=f"pipeline '{name}' cannot be loaded: {reason}"):
        worker.describe(name, Options())
    assert worker.describe("identity", Options())


def test_a_dead_child_costs_the_attempt_and_the_next_request_starts_another(
    worker: Worker, controls: Path, request_for: Callable[..., Request]
) -> None:
    running = Running(worker, request_for("test-held"), controls)
    os.kill(running.pid, signal.SIGKILL)
    died = running.end()
    assert isinstance(died, WorkerDied)
    assert "signal 9" in str(died)
    (controls / "hold").unlink()
    assert worker.run(request_for("test-held"), ignore).kind == "done"
    assert worker.pid != running.pid


@pytest.mark.parametrize("uses", ["test-greedy", "test-greedy-while-loading"])
def test_a_child_without_memory_ends_and_costs_the_attempt(
    worker: Worker, controls: Path, request_for: Callable[..., Request], uses: str
) -> None:
    """What it has is free then, and the next attempt may find enough."""
    worker.describe("identity", Options())
    first = worker.pid
    with pytest.raises(WorkerDied, match="ran out of memory"):
        worker.run(request_for(uses), ignore)
    assert worker.pid is None
    assert not list(controls.glob("derived/*"))
    assert worker.run(request_for("identity"), ignore).kind == "done"
    assert worker.pid != first


def test_the_memory_of_a_series_is_given_back_after_it(
    worker: Worker, controls: Path, request_for: Callable[..., Request]
) -> None:
    """What the networks' allocator keeps within a series: here 256 MB, freed and still held."""

    def resident_mb(status: str) -> float:
        (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024 / 1e6

    assert worker.run(request_for("test-keeping"), ignore).kind == "done"
    worker.describe("identity", Options())  # it answers when it is through with the series
    within = resident_mb((controls / "memory").read_text())
    assert resident_mb(Path(f"/proc/{worker.pid}/status").read_text()) < within - 200


def test_cancel_kills_the_child_of_that_job_only(
    worker: Worker, controls: Path, request_for: Callable[..., Request]
) -> None:
    running = Running(worker, request_for("test-held", "mine"), controls)
    assert not worker.cancel("another")
    assert alive(running.pid)
    assert worker.cancel("mine")
    assert isinstance(running.end(), WorkerDied)
    assert not alive(running.pid)
    assert not worker.cancel("mine")
    assert not (controls / "derived" / "mine").exists()


def test_a_cancel_that_comes_with_the_answer_costs_the_next_job_nothing(
    worker: Worker, request_for: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child dies of it a moment after the answer was read, and as late as it may: when it is waited for."""
    worker.describe("identity", Options())
    process = worker._process
    assert process is not None
    words, kill, wait = process.stdout, process.kill, process.wait
    assert words is not None

    def cancelled_at_the_answer() -> Iterator[str]:
        for line in words:
            if "progress" not in line:
                assert worker.cancel("first")
            yield line

    def die(timeout: float) -> int:
        kill()
        return wait(timeout)

    monkeypatch.setattr(process, "stdout", cancelled_at_the_answer())
    monkeypatch.setattr(process, "kill", lambda: None)
    monkeypatch.setattr(process, "wait", die)
    assert worker.run(request_for("identity", "first"), ignore).kind == "done"
    monkeypatch.undo()
    assert worker.pid is None, "the next job would be given to the dying child"


def test_a_listener_that_fails_never_lets_an_old_answer_reach_the_next_job(
    worker: Worker, controls: Path, request_for: Callable[..., Request]
) -> None:
    """The child still speaks of the first job then; its words must not be taken for the second's."""

    def failing(progress: Progress) -> None:
        raise OSError("the progress could not be written")

    with pytest.raises(OSError, match="progress"):
        worker.run(request_for("identity", "first"), failing)
    outcome = worker.run(request_for("nobody", "second"), ignore)
    assert outcome.kind == "failed"
    assert "no pipeline 'nobody'" in outcome.detail


def test_a_child_that_speaks_nonsense_is_ended(worker: Worker, request_for: Callable[..., Request]) -> None:
    worker.describe("identity", Options())
    first = worker.pid
    assert worker._process is not None
    assert worker._process.stdin is not None
    worker._process.stdin.write('{"describe": "identity", "options": {"strength": "oops"\n')  # the child ends by it
    worker._process.stdin.flush()
    with pytest.raises(WorkerDied, match="exit code 1"):
        worker.run(request_for("identity"), ignore)
    assert worker.run(request_for("identity"), ignore).kind == "done"
    assert worker.pid != first


def test_words_between_the_answers_end_the_child(
    worker: Worker, request_for: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should something write into the protocol after all, nothing that follows is trusted."""
    worker.describe("identity", Options())
    first = worker.pid
    assert worker._process is not None
    monkeypatch.setattr(worker._process, "stdout", iter(["noise\n", '{"kind": "done"}\n']))
    with pytest.raises(WorkerDied, match="signal 9"):
        worker.run(request_for("identity"), ignore)
    monkeypatch.undo()
    assert worker.pid is None
    assert first is not None
    assert not alive(first)


def test_a_stopped_worker_starts_no_child_again(
    worker: Worker, controls: Path, request_for: Callable[..., Request]
) -> None:
    running = Running(worker, request_for("test-held"), controls)
    worker.stop()
    assert isinstance(running.end(), WorkerDied)
    wait_for(lambda: not alive(running.pid))
    with pytest.raises(WorkerDied):
        worker.run(request_for("identity"), ignore)
    assert worker.pid is None


def test_a_stop_in_the_middle_of_a_job_is_not_blamed_on_the_child(
    worker: Worker,
    request_for: Callable[..., Request],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker.describe("identity", Options())
    process = worker._process
    assert process is not None
    pipe = process.stdout
    assert pipe is not None

    class StoppedMeanwhile:
        """The child's words, whose reader comes to the pipe when it was just closed."""

        def __iter__(self) -> Iterator[str]:
            worker.stop()
            return iter(pipe)

        def close(self) -> None:
            pipe.close()

    monkeypatch.setattr(process, "stdout", StoppedMeanwhile())
    with pytest.raises(WorkerDied, match="signal 9"):
        worker.run(request_for("identity"), ignore)
    assert [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING] == []


def test_a_child_that_is_silent_and_stays_is_killed(
    worker: Worker, request_for: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs an attempt, as every lost child; it is no fault of the node."""
    worker.describe("identity", Options())
    process = worker._process
    assert process is not None
    waits: list[float] = []
    wait = process.wait

    def patient(timeout: float) -> int:
        waits.append(timeout)
        if len(waits) == 1:
            raise subprocess.TimeoutExpired("child", timeout)
        return wait(timeout)

    monkeypatch.setattr(process, "wait", patient)
    monkeypatch.setattr(process, "stdout", iter([]))
    with pytest.raises(WorkerDied, match="signal 9"):
        worker.run(request_for("identity"), ignore)
    monkeypatch.undo()
    assert not alive(process.pid)


def test_a_child_that_cannot_be_killed_does_not_keep_the_node_from_stopping(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one does not die while it waits for a disk that has gone."""
    worker.describe("identity", Options())
    process = worker._process
    assert process is not None

    def unending(timeout: float) -> int:
        raise subprocess.TimeoutExpired("child", timeout)

    monkeypatch.setattr(process, "wait", unending)
    worker.stop()
    assert f"worker {process.pid} was killed and does not end" in caplog.text
    monkeypatch.undo()
    process.wait(20)


def test_the_child_ends_with_its_parent_whatever_it_does(controls: Path, request_for: Callable[..., Request]) -> None:
    (controls / "hold").touch()
    code = (
        "import sys, json; from dicomnode.worker import Worker, Request\n"
        "Worker(1).run(Request(**json.loads(sys.argv[1])), lambda progress: None)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, json.dumps(asdict(request_for("test-held")))])
    wait_for(lambda: (controls / "running").exists() and (controls / "running").read_text(), 30)
    child = int((controls / "running").read_text())
    parent.kill()
    parent.wait(10)
    wait_for(lambda: not alive(child), 10, "the orphan to end")


def test_the_child_yields_to_reception(worker: Worker) -> None:
    worker.describe("identity", Options())
    assert worker.pid is not None
    assert os.getpriority(os.PRIO_PROCESS, worker.pid) >= min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
    # In a session of its own its niceness would count for nothing: Linux shares the cores among sessions first.
    assert os.getsid(worker.pid) == os.getsid(0)
    assert os.getpgid(worker.pid) == worker.pid != os.getpgrp()  # Ctrl-C in the node's terminal is not for the child


def test_what_the_c_library_is_told_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=7")
    assert child_environment(2)["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1:glibc.malloc.tcache_count=7"


def test_the_memory_of_the_child_comes_in_large_pages(worker: Worker) -> None:
    """Where glibc asks for them and the kernel gives them to who asks."""
    name, version = platform.libc_ver()
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    on_demand = setting.exists() and "[madvise]" in setting.read_text()
    if name != "glibc" or tuple(map(int, version.split("."))) < (2, 35) or not on_demand:
        pytest.skip("this system gives no large pages to malloc")
    worker.describe("identity", Options())
    _, heap = Path(f"/proc/{worker.pid}/smaps").read_text().split("[heap]", 1)
    flags = next(line for line in heap.splitlines() if line.startswith("VmFlags:"))
    assert "hg" in flags.split()


@pytest.mark.parametrize(("configured", "threads"), [(0, 3), (2, 2), (1000, 3)])
def test_the_child_is_told_what_is_configured_and_no_more_threads_than_cores(
    controls: Path, monkeypatch: pytest.MonkeyPatch, configured: int, threads: int
) -> None:
    """numpy, too, is told before Python begins: it has made its threads before the child's first own line."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 5, 6})
    made = configured_worker(Compute(threads=configured, device="cpu", precision="bf16"))
    made.describe("identity", Options())
    started = Path(f"/proc/{made.pid}")
    assert f"OMP_NUM_THREADS={threads}".encode() in (started / "environ").read_bytes().split(b"\0")
    told = json.loads((started / "cmdline").read_bytes().split(b"\0")[3])
    assert told == {"device": "cpu", "precision": "bf16", "threads": threads}
    made.stop()
