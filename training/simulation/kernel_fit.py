"""The kernel behind the noise of a series: a fit of the spectrum that small tiles of the image must show.

A tile of 12 mm has few frequencies, and neither its edges nor the removal of its trend leave the spectrum as it
is. So the kernel's spectrum is not compared with the measured one, but what tiles would show of it: the autocovariance
of the image noise gives the covariance of a tile, and that goes through the same polynomial and the same transform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from training.physics import Curve, mean_frequency, radial_nps, trend_basis
from training.simulation.projection import Kernel

Float64 = NDArray[np.float64]

TILE_MM = 12.0
"""Large enough for some frequencies below the peak, small enough for a muscle."""
F50_RANGE = (0.1, 1.5)
"""1/mm: the softest kernel of nuclear medicine's attenuation maps, and the sharpest of the inner ear."""
BOOST_RANGE = (0.0, 4.0)
_MEAN_FREQUENCY_WEIGHT = 1.0
_MAX_STEPS = 60
_SIMPLEX = ((0.0, 0.0), (0.15, 0.0), (0.0, 0.5))
"""First steps from the best point of the grid, in (ln f50, boost)."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A kernel and how well it explains what was measured."""

    kernel: Kernel
    residual: float
    """Root mean square difference of the spectra over root mean square of the measured one, weighted with frequency."""


def tile_size(pixel_mm: float) -> int:
    """Pixels along a side of a tile, even."""
    return max(2 * round(TILE_MM / pixel_mm / 2), 14)


def tile_spectrum(kernel: Kernel, pixel_mm: float) -> Curve:
    """Radial NPS that detrended tiles show of the noise of `kernel`, in arbitrary units.

    Filtered back-projection of white noise has the spectrum ``|A(f)|²/f`` (Kak and Slaney 1988, 5.3) up to the Nyquist
    frequency of the detector; sampling with pixels aliases what lies beyond theirs.
    """
    fine = kernel.bins_per_pixel(pixel_mm)
    n = tile_size(pixel_mm)
    axis = np.fft.fftfreq(4 * n * fine, pixel_mm / fine)  # wide enough that a tile does not meet its own repetition
    f = np.hypot(axis[:, None], axis[None, :])
    power = np.where((f > 0) & (f <= 0.5 * fine / pixel_mm), kernel.ramp(f) ** 2 / np.maximum(f, 1e-9), 0)
    covariance = np.fft.ifft2(power).real[::fine, ::fine]

    basis, spectra = _trend(n)
    lag = np.arange(-n + 1, n)
    pairs = (n - np.abs(lag)).astype(np.float64)
    folded = np.zeros((n, n))
    # at each lag there are so many pairs of pixels in a tile; the transform knows lags modulo the tile
    np.add.at(folded, np.ix_(lag % n, lag % n), covariance[np.ix_(lag, lag)] * np.outer(pairs, pairs))
    raw = np.fft.fft2(folded).real
    # less the trend: E|F(1−BBᵀ)n|² = diag F·C·Fᴴ − 2 Re diag F·B·Bᵀ·C·Fᴴ + diag F·B·(Bᵀ·C·B)·Bᵀ·Fᴴ
    moved = np.stack([_convolved(np.fft.fft2(covariance), tile) for tile in basis])
    moved_spectra = np.fft.fft2(moved)
    inner = np.einsum("kyx,lyx->kl", basis, moved)
    cross = (spectra * moved_spectra.conj()).sum(0).real
    twice = np.einsum("kyx,kl,lyx->yx", spectra, inner, spectra.conj()).real
    return radial_nps(np.maximum(raw - 2 * cross + twice, 0), pixel_mm)


def fit_kernel(measured: Curve, pixel_mm: float) -> Fit:
    """The kernel whose `tile_spectrum` is nearest to the radial NPS `measured` of tiles, whatever its scale.

    Squares are weighted with the frequency, as the area of a ring of the spectrum is: low frequencies, where anatomy
    is, count little. The mean frequency, by which noise texture is judged, counts beside them.
    """
    weight = measured.frequency
    mean = mean_frequency(measured)
    scale = float((weight * measured.value**2).sum())

    def differences(kernel: Kernel) -> tuple[float, float]:
        """Relative, of the spectra (root mean square) and of their mean frequencies."""
        model = tile_spectrum(kernel, pixel_mm)
        factor = float((weight * model.value * measured.value).sum() / (weight * model.value**2).sum())
        squares = float((weight * (factor * model.value - measured.value) ** 2).sum() / scale)
        return math.sqrt(squares), mean_frequency(model) / mean - 1

    def distance(kernel: Kernel) -> float:
        shape, texture = differences(kernel)
        return shape**2 + _MEAN_FREQUENCY_WEIGHT * texture**2

    def kernel_at(point: Float64) -> Kernel:
        return Kernel(float(np.clip(np.exp(point[0]), *F50_RANGE)), float(np.clip(point[1], *BOOST_RANGE)))

    starts = [(f50, boost) for f50 in np.geomspace(*F50_RANGE, 12) for boost in (0.0, 1.0, 2.0)]
    best = min(starts, key=lambda start: distance(Kernel(*start)))
    found = minimize(
        lambda point: distance(kernel_at(point)),
        (math.log(best[0]), best[1]),
        method="Nelder-Mead",
        options={"maxfev": _MAX_STEPS, "initial_simplex": [(math.log(best[0]) + a, best[1] + b) for a, b in _SIMPLEX]},
    )
    kernel = kernel_at(found.x)
    kernel = Kernel(round(kernel.f50, 3), round(kernel.boost, 2))
    return Fit(kernel, differences(kernel)[0])


@cache
def _trend(n: int) -> tuple[Float64, NDArray[np.complex128]]:
    """Orthonormal polynomials of second order on a tile, (6, n, n), and their transforms."""
    basis = trend_basis(n).T.reshape(6, n, n)
    return basis, np.fft.fft2(basis)


def _convolved(spectrum: NDArray[np.complex128], tile: Float64) -> Float64:
    """`tile` convolved with the covariance of `spectrum`, within the tile."""
    wide = np.zeros(spectrum.shape)
    n = len(tile)
    wide[:n, :n] = tile
    return np.asarray(np.fft.ifft2(np.fft.fft2(wide) * spectrum).real[:n, :n])
