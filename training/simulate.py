"""Low-dose CT noise by a virtual scan of an image: counts in projection space, filtered back-projection of the noise.

The method is that of Naziroglu et al., Phys Med 2017;36:12-23 (virtual sinogram, bow-tie, noise image added back):

1. HU become attenuation, and attenuation becomes parallel line integrals p(θ, t) (coarse: only for the variance).
2. A ray counts N = N0·B(t)·m(θ, t)·exp(−p) photons; B is a bow-tie filter, m the tube current
   (`training.simulation.counts`).
3. A noise sinogram with the variance of −ln of that count is reconstructed by filtered back-projection with the ramp
   times the kernel's apodisation (`training.simulation.projection`). Anatomy is never reconstructed, so never blurred.

Without electronic noise the variance is proportional to 1/dose: one unit noise image (full dose) scales exactly to
every other dose. The physics and its limits: docs/simulation.md.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from training.simulation.counts import Beam, Draw, added, added_poisson, full_dose, poisson_streams
from training.simulation.projection import MU_WATER_PER_MM, Grid, Kernel, line_integrals, reconstruct

Array = NDArray[np.float32]

F50 = 0.5
"""Frequency (1/mm) at which the apodisation of the ramp is one half: a soft-tissue kernel."""
_VIEWS = 240
"""Views over 180°. The noise of each view is independent, so more views change no variance, only the spokes of the
noise spectrum, which are finer than 1/(60 mm) with this number."""
_SLICES_AT_ONCE = 32
_DEVIATES_AT_ONCE = 32


def unit_noise(
    truth_hu: Array,
    pixel_mm: float,
    seed: int,
    f50: float = F50,
    boost: float = 0.0,
    overlap: float = 1.0,
) -> Array:
    """Noise of a full-dose scan of `truth_hu`.

    Parameters
    ----------
    truth_hu
        (z, y, x) HU, square slices. Padding must be air (−1000 or less) already.
    pixel_mm
        Pixel size, which is also the width of a detector bin, unless the kernel needs finer ones.
    seed
        Same seed, same noise.
    f50, boost
        `training.simulation.projection.Kernel`: half-value frequency in 1/mm; 0 for soft kernels, about 2 for sharp
        ones.
    overlap
        Slice thickness over increment. Above 1, neighbouring slices share part of their noise, as `slice_weights` says.

    Returns
    -------
    numpy.ndarray
        float32 HU, (z, y, x). At the dose fraction d the noise is this divided by √d; what must be added to an image
        that holds full-dose noise already is this times √(1/d − 1).
    """
    return full_dose_noise(truth_hu, pixel_mm, seed, Kernel(f50, boost), Beam(), overlap)


def full_dose_noise(
    hu: Array,
    pixel_mm: float,
    seed: int,
    kernel: Kernel,
    beam: Beam,
    overlap: float = 1.0,
    current: Sequence[float] = (),
    device: str = "cpu",
) -> Array:
    """`unit_noise` of any scanner: with electronic noise it does not scale with the dose.

    Parameters
    ----------
    hu, pixel_mm, seed, overlap
        As in `unit_noise`.
    kernel, beam
        Of the scanner; `training.simulation.calibration` finds them.
    current
        Tube current of each slice, that of `beam` being 1; empty: 1 everywhere.
    device
        Of torch.
    """
    scan = _Scan(hu, pixel_mm, kernel, beam, overlap, device, tuple(current))
    return scan.noise(full_dose(beam, scan.grid), 1, seed)


def added_noise(
    hu: Array,
    pixel_mm: float,
    dose: float,
    seed: int,
    kernel: Kernel,
    beam: Beam,
    overlap: float = 1.0,
    current: Sequence[float] = (),
    poisson: bool = False,
    device: str = "cpu",
) -> Array:
    """What must be added to a full-dose image to make it one of the fraction `dose`.

    Parameters
    ----------
    hu
        (z, y, x) HU that hold full-dose noise already, square slices, padding as air.
    dose
        Fraction of full dose, 0 < dose ≤ 1.
    poisson
        Draw counts instead of Gaussian noise of the same variance. It differs where hardly any photons arrive: streaks,
        and line integrals that are too high on average.
    pixel_mm, seed, overlap
        As in `unit_noise`.
    kernel, beam, current, device
        As in `full_dose_noise`.

    Returns
    -------
    numpy.ndarray
        float32 HU, (z, y, x).
    """
    _check_dose(dose)
    scan = _Scan(hu, pixel_mm, kernel, beam, overlap, device, tuple(current))
    if dose == 1:
        return np.zeros(hu.shape, np.float32)
    if poisson:
        return scan.noise(added_poisson(beam, scan.grid, dose), poisson_streams(beam, scan.grid), seed)
    return scan.noise(added(beam, scan.grid, dose), 1, seed)


def mix(noise_a: Array, noise_b: Array, angle: float) -> Array:
    """``cos(angle)·a + sin(angle)·b``: another noise image with the variance and spectrum of two independent ones."""
    return np.float32(math.cos(angle)) * noise_a + np.float32(math.sin(angle)) * noise_b


def low_dose(truth_hu: Array, pixel_mm: float, dose: float, seed: int) -> Array:
    """A scan of the noise-free `truth_hu` at the fraction `dose` of full dose.

    Parameters
    ----------
    truth_hu
        (z, y, x) HU without noise, square slices.
    pixel_mm
        Pixel size.
    dose
        Fraction of full dose, 0 < dose ≤ 1; the noise holds everything, that of the full dose too.
    seed
        As in `unit_noise`.

    Returns
    -------
    numpy.ndarray
        float32 HU, (z, y, x).
    """
    _check_dose(dose)
    noise = unit_noise(truth_hu, pixel_mm, seed)
    return np.asarray(truth_hu + noise / np.float32(math.sqrt(dose)), np.float32)


def slice_weights(slices: int, overlap: float) -> NDArray[np.float64]:
    """How the noise of each slice is made of its own and its predecessors' deviates, (slices, reach).

    A slice of thickness `overlap` (in increments) averages what lies in it: two slices k apart share ``1 − k/overlap``
    of it, which is the correlation of their noise. The rows are those of the Cholesky factor of that correlation;
    column j belongs to slice k − j. Each row has the norm 1: no slice gets more or less noise.
    """
    if overlap <= 1:
        return np.ones((slices, 1))
    reach = min(math.ceil(overlap - 1e-6), slices)
    distance = np.abs(np.subtract.outer(np.arange(slices), np.arange(slices)))
    factor = np.linalg.cholesky(np.maximum(1 - distance / overlap, 0))
    weights = np.zeros((slices, reach))
    for j in range(reach):
        weights[j:, j] = factor.diagonal(-j)
    return weights


def _check_dose(dose: float) -> None:
    if not 0 < dose <= 1:
        raise ValueError(f"dose is a fraction of full dose, 0 < dose <= 1, got {dose}")


@dataclass(frozen=True, slots=True)
class _Scan:
    """A virtual scan of `hu` (z, n, n)."""

    hu: Array
    pixel_mm: float
    kernel: Kernel
    beam: Beam
    overlap: float
    device: str
    current: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.hu.ndim != 3 or self.hu.shape[1] != self.hu.shape[2]:
            raise ValueError(f"expected square slices (z, n, n), got {self.hu.shape}")
        if self.current and (len(self.current) != len(self.hu) or min(self.current) <= 0):
            raise ValueError(f"{len(self.hu)} slices need as many tube currents above 0, got {self.current}")

    @property
    def grid(self) -> Grid:
        return Grid(self.hu.shape[-1], self.pixel_mm, _VIEWS, self.kernel.bins_per_pixel(self.pixel_mm))

    def noise(self, draw: Draw, streams: int, seed: int) -> Array:
        """Reconstruct the noise that `draw` makes of `streams` deviates for each line integral; float32 HU."""
        out = np.empty(self.hu.shape, np.float32)
        deviates = self._deviates(streams, seed)
        at_once = max(1, min(_SLICES_AT_ONCE, _DEVIATES_AT_ONCE // streams))
        with torch.inference_mode():
            for first in range(0, len(out), at_once):
                part = np.ascontiguousarray(self.hu[first : first + at_once], np.float32)
                p = line_integrals(torch.from_numpy(part).to(self.device), self.grid)
                drawn = torch.stack([next(deviates) for _ in part], 1).to(self.device)
                photons = self.beam.photons(p, self.grid)
                if self.current:
                    photons *= p.new_tensor(self.current[first : first + len(part)])[:, None, None]
                noise = draw(photons, list(drawn))
                image = reconstruct(noise, self.grid, self.kernel)
                out[first : first + len(part)] = (image * (1000 / MU_WATER_PER_MM)).cpu().numpy()
        return out

    def _deviates(self, streams: int, seed: int) -> Iterator[torch.Tensor]:
        """Standard normal deviates (streams, views, bins) of one slice after the other, drawn on the CPU.

        So the same seed gives the same noise on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        weights = slice_weights(len(self.hu), self.overlap)
        recent: deque[torch.Tensor] = deque(maxlen=weights.shape[1])
        for row in weights:
            recent.appendleft(torch.randn((streams, self.grid.views, self.grid.bins), generator=generator))
            yield torch.stack([float(w) * drawn for w, drawn in zip(row, recent, strict=False)]).sum(0)
