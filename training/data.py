"""Training pairs: targets (phantoms, real series) with unit noise images, mixed and scaled into patches on the fly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.noise import noise_level
from pipelines.scaling import to_network
from pipelines.volume import read_volume
from training.phantom import chest_abdomen
from training.simulate import mix, unit_noise

Half = NDArray[np.float16]

PHANTOM_SLICES = 24
HU_RANGE = (-1024.0, 4000.0)
"""Targets are clipped to this: padding becomes air, metal stays metal."""
CLEAN_DOSE = (0.05, 3.0)
"""Dose fractions, drawn log-uniformly, for a target without noise; 3 is a thick slice of a full-dose scan."""
NOISY_DOSE = (0.04, 0.4)
"""The same for a real target: so low that the noise of the target itself hardly counts."""
IDENTITY_PART = 0.05
"""Part of the samples without added noise: what is clean must stay as it is."""
NOISE_LEVEL_JITTER = 0.1
"""Relative standard deviation of the noise level told to the network: at inference it is measured, not known."""
_AIR_PATCH_HU = -970.0


@dataclass(frozen=True, slots=True)
class Scan:
    """A target with noise images to add; (z, y, x), HU."""

    name: str
    target: Half
    noises: tuple[Half, Half]
    """Full-dose noise of two kernels, independent."""
    target_noise_hu: float
    """Noise level of the target; 0 for a phantom."""
    noise_hu: tuple[float, float]
    """Noise level of each noise image, measured as it will be measured at inference."""


def _scan(
    name: str, target: NDArray[np.float32], pixel_mm: float, clean: bool, kernels: Sequence[float], seed: int
) -> Scan:
    noises = [unit_noise(target, pixel_mm, seed + 7919 * (i + 1), f50=f50) for i, f50 in enumerate(kernels)]
    nothing = np.zeros(target.shape, np.bool_)
    own = noise_level(target, nothing, pixel_mm)
    # three times the noise, so that the structure of the target adds little to the measured level
    levels = [math.sqrt(max(noise_level(target + 3 * n, nothing, pixel_mm) ** 2 - own**2, 0)) / 3 for n in noises]
    return Scan(
        name,
        target.astype(np.float16),
        (noises[0].astype(np.float16), noises[1].astype(np.float16)),
        0.0 if clean else own,
        (levels[0], levels[1]),
    )


def phantom_scan(seed: int) -> Scan:
    """A phantom with the noise of two kernels whose band is near that of its edges."""
    rng = np.random.default_rng((seed, 1))
    pixel_mm, spacing_mm, f50 = rng.uniform(0.65, 0.95), rng.uniform(1, 5), rng.uniform(0.35, 0.8)
    target = chest_abdomen(PHANTOM_SLICES, 512, pixel_mm, spacing_mm, seed, f50)
    return _scan(f"phantom {seed}", target, pixel_mm, True, list(f50 * rng.uniform(0.85, 1.2, 2)), seed)


def real_scan(folder: Path, seed: int) -> Scan:
    """A real series of a soft kernel as target.

    Raises
    ------
    pipelines.volume.SeriesRefused
        If the folder is no series that may be denoised.
    ValueError
        If its slices are not square.
    """
    volume = read_volume(sorted(folder.glob("*.dcm")))
    rng = np.random.default_rng((seed, 2))
    target = np.clip(np.where(volume.padding, HU_RANGE[0], volume.hu), *HU_RANGE).astype(np.float32)
    return _scan(folder.name, target, volume.geometry.spacing_mm[1], False, list(rng.uniform(0.35, 0.8, 2)), seed)


class Sampler:
    """Batches of patches; batch `step` depends on the seed and the step alone, so that a run can be resumed exactly."""

    def __init__(
        self, scans: Sequence[Scan], patch_zyx: tuple[int, int, int], batch: int, real_part: float, seed: int
    ) -> None:
        self.clean = [scan for scan in scans if scan.target_noise_hu == 0]
        self.real = [scan for scan in scans if scan.target_noise_hu > 0]
        self.patch_zyx, self.size, self.seed = patch_zyx, batch, seed
        self.real_part = real_part if self.clean and self.real else float(not self.clean)

    def _place(self, scan: Scan, rng: np.random.Generator) -> tuple[NDArray[np.intp], slice, slice]:
        """Slices (replicated beyond the ends) and an in-plane window that is not all air, but for one try in ten."""
        z, y, x = self.patch_zyx
        n, rows, columns = scan.target.shape
        while True:
            first = int(rng.integers(-(z // 4), n - z + z // 4 + 1))
            top, left = int(rng.integers(0, rows - y + 1)), int(rng.integers(0, columns - x + 1))
            planes = np.clip(np.arange(first, first + z), 0, n - 1)
            window = slice(top, top + y), slice(left, left + x)
            if rng.random() < 0.1 or scan.target[planes[z // 2]][window].mean(dtype=np.float32) > _AIR_PATCH_HU:
                return planes, *window

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy and target patches (batch, z, y, x) and noise levels (batch,), all in network units."""
        rng = np.random.default_rng((self.seed, step))
        noisy = np.empty((self.size, *self.patch_zyx), np.float32)
        target = np.empty_like(noisy)
        level = np.empty(self.size, np.float32)
        for i in range(self.size):
            scans, doses = (self.real, NOISY_DOSE) if rng.random() < self.real_part else (self.clean, CLEAN_DOSE)
            scan = scans[int(rng.integers(len(scans)))]
            planes, rows, columns = self._place(scan, rng)
            angle = float(rng.uniform(0, 2 * math.pi))
            dose = math.exp(rng.uniform(math.log(doses[0]), math.log(doses[1])))
            scale = math.sqrt(1 / dose - (scan.target_noise_hu > 0)) if rng.random() > IDENTITY_PART else 0.0
            a, b = (n[planes][:, rows, columns].astype(np.float32) for n in scan.noises)
            clean = scan.target[planes][:, rows, columns].astype(np.float32)
            dirty = clean + np.float32(scale) * mix(a, b, angle)
            if rng.random() < 0.5:
                clean, dirty = clean[..., ::-1], dirty[..., ::-1]
            if rng.random() < 0.5:
                clean, dirty = clean[:, ::-1], dirty[:, ::-1]
            if rng.random() < 0.5:
                clean, dirty = clean.swapaxes(1, 2), dirty.swapaxes(1, 2)
            target[i], noisy[i] = clean, dirty
            added2 = (math.cos(angle) * scan.noise_hu[0]) ** 2 + (math.sin(angle) * scan.noise_hu[1]) ** 2
            total = math.sqrt(scan.target_noise_hu**2 + scale**2 * added2)
            level[i] = total * math.exp(NOISE_LEVEL_JITTER * rng.standard_normal())
        return (
            to_network(torch.from_numpy(noisy)),
            to_network(torch.from_numpy(target)),
            to_network(torch.from_numpy(level)),
        )
