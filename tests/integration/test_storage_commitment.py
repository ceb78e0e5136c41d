"""Storage commitment wire to wire: the real node, Orthanc, a PACS on a script, kill -9."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from committing import CommittingOracle, Site
from conftest import require_peer
from ct_builder import phantom, write_series
from holdings import check_holds_one_derived
from node_process import NodeProcess
from peers import free_port, orthanc, wait_for
from scanner import Image, image, send
from sender import COUNT, UIDS

from dicomnode.db import DeliveryState, JobState

SLICES = 6


def series(folder: Path, name: str) -> list[Image]:
    return [image(path) for path in write_series(folder, phantom(SLICES), name=name)]


def asking(**changes: Any) -> dict[str, Any]:
    return {"destinations": {"pacs": {"commitment_timeout_s": 60.0}}, **changes}


def states(node: NodeProcess, job: dict[str, Any]) -> list[str]:
    sql = "SELECT DISTINCT state FROM transfers WHERE job_id = ?"
    return [row["state"] for row in node.query(sql, job["id"])]


# ── Orthanc ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.peer
def test_orthanc_commits_to_a_derived_series_and_its_originals(tmp_path: Path) -> None:
    require_peer("Orthanc")
    routes = [{"name": "ct", "pipeline": "identity", "send_to": ["pacs"], "originals_to": ["pacs"]}]
    port = free_port()
    with (
        orthanc(tmp_path, modalities={"node": ("NODE", "127.0.0.1", port)}) as pacs,
        NodeProcess(tmp_path / "node", pacs.port, asking(routes=routes, node={"port": port})) as node,
    ):
        send(port, series(tmp_path, "orthanc"))
        (derived,) = node.wait_jobs("DONE")
        (originals,) = node.wait_jobs("DONE", kind="ORIGINALS")
        assert derived["reason"] == originals["reason"] == "every instance committed by pacs"
        assert states(node, derived) == states(node, originals) == ["COMMITTED"]
        assert pacs.count() == 2 * SLICES
        requests = node.query("SELECT * FROM commitments WHERE reported_at IS NOT NULL")
        assert {row["job_id"] for row in requests} == {derived["id"], originals["id"]}
        assert len(node.query("SELECT * FROM commitments")) == 2, "the originals are asked for once, when all are there"


@pytest.mark.peer
def test_what_orthanc_lost_is_sent_again(database: sa.Engine, sent_series: list[Path], tmp_path: Path) -> None:
    require_peer("Orthanc")
    port = free_port()
    with orthanc(tmp_path, modalities={"node": ("DICOMNODE", "127.0.0.1", port)}) as pacs:
        site = Site(database, sent_series, pacs.port, port, tmp_path)
        site.server.start()
        site.sent()
        pacs.delete(UIDS[1])
        again = site.ask()
        assert again["state"] == DeliveryState.WAITING
        assert f"1 of {COUNT} accepted but not committed, e.g. {UIDS[1]}: failure reason 0x0112" in again["reason"]
        assert site.states() == ["COMMITTED", "WAITING", "COMMITTED", "COMMITTED"]
        site.sent()
        assert site.ask()["state"] == DeliveryState.COMMITTED
        assert site.job["state"] == JobState.DONE
        assert pacs.sop_instance_uids() == sorted(UIDS)
        site.server.stop(5)


# ── kill -9, lost reports ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def pacs() -> Iterator[CommittingOracle]:
    with CommittingOracle(0, "NODE", ae_title="PACS") as made:
        yield made


def test_a_node_that_is_killed_while_it_waits_takes_the_report_afterwards(
    pacs: CommittingOracle, tmp_path: Path
) -> None:
    pacs.manner.report = "never"
    images = series(tmp_path, "killed")
    with NodeProcess(tmp_path / "node", pacs.port, asking()) as node:
        pacs.report_to = (node.port, "NODE")
        send(node.port, images)
        node.wait_jobs("COMMITTING")
        wait_for(lambda: pacs.asked, 20, "the request")
        node.restart()  # during the request, or right after it
        if node.query("SELECT state FROM deliveries")[0]["state"] == "COMMITTING":
            (job,) = node.wait_jobs("COMMITTING")
        assert pacs.report(pacs.asked[0]) == 0
        (job,) = node.wait_jobs("DONE")
        assert states(node, job) == ["COMMITTED"]
        assert check_holds_one_derived(pacs, images) == job["derived_series_uid"]
        assert pacs.images == SLICES, "nothing was sent twice"


def test_a_lost_report_is_asked_for_again_and_the_command_line_tells(pacs: CommittingOracle, tmp_path: Path) -> None:
    pacs.manner.report = "never"
    settings = asking(destinations={"pacs": {"commitment_timeout_s": 1.0}}, delivery={"failure_status_tries": 9})
    with NodeProcess(tmp_path / "node", pacs.port, settings) as node:
        pacs.report_to = (node.port, "NODE")
        send(node.port, series(tmp_path, "lost"))
        wait_for(lambda: len(pacs.asked) == 2, 40, "a second request")
        (job,) = node.jobs()
        assert job["state"] == "COMMITTING"
        assert "storage commitment by pacs to come" in job["reason"]
        shown = node.command("jobs", "show", job["id"]).stdout
        assert f"{SLICES} ACCEPTED" in shown
        assert "storage commitment asked for, report awaited until " in shown
        assert pacs.asked[0].transaction_uid in shown
        assert pacs.report(pacs.asked[-1]) == 0
        node.wait_jobs("DONE")
        shown = node.command("jobs", "show", job["id"]).stdout
        assert f"delivery to pacs: COMMITTED, {SLICES} COMMITTED" in shown
    assert len({asked.transaction_uid for asked in pacs.asked}) == len(pacs.asked)
    assert pacs.images == SLICES


def test_what_failed_is_sent_again_by_itself(pacs: CommittingOracle, tmp_path: Path) -> None:
    images = series(tmp_path, "partial")
    with NodeProcess(tmp_path / "node", pacs.port, asking()) as node:
        pacs.report_to = (node.port, "NODE")
        pacs.manner.lose = 1
        send(node.port, images)
        (job,) = node.wait_jobs("DONE")
        assert states(node, job) == ["COMMITTED"]
        wait_for(lambda: pacs.statuses == [0, 0], what="the answers to both reports")
    assert [len(asked.instances) for asked in pacs.asked] == [SLICES, 1]
    assert pacs.images == SLICES + 1
    assert check_holds_one_derived(pacs, images) == job["derived_series_uid"]
