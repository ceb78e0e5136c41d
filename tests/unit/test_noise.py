"""The noise level of a series, against noise that was put in."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.noise import SLICES, noise_level, series_noise_level
from pipelines.safety import network_input
from pipelines.testing import water_volume
from pipelines.volume import Plane, Volume
from training.simulate import unit_noise

Array = NDArray[np.float32]
PIXEL_MM = 0.8


def _nothing(hu: Array) -> NDArray[np.bool_]:
    return np.zeros(hu.shape, np.bool_)


def _white(sd: float, base: float = 40.0, shape: tuple[int, int, int] = (3, 128, 128)) -> Array:
    return np.random.default_rng(1).normal(base, sd, shape).astype(np.float32)


@pytest.mark.parametrize("sd", [3.0, 10.0, 25.0])
def test_white_noise_in_soft_tissue(sd: float) -> None:
    hu = _white(sd)
    assert noise_level(hu, _nothing(hu), PIXEL_MM) == pytest.approx(sd, rel=0.06)


def test_noise_of_a_scanner_in_a_water_disc() -> None:
    y, x = np.mgrid[:256, :256] - 127.5
    disc = np.repeat(np.where(x * x + y * y < 90**2, 40, -1000).astype(np.float32)[None], 4, 0)
    noise = unit_noise(disc, PIXEL_MM, seed=1)
    inside = x * x + y * y < 80**2
    measured = noise_level(disc + noise, _nothing(disc), PIXEL_MM)
    assert measured == pytest.approx(float(noise[:, inside].std()), rel=0.12)


def test_edges_and_lesions_do_not_count() -> None:
    hu = _white(10.0)
    hu[:, 40:60, 40:60] += 60
    hu[:, 80:84, :] += 90
    assert noise_level(hu, _nothing(hu), PIXEL_MM) == pytest.approx(10.0, rel=0.08)


def test_lung_and_air_do_not_count_where_there_is_soft_tissue() -> None:
    hu = _white(10.0)
    hu[:, :, 64:] = np.random.default_rng(2).normal(-850, 60, (3, 128, 64))
    assert noise_level(hu, _nothing(hu), PIXEL_MM) == pytest.approx(10.0, rel=0.08)


def test_padding_does_not_count() -> None:
    hu = _white(10.0)
    padding = _nothing(hu)
    padding[:, :40] = True
    hu[padding] = 40.0  # the HU of soft tissue, without noise
    assert noise_level(hu, padding, PIXEL_MM) == pytest.approx(10.0, rel=0.08)


def test_without_soft_tissue_anything_denser_than_air_counts() -> None:
    hu = _white(15.0, base=-400.0)
    hu[:, :, 90:] = -1000
    assert noise_level(hu, _nothing(hu), PIXEL_MM) == pytest.approx(15.0, rel=0.2)


def test_air_only_and_padding_only() -> None:
    hu = _white(15.0, base=-1000.0)
    assert noise_level(hu, _nothing(hu), PIXEL_MM) == pytest.approx(15.0, rel=0.2)
    assert noise_level(hu, ~_nothing(hu), PIXEL_MM) == 0.0


def test_a_tiny_series_is_measured() -> None:
    hu = _white(10.0, shape=(1, 6, 7))
    assert 2 < noise_level(hu, _nothing(hu), PIXEL_MM) < 20


@pytest.mark.parametrize("slices", [1, 2, 7, 8, 9, 40])
def test_of_a_series_some_slices_are_read_as_a_network_is_given_them(
    slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = water_volume((slices, 96, 80), noise_hu=18.0, padding_hu=-3024.0)
    for k in range(slices):  # each slice has a noise of its own, so that another choice of slices shows
        volume.hu[k] += np.random.default_rng(k).normal(0, 3 * k % 17, volume.hu[k].shape).astype(np.float32)
    asked: list[int] = []

    def plane(self: Volume, k: int) -> Plane:
        asked.append(k)
        return Plane(self.hu[k], self.padding[k])

    monkeypatch.setattr(Volume, "plane", plane)
    measured = series_noise_level(volume)
    assert measured == noise_level(network_input(volume), volume.padding, volume.geometry.spacing_mm[1])
    spread = np.linspace(0, slices - 1, min(SLICES, slices) + 2)[1:-1].round().astype(int)
    assert asked == np.unique(spread).tolist()
