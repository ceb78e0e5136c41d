"""What a running node takes of the machine: resident memory, threads, descriptors."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from node_process import NodeProcess
from peers import wait_for

MAX_GROWTH_BYTES = 20 * 2**20
"""That hostile peers may cause."""
_STILL_S = 3.0


class Held(NamedTuple):
    """At one moment."""

    resident_bytes: int
    threads: int
    descriptors: int
    """But those of the database, which is not for callers: its pool opens files when it likes."""


def held(node: NodeProcess) -> Held:
    """What the node has now; its child process not counted."""
    proc = Path(f"/proc/{node.pid}")
    files: list[str] = []
    for one in (proc / "fd").iterdir():
        with suppress(FileNotFoundError):  # closed since
            files.append(str(one.readlink()))
    return Held(
        int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        sum(1 for _ in (proc / "task").iterdir()),
        sum(f"/{node.database.name}" not in one for one in files),
    )


def wait_until_still(node: NodeProcess) -> None:
    """Wait until the node starts no more threads of its own; some come a second after it listens."""
    seen = held(node).threads, time.monotonic()

    def still() -> bool:
        nonlocal seen
        if (threads := held(node).threads) != seen[0]:
            seen = threads, time.monotonic()
        return time.monotonic() - seen[1] > _STILL_S

    wait_for(still, 30, "the start of the node's threads")


def wait_until_back(node: NodeProcess, before: Held) -> None:
    """Wait until the node has no more threads and descriptors than it had."""

    def back() -> bool:
        now = held(node)
        return now.threads <= before.threads and now.descriptors <= before.descriptors

    wait_for(back, 15, f"threads and descriptors to be back at {before.threads} and {before.descriptors}")


class Costs:
    """What the node has more than when this was made."""

    def __init__(self, node: NodeProcess) -> None:
        self._node = node
        self._before = held(node)

    def check_memory(self) -> None:
        grown = held(self._node).resident_bytes - self._before.resident_bytes
        assert grown <= MAX_GROWTH_BYTES, f"{grown / 2**20:.1f} MiB more than before"

    def check_all(self) -> None:
        self.check_memory()
        wait_until_back(self._node, self._before)
