"""Noise level of a CT series without truth: the global noise index.

The mode of the histogram of the local standard deviation in soft tissue (Christianson et al., AJR 2015;205:W93-W99,
"Automated technique to measure noise in clinical CT examinations"). A window that holds an edge has a larger standard
deviation than the noise and lies in the tail; the mode does not move.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pipelines.safety import network_input
from pipelines.volume import Series

Array = NDArray[np.float32]

WINDOW_MM = 7.0
SOFT_TISSUE_HU = (-20.0, 150.0)
_SMOOTHING_PX = 5
"""Box that decides what a pixel is: the noise must not."""
_AIR_HU = -950.0
_MIN_PIXELS = 500
"""Fewer windows than this make no histogram."""
_BINS = 120
SLICES = 8
"""How many slices are looked at."""


def _box_mean(image: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Mean over size × size pixels around each pixel (odd size), edges replicated."""
    half = size // 2
    total = np.pad(image, ((half + 1, half), (half + 1, half)), mode="edge").cumsum(0).cumsum(1)
    window = total[size:, size:] - total[:-size, size:] - total[size:, :-size] + total[:-size, :-size]
    return np.asarray(window / size**2)


def local_sd(hu: Array, padding: NDArray[np.bool_], window: int) -> tuple[Array, Array]:
    """Local standard deviation and smoothed HU of one slice; NaN where the window meets padding."""
    image = np.where(padding, 0.0, hu).astype(np.float64)
    mean = _box_mean(image, window)
    sd = np.sqrt(np.maximum(_box_mean(image * image, window) - mean * mean, 0))
    sd[_box_mean(padding.astype(np.float64), window) > 1e-6] = np.nan
    return sd.astype(np.float32), _box_mean(image, _SMOOTHING_PX).astype(np.float32)


def _mode(sd: Array) -> float:
    """Most frequent value, from a histogram smoothed over five bins."""
    counts, edges = np.histogram(sd, bins=_BINS, range=(0, float(np.percentile(sd, 98)) + 1e-6))
    smooth = np.convolve(counts, (1, 2, 3, 2, 1), mode="same")
    top = int(smooth.argmax())
    return float(edges[top] + edges[top + 1]) / 2


def _spread(count: int) -> list[int]:
    """At most `SLICES` of `count` slices, evenly spread."""
    return sorted({round(k) for k in np.linspace(0, count - 1, min(SLICES, count) + 2)[1:-1]})


def series_noise_level(series: Series) -> float:
    """`noise_level` of what a network is given of `series`; reads `SLICES` of its slices."""
    planes = (series.plane(k) for k in _spread(series.shape[0]))
    return _level(((network_input(plane), plane.padding) for plane in planes), series.geometry.spacing_mm[1])


def noise_level(hu: Array, padding: NDArray[np.bool_], pixel_mm: float) -> float:
    """Noise of a series in HU (standard deviation), without truth.

    Where a series has no soft tissue (a resolution phantom, lung only), it is the 20th percentile of the local standard
    deviation of everything denser than air; without that too, of everything.

    Parameters
    ----------
    hu, padding
        The volume and its mask of pixels without measurement, (z, y, x).
    pixel_mm
        Pixel size; the window is `WINDOW_MM` wide.

    Returns
    -------
    float
        HU; 0 for a series that is padding everywhere.
    """
    return _level(((hu[k], padding[k]) for k in _spread(len(hu))), pixel_mm)


def _level(planes: Iterable[tuple[Array, NDArray[np.bool_]]], pixel_mm: float) -> float:
    soft, dense, every = [], [], []
    for hu, padding in planes:
        window = min(max(2 * round(WINDOW_MM / pixel_mm / 2) + 1, 5), (min(hu.shape) - 1) // 2 * 2 + 1)
        sd, smooth = local_sd(hu, padding, window)
        measured = np.isfinite(sd)
        tissue = ((smooth > SOFT_TISSUE_HU[0]) & (smooth < SOFT_TISSUE_HU[1])).astype(np.float64)
        soft.append(sd[measured & (_box_mean(tissue, window) > 1 - 1e-6)])
        dense.append(sd[measured & (smooth > _AIR_HU)])
        every.append(sd[measured])
    in_soft = np.concatenate(soft)
    if in_soft.size >= _MIN_PIXELS:
        return _mode(in_soft)
    for values in (np.concatenate(dense), np.concatenate(every)):
        if values.size:
            return float(np.percentile(values, 20))
    return 0.0
