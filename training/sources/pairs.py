"""A low-dose and a full-dose series of one scan as two arrays whose voxels lie at the same places.

Slices are matched by their place along the slice normal, never by name or number. Series whose pixels do not lie on top
of each other are refused: resampling in the plane would blur the noise that a network is to learn.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread

from pipelines.safety import AIR_HU
from pipelines.volume import ORIENTATION_TOLERANCE, SAME_POSITION_MM, SPACING_TOLERANCE_MM, Volume, read_volume
from training.sources.layouts import Case

_log = logging.getLogger(__name__)

Array = NDArray[np.float32]

POSITION_TOLERANCE_MM = 0.1
"""How far slices or pixel grids that count as the same may lie apart: a sixth of a pixel."""
SAME_SPACING = 0.02
"""How far two slice distances that count as the same may differ, as a part of the smaller."""
MAX_GAP = 1.5
"""Widest gap between two slices, in usual slice distances, across which slices are interpolated."""


class PairRefused(ValueError):
    """The two series cannot be laid over each other; says why, and names both."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A full-dose series and its low-dose series on one grid; float32 HU, (z, y, x), padding as air."""

    subject: str
    name: str
    full: Array
    low: Array
    pixel_mm: float
    spacing_mm: float
    """Distance between slices along their normal; the median, where slices are missing."""
    dose: float
    """Dose of `low` as a part of that of `full`."""


@dataclass(frozen=True, slots=True)
class _Stack:
    """One series."""

    hu: Array
    padding: NDArray[np.bool_]
    positions: NDArray[np.float64]
    """Place of each slice along the normal, mm, ascending."""
    step_mm: float

    def at(self, places: NDArray[np.float64], snap_mm: float) -> _Stack:
        """Slices at `places` (mm, ascending), interpolated linearly; within `snap_mm` of a slice, that slice itself."""
        hu = np.empty((len(places), *self.hu.shape[1:]), np.float32)
        padding = np.empty(hu.shape, np.bool_)
        for k, place in enumerate(places.clip(self.positions[0], self.positions[-1])):
            nearest = int(np.abs(self.positions - place).argmin())
            if abs(self.positions[nearest] - place) <= snap_mm:
                hu[k], padding[k] = self.hu[nearest], self.padding[nearest]
                continue
            above = int(np.searchsorted(self.positions, place))
            below = above - 1
            part = np.float32((place - self.positions[below]) / (self.positions[above] - self.positions[below]))
            hu[k] = (1 - part) * self.hu[below] + part * self.hu[above]
            padding[k] = self.padding[below] | self.padding[above]
        return _Stack(hu, padding, places, self.step_mm)

    def has(self, places: NDArray[np.float64]) -> NDArray[np.bool_]:
        """At which places there is a slice."""
        near: NDArray[np.bool_] = np.abs(places[:, None] - self.positions).min(1) <= POSITION_TOLERANCE_MM
        return near

    def covers(self, places: NDArray[np.float64]) -> NDArray[np.bool_]:
        """At which places there is a slice, or one on either side at the usual distance."""
        if len(self.positions) == 1:
            return self.has(places)
        above = np.searchsorted(self.positions, places).clip(1, len(self.positions) - 1)
        gaps = self.positions[above] - self.positions[above - 1]
        inside = (places > self.positions[0]) & (places < self.positions[-1])
        covered: NDArray[np.bool_] = self.has(places) | inside & (gaps <= MAX_GAP * self.step_mm)
        return covered


def load_pair(case: Case, z_target_mm: float | None = None) -> Pair:
    """Read both series of a case and keep the slices they share.

    Of series with the same slice distance, slices at the same place (0.1 mm) are kept. A low-dose series with wider
    distances is interpolated linearly to the slices of the full-dose one: to learn thin slices from thick ones (Wei and
    Hsu, MIDL 2021, 2.0 to 1.0 mm). Across a missing slice nothing is interpolated. Where slices are missing in between,
    the stacks close up, and the log says so.

    Parameters
    ----------
    case
        With a low-dose series.
    z_target_mm
        Slice distance to which both series are interpolated, from the first full-dose slice in the common stretch on.
        It thins out or fills in and never averages: the thickness of the slices stays what it was.

    Raises
    ------
    PairRefused
        If `case` has no low-dose series, if matrix, pixel size, orientation or place of the pixels differ, or if the
        two share no slice.
    pipelines.volume.SeriesRefused
        If one of the two is no CT volume.
    ValueError
        If `z_target_mm` is not above 0.
    OSError
        If a file cannot be read.
    """
    if case.low is None or case.dose is None:
        raise PairRefused(f"{case.name} has no low-dose series; use it as a target for simulated noise")
    if z_target_mm is not None and not z_target_mm > 0:
        raise ValueError(f"slice distance {z_target_mm:g} mm: above 0 is needed")
    volumes = read_volume(case.full), read_volume(case.low)
    if difference := _difference(*volumes):
        raise PairRefused(f"{_named(case)} {difference}; pair series of one reconstruction field")
    full, low = map(_stack, volumes)
    try:
        places = _common_places(full, low, z_target_mm)
    except PairRefused as refused:
        raise PairRefused(f"{_named(case)} {refused}") from None
    steps = np.diff(places)
    if steps.size and steps.max() > MAX_GAP * np.median(steps):
        _log.warning("%s: %d gaps where slices are missing", case.name, int((steps > MAX_GAP * np.median(steps)).sum()))
    same = z_target_mm is None and _same_spacing(full, low)
    snap_mm = POSITION_TOLERANCE_MM if same else SAME_POSITION_MM
    full, low = full.at(places, snap_mm), low.at(places, snap_mm)
    # A voxel that one series lacks would teach to erase or to invent. What is merely low is kept: in the lungs of a
    # low-dose image, noise goes below -1024 HU, and air in its place would bias the target.
    padding = full.padding | low.padding
    full.hu[padding] = low.hu[padding] = AIR_HU
    return Pair(
        subject=case.subject,
        name=case.name,
        full=full.hu,
        low=low.hu,
        pixel_mm=volumes[0].geometry.spacing_mm[2],
        spacing_mm=float(np.median(steps)) if steps.size else full.step_mm,
        dose=case.dose,
    )


def _stack(volume: Volume) -> _Stack:
    positions = np.asarray(volume.positions_mm)
    step = float(np.median(np.diff(positions))) if len(positions) > 1 else volume.geometry.spacing_mm[0]
    return _Stack(volume.hu, volume.padding, positions, step)


def _same_spacing(full: _Stack, low: _Stack) -> bool:
    return abs(full.step_mm - low.step_mm) <= SAME_SPACING * min(full.step_mm, low.step_mm)


def _common_places(full: _Stack, low: _Stack, z_target_mm: float | None) -> NDArray[np.float64]:
    """Where, along the normal in mm, the pair has slices."""
    if z_target_mm is not None:
        shared = full.positions[low.covers(full.positions)]
        end = min(full.positions[-1], low.positions[-1]) + POSITION_TOLERANCE_MM
        places = np.arange(shared[0], end, z_target_mm) if shared.size else shared
        places = places[full.covers(places) & low.covers(places)]
    elif _same_spacing(full, low):
        places = full.positions[low.has(full.positions)]
    elif low.step_mm > full.step_mm:
        places = full.positions[low.covers(full.positions)]
    else:
        raise PairRefused(
            f"have slices {full.step_mm:.2f} and {low.step_mm:.2f} mm apart: thin slices are no input from which to "
            "learn thick ones; choose other series, or a slice distance for both"
        )
    if not places.size:
        raise PairRefused(
            f"share no slice: {full.positions[0]:.2f} to {full.positions[-1]:.2f} mm every {full.step_mm:.2f} mm, and "
            f"{low.positions[0]:.2f} to {low.positions[-1]:.2f} mm every {low.step_mm:.2f} mm"
        )
    return places


def _difference(full: Volume, low: Volume) -> str:
    """Why the pixels of two volumes do not lie on top of each other; empty if they do."""
    a, b = full.geometry, low.geometry
    if full.hu.shape[1:] != low.hu.shape[1:]:
        return f"have {full.hu.shape[1:]} and {low.hu.shape[1:]} pixels"
    if not np.allclose(a.spacing_mm[1:], b.spacing_mm[1:], rtol=0, atol=SPACING_TOLERANCE_MM):
        return f"have pixels of {a.spacing_mm[1:]} and {b.spacing_mm[1:]} mm"
    if abs(a.spacing_mm[1] - a.spacing_mm[2]) > SPACING_TOLERANCE_MM:
        return f"have pixels that are not square, {a.spacing_mm[1:]} mm"
    if not np.allclose(a.direction[1:], b.direction[1:], rtol=0, atol=ORIENTATION_TOLERANCE):
        return f"lie in planes {_plane(full)} and {_plane(low)}"
    normal = np.cross(a.direction[2], a.direction[1])
    for place in (low.positions_mm[0], low.positions_mm[-1]):
        beside = float(np.linalg.norm(_corner(low, normal, place) - _corner(full, normal, place)))
        if beside > POSITION_TOLERANCE_MM:
            return f"lie {beside:.2f} mm beside each other in the plane at {place:.2f} mm"
    return ""


def _plane(volume: Volume) -> str:
    """ImageOrientationPatient, rounded."""
    _, y, x = volume.geometry.direction
    return "\\".join(f"{cosine:.4g}" for cosine in (*x, *y))


def _corner(volume: Volume, normal: NDArray[np.float64], place: float) -> NDArray[np.float64]:
    """Voxel (0, 0) of a slice at `place` along the normal, LPS mm; slices of a tilted gantry advance askew."""
    advance = np.array(volume.geometry.direction[0])
    askew: NDArray[np.float64] = advance * (place - volume.positions_mm[0]) / (advance @ normal)
    return np.array(volume.geometry.origin_mm) + askew


def _named(case: Case) -> str:
    """Subject and the UIDs of both series, for a reason."""
    uids = [
        dcmread(files[0], stop_before_pixels=True, specific_tags=["SeriesInstanceUID"]).SeriesInstanceUID
        for files in (case.full, case.low or ())
    ]
    return f"{case.subject}: series {uids[0]} (full dose) and {uids[1]} (low dose)"
