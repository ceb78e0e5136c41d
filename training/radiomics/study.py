"""Nodules in full-dose and low-dose images, and their features before and after each pipeline."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.base import Options, Pipeline, denoise_volume
from pipelines.gate import check
from pipelines.safety import LOWEST_HU, network_input
from pipelines.volume import Volume
from training.measuring.cases import SECOND, volume_of
from training.nodules import Box, Nodule, insert
from training.radiomics.extraction import features
from training.simulate import F50, full_dose_noise, unit_noise
from training.simulation.calibration import calibrate
from training.simulation.simulated_series import read_series
from training.simulation.simulated_volume import simulate
from training.sources.phantom import chest_abdomen

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

FULL_DOSE, LOW_DOSE = "full-dose", "low-dose"
"""Names of the images that no pipeline made; the first holds the nodules and the noise of the scan as it was."""
PHANTOM_SLICES, PHANTOM_PIXEL_MM, PHANTOM_SPACING_MM = 40, 0.75, 1.5
PHANTOM_SEED = 910_000
"""Added to the seed, so that no phantom is one that a training saw: trainings use seeds far below."""


@dataclass(frozen=True, slots=True)
class Region:
    """What features are taken of."""

    name: str
    kind: str
    """``solid``, ``part-solid``, or ``given``."""
    diameter_mm: float
    """Of the ball of the same volume."""
    box: Box
    mask: Mask
    """(z, y, x) of `box`."""


@dataclass(frozen=True, slots=True)
class Case:
    """One subject with its regions."""

    name: str
    full_dose: Volume
    low_dose: Volume
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Features of one region in one set of images."""

    case: str
    region: Region
    images: str
    """`FULL_DOSE`, `LOW_DOSE` or the name of a pipeline, with its precision unless that is fp32."""
    features: Mapping[str, float]


def phantom_case(number: int, nodules: int, dose: float, seed: int) -> Case:
    """Phantom `number` with nodules, scanned at full dose and at the fraction `dose` of it."""
    own = PHANTOM_SEED + seed + number
    spacing = (PHANTOM_SPACING_MM, PHANTOM_PIXEL_MM, PHANTOM_PIXEL_MM)
    truth = chest_abdomen(PHANTOM_SLICES, 512, PHANTOM_PIXEL_MM, PHANTOM_SPACING_MM, own, F50)
    truth, inserted = insert(truth, spacing, nodules, own)
    noise, more = (unit_noise(truth, PHANTOM_PIXEL_MM, own + k) for k in (0, SECOND))
    full, low = (
        volume_of(np.maximum(truth + n, np.float32(LOWEST_HU)), PHANTOM_PIXEL_MM, PHANTOM_SPACING_MM)
        for n in (noise, noise + np.float32(math.sqrt(1 / dose - 1)) * more)
    )
    return Case(f"phantom {own}", full, low, _regions(inserted))


def series_case(folder: Path, nodules: int, dose: float, seed: int) -> Case:
    """A real series with nodules put into its lungs, and the same at the fraction `dose` of its dose.

    A nodule has the resolution of the kernel, without the edges that a sharp kernel enhances, and noise of the series.

    Raises
    ------
    pipelines.volume.SeriesRefused
        If the folder is no series that may be denoised.
    ValueError
        If its slices are not square, its noise cannot be told, or there is no room in its lungs.
    """
    volume = read_series(folder)
    scanner = calibrate(volume, seed)
    given, spacing = network_input(volume), volume.geometry.spacing_mm
    hu, inserted = insert(
        given,
        spacing,
        nodules,
        seed,
        thickness_mm=volume.thickness_mm,
        f50=scanner.kernel.f50,
        noise=full_dose_noise(given, spacing[1], seed, scanner.kernel, scanner.beam, scanner.overlap, scanner.current),
    )
    full = volume.with_hu(np.where(hu == given, volume.hu, hu))
    return Case(folder.name, full, full.with_hu(simulate(full, dose, seed + SECOND, scanner)), _regions(inserted))


def masked_case(folder: Path, masks: Path, dose: float, seed: int) -> Case:
    """A real series with the regions of ``MASKS/<name of the folder>.npz``, and the same at a fraction of its dose.

    Raises
    ------
    pipelines.volume.SeriesRefused
        If the folder is no series that may be denoised.
    ValueError
        If its slices are not square, its noise cannot be told, or the masks are not there or not of this series.
    """
    volume = read_series(folder)
    regions = read_masks(masks / f"{folder.name}.npz", volume)
    return Case(folder.name, volume, volume.with_hu(simulate(volume, dose, seed + SECOND)), regions)


def _regions(nodules: Sequence[Nodule]) -> tuple[Region, ...]:
    return tuple(
        Region(f"nodule-{k:02d}", one.kind, one.diameter_mm, one.box, one.mask) for k, one in enumerate(nodules, 1)
    )


def read_masks(path: Path, volume: Volume) -> tuple[Region, ...]:
    """Regions of a NumPy archive (`numpy.savez_compressed`), one boolean array (z, y, x) of the series each.

    Axis 0 are the slices as `pipelines.volume.read_volume` sorts them, along the normal of the image plane (of axial
    slices from the feet to the head). The name of an array is that of its region.

    Raises
    ------
    ValueError
        If the file is not there or no such archive, or an array is not boolean, of another shape, or empty.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is not in the folder of masks: each series needs one of its folder's name")
    regions: list[Region] = []
    try:
        archive = np.load(path, allow_pickle=False)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} is no NumPy archive (numpy.savez_compressed): {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{path.name} is a single array: save masks by name with numpy.savez_compressed")
    with archive:
        for name in archive.files:
            mask = archive[name]
            if mask.dtype != np.bool_ or mask.shape != volume.hu.shape:
                raise ValueError(
                    f"mask {name} in {path.name} is {mask.dtype} {mask.shape}: expected bool {volume.hu.shape}, the "
                    "shape of the series"
                )
            if not mask.any():
                raise ValueError(f"mask {name} in {path.name} is empty: leave it out")
            at = [np.flatnonzero(mask.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
            z, y, x = (slice(int(k[0]), int(k[-1]) + 1) for k in at)
            mm3 = np.count_nonzero(mask) * math.prod(volume.geometry.spacing_mm)
            regions.append(Region(name, "given", (6 * mm3 / math.pi) ** (1 / 3), (z, y, x), mask[z, y, x].copy()))
    return tuple(regions)


def measure(
    cases: Iterable[Case], pipelines: Mapping[str, Pipeline], options: Options, progress: Callable[[str], None]
) -> Iterator[Row]:
    """Features of every region of every case in full-dose, low-dose and denoised images.

    Parameters
    ----------
    cases
        Taken one at a time.
    pipelines
        Applied to the low-dose images, by the name of what comes out.
    options
        Of all of them.
    progress
        Called with a line for each case and pipeline.

    Raises
    ------
    pipelines.volume.SeriesRefused
        If a pipeline was not validated for a case.
    """
    for case in cases:
        progress(f"{case.name}: {len(case.regions)} regions")
        for pipeline in pipelines.values():
            check(case.low_dose, pipeline.card)
        yield from _rows(case, FULL_DOSE, case.full_dose.hu)
        yield from _rows(case, LOW_DOSE, case.low_dose.hu)
        for name, pipeline in pipelines.items():
            denoised = denoise_volume(pipeline, case.low_dose, options)
            progress(f"{case.name}: {name}")
            yield from _rows(case, name, denoised)


def _rows(case: Case, images: str, hu: Array) -> Iterator[Row]:
    voxel_mm3 = math.prod(case.low_dose.geometry.spacing_mm)
    for region in case.regions:
        yield Row(case.name, region, images, features(hu[region.box], region.mask, voxel_mm3=voxel_mm3))
