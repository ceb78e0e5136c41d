"""Where a slice shows anything but the air around the patient: only there is it denoised.

Half of a chest scan is air that nobody looks at. It leaves as it came, and a network need not be run there.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipelines.safety import network_input
from pipelines.volume import Series

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
Box = tuple[slice, slice]
"""Rows and columns."""
NOWHERE: Box = (slice(0, 0), slice(0, 0))

BLOCK_PX = 8
"""Judged as one: a mean of 64 pixels tells air from lung under any noise."""
AIR_BELOW_HU = -900.0
"""Lung is denser but for emphysema, and that lies inside the body."""
MARGIN_MM = 10.0
"""Around the body that is denoised too: skin, clothes, the rim of a thin fold."""


def inside(given: Array, pixel_mm: float) -> Mask:
    """True in the body, in the air that it encloses, and `MARGIN_MM` around; (y, x).

    What is thinner than three blocks (a table top, a blanket) is no body. All False in a slice of air.

    Parameters
    ----------
    given
        One slice as a network is given it (`pipelines.safety.network_input`), HU (y, x).
    pixel_mm
        Pixel size.
    """
    rows, columns = given.shape
    padded = np.pad(given, [(0, -length % BLOCK_PX) for length in (rows, columns)], mode="edge")
    air = padded.reshape(len(padded) // BLOCK_PX, BLOCK_PX, -1, BLOCK_PX).mean((1, 3)) <= AIR_BELOW_HU
    blocks = ~_grown(_from_the_border(air))  # eroded ...
    for _ in range(1 + math.ceil(MARGIN_MM / (BLOCK_PX * pixel_mm))):  # ... and grown again, and by the margin
        blocks = _grown(blocks)
    return np.asarray(blocks.repeat(BLOCK_PX, 0).repeat(BLOCK_PX, 1)[:rows, :columns])


def box(series: Series) -> Box:
    """The rows and columns that hold `inside` of every slice; reads them all. `NOWHERE` for a series of air."""
    pixel_mm = series.geometry.spacing_mm[1]
    rows, columns = (np.zeros(length, np.bool_) for length in series.shape[1:])
    for k in range(series.shape[0]):
        mask = inside(network_input(series.plane(k)), pixel_mm)
        rows |= mask.any(1)
        columns |= mask.any(0)
    return span(rows), span(columns)


def span(where: Mask) -> slice:
    """From the first to the last True of one dimension; empty if there is none."""
    found = np.flatnonzero(where)
    return slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, 0)


def _from_the_border(air: Mask) -> Mask:
    """The part of `air` that the border of the image reaches through it: not lungs, not bowel gas."""
    reached = air.copy()
    reached[1:-1, 1:-1] = False
    before = np.zeros_like(air)
    while not np.array_equal(before, reached):
        before = reached.copy()
        reached[1:] |= reached[:-1]
        reached[:-1] |= reached[1:]
        reached[:, 1:] |= reached[:, :-1]
        reached[:, :-1] |= reached[:, 1:]
        reached &= air
    return reached


def _grown(blocks: Mask) -> Mask:
    """True also beside a True, in all eight directions."""
    rows = blocks.copy()
    rows[1:] |= blocks[:-1]
    rows[:-1] |= blocks[1:]
    grown = rows.copy()
    grown[:, 1:] |= rows[:, :-1]
    grown[:, :-1] |= rows[:, 1:]
    return grown
