"""What `dicomnode benchmark` says of a pipeline, against pipelines of known doings; and the phantom it runs them on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import require_peer
from node_process import PLUGINS
from tables import config_of

from dicomnode import benchmark as module
from dicomnode.benchmark import WIDTH, Measured, NotMeasured, Run, benchmark, table, write_phantom
from dicomnode.cli import BAD_USAGE, FAILED, main
from dicomnode.config import Compute, Config
from dicomnode.denoise import Progress
from dicomnode.errors import NodeError
from pipelines.volume import read_volume

NOTING = """
import json, os
from dataclasses import replace
from pathlib import Path
import numpy as np
from pipelines.identity import Identity

MEMORY_BYTES = 300_000_000


class Noting(Identity):
    def __init__(self, execution):
        self.card = replace(Identity.card, name="test-noting", precision="bf16", reason="an abacus, as configured")
        self.threads = execution.threads

    def denoise(self, series, options):
        memory = np.ones(MEMORY_BYTES, np.uint8)
        note = {"shape": series.shape, "options": [options.strength, options.blend], "threads": self.threads,
                "nice": os.nice(0), "thickness": series.thickness_mm}
        with (Path(os.environ["TEST_PIPELINES"]) / "notes").open("a") as file:
            print(json.dumps(note), file=file)
        yield from super().denoise(series, options)
"""
MEMORY_MB = 300


@pytest.fixture
def controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the pipelines' notes; the children know ``test-noting`` and those of tests/plugins."""
    plugins = tmp_path / "plugins"
    info = plugins / "noting-1.0.dist-info"
    info.mkdir(parents=True)
    (plugins / "noting.py").write_text(NOTING)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: noting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dicomnode.pipelines]\ntest-noting = noting:Noting\n")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (plugins, PLUGINS))))
    monkeypatch.setenv("TEST_PIPELINES", str(tmp_path))
    monkeypatch.syspath_prepend(plugins)  # names in a configuration are looked up in this process, too
    monkeypatch.syspath_prepend(PLUGINS)
    return tmp_path


def routed(*pipelines: str, **sections: Any) -> Config:
    routes = [
        {"name": f"route-{k}", "when": {"SeriesNumber": k}, "pipeline": name, "send_to": ["pacs"]}
        for k, name in enumerate(pipelines)
    ]
    return config_of(destinations={"pacs": 104}, routes=routes, **sections)


def ignore(progress: Progress) -> None:
    """A listener to the progress who does not care."""


def run_of(slices: int, wall_s: float, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "start_s": 2.5,
        "stages_s": {"read": 1.0, "network": 7.5, "guard": 2.0, "write": 3.0, "wall": 9.0},
        "peak_mb": 612.4,
        "precision": "int8",
        "reason": "the CPU (there is no GPU), int8, the fastest: measured to lose 0.05 dB",
    }
    return Run(slices=slices, wall_s=wall_s, **{**values, **changes})


# ── measuring ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pipeline_gets_the_series_of_a_job_as_a_job_gives_it(controls: Path) -> None:
    """In a child as nice as that of jobs, with the configured threads and options, each length in one of its own."""
    config = routed(
        "half",
        "twin",
        compute={"threads": 1},
        pipelines={
            "half": {"uses": "test-noting", "strength": 0.75, "blend": 0.5},
            "twin": {"uses": "test-noting", "strength": 0.75, "blend": 0.5},
            "unused": {"uses": "test-noting"},
        },
    )
    told: list[Progress] = []
    (measured,) = benchmark(config, 8, told.append, matrix=64)
    assert isinstance(measured, Measured)
    notes = [json.loads(line) for line in (controls / "notes").read_text().splitlines()]
    common = {"options": [0.75, 0.5], "threads": 1, "nice": min(19, os.nice(0) + 10), "thickness": 1.0}
    assert notes == [{"shape": [count, 64, 64], **common} for count in (2, 8)]
    assert [(one.slices, one.of) for one in told] == [(k, of) for of in (2, 8) for k in (*range(of + 1), of)]
    assert (measured.names, measured.short.slices, measured.long.slices) == ("half, twin", 2, 8)
    for run in (measured.short, measured.long):
        assert (run.precision, run.reason) == ("bf16", "an abacus, as configured")
        assert MEMORY_MB < run.peak_mb < MEMORY_MB + 250  # what else Python, numpy and OpenVINO take
        assert 0 < run.stages_s["wall"] < run.wall_s
        assert run.start_s > 0
    assert list((controls / "temporary").iterdir()) == []


def test_a_pipeline_without_a_result_says_why_and_the_others_are_measured(controls: Path) -> None:
    crash, harmful, good = benchmark(routed("test-harmful", "test-noting", "test-crash"), 8, ignore, matrix=128)
    for row, name, why in (
        (crash, "test-crash", "the worker process ended with signal 9"),
        (harmful, "test-harmful", "withheld: "),
    ):
        assert isinstance(row, NotMeasured)
        assert (row.names, row.why[: len(why)]) == (name, why)
    assert isinstance(good, Measured)
    assert list((controls / "temporary").iterdir()) == []


def test_without_a_pipeline_there_is_nothing_to_measure(controls: Path) -> None:
    with pytest.raises(NodeError, match="no route has a pipeline; write one"):
        next(benchmark(routed(), 8, ignore))
    assert list((controls / "temporary").iterdir()) == []


def test_what_a_series_costs_beside_its_slices_is_told_from_them() -> None:
    """A pipeline of 3 s for a series and half a second for a slice."""
    measured = Measured("x", run_of(16, 3 + 0.5 * 16), run_of(64, 3 + 0.5 * 64))
    for slices in (1, 300, 1500):
        assert measured.expected_s(slices) == pytest.approx(3 + 0.5 * slices)


def test_a_short_series_that_was_held_up_is_not_drawn_upon() -> None:
    """300 slices in negative time would be the answer."""
    measured = Measured("x", run_of(16, 40.0), run_of(64, 32.0))
    assert measured.expected_s(300) == pytest.approx(150.0)


# ── printing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    monkeypatch.setattr(os, "getloadavg", lambda: (8.5, 0.0, 0.0))
    long_name = "a name that is longer than its column"
    rows: list[Measured | NotMeasured] = [
        Measured("st3d", run_of(16, 11.0, start_s=4.25), run_of(64, 35.0)),
        Measured(long_name, run_of(16, 11.0), run_of(64, 35.0, reason="")),
        NotMeasured("other", "failed: " + "ValueError: a fault of which there is much to say " * 4),
    ]
    lines = table(rows, Compute(threads=2)).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "2 of 8 cores, niceness 10." in lines[0]
    heading = next(k for k, line in enumerate(lines) if line.startswith("pipeline "))
    # 3 s and half a second for each slice: 153 s of 300
    figures = "int8 1.96 153 s 4.2 s 612 MB 1.0 s 7.5 s 2.0 s 3.0 s"
    assert lines[heading + 1].split() == ["st3d", *figures.split()]
    assert lines[heading + 2] == (
        "  64 slices in 35.0 s on the CPU (there is no GPU), int8, the fastest: measured to lose 0.05 dB"
    )
    assert lines[heading + 3] == long_name
    assert lines[heading + 4].split() == figures.replace("4.2 s", "2.5 s").split()
    assert lines[heading + 5] == "  64 slices in 35.0 s"
    assert lines[heading + 6] == "other"
    assert lines[heading + 7].startswith("  no result: failed: ValueError")
    assert not any("Other programs" in line for line in lines)
    # each figure ends under the end of its heading
    for title, figure in (("slices/s", "1.96"), ("300 slices", "153 s"), ("memory", "612 MB"), ("writing", "3.0 s")):
        end = lines[heading].index(title) + len(title)
        assert lines[heading + 1][:end].endswith(figure)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, []),
        ({"threads": 8}, []),
        ({"threads": 4}, ["compute.threads 0"]),
        ({"precision": "fp32", "device": "cpu"}, ["compute.precision auto", "compute.device auto"]),
    ],
)
def test_the_advice_names_what_holds_it_back(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], told: list[str]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    said = " ".join(table([], Compute(**settings)).split("Too slow?")[1].split())
    changes = ("compute.threads 0", "compute.precision auto", "compute.device auto")
    assert [change for change in changes if change in said] == told
    assert "a faster pipeline in the routes, e.g. fast-2.5d" in said


def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(2))
    monkeypatch.setattr(os, "getloadavg", lambda: (6.0, 0.0, 0.0))
    assert "Other programs used this machine (load 6.0): an idle one is faster." in table([], Compute())


# ── the command ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_without_pytorch(tmp_path: Path) -> None:
    """A network that ships, at a site that has no PyTorch: who imports it fails."""
    (tmp_path / "torch.py").write_text("raise ImportError('there is no PyTorch here')")
    config = tmp_path / "config.yaml"
    route = {"name": "all", "pipeline": "fast-2.5d", "send_to": ["pacs"]}
    pacs = {"ae_title": "PACS", "host": "127.0.0.1", "port": 104}
    config.write_text(yaml.safe_dump({"compute": {"device": "cpu"}, "destinations": {"pacs": pacs}, "routes": [route]}))
    done = subprocess.run(
        [sys.executable, "-m", "dicomnode.cli", "benchmark", "--config", str(config), "--slices", "8"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= WIDTH
    (row,) = (line.split() for line in lines if line.startswith("fast-2.5d "))
    assert row[1] in ("int8", "bf16", "fp32")
    assert float(row[2]) * float(row[3]) == pytest.approx(300, rel=0.1)
    assert any(line.startswith("  8 slices in ") and " on the CPU (as configured), " in line for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "torch.py"]


@pytest.mark.parametrize("slices", ["7", "0", "-8", "x", "8.5"])
def test_too_few_slices_are_refused(slices: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["benchmark", "--slices", slices])
    assert ended.value.code == BAD_USAGE
    assert "no number of slices of at least 8" in capsys.readouterr().err


def test_a_pipeline_without_a_result_fails_the_command(
    controls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dicomnode.cli.benchmark", lambda *_: iter([NotMeasured("st3d", "failed: a fault")]))
    (controls / "config.yaml").write_text("node: {ae_title: NODE}")
    assert main(["benchmark", "--config", str(controls / "config.yaml")]) == FAILED
    assert "no result: failed: a fault" in capsys.readouterr().out


# ── the phantom ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_phantom_is_a_low_dose_chest(tmp_path: Path) -> None:
    volume = read_volume(write_phantom(tmp_path / "ct", 10))
    assert volume.shape == (10, 512, 512)
    assert volume.geometry.spacing_mm == (1.0, 0.7, 0.7)
    assert 0.45 < module._body_share(512) < 0.6  # of a chest, with the margin that is denoised
    fat, lung, muscle = (
        volume.hu[:, rows, columns]
        for rows, columns in (
            (slice(246, 266), slice(40, 48)),
            (slice(200, 290), slice(110, 190)),
            (slice(145, 165), slice(240, 270)),
        )
    )
    for region, hu in ((fat, -100), (lung, -850), (muscle, 45)):
        assert float(np.median(region)) == pytest.approx(hu, abs=6)
    assert float(muscle.std()) == pytest.approx(25, rel=0.15)
    heart = volume.hu[:, 250:290, 250:300]
    assert float(np.abs(heart[0] - heart[8]).mean()) > 10  # no slice comes twice
    assert len({plane.tobytes() for plane in heart}) == 10


@pytest.mark.peer
def test_dciodvfy_finds_no_error_in_the_phantom(tmp_path: Path) -> None:
    require_peer("dciodvfy")
    (first, _) = write_phantom(tmp_path / "ct", 2, 64)
    done = subprocess.run(["dciodvfy", str(first)], capture_output=True, text=True, timeout=60, check=False)
    assert "Error" not in done.stderr + done.stdout
    assert "CTImage" in done.stderr + done.stdout
