"""A small volume that tells whether a network does in 8 bits on this CPU what it did where it was quantised.

8-bit instructions differ between processors: without VNNI they saturate, and a driver or a compiler may be wrong. What
a network makes of this volume in INT8 and in FP32 may differ as far as its card says and no further.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pipelines.base import Pipeline, denoise_volume
from pipelines.testing import water_volume

SHAPE = (6, 64, 64)
"""Slices, rows and columns: enough for every kind of kernel, at most a second of any network."""
NOISE_HU = 25.0
HIGHEST_HU = 300.0
"""No metal: 8 bits cut it off, and what that changes would hide an error elsewhere."""
MARGIN = 2.0
"""Another CPU rounds the sums between two convolutions otherwise; an error of its instructions is far larger."""


class Deviation(NamedTuple):
    """Between the images of two precisions, HU."""

    max_hu: float
    rms_hu: float

    @property
    def bound(self) -> Deviation:
        """What other CPUs may have where this one has `self`."""
        return Deviation(MARGIN * self.max_hu, MARGIN * self.rms_hu)

    def within(self, bound: Deviation) -> bool:
        """Not a number is not."""
        return self.max_hu <= bound.max_hu and self.rms_hu <= bound.rms_hu


def deviation(int8: Pipeline, fp32: Pipeline) -> Deviation:
    """Between what the same network makes of the volume in two precisions."""
    volume = water_volume(SHAPE, noise_hu=NOISE_HU)
    volume = replace(volume, hu=np.minimum(volume.hu, np.float32(HIGHEST_HU)))
    one, other = (denoise_volume(pipeline, volume) for pipeline in (int8, fp32))
    difference = np.abs(one.astype(np.float64) - other)
    return Deviation(float(difference.max()), math.sqrt(float(np.square(difference).mean())))
