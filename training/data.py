"""Batches of patches: scans and their noise, cut, turned, mixed and scaled on the fly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.scaling import to_network
from training.simulate import mix
from training.sources.lesions import TISSUE_HU
from training.sources.scans import HU_RANGE, Scan

ADDED_NOISE_HU = (3.0, 150.0)
"""Noise level added to a target without noise, drawn log-uniformly: a smooth thick slice to a sharp kernel at a tenth
of the dose."""
ADDED_DOSE = (0.04, 0.4)
"""Dose fraction that a real target is brought to, drawn log-uniformly: so low that its own noise hardly counts."""
IDENTITY_PART = 0.05
"""Part of the samples without added noise: what is clean must stay as it is."""
NOISE_LEVEL_JITTER = 0.1
"""Relative standard deviation of the noise level told to the network: at inference it is measured, not known."""
LESION_RADIUS_PX, LESION_HALF_SLICES, LESION_HU = (2.5, 9.0), (0.7, 4.0), (10.0, 60.0)
"""Of the lesions of a twin: radius in the plane, half the height in slices, contrast."""
LESION_EDGE_PX = 0.6
LESION_AREA_PX = 32 * 32
"""Of a patch, for each lesion: their contrasts come out together (`training.losses.contrast_loss`), so that what counts
is how much of them is lost on average, not how much it differs from one noise to the next."""
AIR_PATCH_HU = -970.0
"""A patch whose mean is lower shows air; one of ten that are drawn so is kept."""


def _log_uniform(limits: tuple[float, float], rng: np.random.Generator) -> float:
    return math.exp(rng.uniform(math.log(limits[0]), math.log(limits[1])))


class Batch(NamedTuple):
    """Network units: noisy and target patches (batch, z, y, x), noise levels (batch,)."""

    noisy: torch.Tensor
    target: torch.Tensor
    level: torch.Tensor
    inserted: torch.Tensor = torch.empty(0)
    """Of a batch of twins, (batch/2, z, y, x): the second half is the first with this added, and the same noise."""


def _lesion(target_hu: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """A faint ellipsoid somewhere in the soft tissue of a patch (z, y, x), HU; nothing where there is none."""
    places = np.flatnonzero((target_hu > TISSUE_HU[0]) & (target_hu < TISSUE_HU[1]))
    if not len(places):
        return np.zeros_like(target_hu)
    centre = np.unravel_index(int(rng.choice(places)), target_hu.shape)
    radius_px = _log_uniform(LESION_RADIUS_PX, rng)
    radii = rng.uniform(*LESION_HALF_SLICES), radius_px * rng.uniform(0.8, 1.25), radius_px * rng.uniform(0.8, 1.25)
    contrast_hu = _log_uniform(LESION_HU, rng) * rng.choice((-1, 1))
    grid = np.meshgrid(
        *(np.arange(n) - c for n, c in zip(target_hu.shape, centre, strict=True)), indexing="ij", sparse=True
    )
    distance = np.sqrt(sum((g / r) ** 2 for g, r in zip(grid, radii, strict=True)))
    edge = np.clip((distance - 1) * radius_px / LESION_EDGE_PX, -30, 30)
    lesion: NDArray[np.float32] = (contrast_hu / (1 + np.exp(edge))).astype(np.float32)
    return lesion


class Sampler(torch.utils.data.Dataset[Batch]):
    """Batch number `step` depends on the seed and the number alone, so that a run can be resumed exactly.

    Parameters
    ----------
    scans
        What patches are cut from.
    patch_zyx, batch
        Size of a patch, patches in a batch.
    real_part
        Part of the patches from real series, if there are any.
    seed
        Everything random.
    twins
        Show each patch twice, the second time with faint lesions in it.
    """

    def __init__(
        self,
        scans: Sequence[Scan],
        patch_zyx: tuple[int, int, int],
        batch: int,
        real_part: float,
        seed: int,
        twins: bool = False,
    ) -> None:
        self.twins = twins
        self.clean = [scan for scan in scans if scan.target_noise_hu == 0]
        self.real = [scan for scan in scans if scan.target_noise_hu > 0]
        self.patch_zyx, self.size, self.seed = patch_zyx, batch, seed
        self.real_part = real_part if self.clean and self.real else float(not self.clean)

    def _place(self, scan: Scan, rng: np.random.Generator) -> tuple[NDArray[np.intp], slice, slice]:
        """Slices (replicated beyond the ends) and an in-plane window that is not all air, but for one try in ten."""
        z, y, x = self.patch_zyx
        n, rows, columns = scan.target.shape
        while True:
            beyond = max(z // 4, int(z > 1))
            first = int(rng.integers(-beyond, max(n - z, 0) + beyond + 1))
            top, left = int(rng.integers(0, rows - y + 1)), int(rng.integers(0, columns - x + 1))
            planes = np.clip(np.arange(first, first + z), 0, n - 1)
            window = slice(top, top + y), slice(left, left + x)
            if rng.random() < 0.1 or scan.target[planes[z // 2]][window].mean(dtype=np.float32) > AIR_PATCH_HU:
                return planes, *window

    def _noisy(
        self, scan: Scan, place: tuple[NDArray[np.intp], slice, slice], rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], float]:
        """The source at `place` with noise of a random dose, and its noise level (HU)."""
        planes, rows, columns = place
        source = scan.source[planes[0] : planes[-1] + 1, rows, columns][planes - planes[0]].astype(np.float32)
        if not scan.noises:
            return source, scan.source_noise_hu
        angle = float(rng.uniform(0, 2 * math.pi))
        unit_hu = math.hypot(math.cos(angle) * scan.noise_hu[0], math.sin(angle) * scan.noise_hu[1])
        if scan.target_noise_hu > 0:
            dose = _log_uniform(ADDED_DOSE, rng)
            added_hu = scan.source_noise_hu * math.sqrt(1 / dose - 1)
        else:
            added_hu = _log_uniform(ADDED_NOISE_HU, rng)
        if rng.random() < IDENTITY_PART:
            added_hu = 0.0
        a, b = (
            n[planes[0] : planes[-1] + 1, rows, columns][planes - planes[0]].astype(np.float32) for n in scan.noises
        )
        noise = mix(a, b, angle) * np.float32(added_hu / unit_hu)
        # as a scanner stores it
        return np.maximum(source + noise, np.float32(HU_RANGE[0])), math.hypot(scan.source_noise_hu, added_hu)

    def __getitem__(self, step: int) -> Batch:
        """Batch number `step`."""
        rng = np.random.default_rng((self.seed, step))
        count = self.size // 2 if self.twins else self.size
        noisy = np.empty((count, *self.patch_zyx), np.float32)
        target = np.empty_like(noisy)
        level = np.empty(count, np.float32)
        for i in range(count):
            scans = self.real if rng.random() < self.real_part else self.clean
            scan = scans[int(rng.integers(len(scans)))]
            planes, rows, columns = place = self._place(scan, rng)
            dirty, told = self._noisy(scan, place, rng)
            clean = scan.target[planes[0] : planes[-1] + 1, rows, columns][planes - planes[0]].astype(np.float32)
            if rng.random() < 0.5:
                clean, dirty = clean[..., ::-1], dirty[..., ::-1]
            if rng.random() < 0.5:
                clean, dirty = clean[:, ::-1], dirty[:, ::-1]
            if rng.random() < 0.5:
                clean, dirty = clean.swapaxes(1, 2), dirty.swapaxes(1, 2)
            target[i], noisy[i] = clean, dirty
            level[i] = told * math.exp(NOISE_LEVEL_JITTER * rng.standard_normal())
        inserted = np.empty(0, np.float32)
        if self.twins:
            lesions = max(self.patch_zyx[1] * self.patch_zyx[2] // LESION_AREA_PX, 1)
            inserted = np.stack([sum(_lesion(patch, rng) for _ in range(lesions)) for patch in target])
            noisy, target = (np.concatenate([values, values + inserted]) for values in (noisy, target))
            level = np.concatenate([level, level])
        return Batch(*(to_network(torch.from_numpy(values)) for values in (noisy, target, level, inserted)))
