"""Callers that come and go by the thousand, and leave a node as it was: its memory, its threads, its descriptors.

    python tests/soak.py [--associations 10000]

Each association asks for a C-ECHO; every twentieth brings an image of a new series, too, which the node denoises (the
pipeline ``identity``) and sends to a PACS. Before each of them somebody connects and says nothing. Eight call at once.
What the node has is printed before, after a warm-up of the same, and after each tenth. Exit status 1: it has over 10 %
more memory than after the warm-up, or more threads or descriptors.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path

from caller import Caller
from costs import Held, held, wait_until_back
from ct_builder import phantom, write_series
from node_process import NodeProcess
from oracle import StorageOracle
from peers import wait_for
from scanner import Image, Scanner, image, renamed

STEPS = 10
SLICES = 10
STORES_EVERY = 20
CALLERS = 8
"""At once."""
FLAT = 0.10
"""Part of the memory after the warm-up by which it may be more later."""
_ENDS_S = 300.0


def new_images(folder: Path) -> Iterator[Image]:
    """Slices of small series, series after series, without end."""
    first = [image(path) for path in write_series(folder, phantom(SLICES, 64))]
    return (renamed(one, str(series)) for series in count() for one in first)


def step(node: NodeProcess, associations: int, images: Iterator[Image]) -> None:
    """So many associations, and as many callers who say nothing; all is answered, and all jobs end."""

    def call(brought: list[Image]) -> None:
        Caller(node.port).close()
        with Scanner(node.port, brought) as scanner:
            assert scanner.echo() == 0x0000
            for one in brought:
                assert scanner.store(one) == 0x0000

    brought = [[next(images)] if k % STORES_EVERY == 0 else [] for k in range(associations)]
    expected = indexed(node) + sum(map(len, brought))
    with ThreadPoolExecutor(CALLERS) as callers:
        for _ in callers.map(call, brought):
            pass
    wait_for(lambda: indexed(node) == expected and at_rest(node), _ENDS_S, "the end of every job")


def indexed(node: NodeProcess) -> int:
    """Number of images that the node knows of."""
    return int(node.query("SELECT count(*) AS n FROM instances")[0]["n"])


def at_rest(node: NodeProcess) -> bool:
    """Is every series closed, and every job done, or superseded because a slice came late?"""
    undone = "SELECT 1 FROM jobs WHERE state NOT IN ('DONE', 'CANCELLED')"
    return not node.query("SELECT 1 FROM series WHERE state <> 'CLOSED'") and not node.query(undone)


def row(when: str, now: Held) -> str:
    """Of the table."""
    return f"| {when} | {now.resident_bytes / 1e6:.1f} | {now.threads} | {now.descriptors} |"


def trouble(warm: Held, now: Held) -> list[str]:
    """What is not as it was after the warm-up."""
    found = []
    if now.resident_bytes > (1 + FLAT) * warm.resident_bytes:
        found.append(f"memory is {now.resident_bytes / 1e6:.1f} MB, {warm.resident_bytes / 1e6:.1f} after the warm-up")
    if now.threads > warm.threads or now.descriptors > warm.descriptors:
        found.append(f"{now.threads} threads and {now.descriptors} descriptors are more than after the warm-up")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--associations", type=int, default=10_000, help="and as many connects (default: %(default)s)")
    associations = parser.parse_args().associations
    each = associations // STEPS
    print(f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}")
    print("| associations, and as many connects | resident (MB) | threads | descriptors |")
    print("| --- | --- | --- | --- |")
    found: list[str] = []
    with tempfile.TemporaryDirectory() as name, StorageOracle(ae_title="PACS") as pacs:
        folder = Path(name)
        images = new_images(folder / "ct")
        with NodeProcess(folder / "node", pacs.port) as node:
            print(row("before", held(node)), flush=True)
            step(node, each, images)
            warm = held(node)
            print(row(f"warm-up ({each:,})", warm), flush=True)
            begun = time.monotonic()
            for k in range(1, STEPS + 1):
                step(node, each, images)
                with suppress(AssertionError):  # it is told below
                    wait_until_back(node, warm)
                now = held(node)
                print(row(f"{k * each:,}", now), flush=True)
                found += trouble(warm, now)
            took_s = time.monotonic() - begun
    said = "; ".join(found) or "as it was"
    print(f"\n{STEPS * each:,} associations and as many connects in {took_s:.0f} s: {said}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
