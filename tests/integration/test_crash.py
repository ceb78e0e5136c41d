"""kill -9 of the node, and of its worker, in every stage: nothing acknowledged is lost, nothing is done twice.

One node is killed and started again throughout this file; each test brings a series of its own.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import require_peer
from ct_builder import phantom, write_series
from holdings import check_holds_one_derived, check_holds_the_result, check_kept
from node_process import NodeProcess, alive
from oracle import Script, StorageOracle
from peers import orthanc, storescu, wait_for
from pydicom import dcmread
from scanner import Gone, Image, Scanner, image, send

SLICES = 6
CHILD_ENDS_S = 5.0
OVERTAKEN = {"DONE", "CANCELLED"}
"""What became of a job whose series grew after it was closed, as far as the job had come by then."""


@pytest.fixture(scope="module")
def oracles() -> Iterator[tuple[StorageOracle, StorageOracle]]:
    pacs, archive = StorageOracle(ae_title="PACS"), StorageOracle(ae_title="ARCHIVE")
    with pacs, archive:
        yield pacs, archive


@pytest.fixture(scope="module")
def mortal(
    tmp_path_factory: pytest.TempPathFactory, oracles: tuple[StorageOracle, StorageOracle]
) -> Iterator[NodeProcess]:
    settings = {
        "destinations": {"archive": {"ae_title": "ARCHIVE", "host": "127.0.0.1", "port": oracles[1].port}},
        "routes": [
            {"name": "held", "when": {"CallingAETitle": "HELD"}, "pipeline": "test-held", "send_to": ["pacs"]},
            {"name": "two", "when": {"CallingAETitle": "TWO"}, "pipeline": "identity", "send_to": ["pacs", "archive"]},
            {"name": "ct", "pipeline": "identity", "send_to": ["pacs"]},
        ],
    }
    with NodeProcess(tmp_path_factory.mktemp("crash"), oracles[0].port, settings) as process:
        yield process


@pytest.fixture
def node(mortal: NodeProcess) -> NodeProcess:
    """The node of this file, running whatever became of the test before."""
    if not mortal.running:
        mortal.start()
    return mortal


@pytest.fixture
def oracle(oracles: tuple[StorageOracle, StorageOracle]) -> StorageOracle:
    oracles[0].script = Script()
    return oracles[0]


def series(folder: Path, name: str, slices: int = SLICES) -> list[Image]:
    return [image(path) for path in write_series(folder, phantom(slices), name=name)]


def check_done(node: NodeProcess, oracle: StorageOracle, images: list[Image]) -> dict[str, Any]:
    (job,) = node.wait_series(images[0].series_uid, "DONE")
    check_kept(node, images)
    assert check_holds_one_derived(oracle, images) == job["derived_series_uid"]
    check_holds_the_result(oracle, node, job["id"])
    return job


def test_during_reception(node: NodeProcess, oracle: StorageOracle, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    images = series(tmp_path, "reception", 40)
    moment = random.Random(seed).randrange(1, 30)
    acknowledged: list[Image] = []
    reached = threading.Event()

    def scan() -> None:
        with suppress(Gone), Scanner(node.port, images) as scanner:
            for one in images:
                assert scanner.store(one) == 0x0000
                acknowledged.append(one)
                if len(acknowledged) == moment:
                    reached.set()

    sender = threading.Thread(target=scan)
    sender.start()
    assert reached.wait(30)
    node.kill()
    sender.join(30)
    assert moment <= len(acknowledged) < 40
    node.start()
    # Its start indexed what was acknowledged, before anything else could come; nothing half-written stays.
    check_kept(node, acknowledged)
    assert not list(node.spool.rglob("*.part"))
    # The sender repeats what it got no answer for; the last answered one too, as scanners do.
    send(node.port, images[len(acknowledged) - 1 :])
    uid = images[0].series_uid
    wait_for(lambda: node.series(uid)["n_instances"] == 40 and node.series(uid)["state"] == "CLOSED", 20, "the series")
    generation = node.series(uid)["generation"]

    def jobs() -> list[dict[str, Any]]:
        return [one for one in node.jobs() if one["series_uid"] == uid]

    wait_for(lambda: [one["state"] for one in jobs() if one["generation"] == generation] == ["DONE"], 40, "its job")
    *older, job = jobs()
    # On a slow machine the restart takes longer than the silence that closes a series.
    assert all(one["superseded_by"] == job["id"] and one["state"] in OVERTAKEN for one in older)
    assert job["n_in"] == 40
    check_kept(node, images)
    check_holds_the_result(oracle, node, job["id"])


def test_before_the_series_closes(node: NodeProcess, oracle: StorageOracle, tmp_path: Path) -> None:
    images = series(tmp_path, "before close")
    with Scanner(node.port, images) as scanner:
        for one in images:
            assert scanner.store(one) == 0x0000
        node.kill()
        with pytest.raises(Gone):
            scanner.echo()
        scanner.abort()
    node.start()
    job = check_done(node, oracle, images)
    assert job["crashes"] == 0


def test_queued_and_running(node: NodeProcess, oracle: StorageOracle, tmp_path: Path) -> None:
    running, queued = series(tmp_path, "running"), series(tmp_path, "queued")
    with node.holding():
        send(node.port, running, calling="HELD")
        node.wait_series(running[0].series_uid, "RUNNING")
        child = node.held_child()
        send(node.port, queued)
        node.wait_series(queued[0].series_uid, "QUEUED")
        node.kill()
        wait_for(lambda: not alive(child), CHILD_ENDS_S, "the end of the orphaned child")
        node.start()
    job = check_done(node, oracle, running)
    assert (job["runs"], job["crashes"]) == (1, 1)
    job = check_done(node, oracle, queued)
    assert (job["runs"], job["crashes"]) == (1, 0)


def test_when_the_result_appears(node: NodeProcess, oracle: StorageOracle, tmp_path: Path) -> None:
    images = series(tmp_path, "result")
    send(node.port, images)
    (job,) = wait_for(lambda: node.query("SELECT id FROM jobs WHERE series_uid = ?", images[0].series_uid), 20)
    result = node.spool / "derived" / job["id"]
    wait_for(result.exists, 20, "the result folder")
    node.kill()
    written = {path.name: path.read_bytes() for path in result.iterdir()}
    node.start()
    check_done(node, oracle, images)
    assert {path.name: path.read_bytes() for path in result.iterdir()} == written


def test_dispatching(node: NodeProcess, oracle: StorageOracle, tmp_path: Path) -> None:
    images = series(tmp_path, "dispatching")
    before = oracle.images
    oracle.script = Script(delay_s=0.3)
    send(node.port, images)
    wait_for(lambda: oracle.images >= before + 3, 20, "the first images")
    node.kill()
    node.wait_series(images[0].series_uid, "DISPATCHING")
    oracle.script = Script()
    node.start()
    job = check_done(node, oracle, images)
    assert job["crashes"] == 0
    assert oracle.images - before <= SLICES + 4


def test_between_two_deliveries(
    node: NodeProcess, oracles: tuple[StorageOracle, StorageOracle], oracle: StorageOracle, tmp_path: Path
) -> None:
    images = series(tmp_path, "between")
    archive = oracles[1]
    archive.stop()
    before = oracle.images
    send(node.port, images, calling="TWO")
    sent = "SELECT 1 FROM deliveries JOIN jobs ON id = job_id WHERE series_uid = ? AND deliveries.state = 'SENT'"
    wait_for(lambda: node.query(sent, images[0].series_uid), 20, "the first delivery")
    node.kill()
    node.wait_series(images[0].series_uid, "DISPATCHING")
    archive.start()
    node.start()
    job = check_done(node, oracle, images)
    check_holds_the_result(archive, node, job["id"])
    assert check_holds_one_derived(archive, images) == job["derived_series_uid"]
    assert oracle.images == before + SLICES  # the finished delivery was not repeated


def test_the_worker_while_it_runs(node: NodeProcess, oracle: StorageOracle, tmp_path: Path) -> None:
    images = series(tmp_path, "worker running")
    with node.holding():
        send(node.port, images, calling="HELD")
        os.kill(node.held_child(), signal.SIGKILL)
        (node.controls / "running").unlink()
        # The next attempt, in a new child.
        node.held_child()
    job = check_done(node, oracle, images)
    assert (job["runs"], job["crashes"]) == (2, 1)
    assert any("signal 9" in event for event in node.events(job["id"]))


@pytest.mark.parametrize("stage", ["reception", "dispatching"])
def test_the_worker_while_it_waits(node: NodeProcess, oracle: StorageOracle, tmp_path: Path, stage: str) -> None:
    images = series(tmp_path, f"worker at {stage}")
    before = oracle.images
    oracle.script = Script(delay_s=0.1)
    with Scanner(node.port, images) as scanner:
        for k, one in enumerate(images):
            if stage == "reception" and k == 3:
                kill_worker(node)
            assert scanner.store(one) == 0x0000
    if stage == "dispatching":
        wait_for(lambda: oracle.images >= before + 2, 20, "the first images")
        kill_worker(node)
    job = check_done(node, oracle, images)
    assert (job["runs"], job["crashes"]) == (1, 0)


def kill_worker(node: NodeProcess) -> None:
    """Kill the compute child, which the node keeps for the next job."""
    (child,) = node.children()
    os.kill(child, signal.SIGKILL)


def test_nothing_foreign_came(
    node: NodeProcess, oracles: tuple[StorageOracle, StorageOracle], oracle: StorageOracle
) -> None:
    """Over all crashes of this file: what the PACS holds is exactly what the jobs meant to send."""
    assert {job["state"] for job in node.jobs() if job["superseded_by"] is None} == {"DONE"}
    assert {job["state"] for job in node.jobs()} <= OVERTAKEN
    for name, peer in zip(("pacs", "archive"), oracles, strict=True):
        rows = node.query(
            "SELECT sop_instance_uid, transfers.state, superseded_by FROM transfers JOIN jobs ON jobs.id = job_id "
            "WHERE destination = ?",
            name,
        )
        # a job that was overtaken while it waited to send has no more to do
        assert {row["state"] for row in rows if row["superseded_by"] is None} == {"ACCEPTED"}
        accepted = {row["sop_instance_uid"] for row in rows if row["state"] == "ACCEPTED"}
        assert accepted <= set(peer.sop_instance_uids()) <= {row["sop_instance_uid"] for row in rows}


@pytest.mark.peer
def test_orthanc_holds_the_series_once(tmp_path: Path) -> None:
    require_peer("Orthanc", "storescu")
    paths = write_series(tmp_path / "ct", phantom(60), name="orthanc once")
    with orthanc(tmp_path) as pacs, NodeProcess(tmp_path / "node", pacs.port) as node:
        assert storescu(node.port, paths).returncode == 0
        wait_for(lambda: pacs.count() >= 2, 30, "the first images")
        node.kill()
        node.start()
        (job,) = node.wait_jobs("DONE", timeout_s=60)
        assert list(pacs.series()) == [job["derived_series_uid"]]
        held = pacs.instances()
        assert {len(ids) for ids in held.values()} == {1}
        assert len(held) == 60
        assert not set(held) & {str(dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in paths}
