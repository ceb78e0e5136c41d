"""The classical filters are those of scikit-image, and their parameter is the best there is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.restoration import denoise_nl_means

from pipelines.base import Options, denoise_volume
from pipelines.noise import noise_level, series_noise_level
from training.measuring.cases import Trial, volume_of
from training.measuring.classical import METHODS, Classical, MethodMissing, tuned
from training.metrics import SOFT_TISSUE, psnr


def _trial() -> Trial:
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:96, :96] - 47.5
    truth = np.where(np.hypot(y, x) < 40, 40.0, -100.0)
    truth[np.hypot(y - 12, x) < 10] = 90
    low = np.repeat(truth[None], 3, axis=0) + rng.normal(0, 25, (3, 96, 96))
    whole = np.repeat(truth[None], 3, axis=0).astype(np.float32)
    return Trial(
        "disc", "phantom", 0.25, volume_of(low.astype(np.float32), 1.0, 2.0), None, whole, slice(0, 3), 0.0, 0.5
    )


def _run(name: str, parameter: float, trial: Trial, options: Options | None = None) -> np.ndarray:
    return denoise_volume(Classical(name, parameter), trial.low, options)


def test_nlm_is_that_of_scikit_image_in_noise_levels() -> None:
    trial = _trial()
    sigma = noise_level(trial.low.hu, trial.low.padding, 1.0)
    direct = denoise_nl_means(trial.low.hu[2], patch_size=5, patch_distance=9, h=0.7 * sigma, fast_mode=True)
    assert np.allclose(_run("nlm", 0.7, trial)[2], direct, atol=0.05)


def test_gaussian_is_that_of_scipy_whatever_the_noise() -> None:
    trial = _trial()
    assert np.allclose(_run("gaussian", 1.2, trial)[1], gaussian_filter(trial.low.hu[1], 1.2), atol=1e-2)


@pytest.mark.parametrize("name", ["nlm", "tv", "bilateral", "gaussian"])
def test_all_denoise_and_keep_the_mean(name: str) -> None:
    trial = _trial()
    chosen = tuned(name, trial)
    out = denoise_volume(chosen, trial.low)
    assert psnr(out, trial.truth, SOFT_TISSUE) > psnr(trial.low.hu, trial.truth, SOFT_TISSUE) + 2
    assert abs(float((out - trial.truth).mean())) < 1
    best = max(
        psnr(_run(name, float(p), trial), trial.truth, SOFT_TISSUE) for p in np.linspace(*METHODS[name].bounds, 6)
    )
    assert psnr(out, trial.truth, SOFT_TISSUE) > best - 0.15


def test_slices_that_are_not_measured_do_not_move_the_parameter() -> None:
    """The noise level that it is told in is that of the slices that it runs on."""
    trial = _trial()
    noisier = np.concatenate([trial.low.hu, trial.truth + 4 * (trial.low.hu - trial.truth), trial.low.hu])
    around = replace(trial, low=volume_of(noisier, 1.0, 2.0), truth=np.tile(trial.truth, (3, 1, 1)))
    for scored, sigma in ((slice(0, 3), 25), (slice(3, 6), 100)):
        alone = replace(
            trial, low=volume_of(around.low.hu[scored], 1.0, 2.0), truth=around.truth[scored], scored=slice(0, 3)
        )
        assert series_noise_level(alone.low) == pytest.approx(sigma, rel=0.15)
        assert tuned("tv", replace(around, scored=scored)).parameter == tuned("tv", alone).parameter


def test_blend_and_padding() -> None:
    trial = _trial()
    trial.low.padding[:, :10] = True
    full, half = (_run("gaussian", 1.0, trial, Options(blend=b)) for b in (1.0, 0.5))
    assert np.array_equal(full[:, :10], trial.low.hu[:, :10])
    assert np.allclose(half, (full + trial.low.hu) / 2, atol=1e-3)


def test_without_the_package_bm3d_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MethodMissing, match="pip install bm3d"):
        Classical("bm3d", 1.0)


def test_bm3d_is_that_of_its_authors_in_noise_levels() -> None:
    """The package's licence allows no commercial use: an independent reference for this test, never a dependency."""
    bm3d = pytest.importorskip("bm3d").bm3d
    trial = _trial()
    sigma = noise_level(trial.low.hu, trial.low.padding, 1.0)
    out = next(iter(Classical("bm3d", 1.2).denoise(trial.low, Options())))
    direct = bm3d(trial.low.hu[0], 1.2 * sigma)
    # rounding decides here and there which of two blocks is the more alike
    assert np.abs(out - direct).mean() < 0.05
    assert psnr(out, trial.truth[0], SOFT_TISSUE) > psnr(trial.low.hu[0], trial.truth[0], SOFT_TISSUE) + 10
    assert abs(float((out - trial.truth[0]).mean())) < 1
