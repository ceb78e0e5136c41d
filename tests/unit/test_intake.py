"""From stored objects to jobs: every object has its row, its route and its outcome, whatever fails in between."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from ct_builder import edit, phantom, uid, write_series
from peers import wait_for
from pydicom import dcmread
from reception import CAPTURE, CT, ENHANCED, QUIET, SERIES, Reception, receptions
from tables import config_of, events, row, rows

from dicomnode import intake as module
from dicomnode import jobs as job_table
from dicomnode.db import JobKind, JobState, SeriesState, jobs
from dicomnode.errors import NodeError
from dicomnode.planning import Planning
from dicomnode.series import Evidence, Header, evidence
from dicomnode.settlement import settle
from dicomnode.spool import Instance, Kept


@pytest.fixture
def reception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Reception]]:
    yield from receptions(tmp_path, monkeypatch)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return write_series(tmp_path / "six", phantom(6, 16))


# ── series to jobs ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_series_is_one_job(reception: Callable[..., Reception], files: list[Path]) -> None:
    node = reception()
    node.run(*files)
    (job,) = node.jobs()
    assert (job["state"], job["n_in"], job["route"], job["uses"]) == (JobState.QUEUED, 6, "ct", "identity")
    assert job["reason"] == "series closed: 6 slices without a gap"
    assert "Modality is CT" in job["route_reason"]
    digests = [(one["sop_instance_uid"], one["sha256"]) for one in rows(node.database, "instances")]
    assert job["fingerprint"] == job_table.fingerprint(digests)
    assert {one["sop_instance_uid"] for one in rows(node.database, "job_instances")} == {one for one, _ in digests}
    kept = row(node.database, "series")
    assert (kept["n_instances"], kept["generation"], kept["n_conflicts"]) == (6, 1, 0)


def test_the_same_series_received_twice_is_one_job(reception: Callable[..., Reception], files: list[Path]) -> None:
    node = reception()
    node.run(*files)
    node.begin()
    assert {node.receive(path) for path in files} == {Kept.SAME}
    node.run()
    assert len(node.jobs()) == 1
    assert len(rows(node.database, "instances")) == row(node.database, "series")["n_instances"] == 6


def test_a_series_that_grew_is_another_job_and_the_older_one_says_so(
    reception: Callable[..., Reception], files: list[Path]
) -> None:
    node = reception()
    for path in files[:4]:
        node.receive(path)
    node.intake.start()
    node.closed()
    (old,) = node.jobs()
    for path in files[4:]:
        node.receive(path)
    wait_for(lambda: len(node.jobs()) == 2)
    node.closed()
    old, new = node.jobs()
    assert (old["n_in"], old["generation"], new["n_in"], new["generation"]) == (4, 1, 6, 2)
    assert (old["superseded_by"], old["cancel_requested"]) == (new["id"], True)
    assert events(node.database, old["id"])[-1] == ("QUEUED", f"superseded by job {new['id']}")
    assert new["fingerprint"] != old["fingerprint"]


def test_a_finished_job_of_a_series_that_grew_is_only_flagged(
    reception: Callable[..., Reception], files: list[Path]
) -> None:
    node = reception()
    for path in files[:4]:
        node.receive(path)
    node.intake.start()
    node.closed()
    with node.database.begin() as connection:
        connection.execute(sa.update(jobs).values(state=JobState.DONE))
    node.receive(files[4])
    wait_for(lambda: len(node.jobs()) == 2)
    old, new = node.jobs()
    assert (old["state"], old["superseded_by"], old["cancel_requested"]) == (JobState.DONE, new["id"], False)


def test_interleaved_series_are_told_apart(
    reception: Callable[..., Reception], files: list[Path], tmp_path: Path
) -> None:
    others = write_series(tmp_path / "other", phantom(6, 16), name="other")
    node = reception()
    node.run(*(path for pair in zip(files, others, strict=True) for path in pair), series_count=2)
    assert sorted((job["series_uid"], job["n_in"]) for job in node.jobs()) == sorted([(SERIES, 6), (uid("other"), 6)])


def test_other_bytes_of_the_same_uid_are_flagged_and_change_no_job(
    reception: Callable[..., Reception], files: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = reception()
    for path in files:
        node.receive(path)
    node.intake.start()
    (changed,) = write_series(tmp_path / "changed", phantom(1, 16, seed=9))
    assert node.receive(changed) is Kept.CONFLICT
    wait_for(lambda: node.series("n_conflicts") == 1)
    node.closed()
    assert len(rows(node.database, "instances")) == 6
    (job,) = node.jobs()
    # Again, and after the job was made: it says so, and the same object counts once.
    node.receive(changed)
    wait_for(lambda: "came with other bytes" in events(node.database, job["id"])[-1][1])
    assert node.series("n_conflicts") == 1
    assert "came again with other bytes" in caplog.text
    assert "Phantom" not in caplog.text


def test_a_missing_slice_waits_the_long_time(reception: Callable[..., Reception], files: list[Path]) -> None:
    node = reception(quiet_s=0.1, quiet_without_evidence_s=0.8)
    begun = time.monotonic()
    node.run(*files[:2], *files[3:])
    assert time.monotonic() - begun > 0.8
    (job,) = node.jobs()
    assert "a gap of 4.00 mm" in job["reason"]
    assert "a gap of 4.00 mm" in row(node.database, "series")["evidence"]


def test_a_series_that_waits_is_judged_once(
    reception: Callable[..., Reception], files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand slices take 50 ms; looking at them at every look would take the processor from reception."""
    judged: list[int] = []
    real = module.evidence

    def counted(headers: Any) -> Any:
        judged.append(len(headers))
        return real(headers)

    monkeypatch.setattr(module, "evidence", counted)
    node = reception(quiet_s=0.1, quiet_without_evidence_s=0.8)
    node.run(*files[:2], *files[3:])
    assert judged == [5]


def test_an_open_association_waits_the_long_time(reception: Callable[..., Reception], files: list[Path]) -> None:
    node = reception(quiet_s=0.1, quiet_without_evidence_s=30.0)
    node.associations[SERIES] = 1
    for path in files:
        node.receive(path)
    node.intake.start()
    wait_for(lambda: node.series("n_instances") == 6)
    end = time.monotonic() + 0.6
    while time.monotonic() < end:
        assert node.jobs() == []
    node.associations.clear()
    node.closed()
    assert len(node.jobs()) == 1


# ── routes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_routes_with_continue_are_two_jobs(reception: Callable[..., Reception], files: list[Path]) -> None:
    routes = [
        {"name": "full", "when": {"Modality": "CT"}, "pipeline": "identity", "send_to": ["pacs"], "continue": True},
        {"name": "half", "when": {"Modality": "CT"}, "pipeline": "half", "send_to": ["archive"]},
        {"name": "never", "when": {"Modality": "CT"}, "action": "forward", "send_to": ["archive"]},
    ]
    node = reception([])
    node.config = config_of(
        destinations={"pacs": 104, "archive": 105},
        routes=routes,
        assembly=QUIET,
        pipelines={"half": {"uses": "identity", "blend": 0.5}},
    )
    node.begin()
    node.run(*files)
    found = {job["route"]: job for job in node.jobs()}
    assert set(found) == {"full", "half"}
    assert (found["full"]["blend"], found["half"]["blend"]) == (1.0, 0.5)
    assert (found["full"]["n_in"], found["half"]["n_in"]) == (6, 6)
    assert found["full"]["superseded_by"] is None
    assert node.jobs(JobKind.ORIGINALS) == []


def test_what_no_route_takes_is_skipped_with_the_reason(reception: Callable[..., Reception], files: list[Path]) -> None:
    node = reception([{"name": "mr", "when": {"Modality": "MR"}, "pipeline": "identity", "send_to": ["pacs"]}])
    node.run(*files)
    (job,) = node.jobs()
    assert (job["state"], job["route"], job["n_in"]) == (JobState.SKIPPED, "", 6)
    assert job["reason"] == "no route matched: route mr: Modality is CT, not MR"
    assert job["finished_at"] is not None
    assert len(events(node.database, job["id"])) == 1


def test_what_a_route_ignores_is_skipped_with_the_reason(
    reception: Callable[..., Reception], files: list[Path]
) -> None:
    node = reception([{"name": "drop", "when": {"Modality": "CT"}, "action": "ignore"}])
    node.run(*files)
    (job,) = node.jobs()
    assert (job["state"], job["route"]) == (JobState.SKIPPED, "drop")
    assert "Modality is CT" in job["reason"]


@pytest.mark.parametrize("sop_class", [ENHANCED, CAPTURE])
def test_what_is_no_ct_image_on_a_pipeline_route_is_forwarded(
    reception: Callable[..., Reception], tmp_path: Path, sop_class: str
) -> None:
    (path,) = write_series(tmp_path / "ct", phantom(1, 16))
    edit(path, lambda ds: setattr(ds, "SOPClassUID", sop_class))
    node = reception()
    node.run(path)
    assert node.jobs() == []
    (job,) = node.jobs(JobKind.ORIGINALS)
    assert (job["state"], job["n_in"], job["n_out"]) == (JobState.DISPATCHING, 1, 1)
    assert "forwarded unchanged" in job["route_reason"]
    (transfer,) = rows(node.database, "transfers")
    assert (transfer["destination"], transfer["sop_class_uid"]) == ("pacs", sop_class)
    assert (node.spool.root / transfer["path"]).exists()


def test_a_localizer_in_the_series_takes_its_own_way(reception: Callable[..., Reception], tmp_path: Path) -> None:
    files = write_series(
        tmp_path / "ct",
        phantom(6, 16),
        ImageType=lambda k: ["ORIGINAL", "PRIMARY", "LOCALIZER" if k == 0 else "AXIAL"],
    )
    node = reception([{"name": "scout", "when": {"ImageType": "LOCALIZER"}, "action": "ignore"}, *CT])
    node.run(*files)
    assert sorted((job["route"], job["state"], job["n_in"]) for job in node.jobs()) == [
        ("ct", JobState.QUEUED, 5),
        ("scout", JobState.SKIPPED, 1),
    ]


def test_originals_go_at_once_and_are_through_only_when_the_series_is(
    reception: Callable[..., Reception], files: list[Path]
) -> None:
    node = reception([{**CT[0], "originals_to": ["archive"]}], quiet_s=0.4, quiet_without_evidence_s=5.0)
    node.intake.start()
    node.receive(files[0])
    wait_for(lambda: rows(node.database, "transfers"))
    assert row(node.database, "series")["state"] == SeriesState.OPEN
    with node.database.begin() as connection:
        connection.execute(sa.text("UPDATE deliveries SET state = 'SENT'"))
        connection.execute(sa.text("UPDATE transfers SET state = 'ACCEPTED'"))
        (originals,) = node.jobs(JobKind.ORIGINALS)
        settle(connection, originals["id"])
    assert node.jobs(JobKind.ORIGINALS)[0]["state"] == JobState.DISPATCHING
    for path in files[1:]:
        node.receive(path)
    wait_for(lambda: len(rows(node.database, "transfers")) == 6)
    assert row(node.database, "deliveries")["state"] == "WAITING", "reopened by what came later"
    with node.database.begin() as connection:
        connection.execute(sa.text("UPDATE deliveries SET state = 'SENT'"))
    node.closed()
    (originals,) = node.jobs(JobKind.ORIGINALS)
    assert (originals["state"], originals["n_in"], originals["n_out"]) == (JobState.DONE, 6, 6)
    assert [job["state"] for job in node.jobs()] == [JobState.QUEUED]


def test_a_series_sent_again_is_judged_by_the_routes_as_they_are_now(
    reception: Callable[..., Reception], files: list[Path]
) -> None:
    wrong = [{**CT[0], "when": {"Modality": "MR"}}]
    node = reception(wrong)
    node.run(*files)
    assert [job["state"] for job in node.jobs()] == [JobState.SKIPPED]
    node.config = config_of(
        destinations={"pacs": 104, "archive": 105},
        routes=[{**CT[0], "originals_to": ["archive"]}],
        assembly=dict(QUIET),
    )
    node.begin()
    node.run(*files)
    assert [(job["state"], job["route"]) for job in node.jobs()] == [
        (JobState.SKIPPED, ""),
        (JobState.QUEUED, "ct"),
    ]
    assert len(rows(node.database, "transfers")) == 6


def test_what_a_destination_got_is_not_forwarded_to_it_again(
    reception: Callable[..., Reception], files: list[Path]
) -> None:
    """Else a PACS that routes to the node what the node forwards to it would never come to rest."""
    node = reception([{"name": "all", "action": "forward", "send_to": ["pacs"]}])
    node.run(*files)
    before = rows(node.database, "transfers"), node.jobs(JobKind.ORIGINALS)
    node.begin()
    node.run(*files)
    assert (rows(node.database, "transfers"), node.jobs(JobKind.ORIGINALS)) == before


def test_a_destination_that_two_routes_name_gets_each_original_once(
    reception: Callable[..., Reception], files: list[Path]
) -> None:
    soft = {**CT[0], "name": "soft", "originals_to": ["archive"], "continue": True}
    node = reception([soft, {"name": "rest", "action": "forward", "send_to": ["archive", "pacs"]}])
    for _ in range(2):  # the series is sent again, too
        node.run(*files)
        got = Counter((one["destination"], one["sop_instance_uid"]) for one in rows(node.database, "transfers"))
        assert got == {(name, dcmread(path).SOPInstanceUID): 1 for name in ("archive", "pacs") for path in files}
        found = {job["route"]: job["reason"] for job in node.jobs(JobKind.ORIGINALS)}
        assert found == {
            "soft": "originals to archive, as they arrive",
            "rest": "originals to pacs, as they arrive",
        }
        node.begin()


def test_a_route_whose_destinations_are_all_served_makes_no_job_of_originals(
    reception: Callable[..., Reception], files: list[Path]
) -> None:
    soft = {**CT[0], "name": "soft", "originals_to": ["archive"], "continue": True}
    node = reception([soft, {"name": "rest", "action": "forward", "send_to": ["archive"]}])
    node.run(*files)
    assert [(job["route"], job["n_in"]) for job in node.jobs(JobKind.ORIGINALS)] == [("soft", len(files))]


def test_an_object_whose_file_was_removed_is_taken_anew_with_other_bytes(
    reception: Callable[..., Reception], files: list[Path], tmp_path: Path
) -> None:
    node = reception([{**CT[0], "originals_to": ["archive"]}])
    node.run(*files)
    for path in node.spool.paths():
        path.unlink()
    corrected = write_series(tmp_path / "corrected", phantom(6, 16, seed=5))
    node.begin()
    node.run(*corrected)
    first, second = node.jobs()
    assert (first["superseded_by"], second["generation"]) == (second["id"], 2)
    digests = [(one["sop_instance_uid"], one["sha256"]) for one in rows(node.database, "instances")]
    assert second["fingerprint"] == job_table.fingerprint(digests)
    assert [job["n_in"] for job in node.jobs(JobKind.ORIGINALS)] == [6, 6]


# ── faults of our own ──────────────────────────────────────────────────────────────────────────────────────────────


def test_an_object_that_faults_stops_no_other_series_and_no_later_start(
    reception: Callable[..., Reception],
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    others = write_series(tmp_path / "other", phantom(4, 16), name="other")
    poison = dcmread(files[2]).SOPInstanceUID
    real = Planning.forward_original

    def faulty(self: Planning, connection: sa.Connection, instance: Instance, *more: Any) -> None:
        if instance.sop_instance_uid == poison:
            raise TypeError("Doe^Jane")
        real(self, connection, instance, *more)

    node = reception()
    with monkeypatch.context() as patched:
        patched.setattr(Planning, "forward_original", faulty)
        node.run(*files, *others, series_count=2)
        node.begin()
        node.intake.recover()  # as a new start does
        node.intake.start()
        node.closed(2)
        node.intake.stop()
    states = {(job["series_uid"] == SERIES, job["state"]) for job in node.jobs()}
    assert states == {(True, JobState.FAILED), (False, JobState.QUEUED)}
    failed = next(job for job in node.jobs() if job["state"] == JobState.FAILED)
    assert f"{poison} not indexed: TypeError at faulty:" in failed["reason"]
    assert failed["n_in"] == len(files) - 1
    assert "Doe" not in caplog.text + failed["reason"]
    with node.database.begin() as connection, pytest.raises(NodeError, match="send the series again"):
        job_table.retry(connection, failed["id"])
    node.begin()  # a start of a node that was mended
    node.intake.recover()
    node.intake.start()
    wait_for(lambda: any(job["n_in"] == len(files) and job["state"] == JobState.QUEUED for job in node.jobs()))


def test_a_series_that_faults_when_it_is_judged_stops_no_other(
    reception: Callable[..., Reception],
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = write_series(tmp_path / "other", phantom(4, 16), name="other")

    def faulty(headers: list[Header]) -> Evidence:
        if len(headers) == len(files):
            raise ZeroDivisionError
        return evidence(headers)

    monkeypatch.setattr(module, "evidence", faulty)
    node = reception()
    node.run(*files, *others, series_count=2)
    failed, queued = sorted(node.jobs(), key=lambda job: str(job["state"]))
    assert (failed["state"], failed["series_uid"], failed["n_in"]) == (JobState.FAILED, SERIES, len(files))
    assert "a fault of the node: ZeroDivisionError at faulty:" in failed["reason"]
    assert (queued["state"], queued["n_in"]) == (JobState.QUEUED, 4)
