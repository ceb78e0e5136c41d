"""The cylinder with rods against formulas: what is measured of it is what was put in."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.optimize import brentq

from training.measuring import rods
from training.measuring.rods import LOW_CONTRAST_HU, NOISE_HU, PIXEL_MM, Phantom, quality
from training.physics import mean_frequency
from training.simulate import F50


@pytest.fixture(scope="module")
def scan() -> Phantom:
    return rods.phantom(0.25, 2)


def _f50(sigma_px: float) -> float:
    """Half-value frequency of the phantom's blur, a pixel's aperture and a further Gaussian, 1/mm."""

    def transfer(f: float) -> float:
        blur = math.exp(-math.log(2) * (f / F50) ** 2 - 2 * (math.pi * f * sigma_px * PIXEL_MM) ** 2)
        return blur * float(np.sinc(f * PIXEL_MM)) - 0.5

    return float(brentq(transfer, 0.01, 0.8))


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
    # a linear filter moves d' of the non-prewhitening observer only by its weights of the frequencies
    assert after.detectability == pytest.approx(before.detectability, rel=0.25)
