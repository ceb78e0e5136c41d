"""The compute child: a process of its own that keeps the models loaded and runs one series at a time.

Parent and child speak JSON lines over the child's stdin and stdout: paths in, progress out, files on disk. A network
that crashes in native code, or runs out of memory as Python or the system tells it, ends the child and costs one
attempt; the node, its associations and its database live on. The child ends itself when the parent's end of the pipe
closes, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TextIO

from dicomnode.config import Compute, Derivation
from dicomnode.denoise import Progress, Report, Withheld, denoise_series, identify
from dicomnode.errors import ConfigError, NodeError, WorkerDied, fault, ground_gave_way
from pipelines.base import Device, Execution, Options, Pipeline, PipelineFault, Precision, load
from pipelines.volume import SeriesRefused

log = logging.getLogger(__name__)

NICENESS = 10
"""Reception and delivery go first."""
_END_WAIT_S = 5.0
_OUT_OF_MEMORY = 12
"""Exit code of the child; ENOMEM."""


@dataclass(frozen=True, slots=True)
class Request:
    """Work for the child."""

    job_id: str
    paths: tuple[str, ...]
    out: str
    uses: str
    strength: float
    blend: float
    fingerprint: str
    created_at: str
    """ISO 8601 with the offset of the server's time zone: readers take times without a zone as local."""
    settings: dict[str, Any]
    """The fields of `Derivation`."""
    sha256: tuple[str, ...] | None = None
    """Hexadecimal, of the data set in each of `paths` as it was received; None if nobody recorded it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the child's work ended.

    ``kind`` is ``done`` (the folder is there), ``refused`` (gate), ``withheld`` (guard), ``no-infrastructure`` (disk
    full or the like: later again) or ``failed``. `detail` says why; `figures` holds what was measured.
    """

    kind: str
    detail: str = ""
    figures: dict[str, Any] | None = None


def keep_headers_out_of_the_log() -> None:
    """Silence the libraries that quote header values, patient names among them, in warnings and messages."""
    logging.captureWarnings(True)
    for name in ("pydicom", "pynetdicom", "py.warnings"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


class Worker:
    """The parent's handle on the child. Starts it when needed, and again after its death."""

    def __init__(self, threads: int, device: Device = "auto", precision: Precision = "auto") -> None:
        self._execution = Execution(device, precision, threads)
        self._process: subprocess.Popen[str] | None = None
        self._turn = threading.Lock()
        """Held by whoever speaks with the child."""
        self._guard = threading.Lock()
        """Held while the child is started or ended."""
        self._job_id: str | None = None
        self._stopped = False

    def describe(self, uses: str, options: Options) -> str:
        """Hash of an installed pipeline with these options; loads its weights, so it also proves that they load.

        Raises
        ------
        ConfigError
            If the pipeline cannot be loaded, with its error, or the options are not for it.
        WorkerDied
        """
        answer = self._ask({"describe": uses, "options": asdict(options)}, None, lambda progress: None)
        if "error" in answer:
            raise ConfigError(answer["error"])
        return str(answer["pipeline_hash"])

    def run(self, request: Request, report: Report) -> Outcome:
        """Do the work in the child and wait for it.

        Raises
        ------
        WorkerDied
            If the child ended before it answered (killed, out of memory, a crash in native code).
        """
        answer = self._ask({"run": asdict(request)}, request.job_id, report)
        return Outcome(**answer)

    def cancel(self, job_id: str) -> bool:
        """Kill the child if it works on `job_id`; True if it did."""
        with self._guard:
            if self._job_id != job_id or self._process is None:
                return False
            self._process.kill()
            # Under the guard: its answer may be in the pipe already, and the next job must not go to a dying process.
            _ended(self._process)
            return True

    def stop(self) -> None:
        """End the child, whatever it does, and start none again; the attempt is taken up at the next start."""
        with self._guard:
            self._stopped = True
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            _ended(process)
            _close(process)

    @property
    def pid(self) -> int | None:
        """Process id of the child, if one runs."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def _ask(self, message: dict[str, Any], job_id: str | None, report: Report) -> dict[str, Any]:
        with self._turn:
            with self._guard:
                process = self._started()
                self._job_id = job_id
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(message) + "\n")
                process.stdin.flush()
                for line in process.stdout:
                    answer: dict[str, Any] = json.loads(line)
                    if "progress" not in answer:
                        return answer
                    report(Progress(**answer["progress"]))
            except BrokenPipeError:
                log.warning("worker %d ended before it took its work", process.pid)
            except ValueError as error:
                if not self._stopped:  # else it is `stop` that closed the pipe
                    log.error("worker %d said what is no answer (%s); it is ended", process.pid, error)
                process.kill()
            except BaseException:
                # Its words for this request would be taken for the answer to the next.
                process.kill()
                _ended(process)
                raise
            finally:
                with self._guard:
                    self._job_id = None
            raise WorkerDied(f"the worker process {_ended(process)}")

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        if self._stopped:
            raise WorkerDied("the node is stopping")
        if self._process is not None:
            _close(self._process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dicomnode.worker", json.dumps(asdict(self._execution))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(self._execution.threads),
            # Not ours to receive: Ctrl-C in the terminal is for the node, which stops its child itself. But no session
            # of its own: Linux shares the cores among sessions first (sched(7), autogroup), and a nice child in another
            # one takes as much as all of reception.
            process_group=0,
        )
        log.info("worker process %d started", self._process.pid)
        return self._process


def child_environment(threads: int) -> dict[str, str]:
    """Environment variables of a process that computes: what is read before the first line of its own.

    numpy makes its threads when it is imported. glibc (2.35 and later; others ignore it) asks for large pages where the
    kernel gives them to who asks (transparent_hugepage "madvise"): planes are megabytes large and taken anew all the
    time, and of small pages each costs a page fault. What a site tells glibc itself comes last and so wins.
    """
    tunables = ":".join(filter(None, ("glibc.malloc.hugetlb=1", os.environ.get("GLIBC_TUNABLES"))))
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "GLIBC_TUNABLES": tunables}


def configured_worker(compute: Compute) -> Worker:
    """The child that a site configures, on all cores or fewer: more threads than cores only wait for each other.

    Reception keeps its speed because the child is nice.
    """
    cores = len(os.sched_getaffinity(0))
    return Worker(min(compute.threads or cores, cores), compute.device, compute.precision)


def _ended(process: subprocess.Popen[str]) -> str:
    """Wait for the end of a process that was killed or closed its pipe, kill it if it stays, and say how it ended."""
    for _ in range(2):
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(_END_WAIT_S)
            if code == _OUT_OF_MEMORY:
                return "ran out of memory"
            return f"ended with signal {-code}" if code < 0 else f"ended with exit code {code}"
        process.kill()
    log.error("worker %d was killed and does not end: it waits for the system, perhaps for a disk", process.pid)
    return "was killed and does not end"


def _close(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class _Child:
    """The other side: one request at a time, models kept by name."""

    def __init__(self, answers: TextIO, execution: Execution) -> None:
        self._answers = answers
        self._execution = execution
        self._pipelines: dict[str, Pipeline] = {}

    def serve(self, line: str) -> None:
        message = json.loads(line)
        if "describe" in message:
            self._say(self._describe(message["describe"], Options(**message["options"])))
        else:
            self._say(asdict(self._run(Request(**message["run"]))))
            _give_memory_back()

    def _describe(self, uses: str, options: Options) -> dict[str, Any]:
        try:
            return {"pipeline_hash": identify(self._pipeline(uses).card, options)}
        except NodeError as error:
            return {"error": f"pipeline {uses!r}: {error}"}
        except Exception as error:  # whatever a foreign pipeline raises while loading is its answer
            return {"error": f"pipeline {uses!r} cannot be loaded: {type(error).__name__}: {error}"}

    def _run(self, request: Request) -> Outcome:
        try:
            pipeline = self._pipeline(request.uses)
        except MemoryError as error:
            _run_out(error)
        except Exception as error:  # as in `_describe`; no header was read yet that its words could quote
            return Outcome("failed", f"{type(error).__name__}: {error}")
        try:
            manifest = denoise_series(
                [Path(path) for path in request.paths],
                Path(request.out),
                pipeline=pipeline,
                options=Options(request.strength, request.blend),
                fingerprint=request.fingerprint,
                settings=Derivation(**request.settings),
                created_at=datetime.fromisoformat(request.created_at),
                report=self._report,
                sha256=request.sha256,
            )
        except SeriesRefused as refusal:
            return Outcome("refused", str(refusal))
        except Withheld as verdict:
            return Outcome("withheld", str(verdict), verdict.figures)
        except OSError as error:
            if ground_gave_way(error):
                return Outcome("no-infrastructure", f"{type(error).__name__}: {error}")
            if str(error.filename) in request.paths:
                what = "is gone" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
                return Outcome("failed", f"{error.filename} {what}; restore it from a backup and retry the job")
            return Outcome("failed", f"a fault in the pipeline or the node: {fault(error)}")
        except MemoryError as error:
            _run_out(error)
        except (NodeError, PipelineFault) as error:  # without what caused it, which may quote the header
            return Outcome("failed", str(error))
        except Exception as error:  # a fault in a pipeline must end as a visible outcome of this job, with its place
            return Outcome("failed", f"a fault in the pipeline or the node: {fault(error)}")
        return Outcome("done", figures={"pipeline_hash": manifest.pipeline_hash})

    def _pipeline(self, uses: str) -> Pipeline:
        if uses not in self._pipelines:
            self._pipelines[uses] = load(uses, self._execution)
        return self._pipelines[uses]

    def _report(self, progress: Progress) -> None:
        self._say({"progress": asdict(progress)})

    def _say(self, answer: dict[str, Any]) -> None:
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()


def _give_memory_back() -> None:
    """Between two series, what the networks' library keeps for the next one; nothing where no network is loaded."""
    openvino_core = sys.modules.get("pipelines.openvino_core")
    if openvino_core is not None:
        openvino_core.give_memory_back()


def _run_out(error: MemoryError) -> NoReturn:
    """End the process: nothing else gives all memory back for sure, and the next attempt may find more."""
    log.error("out of memory: %s", fault(error))
    os._exit(_OUT_OF_MEMORY)


def main() -> None:
    """Entry of the child process; its argument is an `Execution` in JSON."""
    execution = Execution(**json.loads(sys.argv[1]))
    os.nice(NICENESS)
    # A print() of some library must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s worker: %(message)s")
    keep_headers_out_of_the_log()
    requests: list[str] = []
    ready = threading.Condition()

    def listen() -> None:
        for line in sys.stdin:
            with ready:
                requests.append(line)
                ready.notify()
        # The parent is gone or wants us gone: nobody would take the result.
        os._exit(0)

    threading.Thread(target=listen, name="parent", daemon=True).start()
    child = _Child(answers, execution)
    while True:
        with ready:
            ready.wait_for(lambda: requests)
            line = requests.pop(0)
        child.serve(line)


if __name__ == "__main__":
    main()
