"""Projector and back-projector against chords of discs and against two other implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq

from training.simulation.projection import MU_WATER_PER_MM, Grid, Kernel, line_integrals, project, reconstruct

N = 127  # odd: all agree on the centre
PIXEL_MM = 2.0


@pytest.fixture(scope="module")
def blobs() -> NDArray[np.float32]:
    """Smooth, lopsided, 0 outside the inscribed circle."""
    y, x = np.mgrid[:N, :N] - (N - 1) / 2
    image = np.exp(-((x - 14) ** 2 / 200 + (y + 9) ** 2 / 90)) + 0.5 * np.exp(-((x + 25) ** 2 + (y - 18) ** 2) / 60)
    return np.asarray(np.where(np.hypot(x, y) < N / 2 - 3, image, 0), np.float32)


def test_line_integrals_of_a_disc_are_its_chords() -> None:
    n, radius_mm, centre_mm = 512, 120.0, (30.0, -20.0)  # x, y
    pixel_mm = 0.75
    y, x = (np.mgrid[:n, :n] - (n - 1) / 2) * pixel_mm
    disc = np.where(np.hypot(x - centre_mm[0], y - centre_mm[1]) < radius_mm, 0, -1000)
    grid = Grid(n, pixel_mm, 60)
    p = line_integrals(torch.from_numpy(disc[None].astype(np.float32)), grid)[0].numpy()
    t_mm = grid.places_mm(torch.device("cpu")).numpy()
    for k in (0, 7, 30, 52):
        theta = math.pi * k / 60
        distance = np.abs(t_mm - centre_mm[0] * math.cos(theta) - centre_mm[1] * math.sin(theta))
        chord = 2 * np.sqrt(np.maximum(radius_mm**2 - distance**2, 0))
        away = np.abs(distance - radius_mm) > 8  # the grid is coarse at the edge
        np.testing.assert_allclose(p[k][away], MU_WATER_PER_MM * chord[away], atol=0.04)


def test_projector_agrees_with_scikit_image(blobs: NDArray[np.float32]) -> None:
    radon = pytest.importorskip("skimage.transform").radon
    ours = project(torch.from_numpy(blobs[None]), 1.0, 36)[0].numpy()
    degrees = -180 / 36 * np.arange(36)  # there y points upwards
    theirs = radon(blobs.astype(np.float64), theta=degrees, circle=True).T
    assert np.abs(ours - theirs).max() < 0.01 * theirs.max()


def test_projector_agrees_with_astra(blobs: NDArray[np.float32]) -> None:
    """ASTRA Toolbox is GPL-3: an independent reference for this test, never a dependency."""
    astra = pytest.importorskip("astra", exc_type=ImportError)
    views = 36
    volume = astra.create_vol_geom(N, N)
    # there y points upwards: our angle is its negative
    rays = astra.create_proj_geom("parallel", 1.0, N, -np.linspace(0, np.pi, views, endpoint=False))
    projector = astra.create_projector("linear", rays, volume)  # Joseph's method
    number, theirs = astra.create_sino(blobs, projector)
    astra.data2d.delete(number)
    ours = project(torch.from_numpy(blobs[None]), 1.0, views)[0].numpy()
    assert np.abs(ours - theirs).max() < 0.02 * theirs.max()


@pytest.mark.parametrize("bins_per_pixel", [1, 2])
def test_filtered_back_projection_recovers_a_disc(bins_per_pixel: int) -> None:
    """From exact chords of a disc beside the axis: its value above what is outside, even on both sides.

    The whole image lies some 0.5 % too low, as the filter is sampled in frequency (Kak and Slaney 1988, 3.3.3): of
    noise, whose mean is 0, that takes nothing.
    """
    radius_mm, x0, y0, value = 60.0, 25.0, -10.0, 0.02
    grid = Grid(N, PIXEL_MM, 360, bins_per_pixel)
    theta = np.pi * np.arange(360)[:, None] / 360
    t_mm = grid.places_mm(torch.device("cpu")).numpy().astype(np.float64)[None]
    distance = t_mm - x0 * np.cos(theta) - y0 * np.sin(theta)
    sinogram = value * 2 * np.sqrt(np.maximum(radius_mm**2 - distance**2, 0))
    image = reconstruct(torch.from_numpy(sinogram[None].astype(np.float32)), grid, Kernel(0.1))[0].numpy()
    y, x = (np.mgrid[:N, :N] - (N - 1) / 2) * PIXEL_MM
    r = np.hypot(x - x0, y - y0)
    outside = image[(r > 80) & (np.hypot(x, y) < 120)]
    assert abs(float(outside.mean())) < 0.01 * value
    assert float(image[r < 40].mean() - outside.mean()) == pytest.approx(value, rel=0.003)
    assert np.abs(image[r < 40] - image[r < 40].mean()).max() < 0.01 * value
    assert np.abs(outside - outside.mean()).max() < 0.02 * value


def test_kernel_has_its_values() -> None:
    soft, sharp = Kernel(0.4), Kernel(0.5, 1.6)
    assert soft.apodisation(np.array([0.0, 0.4])) == pytest.approx([1, 0.5])
    assert sharp.apodisation(np.array([0.0, 0.5])) == pytest.approx([1, 1.3])
    assert soft.ramp(np.array([-0.4, 0.4])) == pytest.approx([0.2, 0.2])


def test_half_is_passed_up_to_f50_and_by_sharp_kernels_beyond() -> None:
    soft, sharp = Kernel(0.5), Kernel(0.4, 2.0)
    assert soft.passes_half == pytest.approx(0.5, abs=0.001)
    exact = brentq(lambda f: (1 + 2 * (f / 0.4) ** 2) * math.exp(-math.log(2) * (f / 0.4) ** 2.5) - 0.5, 0.4, 1.6)
    assert sharp.passes_half == pytest.approx(exact, abs=0.001)


@pytest.mark.parametrize(("kernel", "bins"), [(Kernel(0.5), 1), (Kernel(0.72), 2), (Kernel(0.5, 1.6), 2)])
def test_sharp_kernels_get_finer_bins(kernel: Kernel, bins: int) -> None:
    assert kernel.bins_per_pixel(0.7) == bins
    nyquist = bins / (2 * 0.7)
    assert float(kernel.apodisation(np.array([nyquist + 0.02]))[0]) < 0.5


@pytest.mark.parametrize(("f50", "boost"), [(0.0, 0.0), (-1.0, 0.0), (0.5, -0.1), (math.nan, 0.0)])
def test_impossible_kernels_are_refused(f50: float, boost: float) -> None:
    with pytest.raises(ValueError, match="kernel needs"):
        Kernel(f50, boost)
