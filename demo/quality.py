"""How near an image is to the truth: PSNR and SSIM, with the range they are computed on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Array = NDArray[np.float32]

WINDOW_HU = (-160.0, 240.0)
"""Soft-tissue window (level 40, width 400), to which images and truth are clipped before PSNR and SSIM."""
RANGE_HU = WINDOW_HU[1] - WINDOW_HU[0]
_SSIM_SIGMA_PX, _SSIM_RADIUS_PX = 1.5, 5
_K1, _K2 = 0.01, 0.03


@dataclass(frozen=True, slots=True)
class Quality:
    """One volume against the truth."""

    psnr_db: float
    ssim: float


def compare(hu: Array, truth_hu: Array) -> Quality:
    """PSNR over all voxels, and SSIM as the mean over slices, in `WINDOW_HU`; both arrays (z, y, x), HU.

    SSIM is that of Wang et al., IEEE TIP 2004;13:600-612: Gaussian of 11×11 pixels, σ 1.5, K1 0.01, K2 0.03.
    """
    squares = 0.0
    ssims = []
    for plane, true_plane in zip(hu, truth_hu, strict=True):
        x, y = (np.clip(image, *WINDOW_HU).astype(np.float64) for image in (plane, true_plane))
        squares += float(np.square(x - y).sum())
        ssims.append(_ssim(x, y))
    if squares == 0:
        return Quality(math.inf, 1.0)
    return Quality(10 * math.log10(RANGE_HU**2 * truth_hu.size / squares), float(np.mean(ssims)))


def _ssim(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    def mean(image: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(gaussian_filter(image, _SSIM_SIGMA_PX, radius=_SSIM_RADIUS_PX, mode="reflect"))

    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * RANGE_HU) ** 2, (_K2 * RANGE_HU) ** 2
    index = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    inner = index[_SSIM_RADIUS_PX:-_SSIM_RADIUS_PX, _SSIM_RADIUS_PX:-_SSIM_RADIUS_PX]
    return float(inner.mean())
