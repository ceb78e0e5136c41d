"""Every demand passes at its limit and fails beyond it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pipelines.base import Options
from pipelines.identity import Identity
from pipelines.volume import Series
from training.measuring.bar import Steadiness, judge, steadiness, table
from training.measuring.cases import Trial, volume_of
from training.measuring.scores import Row
from training.metrics import SOFT_TISSUE

NAME = "net"
STEADY = Steadiness(1.0, 99.9, 0.0)


def _psnr(case: str, dose: float, pipeline: str, *slices: float) -> list[Row]:
    return [
        Row(case, "simulated", dose, pipeline, "PSNR (dB)", str(SOFT_TISSUE), str(k), value)
        for k, value in enumerate(slices)
    ]


def _row(metric: str, value: float, case: str = "a", dose: float = 0.25) -> Row:
    return Row(case, "simulated", dose, NAME, metric, "", "", value)


def _passed(rows: list[Row], steady: Steadiness = STEADY) -> dict[str, bool]:
    return {line.demand: line.passed for line in judge(rows, {NAME: steady})}


@pytest.mark.parametrize(
    ("dose", "gains", "never_below", "mean"),
    [
        (0.25, (0.0, 0.7), True, True),
        (0.25, (0.0, 0.5), True, False),
        (0.25, (-0.1, 2.0), False, True),
        (0.1, (0.9, 1.2), True, True),
        (0.1, (0.9, 1.0), True, False),
    ],
)
def test_against_the_opponent(dose: float, gains: tuple[float, float], never_below: bool, mean: bool) -> None:
    rows = []
    for case, gain in zip("ab", gains, strict=True):
        rows += _psnr(case, dose, "nlm", 29.0, 31.0) + _psnr(case, dose, NAME, 29.0 + 2 * gain, 31.0)
    first, second = [x for x in judge(rows, {NAME: STEADY}) if "nlm" in x.demand and x.measured != "not measured"]
    assert (first.passed, second.passed) == (never_below, mean)
    assert f"{min(gains):+.2f} dB in" in first.measured
    assert f"{sum(gains) / 2:+.2f} dB over 2" in second.measured


def test_phantoms_do_not_count_for_the_opponent() -> None:
    rows = [
        Row("phantom", "phantom", 0.25, name, "PSNR (dB)", str(SOFT_TISSUE), "0", value)
        for name, value in (("nlm", 30.0), (NAME, 20.0))
    ]
    assert {demand: passed for demand, passed in _passed(rows).items() if "nlm" in demand} == {
        "above nlm at 0.25 of full dose, on real images": False,
        "above nlm at 0.1 of full dose, on real images": False,
    }


def test_what_was_not_measured_is_failed() -> None:
    lines = judge([], {NAME: STEADY})
    assert {line.measured for line in lines[:-3]} == {"not measured"}
    assert [line.passed for line in lines] == [False] * 14 + [True] * 3
    assert [line.demand for line in judge([], {"st3d": STEADY}) if "better" in line.demand] == [
        f"{rival} at most {limit} dB better at {dose:g} of full dose"
        for dose in (0.25, 0.1)
        for rival, limit in (("red-cnn", 0.3), ("srresnet3d", 0.2))
    ]


@pytest.mark.parametrize(("ahead", "passed"), [(0.29, True), (0.31, False), (-2.0, True)])
def test_the_yardstick_may_be_a_little_better(ahead: float, passed: bool) -> None:
    rows = _psnr("a", 0.25, NAME, 30.0) + _psnr("a", 0.25, "red-cnn", 30.0 + ahead)
    assert _passed(rows)["red-cnn at most 0.3 dB better at 0.25 of full dose"] is passed


def test_only_stresnet_is_held_against_srresnet() -> None:
    rows = _psnr("a", 0.25, NAME, 30.0) + _psnr("a", 0.25, "st3d", 30.0) + _psnr("a", 0.25, "srresnet3d", 30.25)
    lines = judge(rows, {NAME: STEADY, "st3d": STEADY, "srresnet3d": STEADY})
    against = [(x.pipeline, x.measured) for x in lines if "srresnet3d at most 0.2" in x.demand]
    assert against == [("st3d", "+0.25 dB"), ("st3d", "not measured")]  # a quarter and a tenth of the dose


@pytest.mark.parametrize(
    ("metric", "values", "demand", "passed"),
    [
        ("shift of soft (HU)", (0.2, -1.0), "mean of soft moves by at most 1 HU", True),
        ("shift of soft (HU)", (0.2, -1.1), "mean of soft moves by at most 1 HU", False),
        ("shift of lung (HU)", (5.1, 0), "mean of lung moves by at most 5 HU", False),
        ("shift of bone (HU)", (-5.0, 5.0), "mean of bone moves by at most 5 HU", True),
        ("NPS mean shift (%)", (40.0, -25.0), "mean frequency of the NPS falls by at most 25 %", True),
        ("NPS mean shift (%)", (0.0, -25.1), "mean frequency of the NPS falls by at most 25 %", False),
        ("contrast recovery", (1.2, 0.95), "contrast recovery of 6 mm, 30 HU at least 0.95", True),
        ("contrast recovery", (1.2, 0.94), "contrast recovery of 6 mm, 30 HU at least 0.95", False),
    ],
)
def test_the_worst_case_counts(metric: str, values: tuple[float, float], demand: str, passed: bool) -> None:
    rows = [_row(metric, value, case) for case, value in zip("ab", values, strict=True)]
    assert _passed(rows)[f"{demand} at 0.25 of full dose"] is passed


def test_each_dose_is_judged_for_itself() -> None:
    rows = [
        _row("contrast recovery", value, case, dose)
        for dose, values in ((0.25, (0.97, 0.96)), (0.1, (0.96, 0.9)))
        for case, value in zip("ab", values, strict=True)
    ]
    lines = [x for x in judge(rows, {NAME: STEADY}) if x.demand.startswith("contrast recovery")]
    assert [(x.demand[-20:], x.measured, x.passed) for x in lines] == [
        ("at 0.25 of full dose", "0.960 in b", True),
        (" at 0.1 of full dose", "0.900 in b", False),
    ]


@pytest.mark.parametrize(
    ("steady", "passed"),
    [
        (STEADY, [True, True, True]),
        (Steadiness(1.01, 100, 0), [False, True, True]),
        (Steadiness(0.5, 99.89, 0), [True, False, True]),
        (Steadiness(0.5, 100, 1e-4), [True, True, False]),
    ],
)
def test_without_noise(steady: Steadiness, passed: list[bool]) -> None:
    lines = judge([_row("contrast recovery", 1.0)], {NAME: steady})
    assert [line.passed for line in lines[-3:]] == passed
    assert table(lines[-3:]).count("**fail**") == passed.count(False)


class Offset:
    """Moves a column of the image by 8 HU times its options."""

    card = Identity.card

    def denoise(self, series: Series, options: Options) -> Iterator[np.ndarray]:
        for k in range(series.shape[0]):
            out = series.plane(k).hu.copy()
            out[:, 0] += np.float32(8 * options.strength * options.blend)
            yield out


def test_steadiness_counts_voxels() -> None:
    clean = np.zeros((4, 8, 16), np.float32)
    trial = Trial("p", "phantom", 0.25, volume_of(clean + 1, 0.7, 2.5), None, clean, slice(1, 3), 0.0, 0.5)
    assert steadiness(Offset(), Options(), trial) == Steadiness(0.5, 100 * 15 / 16, 0.0)
    assert steadiness(Offset(), Options(blend=0.5), trial).mean_change_hu == 0.25
