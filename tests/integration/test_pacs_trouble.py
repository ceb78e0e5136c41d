"""A PACS that is away, refuses, stalls, dies or lies: a job is DONE exactly when everything was accepted."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import require_peer
from ct_builder import phantom, write_series
from holdings import check_holds_one_derived, check_holds_the_result, derived_series
from node_process import NodeProcess
from oracle import Script, StorageOracle
from peers import orthanc, storescu, wait_for
from scanner import Image, image, send

SLICES = 6
TRIES = 3


@pytest.fixture(scope="module")
def pacs() -> Iterator[StorageOracle]:
    peer = StorageOracle(ae_title="PACS")
    yield peer
    peer.stop()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, pacs: StorageOracle) -> Iterator[NodeProcess]:
    settings = {"delivery": {"retry_first_s": 0.2, "retry_max_s": 0.4, "failure_status_tries": TRIES}}
    with NodeProcess(tmp_path_factory.mktemp("trouble"), pacs.port, settings) as process:
        yield process


@pytest.fixture
def oracle(pacs: StorageOracle) -> Iterator[StorageOracle]:
    """The PACS of this file, running and obliging, with its counters at zero."""
    pacs.stop()
    pacs.script = Script()
    pacs.images = pacs.associations = 0
    pacs.received.clear()
    pacs.datasets.clear()
    pacs.start()
    yield pacs
    pacs.script = Script()


def series(folder: Path, name: str, slices: int = SLICES) -> list[Image]:
    return [image(path) for path in write_series(folder, phantom(slices), name=name)]


def transfers(node: NodeProcess, job: dict[str, Any], destination: str = "pacs") -> dict[str, dict[str, Any]]:
    sql = "SELECT * FROM transfers WHERE job_id = ? AND destination = ? ORDER BY path"
    return {row["sop_instance_uid"]: row for row in node.query(sql, job["id"], destination)}


def delivery(node: NodeProcess, job: dict[str, Any], destination: str = "pacs") -> dict[str, Any]:
    sql = "SELECT * FROM deliveries WHERE job_id = ? AND destination = ?"
    (row,) = node.query(sql, job["id"], destination)
    return row


def check_done(node: NodeProcess, oracle: StorageOracle, images: list[Image]) -> dict[str, Any]:
    (job,) = node.wait_series(images[0].series_uid, "DONE")
    assert {row["state"] for row in transfers(node, job).values()} == {"ACCEPTED"}
    assert check_holds_one_derived(oracle, images) == job["derived_series_uid"]
    check_holds_the_result(oracle, node, job["id"])
    return job


def test_down_then_up(node: NodeProcess, oracle: StorageOracle, tmp_path: Path) -> None:
    oracle.stop()
    images = series(tmp_path, "down then up")
    send(node.port, images)
    (job,) = node.wait_series(images[0].series_uid, "DISPATCHING")
    wait_for(lambda: delivery(node, job)["failures"] >= 3, 20, "three failed attempts")
    assert "refused" in delivery(node, job)["reason"]
    assert {row["state"] for row in transfers(node, job).values()} <= {"WAITING", "OFFERED"}
    node.wait_series(images[0].series_uid, "DISPATCHING")
    oracle.start()
    check_done(node, oracle, images)
    assert oracle.images == SLICES


def test_one_of_many_is_refused_for_good_and_retried(node: NodeProcess, oracle: StorageOracle, tmp_path: Path) -> None:
    oracle.script = Script(status_of_nth={3: 0xA900})
    images = series(tmp_path, "one refused")
    send(node.port, images)
    (job,) = node.wait_series(images[0].series_uid, "FAILED")
    refused = [uid for uid, row in transfers(node, job).items() if row["state"] == "REFUSED"]
    assert len(refused) == 1
    assert f"1 of {SLICES} refused, e.g. {refused[0]}: status 0xA900" in job["reason"]
    (held,) = derived_series(oracle, images).values()
    assert len(held) == SLICES - 1
    assert refused[0] not in held
    assert oracle.images == SLICES  # nothing was asked twice

    oracle.script = Script()
    done = node.command("jobs", "retry", job["id"][:12])
    assert (done.returncode, done.stderr) == (0, "")
    check_done(node, oracle, images)
    assert oracle.images == SLICES + 1  # only what was missing
    assert [len(copies) for copies in oracle.received.values()] == [1] * SLICES


@pytest.mark.parametrize("status", [0xA700, 0xC000, 0x0110])
def test_a_passing_refusal_passes(node: NodeProcess, oracle: StorageOracle, tmp_path: Path, status: int) -> None:
    oracle.script = Script(status_of_nth={2: status})
    images = series(tmp_path, f"passing {status:04X}")
    send(node.port, images)
    job = check_done(node, oracle, images)
    assert [len(copies) for copies in oracle.received.values()] == [1] * SLICES
    assert oracle.images == SLICES + 1
    assert delivery(node, job)["attempts"] == 2


def test_a_refusal_that_stays_is_given_up_after_some_tries(
    node: NodeProcess, oracle: StorageOracle, tmp_path: Path
) -> None:
    images = series(tmp_path, "staying")
    oracle.script = Script(status_of_nth=dict.fromkeys([2, *range(SLICES + 1, 50)], 0xC123))
    send(node.port, images)
    (job,) = node.wait_series(images[0].series_uid, "FAILED")
    assert f"1 of {SLICES} refused" in job["reason"]
    assert "0xC123" in job["reason"]
    assert oracle.images == SLICES + TRIES - 1
    assert len(oracle.sop_instance_uids()) == SLICES - 1


def test_a_warning_is_accepted(node: NodeProcess, oracle: StorageOracle, tmp_path: Path) -> None:
    oracle.script = Script(status_of_nth={1: 0xB000, 3: 0xB006, 5: 0xB007})
    images = series(tmp_path, "warnings")
    send(node.port, images)
    job = check_done(node, oracle, images)
    assert sorted(row["status"] for row in transfers(node, job).values()) == [0, 0, 0, 0xB000, 0xB006, 0xB007]


def test_dying_in_the_middle_of_an_association(node: NodeProcess, oracle: StorageOracle, tmp_path: Path) -> None:
    images = series(tmp_path, "dying", 16)
    oracle.script = Script(drop_at=range(5, 1000))
    send(node.port, images)
    wait_for(lambda: oracle.images >= 5, 20, "the first images")
    oracle.stop()
    stored, lost = len(oracle.sop_instance_uids()), oracle.images - 4
    assert stored == 4
    (job,) = node.wait_series(images[0].series_uid, "DISPATCHING")
    wait_for(lambda: "refused" in delivery(node, job)["reason"], 20, "attempts at the closed port")
    assert [row["state"] for row in transfers(node, job).values()].count("ACCEPTED") == stored
    oracle.script = Script()
    oracle.start()
    check_done(node, oracle, images)
    assert oracle.images == 16 + lost  # what was accepted is not sent again
    assert [len(copies) for copies in oracle.received.values()] == [1] * 16


@pytest.mark.parametrize("how", ["drop_at", "abort_at", "silent_at"])
def test_an_association_that_breaks(node: NodeProcess, oracle: StorageOracle, tmp_path: Path, how: str) -> None:
    oracle.script = Script(**{how: {3}})
    images = series(tmp_path, how)
    send(node.port, images)
    check_done(node, oracle, images)
    assert [len(copies) for copies in oracle.received.values()] == [1] * SLICES
    assert oracle.images == SLICES + 1


def test_a_duplicate_after_a_lost_answer_is_accepted(node: NodeProcess, oracle: StorageOracle, tmp_path: Path) -> None:
    # The third is stored, its answer lost; offered again it is refused as a duplicate.
    oracle.script = Script(drop_stored_at={3}, status_of_nth={4: 0x0111})
    images = series(tmp_path, "lost answer")
    send(node.port, images)
    job = check_done(node, oracle, images)
    assert [row["status"] for row in transfers(node, job).values()].count(0x0111) == 1
    assert [len(copies) for copies in oracle.received.values()] == [1] * SLICES


def test_a_duplicate_out_of_the_blue_is_a_refusal(node: NodeProcess, oracle: StorageOracle, tmp_path: Path) -> None:
    oracle.script = Script(status_of_nth={4: 0x0111})
    images = series(tmp_path, "out of the blue")
    send(node.port, images)
    (job,) = node.wait_series(images[0].series_uid, "FAILED")
    assert f"1 of {SLICES} refused" in job["reason"]
    assert "0x0111" in job["reason"]
    assert len(oracle.sop_instance_uids()) == SLICES - 1


def test_rejected_for_now(node: NodeProcess, oracle: StorageOracle, tmp_path: Path) -> None:
    oracle.script = Script(reject="transient")
    images = series(tmp_path, "rejected for now")
    send(node.port, images)
    # More often than a permanent rejection would be tried: this one may pass, and is not counted.
    wait_for(lambda: oracle.associations > TRIES + 1, 20, "attempts")
    (job,) = node.wait_series(images[0].series_uid, "DISPATCHING")
    assert "rejected the association for now" in delivery(node, job)["reason"]
    oracle.script = Script()
    check_done(node, oracle, images)


def test_rejected_for_good_then_retried(node: NodeProcess, oracle: StorageOracle, tmp_path: Path) -> None:
    oracle.script = Script(reject="permanent")
    images = series(tmp_path, "rejected for good")
    send(node.port, images)
    (job,) = node.wait_series(images[0].series_uid, "FAILED")
    assert "it does not know the called AE title" in job["reason"]
    assert oracle.associations == TRIES
    oracle.script = Script()
    assert node.command("jobs", "retry", job["id"]).returncode == 0
    check_done(node, oracle, images)


def test_a_dead_destination_delays_nobody(tmp_path: Path) -> None:
    images = series(tmp_path, "two destinations")
    dead = StorageOracle(ae_title="DEAD")
    settings = {
        "destinations": {"dead": {"ae_title": "DEAD", "host": "127.0.0.1", "port": dead.port}},
        "routes": [{"name": "ct", "pipeline": "identity", "send_to": ["dead", "pacs"]}],
    }
    with StorageOracle(ae_title="PACS") as living, NodeProcess(tmp_path / "node", living.port, settings) as node:
        send(node.port, images)
        wait_for(lambda: len(living.sop_instance_uids()) == SLICES, 20, "the living destination")
        (job,) = node.wait_series(images[0].series_uid, "DISPATCHING")
        wait_for(lambda: delivery(node, job, "pacs")["state"] == "SENT", 10, "the delivery")
        wait_for(lambda: delivery(node, job, "dead")["attempts"] >= 2, 20, "attempts at the dead one")
        node.wait_series(images[0].series_uid, "DISPATCHING")
        with dead:
            node.wait_series(images[0].series_uid, "DONE")
            check_holds_the_result(dead, node, job["id"])
        check_holds_the_result(living, node, job["id"])
        assert living.images == SLICES


def test_back_off_survives_the_death_of_the_node(tmp_path: Path) -> None:
    images = series(tmp_path, "back-off")
    pacs = StorageOracle(ae_title="PACS")
    settings = {"delivery": {"retry_first_s": 8, "retry_max_s": 8}}
    with NodeProcess(tmp_path / "node", pacs.port, settings) as node:
        send(node.port, images)
        (job,) = node.wait_series(images[0].series_uid, "DISPATCHING")
        wait_for(lambda: delivery(node, job)["failures"] == 1, 20, "the first failure")
        due = datetime.fromisoformat(delivery(node, job)["next_try_at"]).replace(tzinfo=UTC)
        node.kill()
        with pacs:
            node.start()
            assert delivery(node, job)["next_try_at"] == due.replace(tzinfo=None).isoformat(" ")
            wait_for(lambda: pacs.associations, 20, "the next try")
            assert datetime.now(UTC) >= due
            (job,) = node.wait_series(images[0].series_uid, "DONE")
            assert delivery(node, job)["attempts"] == 2
            check_holds_the_result(pacs, node, job["id"])


@pytest.mark.peer
def test_orthanc_killed_in_the_middle(tmp_path: Path) -> None:
    require_peer("Orthanc", "storescu")
    slices = 240  # sent in two seconds or so: time to see the first and kill it
    paths = write_series(tmp_path / "ct", phantom(slices), name="orthanc killed")
    with orthanc(tmp_path) as pacs, NodeProcess(tmp_path / "node", pacs.port) as node:
        assert storescu(node.port, paths).returncode == 0
        wait_for(lambda: pacs.count() >= 3, 30, "the first images")
        pacs.kill()
        (job,) = node.jobs()
        assert job["state"] == "DISPATCHING"
        wait_for(lambda: delivery(node, job)["attempts"] >= 2, 20, "attempts")
        pacs.start()
        (job,) = node.wait_jobs("DONE", timeout_s=60)
        held = pacs.instances()
        assert sorted(held) == sorted(transfers(node, job))
        assert {len(ids) for ids in held.values()} == {1}
        assert len(held) == slices
