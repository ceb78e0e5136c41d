"""Reception while a network runs: DCMTK's storescu sends to a node that is idle, and to one that denoises, by turns.

    python benchmarks/ingest_under_load.py [--slices 300] [--rounds 5] [--pipeline st3d] [--load-slices 200]

The node is a process like any other installation's; the load is one long series, whose job is stopped for the idle
rounds and begun again for the others. A busy round counts from a moment when denoised slices come out to the end of the
association, and only if the job still runs then. Every image is a new one to the node: storescu gives it a new UID.

The sender runs on the same machine, which a scanner does not, in a session of its own, so that it has its share of the
cores whatever the node does. Only ratios within one run mean anything on a machine that is shared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from machine import description, own_cores

from dicomnode.benchmark import write_phantom
from dicomnode.db import JobState, SeriesState

HOST = "127.0.0.1"
_BAR = 2.0
"""Most that reception may take under load, in times of what it takes idle."""
_POLL_S = 0.1
_START_S = 120.0
_RUNNING_S = 900.0
"""Longest wait for the first denoised slice."""
_TIMEOUT_S = 60
"""Of storescu, for one answer; as impatient as scanners are."""


@dataclass(frozen=True, slots=True)
class Sent:
    """One association."""

    wall_s: float
    failed: int
    """Images without an answer of success."""


class Node:
    """``dicomnode run`` in `folder`; a context manager. What comes from the AE title LOAD is denoised by `pipeline`."""

    def __init__(self, folder: Path, pipeline: str, threads: int) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port = int(probe.getsockname()[1])
        nobody = {"ae_title": "NOBODY", "host": HOST, "port": 9}  # no job comes so far as to be sent
        self._write(
            {
                "node": {"port": self.port, "spool": "spool", "database": "sqlite:///node.db"},
                "assembly": {"quiet_s": 2, "quiet_without_evidence_s": 4},
                "compute": {"threads": threads},
                "destinations": {"nobody": nobody},
                "routes": [
                    {"name": "load", "when": {"CallingAETitle": "LOAD"}, "pipeline": pipeline, "send_to": ["nobody"]},
                    {"name": "rest", "action": "ignore"},
                ],
            }
        )

    def _write(self, config: dict[str, object]) -> None:
        self.config = self.folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(config, sort_keys=False))

    def __enter__(self) -> Node:
        with (self.folder / "node.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dicomnode.cli", "run", "--config", str(self.config)],
                stdout=log,
                stderr=log,
                start_new_session=True,  # as a service has one
            )
        self.wait(
            lambda: b"dicomnode: ready" in (self.folder / "node.log").read_bytes(), _START_S, "the node to listen"
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(60)

    def wait(self, condition: Callable[[], object], longest_s: float, what: str) -> None:
        """Wait for `condition`, or end with the node's last words."""
        deadline = time.monotonic() + longest_s
        while not condition():
            if self._process.poll() is not None or time.monotonic() > deadline:
                words = (self.folder / "node.log").read_text()[-2000:]
                raise SystemExit(f"{words}\nwaited in vain for {what}")
            time.sleep(_POLL_S)

    def query(self, sql: str, *values: str) -> list[tuple[object, ...]]:
        """Rows of its database, which is only looked at."""
        connection = sqlite3.connect(f"file:{self.folder / 'node.db'}?mode=ro", uri=True, timeout=60)
        try:
            return connection.execute(sql, values).fetchall()
        finally:
            connection.close()

    def send(self, calling: str, files: Path, count: int) -> Sent:
        """Send the images in the folder `files`, `count`, as one new series over one association."""
        waits = ["-to", str(_TIMEOUT_S), "-ta", str(_TIMEOUT_S), "-td", str(_TIMEOUT_S)]
        command = ["storescu", "-v", *waits, "-nh", "+sd", "+IR", str(count), "-aet", calling, "-aec", "DICOMNODE"]
        begun = time.perf_counter()
        done = subprocess.run(
            [*command, HOST, str(self.port), str(files)],
            env={**os.environ, "TCP_NODELAY": "1"},
            capture_output=True,
            text=True,
            errors="replace",
            start_new_session=True,
            check=False,
        )
        wall_s = time.perf_counter() - begun
        return Sent(wall_s, count - (done.stdout + done.stderr).count("Received Store Response (Success)"))

    def settle(self) -> None:
        """Wait until nothing that was received is still judged: each round begins on the same ground."""
        opened = "SELECT 1 FROM series WHERE state = ?"
        self.wait(lambda: not self.query(opened, SeriesState.OPEN), _START_S, "the series to be closed")

    @property
    def denoises(self) -> bool:
        """Does the job run, and do slices come out of it?"""
        return bool(self.query("SELECT 1 FROM jobs WHERE state = ? AND progress > 0", JobState.RUNNING))

    def load(self, command: str) -> None:
        """``cancel`` the job of the load, or ``retry`` it; returns when it is at rest, or gives slices."""
        ((job,),) = self.query("SELECT id FROM jobs WHERE pipeline IS NOT NULL")
        subprocess.run(
            [sys.executable, "-m", "dicomnode.cli", "jobs", command, str(job), "--config", str(self.config)],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        if command == "retry":
            self.wait(lambda: self.denoises, _RUNNING_S, "the first denoised slice")
        else:
            at_rest = "SELECT 1 FROM jobs WHERE state = ?"
            self.wait(lambda: self.query(at_rest, JobState.CANCELLED), _START_S, "the job to be cancelled")


def round_of(node: Node, busy: bool, files: Path, count: int) -> Sent:
    """Send once; `busy`: while the node denoises."""
    if busy:
        node.load("retry")
    node.settle()
    sent = node.send("SCANNER", files, count)
    if busy:
        if not node.denoises:
            raise SystemExit("the load ended before the association did: give it more slices (--load-slices)")
        node.load("cancel")
    return sent


def row(name: str, rounds: list[Sent], megabytes: float) -> str:
    """A line of the table."""
    walls = [one.wall_s for one in rounds]
    median = statistics.median(walls)
    return (
        f"| {name} | {median:.2f} [{min(walls):.2f}-{max(walls):.2f}] | {megabytes / median:.0f} "
        f"| {sum(one.failed for one in rounds)} |"
    )


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300, help="images that are sent (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pipeline", default="st3d")
    parser.add_argument("--load-slices", type=int, default=200, help="of the series that is denoised meanwhile")
    parser.add_argument("--threads", type=int, default=0, help="compute.threads (default: all cores)")
    arguments = parser.parse_args()
    if shutil.which("storescu") is None:
        raise SystemExit("storescu is not installed (Debian package dcmtk)")
    rounds: dict[bool, list[Sent]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = write_phantom(folder / "sent", arguments.slices)
        megabytes = sum(path.stat().st_size for path in files) / 1e6
        write_phantom(folder / "load", arguments.load_slices)
        with Node(folder, arguments.pipeline, arguments.threads) as node:
            node.send("LOAD", folder / "load", arguments.load_slices)
            node.wait(lambda: node.denoises, _RUNNING_S, "the first denoised slice")
            node.load("cancel")
            node.send("SCANNER", folder / "sent", arguments.slices)  # the first one is not like the others
            for number in range(arguments.rounds):
                for busy in (False, True) if number % 2 == 0 else (True, False):
                    rounds[busy].append(round_of(node, busy, folder / "sent", arguments.slices))
                    print(f"{'busy' if busy else 'idle'} {rounds[busy][-1].wall_s:.2f} s", file=sys.stderr, flush=True)
    ratio = statistics.median(one.wall_s for one in rounds[True]) / statistics.median(
        one.wall_s for one in rounds[False]
    )
    print(
        f"{description(own_cores())} Load {os.getloadavg()[0]:.1f}.\n{arguments.slices} images of 512x512, "
        f"{megabytes:.0f} MB, one association; {arguments.rounds} interleaved rounds, median [min-max]\n"
    )
    print("| the node | wall s | MB/s | failed stores |")
    print("|---|---|---|---|")
    print(row("idle", rounds[False], megabytes))
    print(row(f"denoises by {arguments.pipeline}", rounds[True], megabytes))
    print(f"\nratio {ratio:.2f} (at most {_BAR:g})")


if __name__ == "__main__":
    main()
