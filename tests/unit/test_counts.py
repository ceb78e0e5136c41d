"""Photons and noise of a ray against formulas, and against SciPy's Poisson distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from training.simulation.counts import Beam, added, added_poisson, full_dose, poisson_quantile, poisson_streams
from training.simulation.projection import MU_WATER_PER_MM, Grid

GRID = Grid(128, 1.0, 180)


def ones(photons: float) -> torch.Tensor:
    return torch.full((1, 1, 1), photons)


def test_bowtie_and_attenuation() -> None:
    """N = N0 · bin · degree · exp(−p) · exp(−μ·min(120, 60·(t/130)²))."""
    grid = Grid(512, 1.0, 90)
    photons = Beam(n0=1e6).photons(torch.full((1, 90, grid.bins), 2.0), grid)[0, 0].numpy()
    t_mm = grid.places_mm(torch.device("cpu")).numpy()
    for t, path_mm in ((0.5, 0.0), (65.5, 15.23), (130.5, 60.46), (300.5, 120.0)):
        expected = 1e6 * 1.0 * 2.0 * math.exp(-2 - MU_WATER_PER_MM * path_mm)
        assert float(photons[np.flatnonzero(t_mm == t)[0]]) == pytest.approx(expected, rel=1e-3)


def test_tube_current_follows_the_attenuation_of_the_source_angle() -> None:
    """A ray at (θ, t) is measured from θ − γ and from θ + γ, γ = asin(t/SOD)."""
    grid, alpha = Grid(512, 1.0, 360), 0.5
    theta = torch.arange(360) * math.pi / 360
    central = 3 + torch.cos(2 * theta)
    p = central[None, :, None].expand(1, 360, grid.bins)
    ratio = (Beam(1e6, modulation=alpha).photons(p, grid) / Beam(1e6).photons(p, grid))[0]
    mean = float(torch.exp(alpha * central).mean())
    t_mm = grid.places_mm(torch.device("cpu"))
    for view, bin_ in ((0, 100), (50, 363), (200, 600)):
        gamma = math.asin(float(t_mm[bin_]) / 570)
        sources = (float(theta[view]) - gamma, float(theta[view]) + gamma)
        expected = sum(math.exp(alpha * (3 + math.cos(2 * angle))) for angle in sources) / 2 / mean
        assert float(ratio[view, bin_]) == pytest.approx(expected, rel=1e-3)
    assert float(ratio[:, grid.bins // 2].mean()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(("photons", "dose"), [(1e5, 0.25), (2e3, 0.1), (500.0, 0.5)])
def test_added_variance_is_the_difference_of_the_scans(photons: float, dose: float) -> None:
    """Var = [1/(dN) + mσe²/(dN)²] − [1/N + mσe²/N²], for bins of m readings."""
    beam = Beam(electronic=5.0)
    m = 1000 * 2 / 360 / 0.6  # readings in a bin of 1 mm and 1°
    low, full = (1 / n + m * 25 / n**2 for n in (dose * photons, photons))
    deviate = [torch.ones(1, 1, 1)]
    assert float(added(beam, GRID, dose)(ones(photons), deviate)) == pytest.approx(math.sqrt(low - full), rel=1e-4)
    assert float(full_dose(beam, GRID)(ones(photons), deviate)) == pytest.approx(math.sqrt(full), rel=1e-4)


def test_variance_of_starved_rays_is_limited() -> None:
    assert float(added(Beam(), GRID, 0.1)(ones(0.01), [torch.ones(1, 1, 1)])) == pytest.approx(2)


@pytest.mark.parametrize("mean", [2.0, 10.0, 300.0])
def test_poisson_quantile_has_the_moments_of_scipy(mean: float) -> None:
    z = torch.randn(400_000, generator=torch.Generator().manual_seed(1))
    ours = poisson_quantile(torch.full_like(z, mean), z).double().numpy()
    theirs = stats.poisson(mean)
    assert ours.mean() == pytest.approx(mean, abs=0.02 * math.sqrt(mean))
    assert ours.std() == pytest.approx(theirs.std(), rel=0.03)
    assert stats.skew(ours) == pytest.approx(float(theirs.stats("s")), abs=0.08)
    assert np.abs(ours - theirs.ppf(stats.norm.cdf(z.numpy()))).mean() < 0.15


def drawn(beam: Beam, dose: float, photons: float, n: int = 40_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    deviates = [torch.randn(n, generator=generator) for _ in range(poisson_streams(beam, GRID))]
    return added_poisson(beam, GRID, dose)(torch.full((n,), photons), deviates)


def test_poisson_counts_have_the_variance_of_the_formula() -> None:
    beam, dose, photons = Beam(electronic=5.0), 0.25, 2e4
    expected = float(added(beam, GRID, dose)(ones(photons), [torch.ones(1, 1, 1)]))
    assert float(drawn(beam, dose, photons).std()) == pytest.approx(expected, rel=0.03)


def test_starved_rays_are_biased_as_the_logarithm_of_poisson_counts_is() -> None:
    """E[−ln(c/N)] ≈ 1/(2N) for one reading of N counts (Taylor), exactly by summing over the distribution."""
    dose, photons = 0.1, 2000.0
    per_reading = photons * dose / (1 - dose) / round(1000 * 2 / 360 / 0.6)
    counts = np.arange(0, 200)
    exact = -(stats.poisson.pmf(counts, per_reading) * np.log(np.maximum(counts, 0.5) / per_reading)).sum()
    assert exact > 0.02
    assert float(drawn(Beam(), dose, photons).mean()) == pytest.approx(exact, rel=0.05)
