"""Images to measure with: a noise-free phantom, real series with simulated low dose, real pairs; each with its truth.

The truth of a real series is its full-dose image, which has noise of its own: a denoiser that removes noise as well as
can be removes the truth's noise too and is punished for it. Only the phantom tells how near an image is to the object.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter

from pipelines.base import Options, Pipeline, denoise_volume
from pipelines.noise import noise_level
from pipelines.safety import LOWEST_HU, network_input
from pipelines.volume import Geometry, Volume
from training.blur import sigma_mm
from training.physics import lesion
from training.simulate import F50, unit_noise
from training.simulation.calibration import calibrate
from training.simulation.simulated_series import read_series
from training.simulation.simulated_volume import simulate
from training.sources.layouts import Origin, find, origin
from training.sources.pairs import load_pair
from training.sources.phantom import chest_abdomen
from training.tissues import smoothed_masks, tissue_masks

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

PHANTOM_PIXEL_MM, PHANTOM_SPACING_MM = 0.75, 2.5
PHANTOM_SEED = 900_001
"""Trainings use seeds far below."""
CONTEXT = 19
"""Slices on each side of the measured ones, as far as st3d looks along z; not measured."""
SECOND = 500_000
"""Added to a seed for the second realisation of the noise."""
_SITE_MARGIN_MM = 6.0
"""Distance of a lesion's centre from the border of soft tissue, at least: twice its radius."""
_SITE_DISTANCE_MM = 25.0
_SITES_PER_SLICE = 4
_PATCH_MM = 10.0
"""Half the size of the box around a lesion; its blurred edge has ended there."""
_NOBODY = Origin("", "", "")


@dataclass(frozen=True, slots=True)
class Trial:
    """A low-dose volume, what it should become, and the same scan again with other noise."""

    case: str
    """Name of the series or phantom, without its folder."""
    kind: Literal["phantom", "simulated", "pair"]
    dose: float
    """Fraction of full dose."""
    low: Volume
    again: Volume | None
    """Independent noise of the same dose; there is none of a real pair."""
    truth: Array
    """(z, y, x) HU."""
    scored: slice
    """Slices that are measured."""
    truth_noise_hu: float
    """Noise level of the truth; 0 of a phantom."""
    f50: float
    """Half-value frequency of the kernel, 1/mm: the band that an inserted lesion is blurred to."""
    origin: Origin = _NOBODY
    """Whose the full-dose series is."""

    @property
    def pixel_mm(self) -> float:
        """Size of square pixels."""
        return self.low.geometry.spacing_mm[1]

    def masks(self) -> dict[str, Mask]:
        """Tissues of the measured slices, from the noise-free truth or from a smoothed one."""
        truth = self.truth[self.scored]
        return tissue_masks(truth) if self.kind == "phantom" else smoothed_masks(truth, self.pixel_mm)


def volume_of(hu: Array, pixel_mm: float, spacing_mm: float, padding: Mask | None = None) -> Volume:
    """`hu` (z, y, x) as a regular axial volume."""
    return Volume(
        hu=hu,
        geometry=Geometry(
            origin_mm=(0.0, 0.0, 0.0),
            spacing_mm=(spacing_mm, pixel_mm, pixel_mm),
            direction=((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)),
            frame_of_reference_uid="",
        ),
        slice_uids=(),
        slice_paths=(),
        padding=np.zeros(hu.shape, np.bool_) if padding is None else padding,
    )


def of_slices(volume: Volume, slices: slice) -> Volume:
    """Some neighbouring slices of `volume`."""
    return replace(volume, hu=volume.hu[slices], padding=volume.padding[slices])


def depended_on(pipeline: Pipeline, trial: Trial) -> slice:
    """The measured slices of `trial`, and those on both sides that `pipeline` looks at for them."""
    reach = pipeline.card.overlap_zyx[0]
    return slice(max(trial.scored.start - reach, 0), min(trial.scored.stop + reach, len(trial.truth)))


def denoised(pipeline: Pipeline, options: Options, volume: Volume, trial: Trial) -> Array:
    """The measured slices of `volume`, an image of `trial`, denoised; the others are computed as far as need be."""
    given = depended_on(pipeline, trial)
    out = denoise_volume(pipeline, of_slices(volume, given), options)
    return out[trial.scored.start - given.start : trial.scored.stop - given.start]


def _block(count: int, wanted: int) -> tuple[slice, slice]:
    """The middle `wanted` of `count` slices with their context, and where the wanted ones lie in it."""
    wanted = min(wanted, count)
    first = (count - wanted) // 2
    start, stop = max(first - CONTEXT, 0), min(first + wanted + CONTEXT, count)
    return slice(start, stop), slice(first - start, first - start + wanted)


def phantom_trials(doses: Sequence[float], slices: int, seed: int = PHANTOM_SEED, matrix: int = 512) -> Iterator[Trial]:
    """A chest-and-abdomen phantom at each dose; the noise is all of that dose, the truth has none."""
    pixel_mm, spacing_mm = PHANTOM_PIXEL_MM, PHANTOM_SPACING_MM
    truth = chest_abdomen(slices + 2 * CONTEXT, matrix, pixel_mm, spacing_mm, seed)
    noises = [unit_noise(truth, pixel_mm, s) for s in (seed, seed + SECOND)]
    for dose in doses:
        low, again = (np.maximum(truth + noise * np.float32(dose**-0.5), np.float32(LOWEST_HU)) for noise in noises)
        yield Trial(
            "phantom",
            "phantom",
            dose,
            volume_of(low, pixel_mm, spacing_mm),
            volume_of(again, pixel_mm, spacing_mm),
            truth,
            slice(CONTEXT, CONTEXT + slices),
            0.0,
            F50,
        )


def simulated_trials(folder: Path, doses: Sequence[float], slices: int, seed: int = PHANTOM_SEED) -> Iterator[Trial]:
    """The middle of a real full-dose series at each dose: the noise that the lower dose adds is simulated.

    The virtual scanner is calibrated on the whole series.

    Raises
    ------
    pipelines.volume.SeriesRefused
        If the folder is no series that may be denoised.
    ValueError
        If the slices are not square, or there is no noise to calibrate with.
    """
    volume = read_series(folder)
    scanner = calibrate(volume, seed)
    read, scored = _block(len(volume.hu), slices)
    spacing_mm, pixel_mm, _ = volume.geometry.spacing_mm
    truth, padding = network_input(volume)[read], np.ascontiguousarray(volume.padding[read])
    level_hu = noise_level(truth, padding, pixel_mm)
    block = volume_of(np.ascontiguousarray(volume.hu[read]), pixel_mm, spacing_mm, padding)
    scanner = replace(scanner, current=scanner.current[read])
    for dose in doses:
        low, again = (block.with_hu(simulate(block, dose, s, scanner)) for s in (seed, seed + SECOND))
        yield Trial(
            folder.name,
            "simulated",
            dose,
            low,
            again,
            truth,
            scored,
            level_hu,
            scanner.kernel.passes_half,
            origin(volume.slice_paths[0]),
        )


def lesions(trial: Trial) -> Array | None:
    """Lesions of 6 mm and 30 HU for the places in soft tissue that are farthest from its border; (z, y, x) HU.

    At most four in a slice, 25 mm apart; None where nothing is wide enough. They are blurred in the plane to the band
    of the image.
    """
    spacing_mm, pixel_mm = trial.low.geometry.spacing_mm[0], trial.pixel_mm
    soft = trial.masks()["soft"]
    step = max(math.ceil(_SITE_DISTANCE_MM / spacing_mm), 1)
    half_z, half = math.ceil(_PATCH_MM / 2 / spacing_mm), math.ceil(_PATCH_MM / pixel_mm)
    ball = lesion((2 * half_z + 1, 2 * half + 1, 2 * half + 1), (spacing_mm, pixel_mm, pixel_mm))
    sigma_px = sigma_mm(trial.f50) / pixel_mm
    ball = gaussian_filter(ball, (0, sigma_px, sigma_px)).astype(np.float32)
    # a frame around everything, so that no box leaves the image
    out = np.zeros([n + 2 * h for n, h in zip(trial.truth.shape, (half_z, half, half), strict=True)], np.float32)
    middle = len(soft) // 2
    for k in range(middle % step, len(soft), step):
        distance = distance_transform_edt(soft[k], sampling=pixel_mm)
        rows, columns = np.mgrid[: distance.shape[0], : distance.shape[1]]
        for _ in range(_SITES_PER_SLICE):
            y, x = np.unravel_index(int(distance.argmax()), distance.shape)
            if distance[y, x] < _SITE_MARGIN_MM:
                break
            z = trial.scored.start + k
            out[z : z + len(ball), y : y + ball.shape[1], x : x + ball.shape[2]] += ball
            distance[np.hypot(rows - y, columns - x) * pixel_mm < _SITE_DISTANCE_MM] = 0
    inserted = out[half_z:-half_z, half:-half, half:-half]
    return np.ascontiguousarray(inserted) if inserted.any() else None


def with_inserted(volume: Volume, inserted: Array) -> Volume:
    """`volume` with `inserted` added."""
    return replace(volume, hu=volume.hu + inserted)


def pair_trials(root: Path, slices: int) -> Iterator[Trial]:
    """The middle of each real pair below `root`; there is no second realisation of its noise."""
    for case in find(root):
        if case.low is None or case.dose is None:
            continue
        pair = load_pair(case)
        read, scored = _block(len(pair.full), slices)
        padding = np.zeros(pair.full[read].shape, np.bool_)
        truth = np.ascontiguousarray(pair.full[read], np.float32)
        low = volume_of(np.ascontiguousarray(pair.low[read], np.float32), pair.pixel_mm, pair.spacing_mm, padding)
        level_hu = noise_level(truth, padding, pair.pixel_mm)
        yield Trial(case.name, "pair", case.dose, low, None, truth, scored, level_hu, F50, origin(case.full[0]))
