"""A disk that is full when a job wants to write: it waits, and ends by itself when there is space."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from holdings import check_holds_one_derived, check_kept
from oracle import StorageOracle
from peers import wait_for
from scanner import Scanner, send
from small_disk import (
    AGAIN_S,
    OUT_OF_RESOURCES,
    SmallDiskNode,
    check_left_nothing_but,
    series,
)

pytestmark = pytest.mark.usefixtures("small_disks")


def end_pause(node: SmallDiskNode, series_uid: str) -> None:
    """Make the next try of a job due now, which the node finds by itself as it does after the pause."""
    with closing(sqlite3.connect(node.database, timeout=20)) as database, database:
        database.execute("UPDATE jobs SET next_try_at = updated_at WHERE series_uid = ?", (series_uid,))


def test_derivation_waits_for_space(oracle: StorageOracle, tmp_path: Path) -> None:
    images = series(tmp_path / "ct", "derivation", 8)
    uid = images[0].series_uid
    settings = {"reception": {"min_free_mb": 0}}
    with SmallDiskNode(tmp_path / "node", oracle.port, settings, megabytes=16) as node:
        node.fill(len(images) * (len(images[0].data) + 8192) + 5 * len(images[0].data) // 2)
        send(node.port, images)
        wait_for(lambda: node.query("SELECT 1 FROM jobs WHERE runs > 0"), 30, "the first attempt")
        (job,) = node.wait_series(uid, "QUEUED")
        assert job["reason"] == "OSError: [Errno 28] No space left on device"
        assert (job["runs"], job["crashes"]) == (1, 0)
        # Nothing half-made takes the space that is left, and what came is as it was.
        assert list((node.spool / "derived").iterdir()) == []
        check_kept(node, images)
        pause = datetime.fromisoformat(job["next_try_at"]) - datetime.fromisoformat(job["updated_at"])
        assert timedelta(seconds=25) < pause < timedelta(seconds=35)
        node.make_space()
        end_pause(node, uid)
        (job,) = node.wait_series(uid, "DONE", timeout_s=AGAIN_S)
        assert (job["runs"], job["crashes"]) == (2, 0)
        assert check_holds_one_derived(oracle, images) == job["derived_series_uid"]


def test_all_on_one_disk_that_fills_up_while_a_job_runs(oracle: StorageOracle, tmp_path: Path) -> None:
    """Neither the result can be written, nor that it could not."""
    images = series(tmp_path / "ct", "all on one", 6)
    uid = images[0].series_uid
    settings = {
        "reception": {"min_free_mb": 0},
        "routes": [{"name": "held", "pipeline": "test-held", "send_to": ["pacs"]}],
    }
    with SmallDiskNode(tmp_path / "node", oracle.port, settings, megabytes=16, database=True) as node:
        with node.holding():
            send(node.port, images)
            node.held_child()
            node.fill(0)
        late = series(tmp_path / "late", "late", 1)
        with Scanner(node.port, late) as scanner:
            assert scanner.store(late[0]) == OUT_OF_RESOURCES
        wait_for(lambda: "full" in node.log.read_text(), 20, "the database to be in trouble")
        node.make_space()
        wait_for(oracle.sop_instance_uids, AGAIN_S, "the result")  # to ask that database starts a process each time
        (job,) = node.wait_series(uid, "DONE")
        assert job["crashes"] == 0
        check_kept(node, images)
        check_left_nothing_but(node, images)
        assert check_holds_one_derived(oracle, images) == job["derived_series_uid"]
        # The trouble was told in many words, none of them a patient's.
        assert "Phantom" not in node.log.read_text()
