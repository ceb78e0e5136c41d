"""The simulator against formulas: mean, dose, absolute noise, noise spectrum, independence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from training import simulate
from training.simulate import F50, added_noise, full_dose_noise, low_dose, mix, slice_weights, unit_noise
from training.simulation.counts import N0, Beam
from training.simulation.projection import MU_WATER_PER_MM, Kernel

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


@pytest.mark.parametrize("dose", [0.5, 0.1])
def test_added_noise_scales_exactly_with_the_dose(disc: Array, noise: Array, dose: float) -> None:
    """σ = σ(full dose)·√(1/d − 1), place by place."""
    added = added_noise(disc, PIXEL_MM, dose, 1, Kernel(F50), Beam())
    np.testing.assert_allclose(added, noise * math.sqrt(1 / dose - 1), rtol=1e-4, atol=1e-2)


def test_nothing_is_added_at_full_dose(disc: Array) -> None:
    assert not added_noise(disc[:1], PIXEL_MM, 1.0, 1, Kernel(F50), Beam(electronic=5)).any()


def test_electronic_noise_adds_its_variance_in_the_centre(disc: Array) -> None:
    """Through the centre all rays count N: variance (1/N + mσe²/N²)·… against 1/N·…"""
    n0, electronic = 2e5, 4.0
    quantum, both = (
        full_dose_noise(disc, PIXEL_MM, 9, Kernel(F50), Beam(n0, sigma))[:, 118:138, 118:138].std()
        for sigma in (0.0, electronic)
    )
    per_reading = n0 / (1000 * 2 / 360 / 0.6) * math.exp(-MU_WATER_PER_MM * 2 * RADIUS_MM)
    assert float(both / quantum) == pytest.approx(math.sqrt(1 + electronic**2 / per_reading), rel=0.01)


def test_sharp_kernel_has_the_spectrum_of_its_filter() -> None:
    kernel, pixel_mm = Kernel(0.5, 2.0), 0.4
    y, x = np.mgrid[:N, :N] - (N - 1) / 2
    disc = np.repeat(np.where(np.hypot(x, y) * pixel_mm < 48, 0, -1000).astype(np.float32)[None], 6, 0)
    rois = unit_noise(disc, pixel_mm, 3, f50=kernel.f50, boost=kernel.boost)[:, 96:160, 96:160]
    power = (np.abs(np.fft.fft2(rois - rois.mean((1, 2), keepdims=True))) ** 2).mean(0)
    axis = np.fft.fftfreq(64, pixel_mm)
    f = np.hypot(*np.meshgrid(axis, axis))
    expected = np.where(f > 0, kernel.ramp(f) ** 2 / np.maximum(f, 1e-9), 0)
    band = f < 0.5 / pixel_mm
    mean_f = [float((f * p)[band].sum() / p[band].sum()) for p in (power, expected)]
    assert mean_f[0] == pytest.approx(mean_f[1], rel=0.02)
    soft = Kernel(0.5).ramp(f) ** 2 / np.maximum(f, 1e-9)
    assert mean_f[0] > 1.3 * float((f * soft)[band].sum() / soft[band].sum())


@pytest.mark.parametrize(("overlap", "expected"), [(2.0, (0.5, 0.0)), (1.5625, (0.36, 0.0)), (3.0, (2 / 3, 1 / 3))])
def test_overlapping_slices_share_noise(overlap: float, expected: tuple[float, float]) -> None:
    """Two box slices k increments apart have ``1 − k·increment/thickness`` in common, and that is their correlation."""
    n = 96
    y, x = np.mgrid[:n, :n] - (n - 1) / 2
    disc = np.repeat(np.where(np.hypot(x, y) < 45, 0, -1000).astype(np.float32)[None], 12, 0)
    shared, alone = (unit_noise(disc, PIXEL_MM, 4, overlap=w)[:, 24:72, 24:72] for w in (overlap, 1.0))
    for apart, correlation in enumerate(expected, 1):
        pairs = [np.corrcoef(shared[k].ravel(), shared[k + apart].ravel())[0, 1] for k in range(12 - apart)]
        assert float(np.mean(pairs)) == pytest.approx(correlation, abs=0.04)
    spread = [float(part.std()) for part in (shared[:4], shared[-4:])]
    assert spread == pytest.approx([float(alone.std())] * 2, rel=0.06)  # no slice has more, not even the first


@pytest.mark.parametrize("overlap", [1.0, 1.2, 2.0, 2.5, 7.0])
def test_weights_of_each_slice_have_the_norm_1(overlap: float) -> None:
    assert np.linalg.norm(slice_weights(20, overlap), axis=1) == pytest.approx(np.ones(20))


def test_more_current_less_noise(disc: Array) -> None:
    noise = full_dose_noise(disc[:2], PIXEL_MM, 5, Kernel(F50), Beam(), current=(0.5, 2.0))
    same = full_dose_noise(disc[:2], PIXEL_MM, 5, Kernel(F50), Beam())
    np.testing.assert_allclose(noise[0], same[0] * math.sqrt(2), rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(noise[1], same[1] / math.sqrt(2), rtol=1e-4, atol=1e-2)


def test_modulated_current_makes_noise_rounder() -> None:
    """Through an ellipse 3 : 1, constant current gives streaks along the long axis; α = 0.5 weakens them."""
    y, x = np.mgrid[:128, :128] - 63.5
    ellipse = np.repeat(np.where((x / 60) ** 2 + (y / 20) ** 2 < 1, 0, -1000).astype(np.float32)[None], 6, 0)

    def streaks(alpha: float) -> float:
        rois = full_dose_noise(ellipse, 2.5, 6, Kernel(0.15), Beam(1e7, modulation=alpha))[:, 52:76, 40:88]
        power = (np.abs(np.fft.fft2(rois)) ** 2).mean(0)
        return float(power[1:12, 0].sum() / power[0, 1:24].sum())  # across over along

    assert streaks(0.5) < 0.6 * streaks(0.0)


def test_poisson_noise_is_gaussian_where_photons_abound(disc: Array) -> None:
    centre = np.s_[:, 98:158, 98:158]
    poisson, gaussian = (
        added_noise(disc[:4], PIXEL_MM, 0.25, 8, Kernel(F50), Beam(electronic=3), poisson=p)[centre]
        for p in (True, False)
    )
    assert float(poisson.std() / gaussian.std()) == pytest.approx(1, abs=0.05)
    assert float(poisson.mean()) == pytest.approx(0, abs=0.5)


def test_starved_poisson_noise_lifts_the_centre(disc: Array) -> None:
    """At a few counts line integrals come out too large: HU rise where rays are longest."""
    starved = added_noise(disc[:2], PIXEL_MM, 0.05, 8, Kernel(F50), Beam(2e4, 3.0), poisson=True)
    assert float(starved[:, 98:158, 98:158].mean()) > 5


def test_tube_currents_must_fit_the_slices(disc: Array) -> None:
    with pytest.raises(ValueError, match="tube currents"):
        full_dose_noise(disc[:2], PIXEL_MM, 1, Kernel(F50), Beam(), current=(1.0,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_makes_the_same_noise(disc: Array) -> None:
    of_gpu, of_cpu = (full_dose_noise(disc[:2], PIXEL_MM, 1, Kernel(F50), Beam(), device=d) for d in ("cuda", "cpu"))
    np.testing.assert_allclose(of_gpu, of_cpu, atol=0.05)


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
