"""A dozen of the runs of tests/killing.py: kill -9 of node and worker at moments that nobody chose."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from killing import Ward, run, ward


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    with ward(tmp_path_factory.mktemp("killing")) as wards:
        yield wards


@pytest.mark.parametrize("number", range(12))
def test_nothing_is_lost_and_nothing_done_twice(made: Ward, tmp_path: Path, number: int) -> None:
    if not made.node.running:
        made.node.start()
    seed = str(random.SystemRandom().randrange(10**9))
    print(f"seed {seed}")
    print(run(made, seed, tmp_path))
