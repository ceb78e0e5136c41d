"""The rails: padding, metal, low frequencies, blend."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pipelines.safety import AIR_HU, LOW_FREQUENCY_MM, low_frequencies, network_input, restrained
from pipelines.testing import water_volume
from pipelines.volume import Volume

Array = NDArray[np.float32]


def _volume(hu: Array, padding: NDArray[np.bool_] | None = None) -> Volume:
    like = water_volume((1, 4, 4))
    return Volume(hu, like.geometry, (), (), np.zeros(hu.shape, np.bool_) if padding is None else padding)


def test_network_never_sees_padding() -> None:
    hu = np.array([[[40, -2000, -3024, 5000, -1010]]], np.float32)
    padding = np.array([[[False, True, False, False, False]]])
    assert network_input(_volume(hu, padding)).tolist() == [[[40, AIR_HU, AIR_HU, 5000, -1010]]]


def test_padding_and_metal_with_its_margin_pass_unchanged() -> None:
    hu = np.full((1, 40, 40), 40, np.float32)
    hu[0, 20, 20] = 3500
    hu[0, :4] = -2000
    padding = np.zeros(hu.shape, np.bool_)
    padding[0, :4] = True
    wrong = network_input(_volume(hu, padding)) + np.random.default_rng(0).normal(0, 30, hu.shape).astype(np.float32)
    out = restrained(_volume(hu, padding), wrong, 1.0)
    same = out == hu
    assert same[0, :4].all()
    assert same[0, 17:24, 17:24].all()
    assert same.sum() == 4 * 40 + 49


def test_low_frequencies_are_a_normalised_gaussian() -> None:
    rng = np.random.default_rng(1)
    change = gaussian_filter(rng.normal(0, 100, (122, 135)), 6).astype(np.float32)
    where = rng.random(change.shape) > 0.1
    where[:30, :50] = False
    blurred, weight = (gaussian_filter(x, 2.2, mode="constant", truncate=3) for x in (change * where, where * 1.0))
    expected = blurred / np.maximum(weight, 1e-3)
    assert np.allclose(low_frequencies(change, where, 2.2), expected, atol=1e-3)


@pytest.mark.parametrize("pixel_mm", [0.4, 0.9])
def test_what_passes_unchanged_is_known_in_millimetres(pixel_mm: float) -> None:
    """A network that makes everything 0: waves come out as the Gaussian passes them."""
    size, like = 240, water_volume((1, 4, 4))
    geometry = replace(like.geometry, spacing_mm=(1.0, pixel_mm, pixel_mm))
    for periods in (2, 8, 24):
        wave = 100 * np.sin(2 * np.pi * periods * np.arange(size) / size)
        hu = np.repeat(wave[None, None].astype(np.float32), size, axis=1)
        volume = Volume(hu, geometry, (), (), np.zeros(hu.shape, np.bool_))
        out = restrained(volume, np.zeros_like(hu), 1.0)[0, 60:-60, 60:-60]
        per_mm = periods / (size * pixel_mm)
        passes = np.exp(-2 * (np.pi * per_mm * LOW_FREQUENCY_MM) ** 2)
        assert np.allclose(out, passes * hu[0, 60:-60, 60:-60], atol=1.0)


def test_an_offset_is_taken_out_and_noise_is_not() -> None:
    hu = np.full((1, 128, 128), 40, np.float32)
    noise = np.random.default_rng(2).normal(0, 20, hu.shape).astype(np.float32)
    volume = _volume(hu + noise)
    out = restrained(volume, hu + 7, 1.0)
    assert float(out.mean()) == pytest.approx(40, abs=0.5)
    sigma_px = LOW_FREQUENCY_MM / volume.geometry.spacing_mm[1]
    left = 20 / (2 * np.sqrt(np.pi) * sigma_px)  # of white noise under the Gaussian
    assert float(out[0, 10:-10, 10:-10].std()) == pytest.approx(left, rel=0.1)


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_blend_is_linear(blend: float) -> None:
    rng = np.random.default_rng(3)
    hu = rng.normal(0, 20, (2, 50, 50)).astype(np.float32)
    denoised = np.zeros_like(hu)
    full = restrained(_volume(hu), denoised.copy(), 1.0)
    out = restrained(_volume(hu), denoised.copy(), blend)
    assert np.allclose(out, hu + np.float32(blend) * (full - hu), atol=1e-4)
    if blend == 0:
        assert np.array_equal(out, hu)
