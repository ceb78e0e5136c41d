"""The rails: padding, metal, low frequencies, blend."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pipelines.safety import AIR_HU, LOW_FREQUENCY_PX, low_frequencies, network_input, restrained
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
    blurred, weight = (gaussian_filter(x, LOW_FREQUENCY_PX, mode="constant") for x in (change * where, where * 1.0))
    expected = blurred / weight
    close = (weight > 0.5)[16:-16, 16:-16]
    difference = (low_frequencies(change, where) - expected)[16:-16, 16:-16]
    assert float(np.abs(difference[close]).max()) < 0.1 * float(np.abs(expected).max())


def test_an_offset_is_taken_out_and_noise_is_not() -> None:
    hu = np.full((1, 128, 128), 40, np.float32)
    noise = np.random.default_rng(2).normal(0, 20, hu.shape).astype(np.float32)
    out = restrained(_volume(hu + noise), hu + 7, 1.0)
    assert float(out.mean()) == pytest.approx(40, abs=0.5)
    assert float(out.std()) < 2.5


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
