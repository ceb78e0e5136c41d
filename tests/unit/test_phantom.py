"""The phantom: HU of the tissues, no noise, the band of its edges, one seed one body."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from training.sources.phantom import chest_abdomen
from training.tissues import tissue_masks

Array = NDArray[np.float32]


@pytest.fixture(scope="module")
def body() -> Array:
    return chest_abdomen(8, 256, pixel_mm=1.6, spacing_mm=12.0, seed=5)


def test_tissues_have_their_hu(body: Array) -> None:
    masks = tissue_masks(body)
    means = {name: float(body[mask].mean()) for name, mask in masks.items()}
    assert means["air"] == pytest.approx(-1000, abs=1)
    assert means["lung"] == pytest.approx(-850, abs=35)
    assert means["fat"] == pytest.approx(-102, abs=8)
    assert 30 < means["soft"] < 100
    assert 350 < means["bone"] < 800
    assert all(mask.sum() > 300 for mask in masks.values())


def test_air_around_the_body_has_no_texture(body: Array) -> None:
    assert float(np.abs(body[:, :8] + 1000).max()) < 0.5


def test_organs_have_texture_of_some_hu(body: Array) -> None:
    fat = body[tissue_masks(body)["fat"]]
    assert 2 < float(np.subtract(*np.percentile(fat, (84, 16)))) / 2 < 12


def test_one_seed_one_body(body: Array) -> None:
    again = chest_abdomen(8, 256, pixel_mm=1.6, spacing_mm=12.0, seed=5)
    other = chest_abdomen(8, 256, pixel_mm=1.6, spacing_mm=12.0, seed=6)
    assert np.array_equal(body, again)
    assert float(np.abs(body - other).mean()) > 20


def test_slices_differ_little_from_their_neighbours() -> None:
    body = chest_abdomen(6, 192, pixel_mm=2.1, spacing_mm=1.0, seed=3)
    steps = np.abs(np.diff(body, axis=0)).mean()
    assert steps < 0.2 * np.abs(body[0] - chest_abdomen(1, 192, 2.1, 1.0, seed=4)[0]).mean()


def test_blur_halves_the_contrast_at_f50() -> None:
    """The edge of the skin is a step of known height: its spread has the transfer function of the Gaussian."""
    sharp, soft = (chest_abdomen(1, 512, 0.8, 5.0, seed=1, f50=f50)[0] for f50 in (5.0, 0.25))
    f = np.fft.fftfreq(512, 0.8)
    ratio = np.abs(np.fft.fft2(soft)) / np.abs(np.fft.fft2(sharp))
    at = int(np.argmin(np.abs(f - 0.25)))
    gaussian = np.exp(-np.log(2) * (f[at] / 0.25) ** 2)
    assert float(np.median(ratio[at - 3 : at + 4, :4])) == pytest.approx(gaussian, rel=0.05)
