"""The spectrum of tiles against simulated noise, and kernels found again."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from training.physics import Curve, mean_frequency, nps_2d, radial_nps
from training.simulate import unit_noise
from training.simulation.kernel_fit import fit_kernel, tile_size, tile_spectrum
from training.simulation.projection import Kernel

N = 256
KERNELS = [(Kernel(0.35), 0.8), (Kernel(0.5, 1.8), 0.65), (Kernel(0.6), 0.9)]
"""A soft one, a sharp one, and one that the pixels alias."""


def measured(kernel: Kernel, pixel_mm: float, seed: int) -> Curve:
    """From tiles of simulated noise in the middle of water."""
    y, x = np.mgrid[:N, :N] - (N - 1) / 2
    disc = np.repeat(np.where(np.hypot(x, y) < 110, 0, -1000).astype(np.float32)[None], 6, 0)
    noise = unit_noise(disc, pixel_mm, seed, f50=kernel.f50, boost=kernel.boost)
    n = tile_size(pixel_mm)
    tiles: list[NDArray[np.float32]] = [
        image[a : a + n, b : b + n] for image in noise for a in range(80, 170 - n, n) for b in range(80, 170 - n, n)
    ]
    return radial_nps(nps_2d(np.stack(tiles), pixel_mm), pixel_mm)


@pytest.mark.parametrize(("kernel", "pixel_mm"), KERNELS)
def test_tiles_of_simulated_noise_show_the_computed_spectrum(kernel: Kernel, pixel_mm: float) -> None:
    seen, computed = measured(kernel, pixel_mm, 1), tile_spectrum(kernel, pixel_mm)
    np.testing.assert_allclose(seen.frequency, computed.frequency)
    factor = (seen.value * computed.value).sum() / (computed.value**2).sum()
    difference = seen.value - factor * computed.value
    assert np.sqrt((difference**2).sum() / (seen.value**2).sum()) < 0.08
    assert mean_frequency(computed) == pytest.approx(mean_frequency(seen), rel=0.02)


@pytest.mark.parametrize(("kernel", "pixel_mm"), KERNELS)
def test_the_kernel_of_simulated_noise_is_found(kernel: Kernel, pixel_mm: float) -> None:
    fit = fit_kernel(measured(kernel, pixel_mm, 2), pixel_mm)
    frequency = np.linspace(0.05, 0.5 / pixel_mm, 40)
    ramps = [one.ramp(frequency) / one.ramp(frequency).max() for one in (fit.kernel, kernel)]
    assert np.abs(ramps[0] - ramps[1]).max() < 0.08
    assert fit.residual < 0.08


def test_the_scale_of_the_spectrum_does_not_matter() -> None:
    curve = tile_spectrum(Kernel(0.4), 0.7)
    assert fit_kernel(Curve(curve.frequency, 123 * curve.value), 0.7).kernel == Kernel(0.4)
