"""The real node as a process of its own, with a configuration made for the test, to be killed and started again."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from peers import free_port, wait_for

PLUGINS = Path(__file__).parent / "plugins"
_START_S = 60.0
_STOP_S = 30.0


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def alive(pid: int) -> bool:
    """Does this process run? A zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


class NodeProcess:
    """``dicomnode run`` in `folder`; a context manager that leaves no process behind.

    Parameters
    ----------
    folder
        Holds config.yaml, the spool, node.db and node.log.
    pacs_port
        Port of the destination ``pacs``; more destinations come with `settings`.
    settings
        Changes to the configuration below, section by section. Times are short, so that tests are.
    environment
        Variables for the process, over those of the test.
    prefix
        Command put before python (strace, …).
    """

    def __init__(
        self,
        folder: Path,
        pacs_port: int,
        settings: Mapping[str, Any] | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.spool = folder / "spool"
        self.database = folder / "node.db"
        self.log = folder / "node.log"
        self.controls = folder / "controls"
        """Folder through which tests steer the pipelines of tests/plugins."""
        self._prefix = prefix
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.controls.mkdir(exist_ok=True)
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(PLUGINS),
            "TEST_PIPELINES": str(self.controls),
            "PYTHONUNBUFFERED": "1",
            **(environment or {}),
        }
        base: dict[str, Any] = {
            "node": {"ae_title": "NODE", "port": self.port, "spool": "spool", "database": "sqlite:///node.db"},
            "reception": {"min_free_mb": 1, "called_ae_titles": ["NODE", "ANY"]},
            "assembly": {"quiet_s": 0.5, "quiet_without_evidence_s": 3.0},
            "delivery": {"retry_first_s": 0.2, "retry_max_s": 1.0},
            "destinations": {
                "pacs": {
                    "ae_title": "PACS",
                    "host": "127.0.0.1",
                    "port": pacs_port,
                    "connect_timeout_s": 2,
                    "acse_timeout_s": 3,
                    "dimse_timeout_s": 3,
                }
            },
            "routes": [
                {"name": "ct", "when": {"Modality": "CT"}, "pipeline": "identity", "send_to": ["pacs"]},
                {"name": "rest", "action": "forward", "send_to": ["pacs"]},
            ],
        }
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(_merged(base, settings or {}), sort_keys=False))

    def __enter__(self) -> NodeProcess:
        try:
            self.start()
        except BaseException:  # nobody else ends it
            if self.running:
                self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.running:
            self.kill()
        if kind is not None and self.log.exists():
            print(self.log.read_text()[-8000:])

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Was it started, and did nobody end it?"""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start and wait until it listens."""
        with self.log.open("ab") as log:
            begin = log.tell()
            self._process = subprocess.Popen(
                [*self._prefix, sys.executable, "-m", "dicomnode.cli", "run", "--config", str(self.config)],
                stdout=log,
                stderr=log,
                env=self._environment,
                cwd=self.folder,
                start_new_session=True,
            )

        def ready() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, f"the node ended at start: {self.log.read_text()[begin:][-3000:]}"
            return b"dicomnode: ready" in self.log.read_bytes()[begin:]

        wait_for(ready, _START_S, "the node to listen")

    def kill(self) -> None:
        """``kill -9`` the node (not its child, which must notice by itself)."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(_STOP_S)

    def stop(self) -> int:
        """SIGTERM, wait, exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(_STOP_S)

    def restart(self) -> None:
        """Kill -9 and start again."""
        self.kill()
        self.start()

    def query(self, sql: str, *values: object) -> list[dict[str, Any]]:
        """Rows of the node's database, read by sqlite3 without any code of the node."""
        connection = sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=20)
        connection.row_factory = sqlite3.Row
        try:
            return [dict(row) for row in connection.execute(sql, values)]
        finally:
            connection.close()

    def jobs(self, kind: str = "PIPELINE") -> list[dict[str, Any]]:
        """Jobs of a kind, oldest first."""
        return self.query("SELECT * FROM jobs WHERE kind = ? ORDER BY created_at, id", kind)

    def wait_jobs(self, *states: str, kind: str = "PIPELINE", timeout_s: float = 40.0) -> list[dict[str, Any]]:
        """Wait until the states of the jobs of `kind`, oldest first, are `states`; return the jobs."""
        wait_for(
            lambda: [job["state"] for job in self.jobs(kind)] == list(states),
            timeout_s,
            f"{kind} jobs to be {states}",
        )
        return self.jobs(kind)

    def series(self, series_uid: str) -> dict[str, Any]:
        """Row of a series; empty if the node has not indexed any of it."""
        rows = self.query("SELECT * FROM series WHERE series_uid = ?", series_uid)
        return rows[0] if rows else {}

    def wait_series(
        self, series_uid: str, *states: str, kind: str = "PIPELINE", timeout_s: float = 40.0
    ) -> list[dict[str, Any]]:
        """Wait until the states of the jobs of one series, by generation, are `states`; return the jobs."""
        sql = "SELECT * FROM jobs WHERE series_uid = ? AND kind = ? ORDER BY generation, route"
        seen: list[dict[str, Any]] = []

        def arrived() -> bool:
            seen[:] = self.query(sql, series_uid, kind)
            return [job["state"] for job in seen] == list(states)

        try:
            wait_for(arrived, timeout_s, f"{kind} jobs of {series_uid} to be {states}")
        except AssertionError as error:
            raise AssertionError(f"{error}; they are {[(job['state'], job['reason']) for job in seen]}") from None
        return seen

    def children(self) -> list[int]:
        """Process ids of the node's living children."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/children")
        return [int(pid) for task in tasks for pid in task.read_text().split() if alive(int(pid))]

    @contextmanager
    def holding(self) -> Iterator[None]:
        """The pipeline ``test-held`` waits until the end of the block."""
        (self.controls / "running").unlink(missing_ok=True)
        (self.controls / "hold").touch()
        try:
            yield
        finally:
            (self.controls / "hold").unlink()

    def held_child(self) -> int:
        """Process id of the child in which ``test-held`` waits, once it does."""
        said = self.controls / "running"
        return int(wait_for(lambda: said.exists() and said.read_text(), 30, "the held pipeline to run"))

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``dicomnode ARGUMENTS --config …`` beside the running node."""
        return subprocess.run(
            [sys.executable, "-m", "dicomnode.cli", *arguments, "--config", str(self.config)],
            env=self._environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def events(self, job_id: str) -> list[str]:
        """History of a job as ``STATE what`` lines."""
        rows = self.query("SELECT state, what FROM job_events WHERE job_id = ? ORDER BY id", job_id)
        return [f"{row['state']} {row['what']}" for row in rows]
