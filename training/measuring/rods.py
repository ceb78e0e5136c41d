"""A water cylinder with rods, for what only a known object shows: resolution, noise texture, CNR and detectability.

The cylinder is denoised three times: as it is, with other noise, and with rods under the first noise. The difference of
the first two, over √2, is noise; the difference of the third and the first is what came through of the rods, without
noise (AAPM TG-233 averages many scans for the same). Rods of every contrast, for a network is not linear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pipelines.base import Options, Pipeline, denoise_volume
from training.blur import sigma_mm
from training.measuring.cases import volume_of
from training.physics import LESION_HU, Curve, cnr, detectability, disc_task, falls_to, nps_2d, radial_nps, ttf
from training.simulate import F50, unit_noise

Array = NDArray[np.float32]

MATRIX, PIXEL_MM, SPACING_MM = 320, 0.6, 2.5
CYLINDER_MM = 90.0
"""Radius."""
ROD_MM, RODS_AT_MM = 7.5, 42.0
"""Radius of a rod, and of the circle they stand on."""
LOW_CONTRAST_HU = LESION_HU
"""The rod of CNR and d′: a network passes each contrast otherwise, so the task's own."""
CONTRASTS_HU = (-120.0, LOW_CONTRAST_HU, 60.0, 300.0, 900.0)
"""Fat, a faint lesion, contrast medium in an organ, contrast medium in a vessel, bone."""
NOISE_HU = 12.0
"""Standard deviation at full dose."""
_TILE = 64
_SEED = 900_101
_FINE = 5


def _disc(centre_mm: tuple[float, float], radius_mm: float) -> NDArray[np.float64]:
    """Fraction of each pixel that a disc covers, (y, x)."""
    axis = ((np.arange(MATRIX * _FINE) + 0.5) / _FINE - MATRIX / 2) * PIXEL_MM
    inside = (axis[:, None] - centre_mm[0]) ** 2 + (axis[None, :] - centre_mm[1]) ** 2 <= radius_mm**2
    return np.asarray(inside.reshape(MATRIX, _FINE, MATRIX, _FINE).mean(axis=(1, 3)))


def _centres() -> list[tuple[float, float]]:
    """Of the rods, mm from the middle, (y, x)."""
    angles = [2 * math.pi * k / len(CONTRASTS_HU) for k in range(len(CONTRASTS_HU))]
    return [(RODS_AT_MM * math.sin(a), RODS_AT_MM * math.cos(a)) for a in angles]


@dataclass(frozen=True, slots=True)
class Phantom:
    """One dose of the cylinder, (z, y, x) HU: two realisations of its noise, and the rods to be added."""

    first: Array
    second: Array
    rods: Array


@dataclass(frozen=True, slots=True)
class Quality:
    """What an image of the phantom is like."""

    f50: dict[float, float]
    """1/mm, by contrast of the rod in HU."""
    nps: Curve
    cnr: float
    detectability: float
    mean_hu: float
    """Of the water."""
    sd_hu: float


def phantom(dose: float, slices: int) -> Phantom:
    """The cylinder at `dose`; all slices are alike but for their noise."""
    sigma_px = sigma_mm(F50) / PIXEL_MM
    water = gaussian_filter(1000 * _disc((0, 0), CYLINDER_MM) - 1000, sigma_px)
    rods = sum(
        (hu * _disc(centre, ROD_MM) for hu, centre in zip(CONTRASTS_HU, _centres(), strict=True)),
        np.zeros((MATRIX, MATRIX)),
    )
    clean = np.repeat(water[None], slices, axis=0).astype(np.float32)
    middle = slice(MATRIX // 2 - _TILE // 2, MATRIX // 2 + _TILE // 2)
    scans = []
    for seed in (_SEED, _SEED + 1):
        noise = unit_noise(clean, PIXEL_MM, seed)
        scans.append(clean + noise * np.float32(NOISE_HU / noise[:, middle, middle].std() / math.sqrt(dose)))
    rods_all = np.repeat(gaussian_filter(rods, sigma_px)[None], slices, axis=0).astype(np.float32)
    return Phantom(scans[0], scans[1], rods_all)


def _tiles(image: Array) -> Array:
    """Nine squares of each slice, inside the water."""
    starts = [MATRIX // 2 - _TILE // 2 + k * _TILE for k in (-1, 0, 1)]
    return np.concatenate([image[:, y : y + _TILE, x : x + _TILE] for y in starts for x in starts])


def quality(first: Array, second: Array, with_rods: Array) -> Quality:
    """Measure three images of the phantom that were treated alike.

    Parameters
    ----------
    first, second
        The cylinder with independent noise, (z, y, x) HU.
    with_rods
        The cylinder with rods, under the noise of `first`.
    """
    nps = radial_nps(nps_2d(_tiles((first - second) / np.float32(math.sqrt(2))), PIXEL_MM), PIXEL_MM)
    through = (with_rods - first).mean(axis=0, dtype=np.float64)
    middle = (MATRIX - 1) / 2
    curves = {}
    for contrast, (y, x) in zip(CONTRASTS_HU, _centres(), strict=True):
        centre = (middle + y / PIXEL_MM, middle + x / PIXEL_MM)
        curves[contrast] = ttf(through, PIXEL_MM, centre, ROD_MM)
    y, x = _centres()[CONTRASTS_HU.index(LOW_CONTRAST_HU)]
    rows, columns = (np.arange(MATRIX) - middle) * PIXEL_MM, (np.arange(MATRIX) - middle) * PIXEL_MM
    distance = np.hypot(rows[:, None] - y, columns[None, :] - x)
    inside, around = distance < ROD_MM * 0.6, (distance > ROD_MM * 1.5) & (distance < ROD_MM * 2.2)
    water = _tiles(first)
    return Quality(
        f50={contrast: falls_to(curve, 0.5) for contrast, curve in curves.items()},
        nps=nps,
        cnr=float(np.mean([cnr(image, inside, around) for image in with_rods])),
        detectability=detectability(curves[LOW_CONTRAST_HU], nps, disc_task()),
        mean_hu=float(water.mean(dtype=np.float64)),
        sd_hu=float(water.std(dtype=np.float64)),
    )


def measured(pipeline: Pipeline | None, options: Options, scan: Phantom) -> Quality:
    """`quality` of the phantom after `pipeline`, or of the phantom itself."""
    images = [scan.first, scan.second, scan.first + scan.rods]
    if pipeline is not None:
        images = [denoise_volume(pipeline, volume_of(hu, PIXEL_MM, SPACING_MM), options) for hu in images]
    return quality(*images)
