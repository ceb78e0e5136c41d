"""Rows of filters whose effect a formula knows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from pipelines.base import ModelCard, Options
from pipelines.identity import Identity
from pipelines.volume import Series
from training.measuring.cases import Trial, lesions, volume_of
from training.measuring.scores import IMAGE_METRICS, WINDOWS, Row, score, soft_tiles, values
from training.metrics import SOFT_TISSUE


class Gaussian:
    """Linear, so that everything about it can be calculated."""

    card: ModelCard = Identity.card

    def __init__(self, sigma_px: float, offset_hu: float = 0.0) -> None:
        self.sigma_px, self.offset_hu = sigma_px, offset_hu

    def denoise(self, series: Series, options: Options) -> Iterator[np.ndarray]:
        for k in range(series.shape[0]):
            hu = series.plane(k).hu
            out = gaussian_filter(hu, self.sigma_px) + np.float32(self.offset_hu)
            yield hu + np.float32(options.blend) * (out - hu)


@pytest.fixture(scope="module")
def trial() -> Trial:
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:160, :160] - 79.5
    truth = np.repeat(np.where(np.hypot(y, x) < 72, 50.0, -40.0)[None], 5, axis=0).astype(np.float32)
    low, again = (volume_of(truth + rng.normal(0, 20, truth.shape).astype(np.float32), 0.8, 2.0) for _ in range(2))
    return Trial("disc", "phantom", 0.25, low, again, truth, slice(1, 4), 0.0, 0.5)


def _value(rows: list[Row], metric: str) -> float:
    (value,) = values(rows, metric=metric)
    return value


def test_nothing_done_changes_nothing(trial: Trial) -> None:
    result = score(trial, "low dose", None, Options())
    assert values(result.rows, metric="seconds per slice") == []
    assert _value(result.rows, "shift of soft (HU)") == 0
    assert _value(result.rows, "NPS mean shift (%)") == 0
    assert _value(result.rows, "contrast recovery") == pytest.approx(1, abs=1e-5)
    assert _value(result.rows, "noise level (HU)") == pytest.approx(20, rel=0.05)
    assert len([r for r in result.rows if r.slice]) == 3 * len(WINDOWS) * len(IMAGE_METRICS)
    assert np.array_equal(result.middle, trial.low.hu[2])
    assert result.middle.base is None  # kept to the end of a report: not the whole image with it


def test_psnr_and_rmse_are_of_the_measured_slices(trial: Trial) -> None:
    rows = score(trial, "low dose", None, Options()).rows
    noise = np.clip(trial.low.hu, -160, 240).astype(np.float64) - np.clip(trial.truth, -160, 240)
    for k in range(3):
        (rmse,) = values(rows, metric="RMSE", window=str(SOFT_TISSUE), slice=str(k))
        (psnr,) = values(rows, metric="PSNR (dB)", window=str(SOFT_TISSUE), slice=str(k))
        assert rmse == pytest.approx(np.sqrt(np.mean(noise[k + 1] ** 2)) / 400, rel=1e-6)
        assert psnr == pytest.approx(-20 * math.log10(rmse))


def test_a_linear_filter_is_measured_as_it_is(trial: Trial) -> None:
    result = score(trial, "gaussian", Gaussian(1.5, offset_hu=3.0), Options())
    assert _value(result.rows, "shift of soft (HU)") == pytest.approx(3, abs=0.3)
    inserted = lesions(trial)
    assert inserted is not None
    core = inserted >= inserted.max() / 2
    expected = gaussian_filter(inserted, (0, 1.5, 1.5))[core].mean() / inserted[core].mean()
    assert _value(result.rows, "contrast recovery") == pytest.approx(expected, abs=1e-4)
    assert _value(result.rows, "NPS mean shift (%)") < -40
    assert 2.5 < _value(result.rows, "noise level (HU)") < 20 / (2 * math.sqrt(math.pi) * 1.5)


def test_blend_reaches_every_number(trial: Trial) -> None:
    rows = score(trial, "gaussian", Gaussian(1.5, offset_hu=3.0), Options(blend=0.5)).rows
    assert _value(rows, "shift of soft (HU)") == pytest.approx(1.5, abs=0.2)


def test_perceptual_metric_is_asked_slice_by_slice(trial: Trial) -> None:
    rows = score(trial, "low dose", None, Options(), lambda a, b: float(np.abs(a - b).max())).rows
    expected = [float(np.abs(trial.low.hu[k] - trial.truth[k]).max()) for k in (1, 2, 3)]
    assert values(rows, metric="LPIPS") == expected


def test_a_pair_has_no_second_realisation(trial: Trial) -> None:
    pair = Trial("pair", "pair", 0.25, trial.low, None, trial.truth, trial.scored, 5.0, 0.5)
    result = score(pair, "low dose", None, Options())
    assert result.nps is None
    assert values(result.rows, metric="NPS mean frequency (1/mm)") == []


def test_squares_lie_where_most_soft_tissue_is(trial: Trial) -> None:
    tiles = soft_tiles(trial)
    assert tiles[0][1:] == (32, 32) or tiles[0][1:] == (64, 32)
    soft = trial.masks()["soft"]
    parts = [soft[z, y : y + 32, x : x + 32].mean() for z, y, x in tiles]
    assert parts == sorted(parts, reverse=True)
    assert parts[0] == 1
