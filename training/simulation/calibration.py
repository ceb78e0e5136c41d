"""Which scanner made this series? Kernel and photons, from the noise of the images alone.

1. The noise index (`pipelines.noise`) says how much noise there is.
2. The spectrum of the noise in quiet soft tissue says which kernel it went through. It is taken from differences of
   slices that share no layer of tissue, where they exist: anatomy that runs through both is no noise.
3. The photons are those with which a virtual scan has the noise of the series, place by place and slice by slice; the
   tube current in the headers is where that starts from. In all they are as many as make the noise index double at a
   quarter of the dose.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from pydicom import dcmread
from scipy.ndimage import convolve1d, gaussian_filter, gaussian_filter1d, minimum_filter

from pipelines.elements import BadElement, numbers, shown, text
from pipelines.noise import SOFT_TISSUE_HU, WINDOW_MM, local_sd, noise_level
from pipelines.volume import Volume
from training.physics import Curve, nps_2d, radial_nps
from training.simulate import full_dose_noise
from training.simulation.counts import ELECTRONIC_COUNTS, Beam
from training.simulation.kernel_fit import fit_kernel, tile_size
from training.simulation.projection import Kernel

Array = NDArray[np.float32]

AIR_HU = -1024.0
"""Put in the place of what was not measured."""
DEFAULT_KERNEL = Kernel(0.45)
KERNELS = {
    "b": Kernel(0.38),
    "b10": Kernel(0.26),
    "b30": Kernel(0.39),
    "b40": Kernel(0.43),
    "b70": Kernel(0.5, 1.83),
    "d": Kernel(0.52),
    "l": Kernel(0.373, 4.0),
    "lung": Kernel(0.57),
    "standard": Kernel(0.42, 0.16),
    "std+": Kernel(0.385),
    "ub": Kernel(0.38),
    "ya": Kernel(0.565, 1.43),
}
"""Found with this module, by ConvolutionKernel in lower case; those of Siemens without their last letter."""
_GOLDEN = (math.sqrt(5) - 1) / 2
_ENOUGH_TILES = 300
_FEWEST_TILES = 8
_FEWEST_QUIET_TILES = 30
_FEWEST_WINDOWS = 500
_EVEN_MM = 10.0
"""Over such distances noise is even."""
_QUIET_PART = 0.4
"""Of the tiles those with the least variance: the others have edges."""
_TISSUE_SMOOTHING_PX = 2.5
_TISSUE_PART = 0.97
"""Of the pixels of a tile that must be soft tissue."""
_LOOKED_AT = 8
"""Slices that are scanned virtually for the photons."""
_BODY_HU = -200.0
_MOST_CONTRADICTION = 0.35
"""By how much the noise of a slice may contradict the tube current of the headers, in the logarithm of the photons."""
_MOST_MODULATION = 20.0
"""Highest over lowest tube current of a series that is believed."""
_ROUNDS = (2, _LOOKED_AT)
"""Slices scanned: the second round corrects for the electronic noise, which is not proportional to 1/photons."""
_MODE_STEP = 0.005
_MODE_SMOOTHING = 0.06
"""Of the logarithm of a standard deviation."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The scanner of a series."""

    kernel: Kernel
    beam: Beam
    overlap: float
    """Slice thickness over increment, at least 1."""
    current: tuple[float, ...]
    """Of each slice, in units of that of `beam`: from the headers, corrected by the noise of some slices."""
    noise_hu: float
    """Noise index of the series."""
    kernel_from: str
    """``"differences of slices"``, ``"single slices"``, ``"table: NAME"`` or ``"default"``."""
    tiles: int = 0
    """Quiet tiles that the kernel was found from."""
    residual: float = math.nan
    """`training.simulation.kernel_fit.Fit.residual`; NaN if nothing was fitted."""


def calibrate(volume: Volume, seed: int = 0, modulation: float = 0.0, device: str = "cpu") -> Calibration:
    """Find kernel and photons with which a virtual scan of `volume` has the noise that the volume has.

    Parameters
    ----------
    volume
        A series at full dose, square slices.
    seed
        Of the noise of the virtual scan.
    modulation
        Tube-current modulation over the angle, see `training.simulation.counts.Beam`.
    device
        Of torch.

    Raises
    ------
    ValueError
        If the slices are not square, or there is no noise at all.
    """
    pixel_mm = square_pixel_mm(volume)
    overlap = overlap_of(volume)
    noise_hu = noise_level(volume.hu, volume.padding, pixel_mm)
    if noise_hu == 0:
        raise ValueError("the series has no noise: nothing can be learnt of its scanner")
    beam = Beam(electronic=ELECTRONIC_COUNTS, modulation=modulation)
    found = Calibration(DEFAULT_KERNEL, beam, overlap, (), noise_hu, "default")
    for apart, source in ((math.ceil(overlap - 1e-6), "differences of slices"), (0, "single slices")):
        spectrum, tiles = noise_spectrum(volume, pixel_mm, apart)
        if spectrum is not None:
            fit = fit_kernel(spectrum, pixel_mm)
            found = replace(found, kernel=fit.kernel, kernel_from=source, tiles=tiles, residual=fit.residual)
            break
    else:
        name = kernel_name(volume)
        if name in KERNELS:
            found = replace(found, kernel=KERNELS[name], kernel_from=f"table: {shown(name)}")
    return _with_photons(found, volume, pixel_mm, seed, device)


def square_pixel_mm(volume: Volume) -> float:
    """Pixel size of `volume`.

    Raises
    ------
    ValueError
        If pixels or slices are not square.
    """
    rows, columns = volume.geometry.spacing_mm[1:]
    if not math.isclose(rows, columns, rel_tol=1e-3) or volume.hu.shape[1] != volume.hu.shape[2]:
        raise ValueError(
            f"slices of {volume.hu.shape[1:]} pixels of {rows:g} x {columns:g} mm: the virtual scan needs square ones"
        )
    return columns


def overlap_of(volume: Volume) -> float:
    """Slice thickness over increment, at least 1; 1 where one of them is not known."""
    spacing_mm = volume.geometry.spacing_mm[0]
    return max(1.0, volume.thickness_mm / spacing_mm) if len(volume.hu) > 1 and spacing_mm > 0 else 1.0


def without_padding(volume: Volume, k: int) -> Array:
    """HU of slice `k` with air where nothing was measured, (y, x)."""
    return np.where(volume.padding[k], np.float32(AIR_HU), np.maximum(volume.hu[k], np.float32(AIR_HU)))


def tube_current(volume: Volume) -> tuple[float, ...]:
    """XRayTubeCurrent of each slice over the mean; empty if one is missing or nonsense, or all are the same."""
    found = []
    for path in volume.slice_paths:
        header = dcmread(path, stop_before_pixels=True, specific_tags=["XRayTubeCurrent"])
        try:
            value = numbers(header, "XRayTubeCurrent", 1)
        except BadElement:
            return ()
        if value is None or value[0] <= 0:
            return ()
        found.append(value[0])
    if not found or min(found) == max(found) or max(found) > _MOST_MODULATION * min(found):
        return ()
    mean = sum(found) / len(found)
    return tuple(one / mean for one in found)


def kernel_name(volume: Volume) -> str:
    """ConvolutionKernel as `KERNELS` spells it; empty if the files do not tell."""
    if not volume.slice_paths:
        return ""
    header = dcmread(volume.slice_paths[0], stop_before_pixels=True, specific_tags=["ConvolutionKernel"])
    try:
        name = text(header, "ConvolutionKernel").casefold()
    except BadElement:
        return ""
    return re.sub(r"^(b\d\d)[fhs]$", r"\1", name)


def noise_spectrum(volume: Volume, pixel_mm: float, apart: int) -> tuple[Curve | None, int]:
    """Radial NPS of quiet soft tissue and the number of tiles that it was measured on; None if there are too few.

    Parameters
    ----------
    apart
        The noise is the difference of slices so many apart over √2; 0: the slices themselves, anatomy included.
    """
    tiles: list[Array] = []
    pairs = max(len(volume.hu) - apart, 0)
    for k in np.argsort(np.arange(pairs) * _GOLDEN % 1):  # spread over the series from the first on
        slices = [without_padding(volume, one) for one in ((k, k + apart) if apart else (k,))]
        noise = (slices[0] - slices[1]) / np.float32(math.sqrt(2)) if apart else slices[0]
        tiles += tissue_tiles(slices, noise, tile_size(pixel_mm))
        if len(tiles) >= _ENOUGH_TILES:
            break
    if len(tiles) < _FEWEST_TILES:
        return None, len(tiles)
    stack = np.stack(tiles)
    quiet = stack[np.argsort(stack.var((1, 2)))[: max(_FEWEST_QUIET_TILES, round(_QUIET_PART * len(stack)))]]
    return radial_nps(nps_2d(quiet, pixel_mm), pixel_mm), len(quiet)


def tissue_tiles(slices: Sequence[Array], noise: Array, size: int) -> list[Array]:
    """Half-overlapping tiles of `noise` (y, x) where all `slices` show soft tissue."""
    tissue = np.ones(noise.shape, np.bool_)
    for one in slices:
        smooth = gaussian_filter(one, _TISSUE_SMOOTHING_PX)
        tissue &= (smooth > SOFT_TISSUE_HU[0]) & (smooth < SOFT_TISSUE_HU[1])
    part = sliding_window_view(tissue, (size, size))[:: size // 2, :: size // 2].mean((2, 3))
    corners = np.argwhere(part > _TISSUE_PART) * (size // 2)
    return [noise[y : y + size, x : x + size] for y, x in corners]


def _with_photons(found: Calibration, volume: Volume, pixel_mm: float, seed: int, device: str) -> Calibration:
    """`found` with as many photons as give the virtual scan the noise of the series, slice by slice.

    The noise index of a whole slice blurs where its noise is uneven. Here each local standard deviation is taken in
    units of the one that the virtual scan has there, and the mode of that is compared with the virtual scan's own.
    Some slices are looked at, none is believed alone, and between them the factor is interpolated.
    """
    looked_at, windows = _windows(volume, pixel_mm)
    hu = np.stack([without_padding(volume, k) for k in looked_at])
    current = tube_current(volume) or (1.0,) * len(volume.hu)
    beam, size, whole = found.beam, _window_px(pixel_mm), np.zeros(hu.shape[1:], np.bool_)
    for count in _ROUNDS:
        scanned = [current[k] for k in looked_at[:count]]
        noise = full_dose_noise(hu[:count], pixel_mm, seed, found.kernel, beam, current=scanned, device=device)
        missing = []
        for image, one, inside in zip(hu, noise, windows, strict=False):
            body = (image > _BODY_HU).astype(np.float32)
            around = _EVEN_MM / pixel_mm
            expected = np.sqrt(gaussian_filter(one**2 * body, around)[inside] / gaussian_filter(body, around)[inside])
            own, simulated = (_likeliest(local_sd(what, whole, size)[0][inside] / expected) for what in (image, one))
            missing.append((simulated / own) ** 2)
        photons = float(np.median(missing))
        beam = replace(beam, n0=float(f"{beam.n0 * photons:.3g}"))
    excess = _excess(hu, noise / np.float32(math.sqrt(photons)), volume.padding[looked_at], pixel_mm)
    beam = replace(beam, n0=float(f"{beam.n0 * excess:.3g}"))
    along = np.argsort(looked_at)
    contradiction = np.clip(np.log(np.array(missing)[along] / photons), -_MOST_CONTRADICTION, _MOST_CONTRADICTION)
    relative = np.exp(convolve1d(contradiction, (0.25, 0.5, 0.25), mode="nearest"))
    factor = np.interp(np.arange(len(volume.hu)), np.array(looked_at)[along], relative)
    return replace(
        found, beam=beam, current=tuple(round(float(a * b), 3) for a, b in zip(current, factor, strict=True))
    )


def _excess(hu: Array, noise: Array, padding: NDArray[np.bool_], pixel_mm: float) -> float:
    """Variance that `noise`, of the full dose, brings into the noise index of slices, over the one it should bring.

    At a quarter of the dose three times the variance of the full dose is added, and the index doubles.
    """
    ratios = []
    for image, one, mask in zip(hu, noise, padding, strict=True):
        quarter = image + np.float32(math.sqrt(3)) * one
        before, after = (noise_level(what[None], mask[None], pixel_mm) for what in (image, quarter))
        if before > 0:
            ratios.append(after / before)
    return (float(np.median(ratios)) ** 2 - 1) / 3 if ratios else 1.0


def _windows(volume: Volume, pixel_mm: float) -> tuple[list[int], NDArray[np.bool_]]:
    """Some slices, and where in them a window is full of soft tissue.

    If no slice has enough of that, windows of anything denser than lung.

    Raises
    ------
    ValueError
        If there is no body.
    """
    size = _window_px(pixel_mm)
    for low, high in (SOFT_TISSUE_HU, (_BODY_HU, math.inf)):
        slices: list[int] = []
        windows = []
        for k in np.argsort(np.arange(len(volume.hu)) * _GOLDEN % 1):
            smooth = gaussian_filter(without_padding(volume, int(k)), _TISSUE_SMOOTHING_PX)
            inside = minimum_filter((smooth > low) & (smooth < high), size)
            if np.count_nonzero(inside) >= _FEWEST_WINDOWS:
                slices.append(int(k))
                windows.append(inside)
            if len(slices) == _LOOKED_AT:
                break
        if slices:
            return slices, np.stack(windows)
    raise ValueError("the series shows no body: nothing can be learnt of its scanner")


def _window_px(pixel_mm: float) -> int:
    """Odd width of the window of the noise index."""
    return max(2 * round(WINDOW_MM / pixel_mm / 2) + 1, 5)


def _likeliest(values: Array) -> float:
    """Most frequent of positive values, by a histogram of their logarithms, smoothed: here of ratios, not of HU."""
    counts, edges = np.histogram(np.log(values[values > 0]), bins=np.arange(-3, 6, _MODE_STEP))
    top = int(gaussian_filter1d(counts.astype(np.float64), _MODE_SMOOTHING / _MODE_STEP).argmax())
    return math.exp((edges[top] + edges[top + 1]) / 2)
