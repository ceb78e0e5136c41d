"""Parallel-beam projection of HU images and filtered back-projection of noise, batched in torch.

The geometry is that of Kak and Slaney, Principles of Computerized Tomographic Imaging (1988), chapter 3: line
integrals ``p(θ, t)`` along ``x·cos θ + y·sin θ = t`` over 180°, x to the right and y downwards from the centre of the
image, which is taken for the axis of rotation. Only noise is reconstructed; anatomy is projected coarsely, for its
attenuation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

MU_WATER_PER_MM = 0.0193
"""Linear attenuation of water at 70 keV, the mean energy of a 120 kVp beam (1/mm)."""
APODISATION_ORDER = 2.5
_OVERSAMPLING = 2
"""Samples of a filtered view per detector bin."""
_COARSE_VIEWS = 90
_COARSE_MATRIX = 128
"""The variance of a line integral varies slowly: this is enough for it."""
_VIEWS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Kernel:
    """Reconstruction kernel: the ramp with ``a(f) = (1 + boost·(f/f50)²)·exp(−ln2·(f/f50)^2.5)`` upon it.

    A soft kernel falls monotonically and has no boost. A sharp one (B70f, L, LUNG, YA: boost about 2) lifts the middle
    frequencies before it falls, so that one number cannot describe it.
    """

    f50: float
    """1/mm; without boost the frequency at which a is one half."""
    boost: float = 0.0
    """At f50, a is ``(1 + boost)/2``."""

    def __post_init__(self) -> None:
        if not (0 < self.f50 < math.inf and 0 <= self.boost < math.inf):
            raise ValueError(f"a kernel needs f50 > 0 and boost >= 0, got {self.f50} and {self.boost}")

    def apodisation(self, frequency: NDArray[np.floating]) -> NDArray[np.float64]:
        """``a(f)``, f in 1/mm; 1 at 0."""
        relative = np.abs(np.asarray(frequency, np.float64)) / self.f50
        return np.asarray((1 + self.boost * relative**2) * np.exp(-math.log(2) * relative**APODISATION_ORDER))

    def ramp(self, frequency: NDArray[np.floating]) -> NDArray[np.float64]:
        """The filter of a view, ``|f|·a(f)``, in 1/mm."""
        return np.asarray(np.abs(frequency) * self.apodisation(frequency))

    @property
    def passes_half(self) -> float:
        """The highest frequency of which it passes half, 1/mm; without boost `f50`."""
        grid = np.linspace(0, 4 * self.f50, 4001)
        return float(grid[self.apodisation(grid) >= 0.5 - 1e-9][-1])

    def bins_per_pixel(self, pixel_mm: float) -> int:
        """Detector bins per pixel: more than 1 for a kernel that passes half beyond the Nyquist frequency of a pixel.

        That part of the noise is aliased in the image, as it is in a real one.
        """
        return max(1, math.ceil(2 * pixel_mm * self.passes_half - 1e-6))


@dataclass(frozen=True, slots=True)
class Grid:
    """Square images and the sinogram that belongs to them."""

    matrix: int
    """Rows and columns of an image."""
    pixel_mm: float
    views: int
    """Over 180°."""
    bins_per_pixel: int = 1

    @property
    def bins(self) -> int:
        """Detector bins; they reach beyond the corners of the image."""
        return (2 * math.ceil(self.matrix * math.sqrt(0.5)) + 2) * self.bins_per_pixel

    @property
    def bin_mm(self) -> float:
        """Width of a detector bin."""
        return self.pixel_mm / self.bins_per_pixel

    def places_mm(self, device: torch.device) -> torch.Tensor:
        """Distance t of each bin from the axis."""
        return (torch.arange(self.bins, device=device) - (self.bins - 1) / 2) * self.bin_mm


def project(image: torch.Tensor, pixel_mm: float, views: int) -> torch.Tensor:
    """Line integrals of `image` (z, n, n) by rotating and adding, (z, views, n): bins as wide as pixels."""
    n = image.shape[-1]
    out = image.new_empty((image.shape[0], views, n))
    for k in range(views):
        theta = math.pi * k / views
        cos, sin = math.cos(theta), math.sin(theta)
        turn = image.new_tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]])
        grid = functional.affine_grid(turn, [1, 1, n, n], align_corners=False)
        turned = functional.grid_sample(image[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        out[:, k] = turned[0].sum(1) * pixel_mm
    return out


def line_integrals(hu: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Attenuation along each ray of `grid`, (z, views, bins), of images (z, n, n) in HU.

    Projected on a coarse grid and interpolated. Less than vacuum attenuates nothing.
    """
    mu = (MU_WATER_PER_MM * (1 + hu / 1000)).clamp_min(0)
    factor = max(grid.matrix // _COARSE_MATRIX, 1)
    spare = -grid.matrix % factor
    mu = functional.pad(mu, (spare // 2, spare - spare // 2) * 2)
    coarse = functional.avg_pool2d(mu[:, None], factor)[:, 0]
    p = project(coarse, grid.pixel_mm * factor, _COARSE_VIEWS)
    p = torch.cat([p, p[:, :1].flip(-1)], 1)  # the view at 180° is the one at 0°, mirrored
    # grid_sample with align_corners: −1 and +1 are the centres of the first and the last sample
    column = grid.places_mm(hu.device) / (grid.pixel_mm * factor) / ((p.shape[-1] - 1) / 2)
    row = torch.arange(grid.views, device=hu.device) / grid.views * 2 - 1
    where = torch.stack(
        [column[None, :].expand(grid.views, grid.bins), row[:, None].expand(grid.views, grid.bins)], -1
    )[None]
    return functional.grid_sample(p[None], where, mode="bilinear", padding_mode="zeros", align_corners=True)[0]


def reconstruct(sinogram: torch.Tensor, grid: Grid, kernel: Kernel) -> torch.Tensor:
    """Filtered back-projection of `sinogram` (z, views, bins) to images (z, n, n), in 1/mm."""
    return _back_project(_filter(sinogram, grid.bin_mm, kernel), grid)


def _filter(sinogram: torch.Tensor, bin_mm: float, kernel: Kernel) -> torch.Tensor:
    """Convolve each view (last axis) with the kernel and sample the result `_OVERSAMPLING` times finer.

    The response is divided by that of the linear interpolation that follows, sinc²(f·d) for samples d apart.
    """
    length = 1 << math.ceil(math.log2(2 * sinogram.shape[-1]))
    f = np.fft.rfftfreq(length, bin_mm)
    response = torch.from_numpy(kernel.ramp(f) / np.sinc(f * bin_mm / _OVERSAMPLING) ** 2).float()
    spectrum = torch.fft.rfft(sinogram, length, dim=-1) * response.to(sinogram.device)
    fine = torch.fft.irfft(spectrum, length * _OVERSAMPLING, dim=-1) * _OVERSAMPLING
    return torch.narrow(fine, -1, 0, sinogram.shape[-1] * _OVERSAMPLING)


def _back_project(filtered: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Back-project (z, views, samples) to (z, n, n) by linear interpolation, times π/views.

    All slices share the geometry, so each (view, sample) is one row of slices and the sum over views is a weighted sum
    of rows of a table. Sample ``_OVERSAMPLING·i`` lies at bin i.
    """
    slices, views, samples = filtered.shape
    n, device = grid.matrix, filtered.device
    centre = (samples // _OVERSAMPLING - 1) / 2 * _OVERSAMPLING
    axis = (torch.arange(n, dtype=torch.float32, device=device) - (n - 1) / 2) * (_OVERSAMPLING * grid.bins_per_pixel)
    out = torch.zeros((n * n, slices), device=device)
    for first in range(0, views, _VIEWS_AT_ONCE):
        theta = torch.arange(first, min(first + _VIEWS_AT_ONCE, views), device=device) * (math.pi / views)
        table = filtered[:, first : first + len(theta)].permute(1, 2, 0).reshape(-1, slices).contiguous()
        t = axis[None, :, None] * torch.cos(theta) + axis[:, None, None] * torch.sin(theta) + centre
        low = t.floor()
        part = (t - low).reshape(n * n, -1)
        view = torch.arange(len(theta), dtype=torch.int32, device=device)
        index = low.reshape(n * n, -1).int() + view * samples
        rows = torch.cat([index, index + 1], 1)
        weights = torch.cat([1 - part, part], 1)
        out += functional.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)
    return (out.T.reshape(slices, n, n) * (math.pi / views)).contiguous()
