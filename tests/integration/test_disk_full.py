"""A full disk, under each thing that writes: nothing is cut short, nothing is lost, all goes on when there is space."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest
from holdings import check_holds_one_derived, check_kept
from oracle import StorageOracle
from peers import wait_for
from scanner import Image, Scanner, send
from small_disk import (
    AGAIN_S,
    OUT_OF_RESOURCES,
    PAGE,
    SmallDiskNode,
    check_left_nothing_but,
    series,
)

pytestmark = pytest.mark.usefixtures("small_disks")


def test_reception_stops_before_the_disk_is_full(oracle: StorageOracle, tmp_path: Path) -> None:
    reserve = 4_000_000
    images = series(tmp_path / "ct", "watermark", 6)
    settings = {"reception": {"min_free_mb": reserve // 1_000_000}}
    with SmallDiskNode(tmp_path / "node", oracle.port, settings, megabytes=16) as node:
        node.fill(reserve + 5 * len(images[0].data) // 2)
        with Scanner(node.port, images) as scanner:
            assert [scanner.store(one) for one in images] == [0, 0, *[OUT_OF_RESOURCES] * 4]
            assert node.free_bytes() >= reserve
            check_left_nothing_but(node, images[:2])
            told = node.log.read_text()
            assert told.count("0xA700 to 127.0.0.1: less than 4 MB would be left in ") == 4
            node.make_space()
            # What has come is one of them again; the sender need not know where it stopped.
            assert [scanner.store(one) for one in images] == [0] * 6
        (job,) = node.wait_series(images[0].series_uid, "DONE")
        assert (job["n_in"], job["generation"]) == (6, 1)
        check_kept(node, images)
        check_left_nothing_but(node, images)
    check_holds_one_derived(oracle, images)


def test_the_last_page_is_missing(oracle: StorageOracle, tmp_path: Path) -> None:
    """What comes fits, and with our file meta information it does not: the write itself ends short."""
    short = len(series(tmp_path / "probe", "short", 1)[0].data)
    images = series(tmp_path / "ct", "short", 2, ImageComments="x" * (-(short + 8 + 16) % PAGE))
    size = len(images[0].data)
    assert -size % PAGE == 16
    settings = {"reception": {"min_free_mb": 0}}
    with SmallDiskNode(tmp_path / "node", oracle.port, settings, megabytes=16) as node:
        node.fill(size + 16)
        assert node.free_bytes() == size + 16
        with Scanner(node.port, images) as scanner:
            assert scanner.store(images[0]) == OUT_OF_RESOURCES
            assert "0xA700 to 127.0.0.1: no space left in " in node.log.read_text()
            check_left_nothing_but(node, [])
            assert node.free_bytes() == size + 16
            node.make_space()
            assert [scanner.store(one) for one in images] == [0, 0]
        check_left_nothing_but(node, images)


def test_reception_on_a_full_disk(oracle: StorageOracle, tmp_path: Path) -> None:
    """Without a reserve, with four senders at once, who race for the last of the space."""
    parts = [series(tmp_path / "ct", f"full {k}", 4) for k in range(4)]
    settings = {"reception": {"min_free_mb": 0}}
    with SmallDiskNode(tmp_path / "node", oracle.port, settings, megabytes=16) as node:
        node.fill(11 * len(parts[0][0].data) // 2)
        answers: dict[str, int] = {}

        def bring(part: list[Image]) -> None:
            with Scanner(node.port, part) as scanner:
                for one in part:
                    answers[one.sop_instance_uid] = scanner.store(one)
                assert scanner.echo() == 0

        senders = [threading.Thread(target=bring, args=(part,)) for part in parts]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join(60)
        images = [one for part in parts for one in part]
        counted = Counter(answers.values())
        assert set(counted) == {0, OUT_OF_RESOURCES}
        assert 3 <= counted[0] <= 5
        check_left_nothing_but(node, [one for one in images if answers[one.sop_instance_uid] == 0])
        assert node.log.read_text().count("0xA700 to 127.0.0.1: ") == counted[OUT_OF_RESOURCES]
        node.make_space()
        for part in parts:
            send(node.port, part)
        for part in parts:
            wait_for(lambda uid=part[0].series_uid: node.series(uid).get("n_instances") == 4, 20, "the index")
        check_kept(node, images)
        check_left_nothing_but(node, images)


def test_the_database_on_a_full_disk(oracle: StorageOracle, tmp_path: Path) -> None:
    """Reception goes on into the spool, which has space, and the rows follow."""
    images = series(tmp_path / "ct", "database", 12)
    uid = images[0].series_uid
    with SmallDiskNode(tmp_path / "node", oracle.port, megabytes=16, spool=False, database=True) as node:
        node.fill(0)
        send(node.port, images)
        wait_for(lambda: "cannot index now, will try again" in node.log.read_text(), 20, "the trouble to be said")
        check_left_nothing_but(node, images)
        assert node.series(uid) == {}
        assert oracle.images == 0
        with Scanner(node.port) as scanner:
            assert scanner.echo() == 0
        node.make_space()
        (job,) = node.wait_series(uid, "DONE", timeout_s=AGAIN_S)
        assert (job["n_in"], job["crashes"]) == (12, 0)
        check_kept(node, images)
        assert check_holds_one_derived(oracle, images) == job["derived_series_uid"]
