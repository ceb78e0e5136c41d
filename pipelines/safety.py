"""What no network may do: see padding as tissue, touch it or metal, or move the mean HU of a region."""

from __future__ import annotations

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
LOW_FREQUENCY_PX = 8.0
"""Standard deviation of the Gaussian below whose band the network may change nothing."""
_POOL = 4
"""The Gaussian is applied to an image made smaller by this: it holds nothing finer."""


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
        size = 2 * METAL_MARGIN_PX + 1
        grown = functional.max_pool2d(
            torch.from_numpy(metal.astype(np.float32))[None, None], size, stride=1, padding=METAL_MARGIN_PX
        )
        fixed |= grown[0, 0].numpy() > 0
    return np.asarray(fixed)


def _gaussian(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Separable Gaussian of (1, 1, y, x), zeros around it."""
    half = int(np.ceil(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-half, half + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    image = functional.conv2d(image, kernel.view(1, 1, -1, 1), padding=(half, 0))
    return functional.conv2d(image, kernel.view(1, 1, 1, -1), padding=(0, half))


def low_frequencies(residual: Array, where: NDArray[np.bool_]) -> Array:
    """Local mean of `residual` over the pixels `where`: both blurred, then divided; one slice."""
    weight = torch.from_numpy(where.astype(np.float32))[None, None]
    values = torch.from_numpy(np.ascontiguousarray(residual))[None, None] * weight
    size = values.shape[-2:]
    pad = (0, -size[1] % _POOL, 0, -size[0] % _POOL)
    small = [functional.avg_pool2d(functional.pad(x, pad), _POOL) for x in (values, weight)]
    sums, weights = (_gaussian(x, LOW_FREQUENCY_PX / _POOL) for x in small)
    mean = sums / weights.clamp_min(1e-3)
    full = functional.interpolate(mean, scale_factor=_POOL, mode="bilinear", align_corners=False)
    return np.asarray(full[0, 0, : size[0], : size[1]].numpy())


def guarded(volume: Volume, denoised: Array, blend: float) -> Array:
    """What leaves the pipeline: ``hu + blend·(denoised − hu)`` without the low frequencies of the difference.

    Noise of a scanner has next to no power at low frequencies, so what the network changes there is an error in HU.

    Parameters
    ----------
    volume
        The series as it came.
    denoised
        Output of the network for `network_input`, (z, y, x) HU; overwritten.
    blend
        Part of the denoised image, 0 to 1.
    """
    given = network_input(volume)
    with torch.inference_mode():
        for k in range(len(denoised)):
            fixed = _untouchable(volume.hu[k], volume.padding[k])
            change = denoised[k] - given[k]
            change -= low_frequencies(change, ~fixed)
            denoised[k] = np.where(fixed, volume.hu[k], volume.hu[k] + np.float32(blend) * change)
    return denoised
