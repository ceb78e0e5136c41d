"""Safety rails of every network here: it never sees padding as tissue, never touches padding, metal or the air around
the body, and never moves what is wider than the finest detail.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipelines.ct_slice import PADDING_BELOW_HU
from pipelines.volume import Plane, Volume

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

AIR_HU = -1000.0
LOWEST_HU = -1024.0
"""No network sees anything lower, here and in training: the end of 12 bits with the usual intercept. Where a scanner
stores more, noise in air and lung goes below."""
METAL_HU = 3071.0
"""Highest value of 12 bits with the usual intercept: above it, and `METAL_MARGIN_PX` around, voxels pass unchanged."""
METAL_MARGIN_PX = 3
LOW_FREQUENCY_MM = 1.5
"""Standard deviation of the Gaussian whose band passes unchanged: half of what has 0.125 periods per mm, nearly all of
what is wider than 15 mm. Wider Gaussians kept organs at their HU and let lesions of 6 mm fade."""

ROWS_AT_ONCE = 64
"""Of an image that is blurred: so few stay in the cache of a core from one step to the next."""


def network_input(given: Plane | Volume) -> Array:
    """HU with air for padding; as many dimensions as `given`."""
    hu = np.maximum(given.hu, np.float32(LOWEST_HU))
    hu[given.padding] = AIR_HU
    return hu


class Rail:
    """What leaves a pipeline: ``hu + part·(denoised − hu)`` without the low frequencies of the difference.

    Noise of a scanner has little power at low frequencies, so what the network changes there is mostly an error in HU.

    Parameters
    ----------
    pixel_mm
        Pixel size.
    part
        Part of the difference that is made, 0 to 1: `Options.blend`, times the strength of a network without noise map.
    """

    def __init__(self, pixel_mm: float, part: float) -> None:
        self._part = np.float32(part)
        sigma_px = LOW_FREQUENCY_MM / pixel_mm
        taps = np.exp(-0.5 * (np.arange(math.ceil(3 * sigma_px) + 1) / sigma_px) ** 2)
        self._taps = (taps / (2 * taps.sum() - taps[0])).astype(np.float32)
        """One half of the kernel, from its centre outwards."""
        self._where: Mask = np.empty((0, 0), np.bool_)
        self._weight: Array = np.empty((0, 0), np.float32)

    def __call__(self, plane: Plane, given: Array, denoised: Array, inside: Mask) -> Array:
        """One slice.

        Parameters
        ----------
        plane
            As it came.
        given
            As the network was given it, `network_input`.
        denoised
            Output of the network, (y, x) HU.
        inside
            Where it may change anything (`pipelines.body`), (y, x); elsewhere `denoised` counts for nothing.
        """
        free = inside & ~_untouchable(plane)
        hu = plane.hu.copy()
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if rows.size:
            box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
            change = denoised[box] - given[box]
            change -= self.low_frequencies(change, free[box])
            change *= self._part
            change[~free[box]] = 0
            hu[box] += change
        return hu

    def low_frequencies(self, change: Array, where: Mask) -> Array:
        """Local mean of `change` over the pixels `where`: both blurred, then divided; (y, x)."""
        if not np.array_equal(where, self._where):  # of many series it is the same for every slice
            self._where = where
            self._weight = np.maximum(self._blurred(where.astype(np.float32)), np.float32(1e-3))
        return np.asarray(self._blurred(np.where(where, change, np.float32(0))) / self._weight)

    def _blurred(self, image: Array) -> Array:
        """Separable Gaussian, zeros around the image; some rows at once, which stay in the cache meanwhile."""
        half = len(self._taps) - 1
        rows, columns = image.shape
        above = np.pad(image, [(half, half), (0, 0)])
        beside = np.zeros((ROWS_AT_ONCE, columns + 2 * half), np.float32)
        pairs = np.empty((ROWS_AT_ONCE, columns), np.float32)
        blurred = np.empty((rows, columns), np.float32)
        for top in range(0, rows, ROWS_AT_ONCE):
            out = blurred[top : top + ROWS_AT_ONCE]
            n = len(out)
            self._convolve(above[top : top + n + 2 * half], 0, pairs[:n], out)
            beside[:n, half : half + columns] = out
            self._convolve(beside[:n], 1, pairs[:n], out)
        return blurred

    def _convolve(self, padded: Array, axis: int, pairs: Array, out: Array) -> None:
        """Along `axis`, of which `padded` has half a kernel more at both ends than `out`; `pairs` is for scratch."""
        padded, pairs, out = (np.moveaxis(x, axis, 0) for x in (padded, pairs, out))
        half, n = len(self._taps) - 1, len(out)
        np.multiply(padded[half : half + n], self._taps[0], out=out)
        for k in range(1, half + 1):
            np.add(padded[half - k : half - k + n], padded[half + k : half + k + n], out=pairs)
            pairs *= self._taps[k]
            out += pairs


def _untouchable(plane: Plane) -> Mask:
    """Padding, specks below any measurement, and metal with its margin."""
    fixed = plane.padding | (plane.hu < PADDING_BELOW_HU)
    metal = plane.hu > METAL_HU
    if metal.any():
        for axis in (0, 1):
            metal = _grown(metal, axis)
        fixed |= metal
    return np.asarray(fixed)


def _grown(mask: Mask, axis: int) -> Mask:
    """True up to `METAL_MARGIN_PX` away along `axis`."""
    grown = mask.copy()
    source, target = np.moveaxis(mask, axis, 0), np.moveaxis(grown, axis, 0)
    for k in range(1, METAL_MARGIN_PX + 1):
        target[k:] |= source[:-k]
        target[:-k] |= source[k:]
    return grown
