"""Proof that a series is whole, over the wire: it is closed within 3 s of its last slice, and never before."""

from __future__ import annotations

import time
from pathlib import Path

from ct_builder import phantom, write_series
from holdings import check_holds_one_derived
from node_process import NodeProcess
from oracle import StorageOracle
from peers import wait_for
from scanner import Image, Scanner, image, send

SLICES = 8
IN_TIME_S = 3.0
SETTINGS = {"assembly": {"quiet_s": 15.0, "quiet_without_evidence_s": 120.0}}
"""As shipped."""


def series(folder: Path, name: str) -> list[Image]:
    paths = write_series(folder, phantom(SLICES), name=name, NumberOfSeriesRelatedInstances=SLICES)
    return [image(path) for path in paths]


def check_closed_in_time(node: NodeProcess, images: list[Image], last: float) -> None:
    """The series is closed, as a whole, within 3 s of `last` (of `time.monotonic`)."""
    uid = images[0].series_uid
    wait_for(lambda: node.series(uid).get("state") == "CLOSED", IN_TIME_S - (time.monotonic() - last), "the closing")
    row = node.series(uid)
    assert (row["generation"], row["n_instances"]) == (1, SLICES)
    assert row["evidence"] == f"all {SLICES} announced images came"


def check_stays_open(node: NodeProcess, images: list[Image]) -> None:
    end = time.monotonic() + IN_TIME_S
    while time.monotonic() < end:
        assert node.series(images[0].series_uid).get("state", "OPEN") == "OPEN"
        time.sleep(0.1)  # that nothing happens takes time


def test_released(node: NodeProcess, pacs: StorageOracle, tmp_path: Path) -> None:
    images = series(tmp_path, "released")
    send(node.port, images)
    check_closed_in_time(node, images, time.monotonic())
    node.wait_series(images[0].series_uid, "DONE")
    check_holds_one_derived(pacs, images)


def test_the_scanner_goes_on_with_another_series(node: NodeProcess, tmp_path: Path) -> None:
    images, others = series(tmp_path, "first of two"), series(tmp_path, "second of two")
    with Scanner(node.port, images) as scanner:
        for one in images:
            assert scanner.store(one) == 0x0000
        last = time.monotonic()
        assert scanner.store(others[0]) == 0x0000
        check_closed_in_time(node, images, last)
        assert node.series(others[0].series_uid)["state"] == "OPEN"
        for one in others[1:]:
            assert scanner.store(one) == 0x0000
        check_closed_in_time(node, others, time.monotonic())


def test_capped_transfers(node: NodeProcess, pacs: StorageOracle, tmp_path: Path) -> None:
    images = series(tmp_path, "capped")
    send(node.port, images[:5])
    check_stays_open(node, images)
    with Scanner(node.port, images) as scanner:
        for one in (*images[3:5], images[5]):  # two of them again
            assert scanner.store(one) == 0x0000
        scanner.begin(images[6])
        scanner.abort()
    check_stays_open(node, images)
    send(node.port, images[6:])
    check_closed_in_time(node, images, time.monotonic())
    (job,) = node.wait_series(images[0].series_uid, "DONE")
    assert job["n_in"] == SLICES
    check_holds_one_derived(pacs, images)
