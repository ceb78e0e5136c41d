"""Which voxels are air, lung, fat, soft tissue and bone: what numbers by tissue are taken under."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

TISSUES: dict[str, tuple[float, float]] = {
    "air": (-2000.0, -965.0),
    "lung": (-930.0, -760.0),
    "fat": (-140.0, -60.0),
    "soft": (0.0, 140.0),
    "bone": (300.0, 2000.0),
}
"""HU range of each tissue in the noise-free truth."""
_EROSION_PX = 2
"""Pixels taken off each tissue mask, so that partial volume at an edge never counts as tissue."""
_SMOOTHING_MM = 2.0


def tissue_masks(truth_hu: Array) -> dict[str, Mask]:
    """Where each tissue of `TISSUES` lies, from noise-free HU (z, y, x), eroded in the plane.

    A mask taken from noisy HU selects the noise with the tissue and shows a bias that is none; hence only the truth.
    """
    masks: dict[str, Mask] = {}
    for name, (low, high) in TISSUES.items():
        mask = (truth_hu >= low) & (truth_hu <= high)
        for _ in range(_EROSION_PX):
            inner = np.zeros_like(mask)
            inner[:, 1:-1, 1:-1] = (
                mask[:, 1:-1, 1:-1] & mask[:, :-2, 1:-1] & mask[:, 2:, 1:-1] & mask[:, 1:-1, :-2] & mask[:, 1:-1, 2:]
            )
            mask = inner
        masks[name] = mask
    return masks


def smoothed(hu: NDArray[np.floating], pixel_mm: float) -> Array:
    """A noisy image (z, y, x) as masks are taken from: smoothed in the plane (σ 2 mm)."""
    smooth = hu.astype(np.float32)
    for axis in (1, 2):
        smooth = gaussian_filter1d(smooth, _SMOOTHING_MM / pixel_mm, axis=axis)
    return smooth


def smoothed_masks(hu: NDArray[np.floating], pixel_mm: float) -> dict[str, Mask]:
    """Masks of `TISSUES` from a noisy image, (z, y, x), `smoothed`.

    A threshold on the noisy image itself selects noise with the tissue, which denoising then removes: a bias of some HU
    that is none.
    """
    return tissue_masks(smoothed(hu, pixel_mm))
