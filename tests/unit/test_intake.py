"""From stored objects to jobs: every object has its row, its route and its outcome, whatever fails in between."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from ct_builder import edit, phantom, uid, write_series
from peers import free_port, wait_for
from pydicom import dcmread
from tables import config_of, database_in, events, row, rows

from dicomnode import intake as module
from dicomnode import jobs as job_table
from dicomnode.config import Config
from dicomnode.db import JobKind, JobState, SeriesState, jobs, series
from dicomnode.intake import Intake
from dicomnode.router import header_values
from dicomnode.scp import StorageServer
from dicomnode.scu import Answer, Outgoing, Peer, store
from dicomnode.spool import Incoming, Kept, Spool

HASH = "ab" * 32
SERIES = uid("series")
QUIET = {"quiet_s": 0.15, "quiet_without_evidence_s": 0.5}
CT = [{"name": "ct", "when": {"Modality": "CT"}, "pipeline": "identity", "send_to": ["pacs"]}]
ENHANCED = "1.2.840.10008.5.1.4.1.1.2.1"
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


class Reception:
    """A spool, tables, and an intake that may be stopped or killed and started again on them."""

    def __init__(self, folder: Path, routes: list[dict[str, Any]], **assembly: float) -> None:
        self.folder = folder
        self.config: Config = config_of(
            destinations={"pacs": 104, "archive": 105}, routes=routes, assembly={**QUIET, **assembly}
        )
        self.database = database_in(folder)
        self.spool = Spool(folder / "spool")
        self.associations: Counter[str] = Counter()
        self.begin()

    def begin(self) -> None:
        """A new intake, as a new process has it."""
        hashes = dict.fromkeys(self.config.pipelines, HASH)
        self.intake = Intake(self.config, self.database, self.spool, lambda one: self.associations[one], hashes)

    def receive(self, path: Path, calling_ae: str = "SCANNER", *, tell: bool = True) -> Kept:
        """Keep one object as the receiver does; without `tell` as if the process ended before the row was written."""
        ds = dcmread(path)
        content = path.read_bytes()
        incoming = Incoming(
            sop_instance_uid=ds.SOPInstanceUID,
            sop_class_uid=ds.SOPClassUID,
            series_uid=ds.SeriesInstanceUID,
            study_uid=ds.StudyInstanceUID,
            transfer_syntax_uid=ds.file_meta.TransferSyntaxUID,
            calling_ae=calling_ae,
            called_ae="NODE",
        )
        data = memoryview(content)[144 + ds.file_meta.FileMetaInformationGroupLength :]
        kept, instance = self.spool.store(incoming, data)
        if tell:
            self.intake.stored(kept, instance, header_values(ds, self.intake.keywords))
        return kept

    def jobs(self, kind: JobKind = JobKind.PIPELINE) -> list[dict[str, Any]]:
        return [job for job in rows(self.database, "jobs", "created_at") if job["kind"] == kind]

    def series(self, column: str) -> Any:
        """A value of the one series; None as long as there is none."""
        found = rows(self.database, "series")
        return found[0][column] if found else None

    def closed(self, count: int = 1) -> None:
        """Wait until so many series are there and closed."""

        def quiet() -> bool:
            states = [one["state"] for one in rows(self.database, "series")]
            return states == [SeriesState.CLOSED] * count and not self.intake._open

        wait_for(quiet, 15, "the series to close")

    def run(self, *paths: Path, series_count: int = 1) -> None:
        """Receive, start, wait until it is closed, stop."""
        for path in paths:
            self.receive(path)
        before = self.series("last_at")
        self.intake.start()
        wait_for(lambda: not paths or self.series("last_at") != before, 15, "the objects to be indexed")
        self.closed(series_count)
        self.intake.stop()


@pytest.fixture
def reception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Reception]]:
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.02)
    made: list[Reception] = []

    def make(routes: list[dict[str, Any]] | None = None, **assembly: float) -> Reception:
        made.append(Reception(tmp_path, CT if routes is None else routes, **assembly))
        return made[-1]

    yield make
    for one in made:
        one.intake.stop()
        one.spool.close()


@pytest.fixture(scope="module")
def shared_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_series(tmp_path_factory.mktemp("ct"), phantom(6, 16))


@pytest.fixture
def files(shared_files: list[Path]) -> list[Path]:
    return list(shared_files)


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
        job_table.settle(connection, originals["id"])
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


# ── recovery ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_without_a_row_is_indexed_at_start(reception: Callable[..., Reception], files: list[Path]) -> None:
    node = reception()
    for path in files:
        node.receive(path, tell=False)
    node.intake.recover()
    assert len(rows(node.database, "instances")) == 6
    assert row(node.database, "series")["state"] == SeriesState.OPEN
    assert {(one["calling_ae"], one["called_ae"]) for one in rows(node.database, "instances")} == {("SCANNER", "NODE")}
    node.intake.recover()
    assert row(node.database, "series")["n_instances"] == 6
    node.run()
    assert [job["n_in"] for job in node.jobs()] == [6]


def test_an_open_series_goes_on_after_a_restart(reception: Callable[..., Reception], files: list[Path]) -> None:
    node = reception(quiet_s=20.0, quiet_without_evidence_s=20.0)
    node.intake.start()
    for path in files[:3]:
        node.receive(path)
    wait_for(lambda: node.series("n_instances") == 3)
    node.intake.stop()
    node.config = config_of(destinations={"pacs": 104}, routes=CT, assembly=QUIET)
    node.begin()
    node.intake.recover()
    node.run(*files[3:])
    (job,) = node.jobs()
    assert (job["n_in"], job["generation"]) == (6, 1)


def test_an_open_series_closes_after_a_restart_though_nothing_more_comes(
    reception: Callable[..., Reception], files: list[Path]
) -> None:
    node = reception()
    for path in files:
        node.receive(path)
    node.intake._index(node.intake._drain())  # and here the process ends
    assert node.jobs() == []
    node.begin()
    node.intake.recover()
    node.run()
    assert [job["n_in"] for job in node.jobs()] == [6]


def test_a_row_without_a_file_is_reported_and_stops_nothing(
    reception: Callable[..., Reception], files: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    node = reception()
    for path in files:
        node.receive(path)
    node.intake._index(node.intake._drain())
    lost = sorted(node.spool.paths())[0]
    lost.unlink()
    node.begin()
    node.intake.recover()
    assert [record.levelno for record in caplog.records if lost.name in record.message] == [logging.ERROR]
    node.run()
    assert [job["n_in"] for job in node.jobs()] == [5]


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"\0" * 128 + b"DICM" + b"\xff" * 100])
def test_a_damaged_file_stops_neither_the_start_nor_its_series(
    reception: Callable[..., Reception], files: list[Path], caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    node = reception()
    for path in files[:5]:
        node.receive(path)
    node.intake._index(node.intake._drain())
    sorted(node.spool.paths())[0].write_bytes(content)
    node.receive(files[5], tell=False)
    (node.spool.instances / SERIES / "1.2.3.dcm").write_bytes(content)
    node.begin()
    node.intake.recover()
    assert "1.2.3.dcm" in caplog.text
    node.run()
    assert [job["n_in"] for job in node.jobs()] == [5]


def test_an_object_whose_first_acknowledgement_failed_gets_its_row_from_the_second(
    reception: Callable[..., Reception], files: list[Path]
) -> None:
    """Renamed, and then the folder could not be synced: no success was answered, and the sender comes again."""
    node = reception()
    node.receive(files[0], tell=False)
    assert node.receive(files[0]) is Kept.SAME
    node.run(*files[1:])
    assert [job["n_in"] for job in node.jobs()] == [6]


# ── the database fails ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_locked_database_does_not_stop_reception(
    reception: Callable[..., Reception], files: list[Path], tmp_path: Path
) -> None:
    node = reception()
    settings = config_of(reception={"min_free_mb": 0}, node={"port": free_port()})
    server = StorageServer(settings, node.spool, node.intake.keywords, node.intake.stored)
    node.intake.start()
    server.start()
    holder = sqlite3.connect(tmp_path / "node.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    answers: list[Any] = []
    items = [
        Outgoing(uid("series", "instance", k), dcmread(path).SOPClassUID, "1.2.840.10008.1.2.1", path)
        for k, path in enumerate(files)
    ]
    begun = time.monotonic()
    try:
        peer = Peer("node", settings.node.ae_title, "127.0.0.1", server.port, "SCANNER")
        store(peer, items, answers.append, lambda: False)
        answered_s = time.monotonic() - begun
        wait_for(lambda: time.monotonic() - begun > 3.0, 10)
        with sqlite3.connect(f"file:{tmp_path / 'node.db'}?mode=ro", uri=True) as plain:
            assert plain.execute("SELECT count(*) FROM instances").fetchone() == (0,)
        plain.close()
    finally:
        holder.rollback()
        holder.close()
        server.stop(1)
    assert answers == [Answer(item.sop_instance_uid, 0x0000) for item in items]
    assert answered_s < 2.5, "answered while the lock was held"
    node.closed()
    assert [job["n_in"] for job in node.jobs()] == [6]


def test_a_full_disk_of_the_database_does_not_stop_reception(
    reception: Callable[..., Reception], files: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """SQLite's own limit on pages gives the very error of a full disk (SQLITE_FULL)."""
    monkeypatch.setattr(module, "_DATABASE_PAUSE_S", 0.05)
    node = reception()
    limit = [0]

    def set_limit(connection: Any, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count={limit[0] or 1 << 30}")

    sa.event.listen(node.database, "checkout", set_limit)
    with node.database.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE ballast (bytes BLOB)")
        limit[0] = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    with sqlite3.connect(tmp_path / "node.db") as filler:
        filler.execute(f"PRAGMA max_page_count={limit[0]}")
        size = 4000
        while size:
            try:
                filler.execute("INSERT INTO ballast VALUES (zeroblob(?))", (size,))
                filler.commit()
            except sqlite3.OperationalError:
                size //= 10
        filler.rollback()
    filler.close()
    many = write_series(tmp_path / "many", phantom(60, 16), name="many")
    node.intake.start()
    for path in many:
        assert node.receive(path) is Kept.NEW
    wait_for(lambda: "cannot index now" in caplog.text, 10)
    assert "database or disk is full" in caplog.text
    limit[0] = 0
    node.closed()
    assert [job["n_in"] for job in node.jobs()] == [60]


@pytest.mark.parametrize(
    "error",
    [
        sa.exc.OperationalError("INSERT", {}, Exception("locked")),
        sa.exc.TimeoutError("no free connection"),
        OSError("the disk is away"),
    ],
)
def test_the_thread_survives_and_loses_nothing(
    reception: Callable[..., Reception], files: list[Path], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(module, "_DATABASE_PAUSE_S", 0.01)
    node = reception()
    index, failures = node.intake._index, [error, error]

    def failing(batch: Any) -> None:
        if failures:
            raise failures.pop()
        index(batch)

    monkeypatch.setattr(node.intake, "_index", failing)
    node.run(*files)
    assert [job["n_in"] for job in node.jobs()] == [6]


def test_no_series_is_closed_while_objects_wait_for_their_rows(
    reception: Callable[..., Reception], files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a long lock much is queued; a series whose rest is among it only looks silent."""
    monkeypatch.setattr(module, "_BATCH", 1)
    node = reception()
    indexed, index = threading.Semaphore(0), node.intake._index

    def slow(batch: Any) -> None:
        indexed.acquire(timeout=10)
        index(batch)

    monkeypatch.setattr(node.intake, "_index", slow)
    for path in files[:3]:
        node.receive(path)
    others = write_series(node.folder / "others", phantom(3, 16), name="others")
    for path in [*others, *files[3:]]:
        node.receive(path)
    node.intake.start()
    for number in range(1, 10):
        indexed.release()
        wait_for(lambda n=number: len(rows(node.database, "instances")) == n)
        if number == 5:  # the first series has been silent for longer than quiet_s
            time.sleep(3 * QUIET["quiet_s"])
    node.closed(2)
    assert sorted((job["n_in"], job["generation"]) for job in node.jobs()) == [(3, 1), (6, 1)]


def test_nothing_queued_is_forgotten_at_the_stop(reception: Callable[..., Reception], files: list[Path]) -> None:
    node = reception(quiet_s=20.0, quiet_without_evidence_s=20.0)
    for path in files:
        node.receive(path)
    node.intake.start()
    node.intake.stop()
    assert len(rows(node.database, "instances")) == 6


def test_the_same_slices_through_another_pipeline_are_another_job(
    reception: Callable[..., Reception], files: list[Path]
) -> None:
    node = reception()
    node.run(*files)
    node.intake = Intake(node.config, node.database, node.spool, lambda one: 0, {"identity": "cd" * 32})
    with node.database.begin() as connection:
        connection.execute(sa.update(series).values(state=SeriesState.OPEN))
    node.intake.recover()
    node.run()
    first, second = node.jobs()
    assert first["fingerprint"] == second["fingerprint"]
    assert first["id"] != second["id"]
