"""May this pipeline denoise this series? Geometry against what the pipeline was validated for, with a reason each.

`pipelines.volume.read_volume` has refused what is no CT volume at all. Here stands what depends on the pipeline: one
that looks at single slices (``input="slice"``) does not care how they are stacked; one that looks at neighbours
(``"slab3"``, ``"volume"``) needs them to be neighbours. Every reason: docs/gate.md.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.base import ModelCard
from pipelines.volume import Series, SeriesRefused

IRREGULARITY = 0.05
"""How far a slice distance may differ from the median, as a part of it. Table feed and rounding of positions stay below
1 %; a scout among the slices, or a slice left out, makes 10 % and more."""
IRREGULARITY_MM = 0.02
"""... and in mm, because positions of thin slices are rounded to 0.01 mm."""
MAX_SPACING_PER_THICKNESS = 1.25
"""Largest distance of slices in slice thicknesses: beyond it, neighbours do not show the same tissue. Contiguous scans
have at most 1; some headers round the thickness down."""
MAX_TILT_DEG = 0.5
"""Largest angle between slice normal and stacking direction that counts as none: 0.01 mm per mm of table feed."""
MIN_MATRIX = 32
"""Least rows and columns. No scanner reconstructs fewer, and a network would see more border than tissue: receptive
fields are 17 pixels wide and more, RED-CNN fails below 21."""
NAMED = 3
"""How many places a reason names."""


def check(series: Series, card: ModelCard) -> None:
    """Refuse `series` if the pipeline of `card` was not validated for it.

    Raises
    ------
    SeriesRefused
        ``too-small`` and ``outside-envelope`` for every pipeline; ``gap``, ``irregular-spacing`` and ``gantry-tilt``
        for one that looks at neighbouring slices.
    """
    envelope = card.valid_for
    slices, rows, columns = series.shape
    if min(rows, columns) < MIN_MATRIX:
        raise SeriesRefused(
            "too-small",
            f"slices of {rows} x {columns} pixels; at least {MIN_MATRIX} x {MIN_MATRIX} are denoised",
        )
    if not envelope.min_slices <= slices <= envelope.max_slices:
        _refuse_outside(card, f"{slices} slices", (envelope.min_slices, envelope.max_slices), "")
    low, high = envelope.pixel_spacing_mm
    for spacing in series.geometry.spacing_mm[1:]:
        if not low <= spacing <= high:
            _refuse_outside(card, f"pixels of {spacing:g} mm", (low, high), " mm")
    if card.input == "slice" or slices == 1:
        return

    positions = _positions(series)
    distances = np.diff(positions)
    usual = float(np.median(distances))
    _refuse_irregular(positions, distances, usual)
    if series.thickness_mm > 0 and usual > MAX_SPACING_PER_THICKNESS * series.thickness_mm:
        raise SeriesRefused(
            "gap",
            f"slices are {series.thickness_mm:g} mm thick but {usual:.2f} mm apart: neighbours show different tissue; "
            "use a pipeline for single slices",
        )
    if series.tilt_deg > MAX_TILT_DEG and not envelope.gantry_tilt:
        raise SeriesRefused(
            "gantry-tilt",
            f"the gantry is tilted by {series.tilt_deg:.1f} degrees: the slices are sheared, and {card.name} was not "
            "validated for that; use a pipeline for single slices",
        )
    low, high = envelope.slice_spacing_mm
    if not low <= usual <= high:
        _refuse_outside(card, f"slices {usual:.2f} mm apart", (low, high), " mm")


def _positions(series: Series) -> NDArray[np.float64]:
    """Place of each slice along the slice normal, mm."""
    if series.positions_mm:
        return np.asarray(series.positions_mm, dtype=np.float64)
    return np.arange(series.shape[0], dtype=np.float64) * series.geometry.spacing_mm[0]


def _refuse_irregular(positions: NDArray[np.float64], distances: NDArray[np.float64], usual: float) -> None:
    tolerance = max(IRREGULARITY * usual, IRREGULARITY_MM)
    odd = np.flatnonzero(np.abs(distances - usual) > tolerance)
    if not odd.size:
        return
    places = ", ".join(f"{positions[k]:.2f} and {positions[k + 1]:.2f} mm" for k in odd[:NAMED])
    more = f" and {odd.size - NAMED} more" if odd.size > NAMED else ""
    parts = distances[odd] / usual
    if np.all(np.rint(parts) >= 2) and np.all(np.abs(parts - np.rint(parts)) * usual <= tolerance * np.rint(parts)):
        missing = int((np.rint(parts) - 1).sum())
        raise SeriesRefused(
            "gap",
            f"{missing} slice(s) missing between {places}{more} (usual distance {usual:.2f} mm); send the series again",
        )
    raise SeriesRefused(
        "irregular-spacing",
        f"slices are {distances.min():.2f} to {distances.max():.2f} mm apart, unusual between {places}{more}; use "
        "a pipeline for single slices",
    )


def _refuse_outside(card: ModelCard, what: str, limits: tuple[float, float], unit: str) -> None:
    raise SeriesRefused(
        "outside-envelope", f"{what}; {card.name} {card.version} was validated for {limits[0]:g} to {limits[1]:g}{unit}"
    )
