"""The report says what the rows say; its pictures are there and small."""

from __future__ import annotations

import csv
import inspect
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.losses import l1_ssim
from training.measuring import figures, papers
from training.measuring.bar import Steadiness
from training.measuring.cases import Trial, volume_of
from training.measuring.report import Measurement, markdown, write_csv
from training.measuring.scores import INPUT, Result, Row
from training.metrics import LUNG, SOFT_TISSUE
from training.physics import Curve

RNG = np.random.default_rng(0)


def _trial(case: str, dose: float) -> Trial:
    truth = RNG.normal(40, 10, (3, 96, 96)).astype(np.float32)
    return Trial(case, "simulated", dose, volume_of(truth, 0.7, 1.0), None, truth, slice(0, 3), 10.0, 0.5)


def _result(trial: Trial, name: str, psnr: list[float]) -> Result:
    rows = [
        Row(trial.case, trial.kind, trial.dose, name, metric, str(window), str(k), value)
        for window in (SOFT_TISSUE, LUNG)
        for k, value in enumerate(psnr)
        for metric in ("PSNR (dB)", "L1")
    ]
    rows.append(Row(trial.case, trial.kind, trial.dose, name, "contrast recovery", "", "", 0.987))
    frequency = np.linspace(0, 0.7, 20)
    return Result(rows, trial.truth[1] + 5, Curve(frequency, np.exp(-frequency)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Measurement]:
    out = tmp_path_factory.mktemp("report")
    measured = Measurement("python -m training evaluate net", "A title")
    for case, psnr in (("scan A", [30.0, 32.0]), ("scan B", [20.0, 24.0, 28.0])):
        trial = _trial(case, 0.25)
        measured.begin(trial)
        measured.add(trial, INPUT, _result(trial, INPUT, [value - 5 for value in psnr]))
        measured.add(trial, "net", _result(trial, "net", psnr))
    measured.steady["net"] = Steadiness(0.5, 100.0, 0.0)
    measured.warnings.append("net was trained on the patient of scan A.")
    measured.lpips_weights = {"alexnet.pth": "12ab", "heads.pth": "34cd"}
    return out, markdown(measured, out), measured


def test_means_are_over_slices_then_cases(written: tuple[Path, str, Measurement]) -> None:
    _, text, _ = written
    assert re.search(r"\| net \| 27\.5000 \| 27\.50 \|", text)  # (31 + 24) / 2, not the mean of five slices
    assert "| net | 31.00 ± 1.00 | 24.00 ± 3.27 |" in text
    assert "| contrast recovery | 0.987 | 0.987 |" in text
    assert "| scan A | simulated | unknown | 0.25 | 3 | 1.00 | 0.70 | 10.0 | 0.50 |" in text


def test_the_bar_stands_above(written: tuple[Path, str, Measurement]) -> None:
    _, text, _ = written
    assert text.index("## The bar") < text.index("## What was measured")
    assert (
        "| net | contrast recovery of 6 mm, 30 HU at least 0.95 at 0.25 of full dose | 0.987 in scan A | pass |" in text
    )


def test_a_warning_stands_above_the_numbers(written: tuple[Path, str, Measurement]) -> None:
    _, text, _ = written
    warning = text.index("**Warning:** net was trained on the patient of scan A.")
    assert warning < text.index("## What was measured") < text.index("| ours: net |")


def test_weights_of_lpips_are_named(written: tuple[Path, str, Measurement]) -> None:
    out, text, measured = written
    assert "SHA-256: alexnet.pth `12ab`, heads.pth `34cd`." in text
    without = markdown(replace(measured, lpips_weights={}), out)
    assert "by weights of SHA-256" not in without


def test_pictures_are_there_small_and_named_by_the_data(written: tuple[Path, str, Measurement]) -> None:
    out, text, _ = written
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert shown == [
        "pictures/psnr-0.25.png",
        "pictures/nps-0.25.png",
        "pictures/images-scan-a-0.25.jpg",
        "pictures/images-scan-b-0.25.jpg",
    ]
    for name in shown:
        assert 1000 < (out / name).stat().st_size < figures.MAX_BYTES
        with Image.open(out / name) as picture:
            assert min(picture.size) > 200


def test_same_data_same_files(written: tuple[Path, str, Measurement], tmp_path: Path) -> None:
    out, text, measured = written
    assert markdown(measured, tmp_path) == text
    for path in (out / "pictures").iterdir():
        assert (tmp_path / "pictures" / path.name).read_bytes() == path.read_bytes()


def test_csv_holds_every_number(written: tuple[Path, str, Measurement], tmp_path: Path) -> None:
    _, _, measured = written
    write_csv(measured.rows, tmp_path / "numbers.csv")
    with (tmp_path / "numbers.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(measured.rows)
    first = measured.rows[0]
    assert read[0] == {
        "case": "scan A",
        "kind": "simulated",
        "dose": "0.25",
        "pipeline": INPUT,
        "metric": first.metric,
        "window": "-160 to 240 HU",
        "slice": "0",
        "value": "25",
    }


def test_picture_of_noise_is_made_to_fit(tmp_path: Path) -> None:
    noise = RNG.normal(40, 200, (9, 512, 512)).astype(np.float32)
    results = {f"net {k}": image for k, image in enumerate(noise[1:])}
    path = figures.images(tmp_path, "Noise, 100 %", 0.1, noise[0], results)
    assert path.name == "images-noise-100-0.1.jpg"
    assert path.stat().st_size < figures.MAX_BYTES


def test_tables_of_the_papers_stand_beside_ours(written: tuple[Path, str, Measurement]) -> None:
    _, text, measured = written
    assert "| printed: HQINet | 0.021 ± 0.006 | 0.012 ± 0.006 | 31.30 ± 2.69 | 1.30 ± 0.38 |" in text
    # (31 + 24) / 2, and the two cases lie 3.5 to either side
    assert "| ours: net | 27.500 ± 3.500 | not measured | 27.50 ± 3.50 | not measured |" in text
    assert "| ours: net | 27.50 | not measured | not measured |" in papers.beside(
        papers.DCSCN, measured.rows, ["net"], 0.25
    )
    first = [row for row in measured.rows if row.case == "scan A"]
    assert "| ours: net | 31.000 | not measured | 31.00 | not measured |" in papers.beside(
        papers.HQINET, first, ["net"], 0.25
    )


def test_our_window_is_the_one_that_the_table_of_hqinet_fits() -> None:
    """By its L1, a low dose has 17 HU of mean absolute error on the window of the loss; 60 HU on that of lungs."""
    window = papers.HQINET.window
    assert window == inspect.signature(l1_ssim).parameters["window"].default
    error_hu = float(papers.HQINET.rows["low dose"][0].split()[0]) * (window.high_hu - window.low_hu)
    assert error_hu == pytest.approx(17, abs=0.5)


@pytest.mark.parametrize("row", papers.DCSCN.rows.values())
def test_printed_rows_of_dcscn_obey_the_identity(row: tuple[str, ...]) -> None:
    assert float(row[0]) == pytest.approx(-20 * math.log10(float(row[2])), abs=0.03)


@pytest.mark.parametrize("printed", papers.TABLES)
def test_rows_of_the_papers_are_complete(printed: papers.Printed) -> None:
    assert {len(cells) for cells in printed.rows.values()} == {len(printed.metrics)}
