"""The commands as a person types them; their words and exit codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
import yaml
from ct_builder import phantom, write_series
from oracle import Script, StorageOracle
from peers import HOST, free_port
from pydicom import dcmread
from untrained import damaged

from dicomnode import jobs as job_table
from dicomnode.cli import BAD_USAGE, FAILED, OK, main
from dicomnode.db import JobKind, JobState, SeriesState, jobs, now, open_database, series
from pipelines import base
from pipelines.shipped import st3d

SERIES = "1.2.3.4"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with one destination, nobody behind it."""
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "node": {"spool": "spool", "database": "sqlite:///node.db"},
                "destinations": {"pacs": {"ae_title": "PACS", "host": HOST, "port": free_port()}},
                "pipelines": {"half": {"uses": "identity", "blend": 0.5}},
                "routes": [{"name": "all", "action": "forward", "send_to": ["pacs"]}],
            }
        )
    )
    return path


def with_peer(config: Path, oracle: StorageOracle) -> Path:
    content = yaml.safe_load(config.read_text())
    content["destinations"]["pacs"] = {"ae_title": oracle.ae_title, "host": HOST, "port": oracle.port}
    config.write_text(yaml.safe_dump(content))
    return config


def add_job(config: Path, identity: str, state: JobState, reason: str) -> None:
    database = open_database(f"sqlite:///{config.parent / 'node.db'}")
    with database.begin() as connection:
        connection.execute(
            sa.insert(series)
            .prefix_with("OR IGNORE")
            .values(series_uid=SERIES, study_uid="1.2", state=SeriesState.CLOSED, first_at=now(), last_at=now())
        )
        job_table.create(
            connection,
            identity=identity,
            state=state,
            reason=reason,
            kind=JobKind.PIPELINE,
            series_uid=SERIES,
            study_uid="1.2",
            generation=1,
            calling_ae="CT1",
            route="chest",
            route_reason="route chest: Modality is CT",
            uses="identity",
            priority=10,
        )
    database.dispose()


def test_check_config_says_good(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", "--config", str(config)]) == OK
    assert "1 destinations, 1 routes" in capsys.readouterr().out


def test_check_config_names_the_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text("node:\n  prot: 104\n")
    assert main(["check-config", "--config", str(config)]) == BAD_USAGE
    assert "config.yaml:2" in capsys.readouterr().err


def test_echo_answered_and_not(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["echo", "pacs", "--config", str(config)]) == FAILED
    assert "no answer" in capsys.readouterr().err
    with StorageOracle() as oracle:
        assert main(["echo", "pacs", "--config", str(with_peer(config, oracle))]) == OK
    assert "answered in" in capsys.readouterr().out


def test_echo_of_an_unknown_destination_names_those_that_exist(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["echo", "pax", "--config", str(config)]) == FAILED
    assert "there are: pacs" in capsys.readouterr().err


def test_send_a_folder_with_other_files_in_it(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_series(tmp_path / "ct", phantom(3))
    (tmp_path / "ct" / "README.txt").write_text("not DICOM")
    with StorageOracle() as oracle:
        assert main(["send", "pacs", str(tmp_path / "ct"), "--config", str(with_peer(config, oracle))]) == OK
        assert sorted(oracle.received) == sorted(dcmread(path).SOPInstanceUID for path in files)
    said = capsys.readouterr()
    assert "3 of 3 accepted" in said.out
    assert "README.txt: left out" in said.err


def test_send_tells_of_a_refused_image(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_series(tmp_path / "ct", phantom(2))
    refused = dcmread(files[0]).SOPInstanceUID
    with StorageOracle(Script(status_of={refused: 0xA900})) as oracle:
        assert main(["send", "pacs", str(tmp_path / "ct"), "--config", str(with_peer(config, oracle))]) == FAILED
    said = capsys.readouterr()
    assert "1 of 2 accepted" in said.out
    assert f"{refused}: 0xA900" in said.err


@pytest.mark.parametrize("status", [0xB000, 0xB006, 0xB007])
def test_send_counts_a_warning_as_accepted_and_tells_it(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    files = write_series(tmp_path / "ct", phantom(2))
    warned = dcmread(files[0]).SOPInstanceUID
    with StorageOracle(Script(status_of={warned: status})) as oracle:
        assert main(["send", "pacs", str(tmp_path / "ct"), "--config", str(with_peer(config, oracle))]) == OK
    said = capsys.readouterr()
    assert "2 of 2 accepted" in said.out
    assert f"{warned}: accepted with warning 0x{status:04X}" in said.err


def test_jobs_list_and_show(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_job(config, "a" * 40, JobState.SKIPPED, "gap: a slice is missing")
    add_job(config, "b" * 40, JobState.QUEUED, "series closed")
    assert main(["jobs", "list", "--config", str(config)]) == OK
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert main(["jobs", "list", "--state", "SKIPPED", "--config", str(config)]) == OK
    assert "gap: a slice is missing" in capsys.readouterr().out.splitlines()[1]
    assert main(["jobs", "show", "aaa", "--config", str(config)]) == OK
    shown = capsys.readouterr().out
    assert "a" * 40 in shown
    assert "SKIPPED" in shown
    assert main(["jobs", "show", "c", "--config", str(config)]) == FAILED


def test_jobs_show_says_how_far_and_where_the_time_goes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_job(config, "a" * 40, JobState.QUEUED, "series closed")
    database = open_database(f"sqlite:///{config.parent / 'node.db'}")
    measured = {
        "seconds": {"read": 1.26, "network": 31.04, "guard": 2.0, "write": 3.75, "wall": 33.5},
        "noise_before_hu": 24.25,
        "reason": "the CPU (there is no GPU), bf16",
        "guard": {"withheld": "", "bias_hu": {"air": 0.123456, "soft": -0.5}, "not_finite": 0},
    }
    with database.begin() as connection:
        connection.execute(sa.update(jobs).values(state="RUNNING", progress=7 / 300, n_in=300, measured=measured))
    database.dispose()
    assert main(["jobs", "show", "aaa", "--config", str(config)]) == OK
    shown = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    took = (
        "reading 1.3 s, network 31.0 s, output check 2.0 s, writing 3.8 s, in all 33.5 s; the stages run side by side"
    )
    for line in (
        ["progress", "7 of 300 images (2%)"],
        ["seconds", took],
        ["noise_before_hu", "24.2"],
        ["ran", "on                    the CPU (there is no GPU), bf16"],
        ["guard", "bias_hu             air 0.123, soft -0.5"],
        ["reason", "series closed"],
    ):
        assert line in shown


def test_jobs_retry_and_cancel_refuse_what_makes_no_sense(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_job(config, "a" * 40, JobState.FAILED, "broken")
    add_job(config, "b" * 40, JobState.QUEUED, "series closed")
    assert main(["jobs", "retry", "b", "--config", str(config)]) == FAILED
    assert main(["jobs", "retry", "a", "--config", str(config)]) == OK
    assert main(["jobs", "cancel", "b", "--config", str(config)]) == OK
    database = open_database(f"sqlite:///{config.parent / 'node.db'}")
    with database.connect() as connection:
        rows = connection.execute(sa.text("SELECT id, state, cancel_requested FROM jobs ORDER BY id")).all()
    database.dispose()
    assert [tuple(row) for row in rows] == [("a" * 40, "QUEUED", 0), ("b" * 40, "QUEUED", 1)]


def test_denoise_folder_to_folder(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [dcmread(path) for path in write_series(tmp_path / "ct", phantom(4))]
    out = tmp_path / "out"
    assert main(["denoise", str(tmp_path / "ct"), str(out), "--pipeline", "half", "--config", str(config)]) == OK
    derived = [dcmread(path) for path in sorted(out.glob("*.dcm"))]
    assert len(derived) == 4
    by_place = {tuple(ds.ImagePositionPatient): ds for ds in sources}
    for ds in derived:
        source = by_place[tuple(ds.ImagePositionPatient)]
        np.testing.assert_array_equal(ds.pixel_array, source.pixel_array)
        assert ds.SeriesInstanceUID != source.SeriesInstanceUID
    assert "4 slices by identity" in capsys.readouterr().out
    assert main(["denoise", str(tmp_path / "ct"), str(out), "--pipeline", "half", "--config", str(config)]) == FAILED
    assert "exists" in capsys.readouterr().err


def test_denoise_says_why_not(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_series(tmp_path / "ct", phantom(4), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    arguments = ["denoise", str(tmp_path / "ct"), str(tmp_path / "out"), "--pipeline", "identity"]
    assert main([*arguments, "--config", str(config)]) == FAILED
    assert "localizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_denoise_without_weights_is_one_sentence(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def untrained(name: str, execution: base.Execution | None = None) -> base.Pipeline:
        raise base.WeightsMissing(f"there are no weights of {name!r}")

    monkeypatch.setattr(base, "load", untrained)
    write_series(tmp_path / "ct", phantom(2))
    arguments = ["denoise", str(tmp_path / "ct"), str(tmp_path / "out"), "--pipeline", "identity"]
    assert main([*arguments, "--config", str(config)]) == FAILED
    assert capsys.readouterr().err.strip() == "WeightsMissing: there are no weights of 'identity'"
    assert not (tmp_path / "out").exists()


def test_denoise_with_damaged_weights_is_one_sentence(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged("st3d", tmp_path)
    monkeypatch.setattr(base, "load", lambda name, execution=None: st3d(execution, tmp_path))
    write_series(tmp_path / "ct", phantom(2))
    arguments = ["denoise", str(tmp_path / "ct"), str(tmp_path / "out"), "--pipeline", "identity"]
    assert main([*arguments, "--config", str(config)]) == FAILED
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert told.startswith("WeightsDamaged: the weights of 'st3d' are damaged: st3d.safetensors has SHA-256")
    assert "install" in told
    assert not (tmp_path / "out").exists()


def test_jobs_of_the_wrong_folder_are_no_empty_list(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "list", "--config", str(config)]) == FAILED
    assert "no job log" in capsys.readouterr().err
    assert not (config.parent / "node.db").exists()


def test_a_job_log_that_is_none_is_one_sentence(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config.parent / "node.db").write_bytes(b"this is no database, and it is long enough to be looked at" * 10)
    assert main(["jobs", "list", "--config", str(config)]) == FAILED
    said = capsys.readouterr().err
    assert "the job log cannot be used: file is not a database" in said
    assert "Traceback" not in said
