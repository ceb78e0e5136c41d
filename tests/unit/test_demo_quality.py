"""The demo's PSNR and SSIM against another implementation, and its picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from demo.picture import draw
from demo.quality import RANGE_HU, WINDOW_HU, compare


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    rng = np.random.default_rng(3)
    truth = rng.uniform(-300, 400, (3, 40, 50)).astype(np.float32)
    noisy = truth + rng.normal(0, 25, truth.shape).astype(np.float32)
    clipped = [volume.clip(*WINDOW_HU).astype(np.float64) for volume in (truth, noisy)]
    found = compare(noisy, truth)
    assert found.psnr_db == pytest.approx(peak_signal_noise_ratio(*clipped, data_range=RANGE_HU), abs=1e-9)
    slices = [
        structural_similarity(a, b, data_range=RANGE_HU, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        for a, b in zip(*clipped, strict=True)
    ]
    assert found.ssim == pytest.approx(float(np.mean(slices)), abs=1e-9)


def test_a_known_error_has_a_known_psnr() -> None:
    truth = np.zeros((2, 32, 32), np.float32)
    assert compare(truth + 4, truth).psnr_db == pytest.approx(40.0)
    assert compare(truth, truth).psnr_db == math.inf
    assert compare(truth, truth).ssim == pytest.approx(1.0)


def test_the_picture_shows_both_at_one_window_and_their_difference(tmp_path: Path) -> None:
    before = np.full((400, 400), 40.0, np.float32)
    after = before.copy()
    after[:, 200:] = WINDOW_HU[1] + 100
    draw(tmp_path / "p.png", before, after, "some")
    with Image.open(tmp_path / "p.png") as picture:
        pixels = np.asarray(picture)
    row = pixels[200]
    assert row[8 + 100] == row[8 + 300] == 128  # level 40 is the middle of the window
    assert row[2 * 8 + 400 + 100] == 128
    assert row[2 * 8 + 400 + 300] == 255
    assert row[3 * 8 + 800 + 100] == 128  # no difference
    assert row[3 * 8 + 800 + 300] < 128
