"""Masks of tissues: the truth's are eroded, a noisy image's make up no bias."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from training.physics import hu_bias
from training.sources.phantom import chest_abdomen
from training.tissues import TISSUES, smoothed_masks, tissue_masks


def test_masks_are_disjoint_and_two_pixels_smaller_than_their_tissue() -> None:
    body = chest_abdomen(4, 192, pixel_mm=2.1, spacing_mm=20.0, seed=5)
    masks = tissue_masks(body)
    assert np.sum(list(masks.values()), axis=0).max() == 1
    for name, (low, high) in TISSUES.items():
        inside = (body >= low) & (body <= high)
        eroded = np.stack([binary_erosion(plane, iterations=2) for plane in inside])
        assert 100 < eroded.sum() < inside.sum()
        assert np.array_equal(masks[name], eroded)


def test_bias_of_smoothed_masks_is_the_real_one() -> None:
    # perfect denoising has no bias; a mask of the noisy image makes one up, at fat's upper limit next to soft tissue
    truth = np.full((2, 256, 256), -62.0)
    truth[:, :, 128:] = 55.0
    noise = np.random.default_rng(21).normal(0, 20, truth.shape)
    noisy = truth + noise
    masks = smoothed_masks(noisy, 0.6)
    assert masks["soft"].mean() == pytest.approx(0.5, abs=0.05)
    assert hu_bias(truth + 0.7, noisy, {"soft": masks["soft"]})["soft"] == pytest.approx(0.7, abs=0.3)
    assert set(hu_bias(truth, noisy, masks)) == {"fat", "soft"}
    selected = {"fat": (noisy >= -140) & (noisy <= -60)}
    assert abs(hu_bias(truth, noisy, selected)["fat"]) > 5
