"""Programs that run beside the demo: started on a free port of 127.0.0.1, watched, and stopped by their process id."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

HOST = "127.0.0.1"
_PORTS = (11000, 32000)
"""Below the range from which the kernel takes the local ports of outgoing connections."""
_LOOK_EVERY_S = 0.1
_ASK_EVERY_S = 1.0
"""A SIGTERM that arrives while a Python program goes to sleep is noticed only when it wakes: the next one wakes it."""
_LOG_TAIL_CHARACTERS = 2000


class DemoFailed(Exception):
    """Something the demo needs does not work; the message says what, and where to look."""


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens."""
    for _ in range(1000):
        port = random.SystemRandom().randrange(*_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise DemoFailed(f"no free port between {_PORTS[0]} and {_PORTS[1]} on {HOST}")


def listening(port: int) -> bool:
    """Does somebody accept connections there?"""
    try:
        with socket.create_connection((HOST, port), timeout=1):
            return True
    except OSError:
        return False


class Program:
    """A program in the background with its log; gone when its block ends, however it ends.

    Parameters
    ----------
    name
        What messages call it.
    command
        Never run through a shell.
    log
        Its output goes there.
    ready
        True as soon as it can be used.
    timeout_s
        Until it is ready, and again until it has ended.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, ready: Callable[[], bool], timeout_s: float = 60.0
    ) -> None:
        self.name = name
        self._command = command
        self._log = log
        self._ready = ready
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Program:
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(
                self._command,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                # without it the peer's acknowledgements hold up each image for 40 ms (DCMTK, in Orthanc)
                env={**os.environ, "TCP_NODELAY": "1"},
                # Ctrl-C is for the demo, which stops its programs in order
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + self._timeout_s
            while not self._ready():
                self.check()
                if time.monotonic() > deadline:
                    raise DemoFailed(f"{self.name} is not ready after {self._timeout_s:.0f} s; see {self._log}")
                time.sleep(_LOOK_EVERY_S)
        except BaseException:  # Ctrl-C too: no program may be left behind
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def check(self) -> None:
        """Raise `DemoFailed`, with the end of its log, if it has ended."""
        if self._process is not None and self._process.poll() is not None:
            said = self._log.read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:]
            raise DemoFailed(f"{self.name} ended with exit code {self._process.returncode}; its last words:\n{said}")

    def stop(self) -> None:
        """Ask it to end, every second again; kill it if it does not."""
        if self._process is None:
            return
        deadline = time.monotonic() + self._timeout_s
        while self._process.poll() is None:
            if time.monotonic() < deadline:
                self._process.terminate()
            else:
                self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_ASK_EVERY_S)
        self._process = None
