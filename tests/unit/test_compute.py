"""One attempt to compute: every outcome leads to its state, and no trouble of ours is held against a series."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from attempts import COUNT, PATHS, UIDS, Scripted, compute_with, config_with_route, make_job
from ct_builder import phantom, write_series
from node_process import PLUGINS
from peers import wait_for
from tables import add_job, add_series, config_of, events, row, rows

from dicomnode import compute as module
from dicomnode.config import Config, Derivation
from dicomnode.db import DeliveryState, JobState, jobs
from dicomnode.denoise import MANIFEST, Manifest, Report, denoise_series
from dicomnode.errors import WorkerDied
from dicomnode.worker import Outcome, Request, Worker
from pipelines.base import Options
from pipelines.identity import Identity


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("spool")
    write_series(root / "instances", phantom(COUNT, 64))
    return root


@pytest.fixture
def controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(PLUGINS))
    monkeypatch.setenv("TEST_PIPELINES", str(tmp_path))
    return tmp_path


@pytest.fixture
def config() -> Config:
    return config_with_route()


@pytest.fixture
def worker(controls: Path) -> Iterator[Worker]:
    made = Worker(1)
    yield made
    made.stop()


@pytest.fixture
def own_spool(spool: Path, tmp_path: Path) -> Path:
    """A spool with the same files and no results yet."""
    root = tmp_path / "spool"
    root.mkdir()
    (root / "instances").symlink_to(spool / "instances")
    return root


# ── outcomes ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (Outcome("refused", "a localizer"), JobState.SKIPPED),
        (Outcome("withheld", "HU moved", {"bias_hu": 40.0}), JobState.WITHHELD),
        (Outcome("failed", "ValueError: a fault"), JobState.FAILED),
        (Outcome("no-infrastructure", "no space"), JobState.QUEUED),
        (WorkerDied("signal 9"), JobState.QUEUED),
    ],
)
def test_each_outcome_has_its_state(
    config: Config, database: sa.Engine, spool: Path, outcome: Any, state: JobState
) -> None:
    make_job(database)
    compute_with(config, database, spool, Scripted(outcome)).process("job", 0)
    job = row(database, "jobs")
    assert job["state"] == state
    assert job["reason"] == (str(outcome) if isinstance(outcome, Exception) else outcome.detail)
    assert events(database)[-1] == (state, job["reason"])
    assert rows(database, "deliveries") == []
    assert (job["next_try_at"] is not None) == (state is JobState.QUEUED)
    assert job["crashes"] == isinstance(outcome, Exception)
    if state is JobState.WITHHELD:
        assert job["measured"] == {"guard": {"bias_hu": 40.0}}


def test_done_means_planned_for_every_destination(
    config: Config, database: sa.Engine, own_spool: Path, worker: Worker
) -> None:
    make_job(database, spool=own_spool)
    compute_with(config, database, own_spool, worker).process("job", 0)
    job = row(database, "jobs")
    manifest = Manifest.read(own_spool / "derived" / "job")
    assert (job["state"], job["n_in"], job["n_out"], job["progress"]) == (JobState.DISPATCHING, COUNT, COUNT, 1.0)
    assert job["derived_series_uid"] == manifest.derived_series_uid
    assert job["pipeline_hash"] == manifest.pipeline_hash
    assert job["measured"]["seconds"] == manifest.seconds
    assert [what.partition(";")[0] for _, what in events(database)[-2:]] == ["6 of 6 slices", "6 instances derived"]
    assert {(one["destination"], one["state"]) for one in rows(database, "deliveries")} == {
        ("a", DeliveryState.WAITING),
        ("b", DeliveryState.WAITING),
    }
    # What is sent is read from that folder, and nothing else.
    assert {(one["destination"], one["sop_instance_uid"], one["path"]) for one in rows(database, "transfers")} == {
        (name, one.sop_instance_uid, f"derived/job/{one.path.name}")
        for name in ("a", "b")
        for one in manifest.instances
    }


def test_what_computed_it_and_why_is_in_the_row(config: Config, database: sa.Engine, own_spool: Path) -> None:
    make_job(database)

    class Chosen(Identity):
        card = replace(Identity().card, backend="openvino", precision="int8", reason="the CPU (there is no GPU), int8")

    def denoise(request: Request, report: Report) -> None:
        denoise_series(
            [Path(path) for path in request.paths],
            Path(request.out),
            pipeline=Chosen(),
            options=Options(),
            fingerprint=request.fingerprint,
            settings=Derivation(**request.settings),
            created_at=datetime.fromisoformat(request.created_at),
            report=report,
        )

    worker = Scripted(Outcome("done"))
    worker.during = denoise
    compute_with(config, database, own_spool, worker).process("job", 0)
    measured = row(database, "jobs")["measured"]
    assert (measured["backend"], measured["precision"]) == ("openvino", "int8")
    assert measured["reason"] == "the CPU (there is no GPU), int8"


@pytest.mark.parametrize(
    ("uses", "state"),
    [
        ("test-harmful", JobState.WITHHELD),
        ("test-broken", JobState.FAILED),
        ("test-no-space", JobState.QUEUED),
        ("nobody", JobState.FAILED),
    ],
)
def test_a_pipeline_that_misbehaves_sends_nothing(
    config: Config, database: sa.Engine, own_spool: Path, worker: Worker, uses: str, state: JobState
) -> None:
    make_job(database, uses, spool=own_spool)
    compute_with(config, database, own_spool, worker).process("job", 0)
    assert row(database, "jobs")["state"] == state
    assert rows(database, "deliveries") == []
    derived = own_spool / "derived"
    assert not derived.exists() or list(derived.iterdir()) == []


def test_a_route_that_left_the_configuration(
    config: Config, database: sa.Engine, spool: Path, own_spool: Path, worker: Worker
) -> None:
    make_job(database, spool=own_spool)
    without = config_of(destinations={"a": 104})
    compute_with(without, database, own_spool, worker).process("job", 0)
    job = row(database, "jobs")
    assert job["state"] == JobState.FAILED
    assert "route ct is no longer in config.yaml" in job["reason"]
    # Put back, the result is there: it is sent, not computed again.
    with database.begin() as connection:
        module.job_table.retry(connection, "job")
    written = (own_spool / "derived" / "job" / MANIFEST).stat().st_mtime_ns
    compute_with(config, database, own_spool, worker).process("job", 1)
    assert row(database, "jobs")["state"] == JobState.DISPATCHING
    assert (own_spool / "derived" / "job" / MANIFEST).stat().st_mtime_ns == written


def test_a_file_that_changed_since_it_was_received_is_not_denoised(
    config: Config, database: sa.Engine, spool: Path, own_spool: Path, worker: Worker
) -> None:
    """Its pixels are zeros of the disk's making: as an image they are a possible one, and nothing else would notice."""
    make_job(database, spool=spool)
    (own_spool / "instances").unlink()
    shutil.copytree(spool / "instances", own_spool / "instances")
    damaged = own_spool / PATHS[UIDS[2]]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-2000] + bytes(2000))
    compute_with(config, database, own_spool, worker).process("job", 0)
    job = row(database, "jobs")
    assert job["state"] == JobState.FAILED
    assert job["reason"].startswith(f"{damaged} was changed on disk since it was received")
    assert list((own_spool / "derived").iterdir()) == []
    damaged.write_bytes(content)
    with database.begin() as connection:
        module.job_table.retry(connection, "job")
    compute_with(config, database, own_spool, worker).process("job", 1)
    assert row(database, "jobs")["state"] == JobState.DISPATCHING


def test_the_request_names_the_slices_of_the_job(config: Config, database: sa.Engine, spool: Path) -> None:
    worker = Scripted(Outcome("failed", "x"))
    with database.begin() as connection:
        add_series(connection, paths=PATHS, sha256={path: f"{k:064x}" for k, path in enumerate(PATHS.values())})
        add_series(connection, "9.9", paths=dict.fromkeys(UIDS, "instances/foreign.dcm"))  # the same UIDs elsewhere
        add_job(connection, sop_instance_uids=UIDS[1:4], strength=0.75, blend=0.5)
    compute_with(config, database, spool, worker).process("job", 0)
    (request,) = worker.requests
    assert request.paths == tuple(str(spool / "instances" / f"series-{k:04d}.dcm") for k in (1, 2, 3))
    assert request.sha256 == tuple(f"{k:064x}" for k in (1, 2, 3))
    assert (request.uses, request.strength, request.blend) == ("identity", 0.75, 0.5)
    assert request.out == str(spool / "derived" / "job")
    made = datetime.fromisoformat(request.created_at)
    assert made.utcoffset() is not None
    assert made.timestamp() == row(database, "jobs")["created_at"].replace(tzinfo=module.UTC).timestamp()


# ── lost attempts ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_poison_series_has_failed_after_max_worker_deaths(
    config: Config, database: sa.Engine, own_spool: Path, worker: Worker, controls: Path
) -> None:
    make_job(database, "test-crash", spool=own_spool)
    make_job(database, identity="next", spool=own_spool)
    compute = compute_with(config, database, own_spool, worker)
    for run in range(5):
        compute.process("job", run)
    job = row(database, "jobs", id="job")
    assert (job["state"], job["crashes"], job["runs"]) == (JobState.FAILED, 3, 3)
    assert "signal 9" in job["reason"]
    assert (controls / "crashes").read_text() == "xxx"
    assert list((own_spool / "derived").iterdir()) == []
    compute.process("next", 0)
    assert row(database, "jobs", id="next")["state"] == JobState.DISPATCHING


def test_one_dead_child_costs_one_attempt(
    config: Config, database: sa.Engine, own_spool: Path, worker: Worker, controls: Path
) -> None:
    make_job(database, "test-held", spool=own_spool)
    (controls / "hold").touch()
    compute = compute_with(config, database, own_spool, worker)
    thread = threading.Thread(target=compute.process, args=("job", 0))
    thread.start()
    wait_for(lambda: (controls / "running").exists() and (controls / "running").read_text(), 20)
    os.kill(int((controls / "running").read_text()), signal.SIGKILL)
    thread.join(20)
    assert (row(database, "jobs")["state"], row(database, "jobs")["crashes"]) == (JobState.QUEUED, 1)
    (controls / "hold").unlink()
    compute.process("job", 1)
    assert row(database, "jobs")["state"] == JobState.DISPATCHING


def test_a_death_at_the_stop_of_the_node_is_not_the_fault_of_the_series(
    config: Config, database: sa.Engine, spool: Path
) -> None:
    make_job(database)
    compute = compute_with(config, database, spool, Scripted(WorkerDied("the node is stopping")))
    compute.stop()
    compute.process("job", 0)
    job = row(database, "jobs")
    assert (job["state"], job["crashes"]) == (JobState.QUEUED, 0)
    assert job["next_try_at"] <= module.now()


def test_a_death_by_cancel_is_left_to_the_dispatcher(config: Config, database: sa.Engine, spool: Path) -> None:
    make_job(database)
    worker = Scripted(WorkerDied("signal 9"))

    def cancel(request: Request, report: Any) -> None:
        with database.begin() as connection:
            connection.execute(sa.update(jobs).values(cancel_requested=True))

    worker.during = cancel
    compute_with(config, database, spool, worker).process("job", 0)
    assert (row(database, "jobs")["state"], row(database, "jobs")["crashes"]) == (JobState.RUNNING, 0)
    with database.begin() as connection:
        assert module.job_table.cancel(connection, "job")


@pytest.mark.parametrize(
    "outcome", [Outcome("refused", "x"), Outcome("failed", "x"), Outcome("no-infrastructure", "x")]
)
def test_an_outcome_that_comes_too_late_changes_nothing(
    config: Config, database: sa.Engine, spool: Path, outcome: Outcome
) -> None:
    make_job(database)
    worker = Scripted(outcome)

    def cancel(request: Request, report: Any) -> None:
        with database.begin() as connection:
            assert module.job_table.cancel(connection, "job")

    worker.during = cancel
    compute_with(config, database, spool, worker).process("job", 0)
    assert row(database, "jobs")["state"] == JobState.CANCELLED


def test_what_is_not_due_is_not_computed(config: Config, database: sa.Engine, spool: Path) -> None:
    make_job(database)
    worker = Scripted()
    compute_with(config, database, spool, worker).process("job", 3)
    compute_with(config, database, spool, worker).process("nobody", 0)
    assert worker.requests == []


@pytest.mark.parametrize("manifest", [None, "{", '{"options": {}}'])
def test_a_result_that_cannot_be_read_ends_visibly(
    config: Config,
    database: sa.Engine,
    own_spool: Path,
    caplog: pytest.LogCaptureFixture,
    manifest: str | None,
) -> None:
    """Not repeated for ever: nobody knows that it would end otherwise."""
    make_job(database)
    out = own_spool / "derived" / "job"
    out.mkdir(parents=True)
    if manifest is not None:
        (out / MANIFEST).write_text(manifest)
    compute_with(config, database, own_spool, Scripted(Outcome("done"))).process("job", 0)
    assert row(database, "jobs")["state"] == JobState.FAILED
    assert row(database, "jobs")["crashes"] == 0
    assert "read:" in caplog.text


@pytest.mark.parametrize(
    ("number", "state"),
    [
        *((number, JobState.QUEUED) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)),
        *((number, JobState.QUEUED) for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)),
        *((number, JobState.FAILED) for number in (errno.EIO, errno.EACCES, errno.ENOENT, errno.ECONNREFUSED)),
    ],
)
def test_an_attempt_is_repeated_only_where_the_machine_has_run_out_of_something(
    config: Config, database: sa.Engine, spool: Path, number: int, state: JobState
) -> None:
    make_job(database)
    worker = Scripted(OSError(number, os.strerror(number)))
    compute_with(config, database, spool, worker).process("job", 0)
    assert row(database, "jobs")["state"] == state
    assert os.strerror(number) in row(database, "jobs")["reason"]
    assert row(database, "jobs")["crashes"] == 0


def test_a_database_that_fails_under_the_attempt_is_left_to_the_dispatcher(
    config: Config, database: sa.Engine, spool: Path
) -> None:
    make_job(database)
    worker = Scripted(sa.exc.OperationalError("UPDATE", {}, Exception("locked")))
    with pytest.raises(sa.exc.OperationalError):
        compute_with(config, database, spool, worker).process("job", 0)
    assert row(database, "jobs")["state"] == JobState.RUNNING
