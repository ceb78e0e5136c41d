"""The simulator against formulas: mean, dose, absolute noise, noise spectrum, independence."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from training import simulate
from training.counts import N0
from training.projection import MU_WATER_PER_MM, Kernel
from training.simulate import F50, low_dose, mix, unit_noise

Array = NDArray[np.float32]

PIXEL_MM = 1.0
RADIUS_MM = 100.0
N = 256
SLICES = 8


@pytest.fixture(scope="module")
def disc() -> Array:
    y, x = np.mgrid[:N, :N] - (N - 1) / 2
    inside = x * x + y * y < (RADIUS_MM / PIXEL_MM) ** 2
    return np.repeat(np.where(inside, 0, -1000).astype(np.float32)[None], SLICES, 0)


@pytest.fixture(scope="module")
def noise(disc: Array) -> Array:
    return unit_noise(disc, PIXEL_MM, seed=1)


def test_water_keeps_its_mean(disc: Array) -> None:
    scan = low_dose(disc, PIXEL_MM, 0.25, seed=2)
    assert float(scan[:, 88:168, 88:168].mean()) == pytest.approx(0, abs=0.5)


def test_quarter_dose_has_twice_the_noise_of_full_dose(disc: Array) -> None:
    centre = np.s_[:, 98:158, 98:158]
    quarter, full = (low_dose(disc, PIXEL_MM, dose, seed)[centre].std() for dose, seed in ((0.25, 3), (1.0, 4)))
    assert float(quarter / full) == pytest.approx(2.0, abs=0.1)


def test_noise_in_the_centre_is_that_of_the_formula(noise: Array) -> None:
    """Var = (1000/μ)²·(π²/views)·Var(p)·d·∫A²df (Kak and Slaney 1988, 5.3): one ray through the centre in each view."""
    views, photons = 240, N0 * PIXEL_MM * 180 / 240 * math.exp(-MU_WATER_PER_MM * 2 * RADIUS_MM)
    f = np.linspace(-0.5 / PIXEL_MM, 0.5 / PIXEL_MM, 20001)
    power = float(np.mean(Kernel(F50).ramp(f) ** 2)) / PIXEL_MM
    expected = 1000 / MU_WATER_PER_MM * math.sqrt(math.pi**2 / views * PIXEL_MM / photons * power)
    assert float(noise[:, 118:138, 118:138].std()) == pytest.approx(expected, rel=0.04)


def test_noise_does_not_depend_on_the_number_of_views(
    disc: Array, noise: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate, "_VIEWS", 400)
    other = unit_noise(disc, PIXEL_MM, seed=5)
    centre = np.s_[:, 98:158, 98:158]
    assert float(other[centre].std() / noise[centre].std()) == pytest.approx(1, abs=0.04)


def test_spectrum_is_that_of_the_filter(disc: Array) -> None:
    """Back-projection spreads the power |A(f)|² of a view over a circle: the spectrum is |A(f)|²/f."""
    f50 = 0.3
    rois = unit_noise(disc, PIXEL_MM, seed=6, f50=f50)[:, 96:160, 96:160]
    power = (np.abs(np.fft.fft2(rois - rois.mean((1, 2), keepdims=True))) ** 2).mean(0)
    axis = np.fft.fftfreq(64, PIXEL_MM)
    f = np.hypot(*np.meshgrid(axis, axis))
    expected = np.where(f > 0, Kernel(f50).ramp(f) ** 2 / np.maximum(f, 1e-9), 0)
    band = f < 0.5 / PIXEL_MM
    mean_f = [float((f * p)[band].sum() / p[band].sum()) for p in (power, expected)]
    assert mean_f[0] == pytest.approx(mean_f[1], rel=0.03)
    low, high = (power[(f > a) & (f < b)].mean() for a, b in ((0.01, 0.04), (0.12, 0.18)))
    assert low < 0.35 * high  # a ramp: hardly any power at low frequencies


def test_slices_are_independent(noise: Array) -> None:
    a, b = noise[0, 88:168, 88:168].ravel(), noise[1, 88:168, 88:168].ravel()
    assert abs(float(np.corrcoef(a, b)[0, 1])) < 0.06


def test_one_seed_one_noise(disc: Array) -> None:
    one, again, other = (unit_noise(disc[:2], PIXEL_MM, seed) for seed in (7, 7, 8))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_mixed_noise_has_the_variance_of_both() -> None:
    a, b = np.random.default_rng(0).normal(0, 12, (2, 200, 200)).astype(np.float32)
    assert float(mix(a, b, 0.7).std()) == pytest.approx(12, rel=0.02)


@pytest.mark.parametrize("dose", [0.0, -0.5, 1.5])
def test_impossible_dose_is_refused(disc: Array, dose: float) -> None:
    with pytest.raises(ValueError, match="fraction of full dose"):
        low_dose(disc[:1], PIXEL_MM, dose, seed=0)


def test_oblong_slices_are_refused() -> None:
    with pytest.raises(ValueError, match="square"):
        unit_noise(np.zeros((1, 8, 9), np.float32), PIXEL_MM, seed=0)
