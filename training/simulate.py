"""Low-dose CT noise by a virtual scan of an image: counts in projection space, filtered back-projection of the noise.

The method is that of Naziroglu et al., Phys Med 2017;36:12-23 (virtual sinogram, bow-tie, noise image added back):

1. HU become attenuation, and attenuation becomes parallel line integrals p(θ, t) (coarse: only for the variance).
2. A ray counts N = N0·B(t)·exp(−p) photons; B is a bow-tie filter. The variance of −ln of a Poisson count is 1/N.
3. A noise sinogram with that variance is reconstructed by filtered back-projection with an apodised ramp
   ``|f|·exp(−ln2·(f/f50)^2.5)``; anatomy is never reconstructed, so it is never blurred.

The variance is proportional to 1/dose: one unit noise image (full dose) scales exactly to every other dose. The Poisson
count is taken as Gaussian, which holds above some 30 counts; starvation streaks and electronic noise are not modelled.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

Array = NDArray[np.float32]

MU_WATER_PER_MM = 0.0193
"""Linear attenuation of water at 70 keV, the mean energy of a 120 kVp beam (1/mm)."""
N0 = 8.0e6
"""Unattenuated photons on the axis per mm of detector and degree of rotation."""
F50 = 0.5
"""Frequency (1/mm) at which the apodisation of the ramp is one half: a soft-tissue kernel."""
APODISATION_ORDER = 2.5
_VARIANCE_LIMIT = 4.0
"""Largest variance of one line integral: beyond it the logarithm of a count has no normal distribution."""
_BOWTIE_MM = 60.0
_BOWTIE_AT_MM = 130.0
_BOWTIE_MAX_MM = 120.0
"""Water-equivalent path of the bow-tie: ``min(120, 60·(t/130)²)`` mm at distance t from the axis."""
_VIEWS = 240
"""Views over 180°. The noise of each view is independent, so more views change no variance, only the spokes of the
noise spectrum, which are finer than 1/(60 mm) with this number."""
_COARSE_VIEWS = 90
_OVERSAMPLING = 2
"""Samples of a filtered view per detector bin."""
_SLICES_AT_ONCE = 32
_VIEWS_AT_ONCE = 8


def apodised_ramp(frequency: NDArray[np.floating], f50: float) -> NDArray[np.floating]:
    """The reconstruction filter ``|f|·exp(−ln2·(|f|/f50)^2.5)``, f in 1/mm."""
    f = np.abs(frequency)
    return np.asarray(f * np.exp(-math.log(2) * (f / f50) ** APODISATION_ORDER))


def _project(mu: torch.Tensor, pixel_mm: float, views: int) -> torch.Tensor:
    """Parallel line integrals over 180° of `mu` (z, y, x) in 1/mm by rotating and adding, (z, views, x)."""
    n = mu.shape[-1]
    out = mu.new_empty((mu.shape[0], views, n))
    for k in range(views):
        theta = math.pi * k / views
        cos, sin = math.cos(theta), math.sin(theta)
        grid = functional.affine_grid(
            torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]]), [1, 1, n, n], align_corners=False
        )
        turned = functional.grid_sample(mu[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        out[:, k] = turned[0].sum(1) * pixel_mm
    return out


def _variance(hu: torch.Tensor, pixel_mm: float, bins: int, views: int, n0: float) -> torch.Tensor:
    """Variance of each line integral at full dose, (z, views, bins); bins are one pixel wide."""
    mu = (MU_WATER_PER_MM * (1 + hu / 1000)).clamp_min(0)
    factor = max(hu.shape[-1] // 128, 1)
    coarse = functional.avg_pool2d(mu[:, None], factor)[:, 0] if factor > 1 else mu
    p = _project(coarse, pixel_mm * factor, _COARSE_VIEWS)
    p = torch.cat([p, p[:, :1].flip(-1)], 1)  # the view at 180° is the one at 0°, mirrored
    t_mm = (torch.arange(bins) - (bins - 1) / 2) * pixel_mm
    # grid_sample with align_corners: −1 and +1 are the centres of the first and the last sample
    column = t_mm / (pixel_mm * factor) / ((p.shape[-1] - 1) / 2)
    row = torch.arange(views) / views * 2 - 1
    grid = torch.stack([column[None, :].expand(views, bins), row[:, None].expand(views, bins)], -1)[None]
    p = functional.grid_sample(p[None], grid, mode="bilinear", padding_mode="zeros", align_corners=True)[0]
    bowtie_mm = (_BOWTIE_MM * (t_mm / _BOWTIE_AT_MM) ** 2).clamp_max(_BOWTIE_MAX_MM)
    photons = n0 * pixel_mm * (180.0 / views) * torch.exp(-p - MU_WATER_PER_MM * bowtie_mm)
    return (1 / photons).clamp_max(_VARIANCE_LIMIT)


def _filter(sinogram: torch.Tensor, bin_mm: float, f50: float) -> torch.Tensor:
    """Convolve each view (last axis) with the apodised ramp and sample the result `_OVERSAMPLING` times finer.

    The response is divided by that of the linear interpolation that follows, sinc²(f·d) for samples d apart.
    """
    length = 1 << math.ceil(math.log2(2 * sinogram.shape[-1]))
    f = np.fft.rfftfreq(length, bin_mm)
    response = torch.from_numpy(apodised_ramp(f, f50) / np.sinc(f * bin_mm / _OVERSAMPLING) ** 2).float()
    spectrum = torch.fft.rfft(sinogram, length, dim=-1) * response
    fine = torch.fft.irfft(spectrum, length * _OVERSAMPLING, dim=-1) * _OVERSAMPLING
    return torch.narrow(fine, -1, 0, sinogram.shape[-1] * _OVERSAMPLING)


def _back_project(filtered: torch.Tensor, n: int) -> torch.Tensor:
    """Back-project (z, views, samples) to (z, n, n) by linear interpolation, times π/views.

    All slices share the geometry, so each (view, sample) is one row of slices and the sum over views is a weighted sum
    of rows of a table. Sample ``_OVERSAMPLING·i`` lies at bin i, and the bins are as wide as pixels.
    """
    slices, views, samples = filtered.shape
    centre = (samples // _OVERSAMPLING - 1) / 2 * _OVERSAMPLING
    axis = (torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * _OVERSAMPLING
    out = torch.zeros((n * n, slices))
    for first in range(0, views, _VIEWS_AT_ONCE):
        theta = torch.arange(first, min(first + _VIEWS_AT_ONCE, views)) * (math.pi / views)
        table = filtered[:, first : first + len(theta)].permute(1, 2, 0).reshape(-1, slices).contiguous()
        t = axis[None, :, None] * torch.cos(theta) + axis[:, None, None] * torch.sin(theta) + centre
        low = t.floor()
        part = (t - low).reshape(n * n, -1)
        index = low.reshape(n * n, -1).int() + torch.arange(len(theta), dtype=torch.int32) * samples
        rows = torch.cat([index, index + 1], 1)
        weights = torch.cat([1 - part, part], 1)
        out += functional.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)
    return (out.T.reshape(slices, n, n) * (math.pi / views)).contiguous()


def unit_noise(truth_hu: Array, pixel_mm: float, seed: int, n0: float = N0, f50: float = F50) -> Array:
    """Noise of a full-dose scan of `truth_hu`, independent from slice to slice.

    Parameters
    ----------
    truth_hu
        (z, y, x) HU, square slices. Padding must be air (−1000 or less) already.
    pixel_mm
        Pixel size, which is also the width of a detector bin.
    seed
        Same seed, same noise.
    n0
        Unattenuated photons per mm of detector and degree of rotation.
    f50
        Half-value frequency of the kernel, 1/mm.

    Returns
    -------
    numpy.ndarray
        float32 HU, (z, y, x). At the dose fraction d the noise is this divided by √d; what must be added to an image
        that holds full-dose noise already is this times √(1/d − 1).
    """
    if truth_hu.ndim != 3 or truth_hu.shape[1] != truth_hu.shape[2]:
        raise ValueError(f"expected square slices (z, n, n), got {truth_hu.shape}")
    n = truth_hu.shape[-1]
    bins = 2 * math.ceil(n * math.sqrt(0.5)) + 2
    generator = torch.Generator().manual_seed(seed)
    out = np.empty(truth_hu.shape, np.float32)
    with torch.inference_mode():
        for first in range(0, len(truth_hu), _SLICES_AT_ONCE):
            hu = torch.from_numpy(np.ascontiguousarray(truth_hu[first : first + _SLICES_AT_ONCE], np.float32))
            variance = _variance(hu, pixel_mm, bins, _VIEWS, n0)
            noise = torch.randn(variance.shape, generator=generator) * variance.sqrt()
            image = _back_project(_filter(noise, pixel_mm, f50), n)
            out[first : first + len(hu)] = (image * (1000 / MU_WATER_PER_MM)).numpy()
    return out


def mix(noise_a: Array, noise_b: Array, angle: float) -> Array:
    """``cos(angle)·a + sin(angle)·b``: another noise image with the variance and spectrum of two independent ones."""
    return np.float32(math.cos(angle)) * noise_a + np.float32(math.sin(angle)) * noise_b


def low_dose(truth_hu: Array, pixel_mm: float, dose: float, seed: int, n0: float = N0, f50: float = F50) -> Array:
    """A scan of the noise-free `truth_hu` at the fraction `dose` of full dose.

    Parameters
    ----------
    truth_hu
        (z, y, x) HU without noise, square slices.
    pixel_mm
        Pixel size.
    dose
        Fraction of full dose, 0 < dose ≤ 1; the noise holds everything, that of the full dose too.
    seed, n0, f50
        As in `unit_noise`.

    Returns
    -------
    numpy.ndarray
        float32 HU, (z, y, x).
    """
    if not 0 < dose <= 1:
        raise ValueError(f"dose is a fraction of full dose, 0 < dose <= 1, got {dose}")
    return np.asarray(
        truth_hu + unit_noise(truth_hu, pixel_mm, seed, n0, f50) / np.float32(math.sqrt(dose)), np.float32
    )
