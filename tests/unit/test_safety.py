"""The rails: padding, metal, low frequencies, blend."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, maximum_filter

from pipelines.safety import AIR_HU, LOW_FREQUENCY_MM, LOWEST_HU, METAL_HU, METAL_MARGIN_PX, Rail, network_input
from pipelines.testing import water_volume
from pipelines.volume import Plane

Array = NDArray[np.float32]
PIXEL_MM = 0.7


def _plane(hu: Array, padding: NDArray[np.bool_] | None = None) -> Plane:
    return Plane(hu, np.zeros(hu.shape, np.bool_) if padding is None else padding)


def _out(plane: Plane, denoised: Array, part: float = 1.0, pixel_mm: float = PIXEL_MM) -> Array:
    return Rail(pixel_mm, part)(plane, network_input(plane), denoised, np.ones(denoised.shape, np.bool_))


def test_network_never_sees_padding() -> None:
    hu = np.array([[40, -2000, 5000, -1010]], np.float32)
    padding = np.array([[False, True, False, False]])
    assert network_input(_plane(hu, padding)).tolist() == [[40, AIR_HU, 5000, -1010]]


def test_noise_below_the_lowest_hu_of_a_training_is_cut_off_there_and_denoised() -> None:
    hu = np.array([[-1010, -1030, -1090, -3024]], np.float32)
    plane = _plane(hu)
    assert network_input(plane).tolist() == [[-1010, LOWEST_HU, LOWEST_HU, LOWEST_HU]]
    rail = Rail(PIXEL_MM, 1.0)
    change = np.array([[10.0, -10.0, 20.0, 30.0]], np.float32)
    where = np.array([[True, True, True, False]])
    made = rail(plane, network_input(plane), network_input(plane) + change, np.ones(hu.shape, np.bool_)) - hu
    expected = np.where(where, change - rail.low_frequencies(change, where), 0)
    np.testing.assert_allclose(made, expected, atol=1e-3)
    assert np.abs(expected[0, :3]).min() > 1


def test_a_volume_is_given_as_its_slices_are() -> None:
    volume = water_volume((3, 20, 24), padding_hu=-3024.0)
    slices = [network_input(volume.plane(k)) for k in range(3)]
    assert np.array_equal(network_input(volume), np.stack(slices))


def test_padding_and_metal_with_its_margin_pass_unchanged() -> None:
    hu = np.full((40, 40), 40, np.float32)
    hu[20, 20] = 3500
    hu[:4] = -2000
    padding = np.zeros(hu.shape, np.bool_)
    padding[:4] = True
    plane = _plane(hu, padding)
    wrong = network_input(plane) + np.random.default_rng(0).normal(0, 30, hu.shape).astype(np.float32)
    same = _out(plane, wrong) == hu
    assert same[:4].all()
    assert same[17:24, 17:24].all()
    assert same.sum() == 4 * 40 + 49


def test_the_margin_of_metal_is_a_maximum_filter() -> None:
    """Metal of any shape, at the border too, and padding that no tag declares."""
    rng = np.random.default_rng(4)
    hu = rng.normal(0, 20, (71, 53)).astype(np.float32)
    metal = rng.random(hu.shape) > 0.997
    metal[0, 7] = metal[70, 52] = metal[33, 0] = metal[30:36, 20:40] = True
    metal[47:, :9] = False
    hu[metal] = METAL_HU + rng.uniform(1, 5000, int(metal.sum()))
    hu[50:, :6] = -1500
    plane = _plane(hu)
    expected = maximum_filter(metal, 2 * METAL_MARGIN_PX + 1, mode="constant", cval=0) | (hu == -1500)
    assert 0.1 < expected.mean() < 0.6
    out = _out(plane, hu + rng.normal(0, 30, hu.shape).astype(np.float32))
    assert np.array_equal(out == hu, expected)


@pytest.mark.parametrize("pixel_mm", [0.35, 0.6818, 1.37])
def test_low_frequencies_are_a_normalised_gaussian(pixel_mm: float) -> None:
    sigma_px = LOW_FREQUENCY_MM / pixel_mm
    rng = np.random.default_rng(1)
    rail = Rail(pixel_mm, 1.0)
    for _ in range(3):  # one rail for many slices: another mask, another weight
        change = gaussian_filter(rng.normal(0, 100, (122, 135)), 6).astype(np.float32)
        where = rng.random(change.shape) > 0.1
        where[:30, :50] = False
        blurred, weight = (
            gaussian_filter(x, sigma_px, mode="constant", radius=math.ceil(3 * sigma_px))
            for x in (change * where.astype(np.float64), where.astype(np.float64))
        )
        expected = blurred / np.maximum(weight, 1e-3)
        for _ in range(2):
            assert np.allclose(rail.low_frequencies(change, where), expected, atol=1e-3)


@pytest.mark.parametrize("pixel_mm", [0.4, 0.9])
def test_what_passes_unchanged_is_known_in_millimetres(pixel_mm: float) -> None:
    """A network that makes everything 0: waves come out as the Gaussian passes them."""
    size = 240
    for periods in (2, 8, 24):
        wave = 100 * np.sin(2 * np.pi * periods * np.arange(size) / size)
        hu = np.repeat(wave[None].astype(np.float32), size, axis=0)
        out = _out(_plane(hu), np.zeros_like(hu), pixel_mm=pixel_mm)[60:-60, 60:-60]
        per_mm = periods / (size * pixel_mm)
        passes = np.exp(-2 * (np.pi * per_mm * LOW_FREQUENCY_MM) ** 2)
        assert np.allclose(out, passes * hu[60:-60, 60:-60], atol=1.0)


def test_an_offset_is_taken_out_and_noise_is_not() -> None:
    hu = np.full((128, 128), 40, np.float32)
    noise = np.random.default_rng(2).normal(0, 20, hu.shape).astype(np.float32)
    out = _out(_plane(hu + noise), hu + 7)
    assert float(out.mean()) == pytest.approx(40, abs=0.5)
    sigma_px = LOW_FREQUENCY_MM / PIXEL_MM
    left = 20 / (2 * np.sqrt(np.pi) * sigma_px)  # of white noise under the Gaussian
    assert float(out[10:-10, 10:-10].std()) == pytest.approx(left, rel=0.1)


def test_what_lies_outside_is_left_alone_and_counts_for_nothing() -> None:
    rng = np.random.default_rng(8)
    hu, denoised = (rng.normal(0, 20, (50, 50)).astype(np.float32) for _ in range(2))
    inside = np.zeros(hu.shape, np.bool_)
    inside[10:40, 5:30] = True
    rail = Rail(PIXEL_MM, 1.0)
    out = rail(_plane(hu), hu, denoised, inside)
    assert np.array_equal(out[~inside], hu[~inside])
    denoised[~inside] = 9000
    assert np.array_equal(rail(_plane(hu), hu, denoised, inside), out)


def test_a_body_of_any_outline_is_worked_on_as_in_the_whole_slice() -> None:
    """Only the box around it is looked at: the formula, over all pixels, gives the same."""
    rng = np.random.default_rng(9)
    hu, denoised = (gaussian_filter(rng.normal(0, 200, (171, 190)), 2).astype(np.float32) for _ in range(2))
    y, x = np.indices(hu.shape)
    inside = (y - 80) ** 2 + (x - 70) ** 2 < 55**2
    inside |= (y > 150) & (x > 120)  # to the border of the slice
    hu[60, 60] = METAL_HU + 1
    denoised[~inside] = np.nan
    free = inside & ((y < 60 - METAL_MARGIN_PX) | (y > 60 + METAL_MARGIN_PX) | (x < 57) | (x > 63))
    change = np.where(free, denoised - hu, 0)
    blurred, weight = (
        gaussian_filter(
            a, LOW_FREQUENCY_MM / PIXEL_MM, mode="constant", radius=math.ceil(3 * LOW_FREQUENCY_MM / PIXEL_MM)
        )
        for a in (change.astype(np.float64), free.astype(np.float64))
    )
    expected = hu + np.where(free, 0.7 * (change - blurred / np.maximum(weight, 1e-3)), 0)
    out = Rail(PIXEL_MM, 0.7)(_plane(hu), hu, denoised, inside)
    np.testing.assert_allclose(out, expected, atol=1e-2)
    assert np.array_equal(out[~free], hu[~free])


def test_a_slice_without_a_body_leaves_as_it_came() -> None:
    hu = np.random.default_rng(10).normal(-1000, 20, (30, 30)).astype(np.float32)
    out = Rail(PIXEL_MM, 1.0)(_plane(hu), hu, hu + 5, np.zeros(hu.shape, np.bool_))
    assert np.array_equal(out, hu)
    assert not np.shares_memory(out, hu)


@pytest.mark.parametrize("part", [0.0, 0.3, 1.0])
def test_part_is_linear(part: float) -> None:
    hu = np.random.default_rng(3).normal(0, 20, (50, 50)).astype(np.float32)
    denoised = np.zeros_like(hu)
    full, out = (_out(_plane(hu), denoised, p) for p in (1.0, part))
    assert np.allclose(out, hu + np.float32(part) * (full - hu), atol=1e-4)
    if part == 0:
        assert np.array_equal(out, hu)


def test_nothing_that_is_given_is_written_into() -> None:
    volume = water_volume((1, 48, 48), padding_hu=-3024.0)
    plane, given = volume.plane(0), network_input(volume.plane(0))
    denoised = given * np.float32(0.5)
    before = [x.copy() for x in (plane.hu, plane.padding, given, denoised)]
    for values in (plane.hu, plane.padding, given, denoised):
        values.flags.writeable = False
    out = Rail(PIXEL_MM, 0.5)(plane, given, denoised, np.ones(given.shape, np.bool_))
    assert not any(np.shares_memory(out, x) for x in (plane.hu, given, denoised))
    assert all(np.array_equal(x, y) for x, y in zip(before, (plane.hu, plane.padding, given, denoised), strict=True))
