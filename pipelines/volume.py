"""The only DICOM → HU code of the project: a CT series on disk becomes a volume in Hounsfield units.

Stub: filled in by the reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class SeriesRefused(Exception):
    """A series cannot be denoised; it is a documented outcome, not a fault.

    Parameters
    ----------
    code
        Stable slug (``"localizer"``, ``"gap"``, …), stored with the job and listed in docs/gate.md.
    detail
        One sentence for a person: what was found, in which slices (UIDs, positions), what to do.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where a volume lies in the patient (PS3.3 C.7.6.2), right-handed, LPS."""

    origin_mm: tuple[float, float, float]
    """Centre of voxel (0, 0, 0)."""
    spacing_mm: tuple[float, float, float]
    """Distance between voxel centres along (z, y, x): slices, rows, columns."""
    direction: tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]
    """Unit vectors of the z, y and x axis of the array, in LPS."""
    frame_of_reference_uid: str


@dataclass(frozen=True, slots=True)
class Volume:
    """A CT volume in HU. ``hu`` is float32 (z, y, x) and always HU: nothing asks whether it is normalised."""

    hu: NDArray[np.float32]
    geometry: Geometry
    slice_uids: tuple[str, ...]
    """SOPInstanceUID of each slice, in the order of axis 0."""
    slice_paths: tuple[Path, ...]
    """File of each slice, in the order of axis 0."""
    padding: NDArray[np.bool_]
    """True where the scanner wrote no measurement (PixelPaddingValue); (z, y, x)."""

    def with_hu(self, hu: NDArray[np.float32]) -> Volume:
        """The same volume with other values; refuses another shape, another type and non-finite values.

        Raises
        ------
        ValueError
            If `hu` is not a finite float32 array of the same shape.
        """
        if hu.shape != self.hu.shape or hu.dtype != np.float32:
            raise ValueError(f"expected float32 {self.hu.shape}, got {hu.dtype} {hu.shape}")
        if not np.isfinite(hu).all():
            raise ValueError(f"{int((~np.isfinite(hu)).sum())} values are not finite")
        return replace(self, hu=hu)


def read_volume(paths: Sequence[Path]) -> Volume:
    """Read one CT series.

    Raises
    ------
    SeriesRefused
        With the reason why these files are no volume that may be denoised.
    """
    raise NotImplementedError
