"""Nothing received is forgotten: restarts, damaged files, a database that is locked, full or gone."""

from __future__ import annotations

import errno
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from ct_builder import phantom, uid, write_series
from peers import free_port, wait_for
from pydicom import dcmread
from reception import CT, QUIET, SERIES, Reception, receptions
from tables import config_of, row, rows

from dicomnode import intake as module
from dicomnode.db import JobState, SeriesState, series
from dicomnode.intake import Intake
from dicomnode.requestor import Peer
from dicomnode.scp import StorageServer
from dicomnode.scu import Answer, Outgoing, store
from dicomnode.spool import Kept


@pytest.fixture
def reception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Reception]]:
    yield from receptions(tmp_path, monkeypatch)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return write_series(tmp_path / "six", phantom(6, 16))


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


@pytest.mark.filterwarnings("ignore")  # as in a node, where pydicom reads on through the last of these
@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"\0" * 128 + b"DICM" + b"\xff" * 100])
def test_a_damaged_file_does_not_stop_the_start_and_its_series_says_so(
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
    (failed,) = node.jobs()
    assert (failed["state"], failed["n_in"]) == (JobState.FAILED, 6)
    assert "received images that cannot be read any more: 1;" in failed["reason"]


def test_a_file_that_nobody_can_open_for_now_is_not_taken_for_damaged(
    reception: Callable[..., Reception], files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = reception()
    node.run(*files[:5])
    node.begin()
    refused = iter(range(2))
    read = module.dcmread

    def short_of_handles(path: Path, **how: Any) -> Any:
        if next(refused, None) is not None:
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return read(path, **how)

    monkeypatch.setattr(module, "dcmread", short_of_handles)
    node.run(files[5])
    assert next(refused, None) is None
    assert [(job["state"], job["n_in"]) for job in node.jobs()] == [(JobState.QUEUED, 5), (JobState.QUEUED, 6)]


@pytest.mark.parametrize("cure", ["put back", "deleted"])
def test_a_series_with_a_damaged_file_is_judged_again_once_it_is_mended(
    reception: Callable[..., Reception], files: list[Path], caplog: pytest.LogCaptureFixture, cure: str
) -> None:
    """It grows while one of its files cannot be read: five slices that seem to be all must not be denoised as such."""
    node = reception()
    node.run(*files[:5])
    path = sorted(node.spool.paths())[0]  # the first of the stack: without it the rest has no gap
    whole = path.read_bytes()
    path.write_bytes(b"\0" * len(whole))
    node.begin()
    node.run(files[5])
    first, failed = node.jobs()
    assert (first["state"], first["superseded_by"]) == (JobState.QUEUED, None)
    assert (failed["state"], failed["n_in"]) == (JobState.FAILED, 6)
    why = "the series was not judged: received images that cannot be read any more: 1; put their files"
    assert failed["reason"].startswith(why)
    assert str(path) in caplog.text
    path.unlink()
    if cure == "put back":
        path.write_bytes(whole)
    node.begin()
    node.run(*files)
    *_, whole_series = node.jobs()
    assert (whole_series["state"], whole_series["n_in"]) == (JobState.QUEUED, 6)
    assert "6 slices without a gap" in whole_series["reason"]
    assert row(node.database, "jobs", id=first["id"])["superseded_by"] == whole_series["id"]


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
    reception: Callable[..., Reception],
    files: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
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
        if number == 5:  # the first series looks silent for longer than quiet_s
            node.intake._open[SERIES].last_activity_s -= 100 * QUIET["quiet_s"]
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
