"""Safety rails of every network here: it never sees padding as tissue, never touches padding or metal, and never moves
the mean HU of a region.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from pipelines.volume import Volume

Array = NDArray[np.float32]

AIR_HU = -1000.0
LOWEST_HU = -1024.0
"""Nothing that was measured is lower; below lies padding that no tag declares."""
METAL_HU = 3071.0
"""Highest value of 12 bits with the usual intercept: above it, and `METAL_MARGIN_PX` around, voxels pass unchanged."""
METAL_MARGIN_PX = 3
LOW_FREQUENCY_MM = 1.5
"""Standard deviation of the Gaussian whose band passes unchanged: half of what has 0.125 periods per mm, nearly all of
what is wider than 15 mm. Wider Gaussians kept organs at their HU and let lesions of 6 mm fade."""


def network_input(volume: Volume) -> Array:
    """HU with air for padding, declared or not; (z, y, x)."""
    hu = np.maximum(volume.hu, np.float32(LOWEST_HU))
    hu[volume.padding | (volume.hu < LOWEST_HU)] = AIR_HU
    return hu


def _untouchable(hu: Array, padding: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Padding, and metal with its margin; one slice."""
    fixed = padding | (hu < LOWEST_HU)
    metal = hu > METAL_HU
    if metal.any():
        grown = functional.max_pool2d(
            torch.from_numpy(metal.astype(np.float32))[None, None],
            2 * METAL_MARGIN_PX + 1,
            stride=1,
            padding=METAL_MARGIN_PX,
        )
        fixed |= grown[0, 0].numpy() > 0
    return np.asarray(fixed)


def _gaussian(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Separable Gaussian of (1, 1, y, x), zeros around it."""
    half = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-half, half + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    image = functional.conv2d(image, kernel.view(1, 1, -1, 1), padding=(half, 0))
    return functional.conv2d(image, kernel.view(1, 1, 1, -1), padding=(0, half))


def low_frequencies(change: Array, where: NDArray[np.bool_], sigma_px: float) -> Array:
    """Local mean of `change` over the pixels `where`: both blurred, then divided; one slice."""
    weight = torch.from_numpy(where.astype(np.float32))[None, None]
    values = torch.from_numpy(np.ascontiguousarray(change))[None, None] * weight
    mean = _gaussian(values, sigma_px) / _gaussian(weight, sigma_px).clamp_min(1e-3)
    return np.asarray(mean[0, 0].numpy())


def restrained(volume: Volume, denoised: Array, part: float) -> Array:
    """What leaves the pipeline: ``hu + part·(denoised − hu)`` without the low frequencies of the difference.

    Noise of a scanner has little power at low frequencies, so what the network changes there is mostly an error in HU.

    Parameters
    ----------
    volume
        The series as it came.
    denoised
        Output of the network for `network_input`, (z, y, x) HU; overwritten.
    part
        Part of the difference that is made, 0 to 1: `Options.blend`, times the strength of a network without noise map.
    """
    given = network_input(volume)
    sigma_px = LOW_FREQUENCY_MM / volume.geometry.spacing_mm[1]
    with torch.inference_mode():
        for k in range(len(denoised)):
            fixed = _untouchable(volume.hu[k], volume.padding[k])
            change = denoised[k] - given[k]
            change -= low_frequencies(change, ~fixed, sigma_px)
            denoised[k] = np.where(fixed, volume.hu[k], volume.hu[k] + np.float32(part) * change)
    return denoised
