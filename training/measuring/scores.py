"""Every number of one pipeline on one image, as rows of a long table."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.base import Options, Pipeline
from pipelines.noise import noise_level
from pipelines.volume import Volume
from training.measuring.cases import Trial, denoised, depended_on, lesions, with_inserted
from training.measuring.rods import LOW_CONTRAST_HU, Quality
from training.metrics import FULL, LUNG, SOFT_TISSUE, Window, l1, mutual_information, nmse, psnr, rmse, ssim
from training.physics import (
    LESION_HU,
    LESION_MM,
    Curve,
    contrast_recovery,
    hu_bias,
    mean_frequency,
    nps_2d,
    peak_frequency,
    radial_nps,
)

Array = NDArray[np.float32]

INPUT = "low dose"
"""Name of the row of what nothing was done to."""
WINDOWS = (SOFT_TISSUE, LUNG, FULL)
IMAGE_METRICS: dict[str, Callable[[Array, Array, Window], float]] = {
    "L1": l1,
    "RMSE": rmse,
    "NMSE": nmse,
    "PSNR (dB)": psnr,
    "SSIM": ssim,
    "MI (nat)": mutual_information,
}
"""All are taken on [0, 1] of the window, slice by slice."""
_TILE = 32
_TILES = 64
_SOFT_PART = 0.9
"""Of a square, at least; else edges and lung would speak for its noise."""
_MIN_VOXELS = 500
"""A tissue of fewer voxels has no mean worth a row."""


@dataclass(frozen=True, slots=True)
class Row:
    """One number. `slice` is empty for a number of the whole case, `window` for one that knows none."""

    case: str
    kind: str
    dose: float
    pipeline: str
    metric: str
    window: str
    slice: str
    value: float


def values(rows: Iterable[Row], **where: str | float) -> list[float]:
    """Values of the rows whose fields are as `where` says."""
    return [row.value for row in rows if all(getattr(row, field) == wanted for field, wanted in where.items())]


def case_means(rows: Iterable[Row], metric: str) -> list[float]:
    """Mean over the slices of each case that has `metric`."""
    cases: dict[str, list[float]] = {}
    for row in rows:
        if row.metric == metric:
            cases.setdefault(row.case, []).append(row.value)
    return [float(np.mean(found)) for found in cases.values()]


@dataclass(frozen=True, slots=True)
class Result:
    """The rows of one pipeline on one trial, and what pictures need of it."""

    rows: list[Row]
    middle: Array
    """The middle slice, (y, x) HU."""
    nps: Curve | None
    """Of the noise that is left; None of a real pair."""


def soft_tiles(trial: Trial) -> list[tuple[int, int, int]]:
    """Corners (z, y, x) of the 32 × 32 squares of the measured slices that are soft tissue, 64 at most."""
    soft = trial.masks()["soft"].astype(np.float32)
    found = []
    for z, mask in enumerate(soft):
        rows, columns = (n // _TILE * _TILE for n in mask.shape)
        parts = mask[:rows, :columns].reshape(rows // _TILE, _TILE, columns // _TILE, _TILE).mean(axis=(1, 3))
        found += [
            (-float(part), z, y * _TILE, x * _TILE) for (y, x), part in np.ndenumerate(parts) if part >= _SOFT_PART
        ]
    return [(z, y, x) for _, z, y, x in sorted(found)[:_TILES]]


def noise_spectrum(first: Array, second: Array, trial: Trial) -> Curve | None:
    """Radial NPS in soft tissue of the noise in which two results of `trial` differ, over √2; measured slices.

    The anatomy, and the truth's own noise, are in both and cancel. None where there is no soft tissue.
    """
    noise = (first - second) / np.float32(math.sqrt(2))
    tiles = [noise[z, y : y + _TILE, x : x + _TILE] for z, y, x in soft_tiles(trial)]
    return radial_nps(nps_2d(np.stack(tiles), trial.pixel_mm), trial.pixel_mm) if tiles else None


def score(
    trial: Trial,
    name: str,
    pipeline: Pipeline | None,
    options: Options,
    perceptual: Callable[[Array, Array], float] | None = None,
) -> Result:
    """Run `pipeline` on `trial` (None: nothing is done) and take every number.

    It runs three times: on the image, on its other realisation, and on the image with lesions.

    Parameters
    ----------
    perceptual
        LPIPS of two slices (y, x) HU; left out without.
    """

    scored = trial.scored

    def run(volume: Volume) -> Array:
        return volume.hu[scored] if pipeline is None else denoised(pipeline, options, volume, trial)

    def row(metric: str, value: float, window: str = "", plane: str = "") -> Row:
        return Row(trial.case, trial.kind, trial.dose, name, metric, window, plane, value)

    start = time.monotonic()
    out = run(trial.low)
    seconds = time.monotonic() - start
    before, truth = trial.low.hu[scored], trial.truth[scored]
    rows = [
        row(metric, function(a, b, window), str(window), str(k))
        for k, (a, b) in enumerate(zip(out, truth, strict=True))
        for window in WINDOWS
        for metric, function in IMAGE_METRICS.items()
    ]
    if perceptual is not None:
        rows += [
            row("LPIPS", perceptual(a, b), str(LUNG), str(k)) for k, (a, b) in enumerate(zip(out, truth, strict=True))
        ]
    rows.append(row("noise level (HU)", noise_level(out, trial.low.padding[scored], trial.pixel_mm)))
    masks = {tissue: mask for tissue, mask in trial.masks().items() if mask.sum() >= _MIN_VOXELS}
    rows += [row(f"shift of {tissue} (HU)", value) for tissue, value in hu_bias(out, before, masks).items()]
    nps = None
    if trial.again is not None:
        nps = noise_spectrum(out, run(trial.again), trial)
        given = noise_spectrum(before, trial.again.hu[scored], trial)
        if nps is not None and given is not None:
            rows += [
                row("NPS mean frequency (1/mm)", mean_frequency(nps)),
                row("NPS peak frequency (1/mm)", peak_frequency(nps)),
                row("NPS mean shift (%)", 100 * (mean_frequency(nps) / mean_frequency(given) - 1)),
            ]
    inserted = lesions(trial)
    if inserted is not None:
        with_lesions = run(with_inserted(trial.low, inserted))
        rows.append(row("contrast recovery", contrast_recovery(with_lesions, out, inserted[scored])))
    if pipeline is not None:
        computed = depended_on(pipeline, trial)
        rows.append(row("seconds per slice", seconds / (computed.stop - computed.start)))
    return Result(rows, out[len(out) // 2].copy(), nps)  # a copy, or all slices would stay in memory with it


def rod_rows(quality: Quality, before: Quality, dose: float, name: str) -> list[Row]:
    """The numbers of the phantom with rods, after and before."""

    def row(metric: str, value: float) -> Row:
        return Row("rods", "rods", dose, name, metric, "", "", value)

    shift = 100 * (mean_frequency(quality.nps) / mean_frequency(before.nps) - 1)
    return [
        *(row(f"TTF f50 at {contrast:+g} HU (1/mm)", value) for contrast, value in quality.f50.items()),
        row(f"CNR of {LOW_CONTRAST_HU:g} HU", quality.cnr),
        row(f"d' of {LESION_MM:g} mm and {LESION_HU:g} HU", quality.detectability),
        row("NPS mean frequency (1/mm)", mean_frequency(quality.nps)),
        row("NPS peak frequency (1/mm)", peak_frequency(quality.nps)),
        row("NPS mean shift (%)", shift),
        row("water (HU)", quality.mean_hu),
        row("noise (HU)", quality.sd_hu),
    ]
