"""The classical filters are those of scikit-image, and their parameter is the best there is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.restoration import denoise_nl_means

from pipelines.base import Options, denoise_volume
from pipelines.noise import noise_level
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
