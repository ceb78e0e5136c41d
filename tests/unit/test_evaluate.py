"""The command: what it measures, and what it writes."""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from ct_builder import write_series
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from untrained import install

from pipelines.base import Execution, OptionRefused, Options, Pipeline, UnknownPipeline
from pipelines.ffdnet import FFDNet
from training import evaluate
from training.measuring import model_page, seen
from training.measuring.cases import Trial, phantom_trials
from training.measuring.classical import Classical
from training.measuring.oracle import BLIND, PERFECT
from training.measuring.report import Measurement
from training.measuring.scores import INPUT, Row, values
from training.metrics import SOFT_TISSUE


def _parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    evaluate.arguments(parser)
    args = parser.parse_args(words)
    args.words = ("evaluate", *words)
    return args


@cache
def _made(doses: tuple[float, ...], slices: int) -> tuple[Trial, ...]:
    return tuple(phantom_trials(doses, slices, matrix=128))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick pipeline and a small phantom, made once."""
    monkeypatch.setattr(
        evaluate, "load", lambda name, execution: Classical("gaussian", {"soft": 1.2, "hard": 0.6}[name])
    )
    monkeypatch.setattr(evaluate, "phantom_trials", lambda doses, slices: _made(tuple(doses), slices))


def test_report_of_two_pipelines_and_a_filter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "secret place" / "report"
    args = _parsed("soft", "hard", "--classical", "tv", "--doses", "0.25", "--slices", "1", "--bar", "--out", str(out))
    args.run(args)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "python -m training evaluate soft hard --classical tv --doses 0.25 --slices 1 --bar --out report" in text
    assert "secret" not in text
    with (out / "numbers.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["pipeline"] for row in rows} == {INPUT, "soft", "hard", "tv", "nlm", PERFECT, BLIND}
    assert {row["case"] for row in rows} == {"phantom", "rods"}
    psnr = {
        row["pipeline"]: float(row["value"])
        for row in rows
        if row["metric"] == "PSNR (dB)" and row["window"] == str(SOFT_TISSUE)
    }
    assert psnr["nlm"] > psnr[INPUT]
    assert psnr[PERFECT] > psnr["nlm"]
    assert psnr["tv"] > psnr[INPUT]
    assert f"| hard | {psnr['hard']:.2f} ± 0.00 |" in text
    # a Gaussian leaves no noise-free image alone
    assert "| soft | noise-free phantom: 99.9 % of voxels within 5 HU |" in capsys.readouterr().out
    assert "| total variation (Chambolle) | phantom | 0.25 | weight, in noise levels |" in text


def _written(folder: Path, hu: NDArray[np.float64], name: str) -> Path:
    """A series as the Grand Challenge has it: its folder says full or low dose."""
    write_series(folder, hu, name=name, spacing_mm=(2.0, 2.0, 2.0), PatientID="L010")
    return folder


def test_real_pairs_and_series_are_measured_from_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PSNR of a pair by its formula; a series at a quarter of its dose has twice its noise."""
    monkeypatch.setattr(evaluate, "_rods", lambda *args: None)
    rng = np.random.default_rng(5)
    y, x = np.indices((96, 96)) - 47.5
    body = np.where(np.hypot(x, y) < 40, 40.0, -1000.0)[None].repeat(5, 0)
    full, low = (np.round(body + rng.normal(0, sd, body.shape)) for sd in (10, 25))
    _written(tmp_path / "pairs" / "L010" / "full_3mm", full, "full")
    _written(tmp_path / "pairs" / "L010" / "quarter_3mm", low, "low")
    series = _written(tmp_path / "scan", full, "alone")
    words = ("--pairs", str(tmp_path / "pairs"), "--series", str(series), "--doses", "0.25", "--slices", "3")
    rows = evaluate.measure(_parsed("soft", *words)).rows
    assert {(row.case, row.kind, row.dose) for row in rows} == {
        ("L010 STANDARD 2 mm", "pair", 0.25),
        ("scan", "simulated", 0.25),
    }
    blurred = np.stack([gaussian_filter(plane, 1.2) for plane in low])  # what soft does
    for name, image in ((INPUT, low), ("soft", blurred)):
        error = np.clip(image, -160, 240) - np.clip(full, -160, 240)
        expected = [20 * np.log10(400 / np.sqrt(np.mean(error[k] ** 2))) for k in (1, 2, 3)]
        found = values(rows, kind="pair", pipeline=name, metric="PSNR (dB)", window=str(SOFT_TISSUE))
        assert found == pytest.approx(expected, abs=0.01)
    (noise,) = values(rows, kind="simulated", pipeline=INPUT, metric="noise level (HU)")
    assert noise == pytest.approx(20, rel=0.1)


def test_options_reach_the_pipeline(tmp_path: Path) -> None:
    args = _parsed("soft", "--doses", "0.25", "--slices", "1", "--blend", "0", "--out", str(tmp_path))
    rows = evaluate.measure(args).rows
    by = {(r.pipeline, r.metric): r.value for r in rows if r.case == "phantom" and not r.window}
    assert by["soft", "contrast recovery"] == pytest.approx(1, abs=1e-6)
    assert by["soft", "noise level (HU)"] == by[INPUT, "noise level (HU)"]


def test_a_network_that_has_seen_a_series_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gaussian.json").write_text('{"training": {"series": [{"name": "theirs"}]}}', encoding="utf-8")
    monkeypatch.setattr(seen, "WEIGHTS", tmp_path)

    def trials(folder: Path, doses: list[float], slices: int) -> Iterator[Trial]:
        for trial in _made(tuple(doses), slices):
            yield replace(trial, kind="simulated", case=folder.name)

    monkeypatch.setattr(evaluate, "simulated_trials", trials)
    monkeypatch.setattr(evaluate, "_rods", lambda *args: None)
    out = tmp_path / "out"
    args = _parsed(
        "soft", "--series", "a/theirs", "a/others", "--doses", "0.25", "0.1", "--slices", "1", "--out", str(out)
    )
    args.run(args)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert text.count("**Warning:**") == 1
    assert "**Warning:** gaussian was trained on the patient of theirs: " in text
    assert "warning: gaussian was trained on the patient of theirs: " in capsys.readouterr().out


def test_options_that_a_pipeline_cannot_take_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "phantom_trials", lambda *args: pytest.fail("measured already"))
    with pytest.raises(OptionRefused, match=r"strength 1\.6"):
        evaluate.measure(_parsed("soft", "--strength", "1.6"))


def test_weights_of_lpips_come_into_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "digests", lambda weights: {"alexnet": str(weights)})
    monkeypatch.setattr(evaluate, "lpips", lambda image, truth, window, weights: 0.25)
    measured = evaluate.measure(_parsed("soft", "--doses", "0.25", "--slices", "1", "--lpips", "folder"))
    assert measured.lpips_weights == {"alexnet": "folder"}
    assert {row.value for row in measured.rows if row.metric == "LPIPS"} == {0.25}


def test_card_is_a_command_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    written = []

    def write(name: str, command: str) -> str:
        written.append((name, command))
        return "table"

    monkeypatch.setattr(model_page, "write", write)
    args = _parsed("soft", "--card")
    args.run(args)
    assert written == [("soft", "python -m training evaluate soft --card")]
    assert capsys.readouterr().out == "table\n"


def test_a_network_is_measured_before_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    install(tmp_path / "run", "fast-2.5d", FFDNet(), "slab3", noise_map=True)
    measured = []

    def score(trial: Trial, name: str, pipeline: Pipeline | None, options: Options, perceptual: None) -> list[Row]:
        measured.append((name, pipeline.card.version if pipeline else ""))
        return []

    monkeypatch.setattr(evaluate, "_rods", lambda *args: None)
    monkeypatch.setattr(evaluate, "score", score)
    monkeypatch.setattr(Measurement, "add", lambda *args: None)
    words = ("--doses", "0.25", "--slices", "1", "--weights", str(tmp_path / "run"))
    args = _parsed("fast-2.5d", "soft", *words)
    report = evaluate.measure(args)
    assert measured == [(INPUT, ""), ("fast-2.5d", "1"), ("soft", Classical("gaussian", 1.2).card.version)]
    digest = hashlib.sha256((tmp_path / "run" / "fast-2.5d.safetensors").read_bytes()).hexdigest()
    assert report.networks[0] == f"| fast-2.5d | 1 | `{digest[:16]}` | fp32 |"
    assert "--weights run" in evaluate.command_line(args)
    with pytest.raises(SystemExit, match="holds no network st3d: give a folder of `train --out`"):
        evaluate.measure(_parsed("st3d", *words))
    (tmp_path / "run" / "nobody.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UnknownPipeline, match="nobody is no network that a node can be told to run"):
        evaluate.measure(_parsed("nobody", *words))
    args = _parsed("fast-2.5d", "--card", *words)
    with pytest.raises(SystemExit, match="training export FOLDER"):
        args.run(args)


def test_each_precision_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, execution: Execution) -> Classical:
        made = Classical("gaussian", 1.2 if execution.precision == "fp32" else 0.6)
        made.card = replace(made.card, precision=execution.precision)
        return made

    monkeypatch.setattr(evaluate, "load", load)
    monkeypatch.setattr(evaluate, "_rods", lambda *args: None)
    measured = evaluate.measure(
        _parsed("soft", "--doses", "0.25", "--slices", "1", "--precision", "fp32", "int8", "--out", "x")
    )
    assert measured.pipelines == [INPUT, "soft", "soft, int8"]
    assert [row.split(" | ")[-1] for row in measured.networks] == ["fp32 |", "int8 |"]
    noise = {
        row.pipeline: row.value for row in measured.rows if (row.case, row.metric) == ("phantom", "noise level (HU)")
    }
    assert noise["soft"] < noise["soft, int8"] < noise[INPUT]


def test_series_of_one_name_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "simulated_trials", lambda *args: pytest.fail("measured already"))
    with pytest.raises(SystemExit, match="folders of one name"):
        evaluate.measure(_parsed("soft", "--series", "a/x", "b/x"))


@pytest.mark.parametrize("words", [["--doses", "1"], ["--doses", "nan"], ["--slices", "0"], ["--slices", "-3"]])
def test_numbers_out_of_range_are_usage_errors(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parsed("soft", *words)
    assert f"argument {words[0]}: " in capsys.readouterr().err
