"""How far a job is and where its time goes: from where a stage runs to the row of the job."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from attempts import Scripted, compute_with, config_with_route, make_job
from ct_builder import phantom, write_series
from numpy.typing import NDArray
from tables import events, row

from dicomnode import compute as module
from dicomnode import denoise, derive
from dicomnode.config import Config, Derivation
from dicomnode.db import JobState
from dicomnode.denoise import Manifest, Progress, Report, denoise_series
from dicomnode.errors import WorkerDied
from dicomnode.worker import Outcome, Request
from pipelines import volume
from pipelines.base import Options
from pipelines.ct_slice import CTSlice
from pipelines.guard import Guard
from pipelines.identity import Identity
from pipelines.volume import FileSeries, Series

COUNT = 5


@pytest.fixture
def config() -> Config:
    return config_with_route()


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """Nothing is read from it: the workers here are scripted."""
    return tmp_path / "spool"


# ── where a stage runs ─────────────────────────────────────────────────────────────────────────────────────────────


class Clocks:
    """A clock for each thread, which stands still until that thread works, or waits, for so many seconds."""

    def __init__(self) -> None:
        self._now: defaultdict[int, float] = defaultdict(float)

    def monotonic(self) -> float:
        return self._now[threading.get_ident()]

    def spend(self, seconds: float) -> None:
        self._now[threading.get_ident()] += seconds


def test_each_stage_is_timed_where_it_runs_without_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times of the test's own choice, a power of two for each stage, so that one in the wrong place shows."""
    clocks = Clocks()
    for timed in (denoise, derive, volume):
        monkeypatch.setattr(timed, "time", SimpleNamespace(monotonic=clocks.monotonic))

    def costs(owner: Any, method: str, seconds: float) -> None:
        original = getattr(owner, method)

        def call(*arguments: Any) -> Any:
            clocks.spend(seconds)
            return original(*arguments)

        monkeypatch.setattr(owner, method, call)

    costs(denoise, "open_series", 1.0)  # the headers, in the caller's thread
    costs(CTSlice, "read_hu", 2.0)  # in the reader's
    costs(FileSeries, "plane", 1024.0)  # waiting for the reader, whoever does
    costs(Guard, "add", 8.0)
    costs(derive.SeriesWriter, "_derive", 16.0)  # in the writer's
    costs(derive.SeriesWriter, "write", 4096.0)  # waiting for the writer

    class Network(Identity):
        def denoise(self, series: Series, options: Options) -> Iterator[NDArray[np.float32]]:
            for k in range(COUNT):
                clocks.spend(4.0)
                self.prefetch(series, k)
                yield series.plane(k).hu.copy()

        def prefetch(self, series: Series, k: int) -> None:
            """A thread of the pipeline's own waits, the pipeline works: that is no waiting."""
            thread = threading.Thread(target=series.plane, args=(k,))
            thread.start()
            thread.join()

    told: list[Progress] = []
    manifest = denoise_series(
        write_series(tmp_path / "ct", phantom(COUNT, 64)),
        tmp_path / "out",
        pipeline=Network(),
        options=Options(),
        fingerprint="5e" * 32,
        settings=Derivation(),
        created_at=datetime(2026, 11, 20, tzinfo=UTC),
        report=told.append,
    )
    expected = {
        "read": 1.0 + COUNT * 2.0,
        "network": COUNT * 4.0,
        "guard": COUNT * 8.0,
        "write": COUNT * 16.0,
        # by the clock of the caller, who opens, compares and waits: for each plane to compare, and for the writer to
        # take it (which asks for the plane once more)
        "wall": 1.0 + COUNT * (1024.0 + 8.0 + 4096.0 + 1024.0),
    }
    assert manifest.seconds == expected
    assert list(manifest.seconds) == list(expected)
    assert Manifest.read(tmp_path / "out").seconds == expected
    assert [(one.slices, one.of) for one in told] == [*((k, COUNT) for k in range(COUNT + 1)), (COUNT, COUNT)]
    assert [one.seconds["guard"] for one in told] == [0.0, 8.0, 16.0, 24.0, 32.0, 40.0, 40.0]
    assert told[0].seconds["read"] >= 1.0
    assert told[-1].seconds == expected


# ── the row ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_progress_is_shown(config: Config, database: sa.Engine, spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROGRESS_EVERY_S", 0.0)
    make_job(database)
    worker, seen = Scripted(Outcome("failed", "x")), []

    def report_some(request: Request, report: Report) -> None:
        for slices in (0, 3, 6):
            report(Progress(slices, 12, {"network": 2.5 * slices}))
            job = row(database, "jobs")
            seen.append((job["progress"], job["measured"]))

    worker.during = report_some
    compute_with(config, database, spool, worker).process("job", 0)
    assert seen == [
        (0.0, {"seconds": {"network": 0.0}}),
        (0.25, {"seconds": {"network": 7.5}}),
        (0.5, {"seconds": {"network": 15.0}}),
    ]


@pytest.mark.parametrize(
    ("outcome", "state", "more"),
    [
        (Outcome("withheld", "HU moved", {"bias_hu": 40.0}), JobState.WITHHELD, {"guard": {"bias_hu": 40.0}}),
        (Outcome("failed", "ValueError: a fault"), JobState.FAILED, {}),
        (Outcome("no-infrastructure", "no space"), JobState.QUEUED, {}),
        (WorkerDied("signal 9"), JobState.QUEUED, {}),
    ],
)
def test_how_long_an_attempt_took_is_kept_however_it_ends(
    config: Config, database: sa.Engine, spool: Path, outcome: Any, state: JobState, more: dict[str, Any]
) -> None:
    """What the child said last, although the row was written a moment before."""
    make_job(database)
    worker = Scripted(outcome)
    seconds = {"read": 1.25, "network": 31.0, "guard": 2.0, "write": 3.75, "wall": 33.5}

    def report_some(request: Request, report: Report) -> None:
        report(Progress(0, 12, dict.fromkeys(seconds, 0.0)))
        report(Progress(9, 12, seconds))

    worker.during = report_some
    compute_with(config, database, spool, worker).process("job", 0)
    job = row(database, "jobs")
    assert (job["state"], job["measured"]) == (state, {"seconds": seconds, **more})
    assert job["progress"] == (0.0 if state is JobState.QUEUED else 0.75)
    assert events(database)[-2:] == [
        (
            JobState.RUNNING,
            "9 of 12 slices; reading 1.2 s, network 31.0 s, output check 2.0 s, writing 3.8 s, in all 33.5 s",
        ),
        (state, job["reason"]),
    ]


def test_a_progress_that_cannot_be_written_harms_no_job(
    config: Config, database: sa.Engine, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PROGRESS_EVERY_S", 0.0)
    make_job(database)
    worker = Scripted(Outcome("refused", "x"))

    def report_into_a_full_disk(request: Request, report: Report) -> None:
        with database.begin() as connection:
            connection.execute(
                sa.text(
                    "CREATE TRIGGER full BEFORE UPDATE OF progress ON jobs WHEN NEW.state = 'RUNNING' "
                    "BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
                )
            )
        report(Progress(1, 2, {}))
        with database.begin() as connection:
            connection.execute(sa.text("DROP TRIGGER full"))
        assert row(database, "jobs")["progress"] == 0.0

    worker.during = report_into_a_full_disk
    compute_with(config, database, spool, worker).process("job", 0)
    assert row(database, "jobs")["state"] == JobState.SKIPPED


def test_a_child_that_works_for_a_cancelled_job_is_stopped_at_its_next_word(
    config: Config, database: sa.Engine, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cancel came between the begin of the attempt and its child: there was nothing to kill yet."""
    monkeypatch.setattr(module, "_PROGRESS_EVERY_S", 0.0)
    make_job(database)
    worker = Scripted(WorkerDied("signal 9"))

    def cancel(request: Request, report: Report) -> None:
        report(Progress(1, 100, {}))
        assert worker.cancelled == []
        with database.begin() as connection:
            assert module.job_table.cancel(connection, "job")
        report(Progress(2, 100, {}))

    worker.during = cancel
    compute_with(config, database, spool, worker).process("job", 0)
    assert worker.cancelled == ["job"]
    assert (row(database, "jobs")["state"], row(database, "jobs")["progress"]) == (JobState.CANCELLED, 0.01)
