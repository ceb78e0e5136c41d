"""A little of tests/soak.py, and what it calls a trouble."""

from __future__ import annotations

from pathlib import Path

import pytest
from costs import Held, held, wait_until_back
from node_process import NodeProcess
from oracle import StorageOracle
from soak import STORES_EVERY, indexed, new_images, step, trouble


def test_callers_come_and_go(tmp_path: Path) -> None:
    images = new_images(tmp_path / "ct")
    with StorageOracle(ae_title="PACS") as pacs, NodeProcess(tmp_path / "node", pacs.port) as node:
        step(node, STORES_EVERY, images)
        warm = held(node)
        step(node, STORES_EVERY, images)
        wait_until_back(node, warm)
        assert indexed(node) == 2
        assert pacs.images >= 2


WARM = Held(100_000_000, 15, 13)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (Held(109_000_000, 15, 13), []),
        (Held(50_000_000, 12, 9), []),
        (Held(111_000_000, 15, 13), ["memory is 111.0 MB, 100.0 after the warm-up"]),
        (Held(100_000_000, 16, 13), ["16 threads and 13 descriptors are more than after the warm-up"]),
        (Held(100_000_000, 15, 14), ["15 threads and 14 descriptors are more than after the warm-up"]),
    ],
)
def test_what_is_not_as_it_was_is_told(now: Held, words: list[str]) -> None:
    assert trouble(WARM, now) == words
