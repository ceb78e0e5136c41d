"""The only DICOM → HU code of the project: a CT series on disk becomes slices in Hounsfield units.

A series of files reads its slices when they are asked for, so that 1500 slices need no more memory than 100; a volume
holds them all, for those who measure.

What a single object must be is decided in `pipelines.ct_slice`; here, which slices may stand in one volume. What a
certain pipeline was not validated for (tilt, gaps, spacing) is decided in `pipelines.gate`. Every reason: docs/gate.md.
"""

from __future__ import annotations

import math
import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.ct_slice import CTSlice, SeriesRefused, read_slice
from pipelines.silence import pydicom_silent

__all__ = [
    "FileSeries",
    "Geometry",
    "Plane",
    "Series",
    "SeriesRefused",
    "Volume",
    "open_series",
    "pydicom_silent",
    "read_volume",
]

MAX_VOXELS = 2**31
"""Largest volume, 8 GiB of HU: 2048 slices of 1024²."""
SAME_POSITION_MM = 0.01
"""Slices closer than this along their normal lie at the same place; reconstructions are 0.1 mm apart at least."""
SPACING_TOLERANCE_MM = 1e-4
"""How far PixelSpacing may differ between slices; over 512 pixels it adds up to a tenth of a pixel."""
ORIENTATION_TOLERANCE = 1e-4
"""How far a direction cosine may differ between slices; over 250 mm it adds up to 0.03 mm."""
SHIFT_TOLERANCE_MM = 0.1
"""How far a slice may lie beside the straight line through the first and the last; a sixth of a pixel."""
MIN_SEPARATE_FRAMES = 3
"""From this number of slices on, a frame of reference of its own for each slice is taken for a trace of
de-identification."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where a volume lies in the patient (PS3.3 C.7.6.2), right-handed, LPS."""

    origin_mm: tuple[float, float, float]
    """Centre of voxel (0, 0, 0)."""
    spacing_mm: tuple[float, float, float]
    """Distance between voxel centres along (z, y, x): slices, rows, columns.

    Of irregular slices the median; of a single slice its thickness, 0 if unknown.
    """
    direction: tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]
    """Unit vectors of the z, y and x axis of the array, in LPS. Of a tilted gantry, z is not normal to y and x."""
    frame_of_reference_uid: str
    """Empty if the series has none, or another one for each slice."""


class Plane(NamedTuple):
    """One slice. Shared by all who ask for it: nobody writes into it."""

    hu: NDArray[np.float32]
    """Always HU, (y, x)."""
    padding: NDArray[np.bool_]
    """True where the scanner wrote no measurement (PixelPaddingValue); (y, x)."""


@dataclass(frozen=True, kw_only=True)
class Series(ABC):
    """A CT series in the order of its slices along their normal."""

    geometry: Geometry
    slice_uids: tuple[str, ...]
    """SOPInstanceUID of each slice."""
    slice_paths: tuple[Path, ...]
    """File of each slice."""
    positions_mm: tuple[float, ...] = ()
    """Place of each slice along the slice normal, ascending; empty: regular, as `geometry` says."""
    thickness_mm: float = 0.0
    """Smallest SliceThickness; 0 if unknown."""
    tilt_deg: float = 0.0
    """Angle between the slice normal and the direction in which the slices advance: the gantry tilt."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns."""

    @abstractmethod
    def plane(self, k: int) -> Plane:
        """Slice `k`, counted from 0.

        Raises
        ------
        SeriesRefused
            ``undecodable``, if its pixels cannot be read.
        OSError
            If its file cannot be read.
        """


@dataclass(frozen=True, kw_only=True)
class Volume(Series):
    """A series in memory."""

    hu: NDArray[np.float32]
    """(z, y, x)."""
    padding: NDArray[np.bool_]
    """(z, y, x)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns."""
        slices, rows, columns = self.hu.shape
        return slices, rows, columns

    def plane(self, k: int) -> Plane:
        """Slice `k`."""
        return Plane(self.hu[k], self.padding[k])

    def with_hu(self, hu: NDArray[np.float32]) -> Volume:
        """The same volume with other values; refuses another shape, another type and non-finite values.

        Raises
        ------
        ValueError
            If `hu` is not a finite float32 array of the same shape.
        """
        if hu.shape != self.hu.shape or hu.dtype != np.float32:
            raise ValueError(f"expected float32 {self.hu.shape}, got {hu.dtype} {hu.shape}")
        infinite = sum(int(plane.size - np.isfinite(plane).sum()) for plane in hu)  # slice by slice: no second volume
        if infinite:
            raise ValueError(f"{infinite} values are not finite")
        return replace(self, hu=hu)


PLANES_AHEAD = 4
"""Read while whoever asks works on the one before: decoding JPEG 2000 takes 33 ms a slice."""
IS_MAX_CHARACTERS = 12
"""Of an integer string (PS3.5 table 6.2-1)."""
PLANES_KEPT = 48
"""Of 1.3 MB (512²). A network for volumes answers 19 slices later, and is compared with what it was given some 4 later:
so long a slice is kept, among as many others that are asked for meanwhile."""


@dataclass(frozen=True, kw_only=True)
class FileSeries(Series):
    """A series on disk. Close it, or use it in a ``with`` statement: a thread of its own reads ahead."""

    slices: tuple[CTSlice, ...]
    _seen: dict[int, int] = field(default_factory=dict, repr=False, compare=False)
    """CRC-32 of the HU of each slice when it was first read."""
    _planes: OrderedDict[int, Future[Plane]] = field(default_factory=OrderedDict, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _read_s: list[float] = field(default_factory=list, repr=False, compare=False)
    _reader: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "series-reader"), repr=False, compare=False
    )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns."""
        return len(self.slices), *self.slices[0].matrix

    @property
    def read_s(self) -> float:
        """Seconds in which slices were read and decoded so far."""
        return sum(self._read_s)

    def plane(self, k: int) -> Plane:
        """Slice `k`; the next ones are read meanwhile, and the last `PLANES_KEPT` are kept."""
        with self._lock:
            for j in range(k, min(k + 1 + PLANES_AHEAD, len(self.slices))):
                if j not in self._planes:
                    self._planes[j] = self._reader.submit(self._read, j)
            self._planes.move_to_end(k)
            plane = self._planes[k]
            while len(self._planes) > PLANES_KEPT:
                self._planes.popitem(last=False)
        return plane.result()

    def _read(self, k: int) -> Plane:
        begun = time.monotonic()
        plane = Plane(np.empty(self.shape[1:], np.float32), np.zeros(self.shape[1:], np.bool_))
        with pydicom_silent():
            self.slices[k].read_hu(*plane)
        # What was denoised, compared and derived from must be one image, however often it is read.
        digest = zlib.crc32(plane.hu.data)
        if digest != self._seen.setdefault(k, digest):
            raise SeriesRefused("undecodable", f"pixels of {self.slice_uids[k]} changed while they were being read")
        for values in plane:
            values.flags.writeable = False
        self._read_s.append(time.monotonic() - begun)
        return plane

    def close(self) -> None:
        """End the thread."""
        self._reader.shutdown(cancel_futures=True)

    def __enter__(self) -> FileSeries:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_series(paths: Sequence[Path]) -> FileSeries:
    """Open one CT series, in whatever order its files come: read all headers, judge them together, decode nothing yet.

    Slices are sorted along their normal (ImageOrientationPatient and ImagePositionPatient), never by number. Rescale is
    applied per slice, so slices of different RescaleSlope or RescaleIntercept are right, each in its own numbers.

    Parameters
    ----------
    paths
        Files of one series, one CT image each.

    Raises
    ------
    SeriesRefused
        With the reason why these files are no volume that may be denoised.
    OSError
        If a file cannot be read.
    """
    if not paths:
        raise SeriesRefused("empty", "there are no files")
    with pydicom_silent():
        slices = [read_slice(path) for path in paths]
    _refuse_mixture(slices)
    row, column = np.array(slices[0].orientation[:3]), np.array(slices[0].orientation[3:])
    normal = np.cross(row, column)
    slices.sort(key=lambda s: float(normal @ np.array(s.position_mm)))
    places = np.array([s.position_mm for s in slices])
    positions = places @ normal
    _refuse_same_place(slices, positions)
    _refuse_interleaved_acquisitions(slices, positions)
    step, advance, tilt_deg = _advance(slices, places, positions, normal)
    frames = {s.frame_of_reference_uid for s in slices}
    thickness = min(s.thickness_mm for s in slices)
    geometry = Geometry(
        origin_mm=slices[0].position_mm,
        spacing_mm=(step or thickness, *slices[0].pixel_spacing_mm),
        direction=(_triple(advance), _triple(column), _triple(row)),
        frame_of_reference_uid=frames.pop() if len(frames) == 1 else "",
    )
    return FileSeries(
        geometry=geometry,
        slice_uids=tuple(s.sop_instance_uid for s in slices),
        slice_paths=tuple(s.path for s in slices),
        positions_mm=tuple(float(p) for p in positions),
        thickness_mm=thickness,
        tilt_deg=tilt_deg,
        slices=tuple(slices),
    )


def read_volume(paths: Sequence[Path]) -> Volume:
    """The same with every slice decoded; raises the same."""
    with open_series(paths) as series, pydicom_silent():
        hu = np.empty(series.shape, np.float32)
        padding = np.zeros(series.shape, np.bool_)
        for k, one in enumerate(series.slices):
            one.read_hu(hu[k], padding[k])
        return Volume(
            geometry=series.geometry,
            slice_uids=series.slice_uids,
            slice_paths=series.slice_paths,
            positions_mm=series.positions_mm,
            thickness_mm=series.thickness_mm,
            tilt_deg=series.tilt_deg,
            hu=hu,
            padding=padding,
        )


def _refuse_mixture(slices: Sequence[CTSlice]) -> None:
    """Refuse slices that do not belong to one series of one patient, or not on one grid."""
    twice = [uid for uid, count in Counter(s.sop_instance_uid for s in slices).items() if count > 1]
    if twice:
        raise SeriesRefused(
            "duplicate-instance", f"{len(twice)} instances are there more than once, the first is {twice[0]}"
        )
    first = slices[0]
    for one in slices:
        pair = f"{first.sop_instance_uid} and {one.sop_instance_uid}"
        if one.patient != first.patient:
            raise SeriesRefused("mixed-patient", f"{pair} belong to different patients")
        if one.study_uid != first.study_uid:
            raise SeriesRefused("mixed-study", f"{pair} belong to different studies")
        if one.series_uid != first.series_uid:
            raise SeriesRefused("mixed-series", f"{pair} belong to different series")
        if one.matrix != first.matrix:
            raise SeriesRefused("mixed-matrix", f"{pair} have {first.matrix} and {one.matrix} pixels")
        if not np.allclose(one.pixel_spacing_mm, first.pixel_spacing_mm, rtol=0, atol=SPACING_TOLERANCE_MM):
            raise SeriesRefused(
                "mixed-pixel-spacing", f"{pair} have pixels of {first.pixel_spacing_mm} and {one.pixel_spacing_mm} mm"
            )
        if not np.allclose(one.orientation, first.orientation, rtol=0, atol=ORIENTATION_TOLERANCE):
            raise SeriesRefused("mixed-orientation", f"{pair} lie in planes {first.orientation} and {one.orientation}")
        if one.reconstruction != first.reconstruction:
            raise SeriesRefused(
                # not the values: nothing says what a header may hold there
                "mixed-acquisition",
                f"{pair} differ in ConvolutionKernel or KVP",
            )
    frames = {s.frame_of_reference_uid for s in slices}
    if len(frames) > 1 and not (len(frames) == len(slices) >= MIN_SEPARATE_FRAMES):
        raise SeriesRefused(
            "mixed-frame-of-reference",
            f"{len(frames)} frames of reference among {len(slices)} slices: positions do not compare",
        )
    voxels = len(slices) * first.matrix[0] * first.matrix[1]
    if voxels > MAX_VOXELS:
        raise SeriesRefused(
            "too-large", f"{len(slices)} slices of {first.matrix} are {voxels} voxels; {MAX_VOXELS} are read"
        )


def _refuse_same_place(slices: Sequence[CTSlice], positions: NDArray[np.float64]) -> None:
    """Two slices at one place: two reconstructions, two phases, bolus tracking; which one is meant cannot be told."""
    close = np.flatnonzero(np.diff(positions) < SAME_POSITION_MM)
    if close.size:
        k = int(close[0])
        raise SeriesRefused(
            "duplicate-position",
            f"{close.size + 1} slices share places, the first {slices[k].sop_instance_uid} and "
            f"{slices[k + 1].sop_instance_uid} at {positions[k]:.2f} mm: several reconstructions or phases",
        )


def _refuse_interleaved_acquisitions(slices: Sequence[CTSlice], positions: NDArray[np.float64]) -> None:
    """Step-and-shoot scans number each table position anew; two acquisitions of one stretch must not be stacked."""
    stretches: dict[str, list[float]] = defaultdict(list)
    for one, position in zip(slices, positions, strict=True):
        stretches[one.acquisition].append(float(position))
    ordered = sorted(stretches.items(), key=lambda item: item[1][0])
    for (before, below), (after, above) in pairwise(ordered):
        if below[-1] > above[0]:
            raise SeriesRefused(
                "mixed-acquisition",
                f"acquisitions {_number(before)} ({below[0]:.2f} to {below[-1]:.2f} mm) and "
                f"{_number(after)} ({above[0]:.2f} to {above[-1]:.2f} mm) overlap",
            )


def _number(text: str) -> str:
    """An acquisition number for a reason; whatever else a header has in its place is nobody's business there."""
    return text if text.isascii() and text.isdigit() and len(text) <= IS_MAX_CHARACTERS else "without number"


def _advance(
    slices: Sequence[CTSlice], places: NDArray[np.float64], positions: NDArray[np.float64], normal: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64], float]:
    """Median distance between slices in mm (0 for one), the unit vector in which they advance, its tilt in degrees."""
    if len(slices) == 1:
        return 0.0, normal, 0.0
    total = places[-1] - places[0]
    advance = total / np.linalg.norm(total)
    line = places[0] + np.outer((positions - positions[0]) / (positions[-1] - positions[0]), total)
    beside = np.linalg.norm(places - line, axis=1)
    k = int(beside.argmax())
    if beside[k] > SHIFT_TOLERANCE_MM:
        raise SeriesRefused(
            "in-plane-shift",
            f"{slices[k].sop_instance_uid} at {positions[k]:.2f} mm lies {beside[k]:.2f} mm beside the line of the "
            "others: the pixel grids do not lie on top of each other",
        )
    cosine = float(np.clip(advance @ normal, -1, 1))
    step = float(np.median(np.diff(positions))) / cosine
    return step, advance, math.degrees(math.acos(cosine))


def _triple(vector: NDArray[np.float64]) -> tuple[float, float, float]:
    return float(vector[0]), float(vector[1]), float(vector[2])
