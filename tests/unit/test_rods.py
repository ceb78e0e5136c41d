"""The cylinder with rods against formulas: what is measured of it is what was put in."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.optimize import brentq

from training.measuring import rods
from training.measuring.rods import CONTRASTS_HU, LOW_CONTRAST_HU, NOISE_HU, PIXEL_MM, ROD_MM, Phantom, quality
from training.physics import LESION_HU, LESION_MM, mean_frequency
from training.simulate import F50


@pytest.fixture(scope="module")
def scan() -> Phantom:
    return rods.phantom(0.25, 2)


def _transfer(f: np.ndarray, sigma_px: float) -> np.ndarray:
    """What the phantom's blur, a pixel's aperture and a further Gaussian leave of the frequencies `f` in 1/mm."""
    blur = np.exp(-math.log(2) * (f / F50) ** 2 - 2 * (math.pi * f * sigma_px * PIXEL_MM) ** 2)
    return np.asarray(blur * np.sinc(f * PIXEL_MM))


def _f50(sigma_px: float) -> float:
    return float(brentq(lambda f: float(_transfer(np.array(f), sigma_px)) - 0.5, 0.01, 0.8))


def _through(scan: Phantom, sigma_px: float) -> rods.Quality:
    images = (scan.first, scan.second, scan.first + scan.rods)
    return quality(*(gaussian_filter(hu, (0, sigma_px, sigma_px)) for hu in images))


def test_noise_is_that_of_the_dose(scan: Phantom) -> None:
    as_it_is = _through(scan, 0)
    assert as_it_is.sd_hu == pytest.approx(2 * NOISE_HU, rel=0.1)
    assert as_it_is.mean_hu == pytest.approx(0, abs=0.5)
    assert as_it_is.cnr == pytest.approx(LOW_CONTRAST_HU / (2 * NOISE_HU), rel=0.2)


@pytest.mark.parametrize("sigma_px", [0.0, 1.0])
def test_resolution_is_that_of_the_blur_at_every_contrast(scan: Phantom, sigma_px: float) -> None:
    for f50 in _through(scan, sigma_px).f50.values():
        assert f50 == pytest.approx(_f50(sigma_px), rel=0.04)


def test_a_gaussian_makes_noise_coarse(scan: Phantom) -> None:
    before, after = _through(scan, 0), _through(scan, 1.0)
    f, value = before.nps.frequency, before.nps.value
    expected = value * np.exp(-((2 * math.pi * f * PIXEL_MM) ** 2))  # the square of the Gaussian's transfer
    mean = float(np.trapezoid(f * expected, f) / np.trapezoid(expected, f))
    assert mean_frequency(after.nps) == pytest.approx(mean, rel=0.05)
    assert after.cnr > 2 * before.cnr


@pytest.mark.parametrize("sigma_px", [0.0, 1.0])
def test_detectability_is_that_of_a_disc_through_the_blur(scan: Phantom, sigma_px: float) -> None:
    found = _through(scan, sigma_px)
    # the task in the image plane, and its Fourier transform: a truth without Bessel functions
    pixels, step_mm = 400, 0.25
    axis = (np.arange(pixels) - pixels / 2) * step_mm
    disc = LESION_HU * (np.hypot(axis[:, None], axis[None, :]) <= LESION_MM / 2)
    f = np.fft.fftfreq(pixels, step_mm)
    radius = np.hypot(f[:, None], f[None, :])
    seen = np.abs(np.fft.fft2(disc)) * step_mm**2 * _transfer(radius, sigma_px)
    seen[radius > found.nps.frequency[-1]] = 0
    noise = np.interp(radius, found.nps.frequency, found.nps.value)
    cell = f[1] ** 2
    expected = (seen**2).sum() * cell / math.sqrt((seen**2 * noise).sum() * cell)
    assert found.detectability == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("blurred", CONTRASTS_HU)
def test_detectability_is_of_the_rod_that_has_the_contrast_of_the_task(scan: Phantom, blurred: float) -> None:
    assert LOW_CONTRAST_HU == LESION_HU
    y, x = rods._centres()[CONTRASTS_HU.index(blurred)]
    axis = (np.arange(rods.MATRIX) - (rods.MATRIX - 1) / 2) * PIXEL_MM
    here = np.hypot(axis[:, None] - y, axis[None, :] - x) < 2.5 * ROD_MM
    through = np.where(here, gaussian_filter(scan.rods, (0, 3, 3)), scan.rods)
    before, after = (quality(scan.first, scan.second, scan.first + one) for one in (scan.rods, through))
    changed = {hu for hu in CONTRASTS_HU if after.f50[hu] < 0.9 * before.f50[hu]}
    assert changed == {blurred}
    assert (after.detectability < 0.95 * before.detectability) == (blurred == LESION_HU)
