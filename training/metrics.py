"""Image quality against a truth, as the papers define it: L1, RMSE, NMSE, PSNR, SSIM and mutual information.

Every number depends on the HU window it is taken in, so every function asks for one: images are clipped to it and
mapped to [0, 1], the range in which the papers compute, in float64. Print the window with the number.

The first argument is what is judged, the second the truth. Without truth: `training.physics` and `pipelines.noise`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d

Array = NDArray[np.floating]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Window:
    """The HU that become 0 and 1; everything outside is clipped.

    Raises
    ------
    ValueError
        If `high_hu` is not above `low_hu`.
    """

    low_hu: float
    high_hu: float

    def __post_init__(self) -> None:
        if not self.low_hu < self.high_hu:
            raise ValueError(f"window from {self.low_hu:g} to {self.high_hu:g} HU is empty: give the lower end first")

    def __str__(self) -> str:
        return f"{self.low_hu:g} to {self.high_hu:g} HU"

    def normalise(self, hu: Array) -> Float64:
        """`hu` clipped to the window and mapped to [0, 1], any shape.

        Raises
        ------
        ValueError
            If a value is NaN or infinite.
        """
        if not np.isfinite(hu).all():
            raise ValueError("image has NaN or infinite values: replace or leave out what was not measured")
        clipped = np.clip(hu.astype(np.float64), self.low_hu, self.high_hu)
        return np.asarray((clipped - self.low_hu) / (self.high_hu - self.low_hu))


SOFT_TISSUE = Window(-160.0, 240.0)
"""That of the DCSCN paper: its RMSE of 0.0723 are 29 HU only in a unit interval of 400 HU."""
LUNG = Window(-1000.0, 400.0)
FULL = Window(-1024.0, 3071.0)
"""All that 12 bits hold with an intercept of -1024."""

_SSIM_RADIUS_PX = 5
_SSIM_SIGMA_PX = 1.5
_K1, _K2 = 0.01, 0.03
_MI_BINS = 256


def _pair(image: Array, truth: Array, window: Window) -> tuple[Float64, Float64]:
    """Both images on [0, 1], after a look at their shapes."""
    if image.shape != truth.shape or image.size == 0:
        raise ValueError(
            f"image of shape {image.shape} and truth of shape {truth.shape}: both must be equal, not empty"
        )
    return window.normalise(image), window.normalise(truth)


def l1(image: Array, truth: Array, window: Window) -> float:
    """Mean absolute error, ``mean |Î − I|`` on [0, 1] (HQINet, Table 1).

    Parameters
    ----------
    image, truth
        HU, any equal shape. So for all functions here.
    window
        Where it is measured.

    Raises
    ------
    ValueError
        If the shapes differ or a value is not finite. So for all functions here.
    """
    a, b = _pair(image, truth, window)
    return float(np.abs(a - b).mean())


def rmse(image: Array, truth: Array, window: Window) -> float:
    """Root mean square error, ``√ mean (Î − I)²`` on [0, 1] (DCSCN, Table 1); times the window's width it is in HU."""
    a, b = _pair(image, truth, window)
    return math.sqrt(float(np.square(a - b).mean()))


def nmse(image: Array, truth: Array, window: Window) -> float:
    """Normalised mean square error, ``‖Î − I‖² / ‖I‖²`` on [0, 1] (HQINet, Table 1).

    Raises
    ------
    ValueError
        Also if the truth lies at or below the window everywhere: its norm is 0.
    """
    a, b = _pair(image, truth, window)
    norm = float(np.square(b).sum())
    if norm == 0:
        raise ValueError(f"truth is nowhere above {window.low_hu:g} HU, so NMSE has no scale: take a lower window")
    return float(np.square(a - b).sum()) / norm


def psnr(image: Array, truth: Array, window: Window, mode: Literal["standard", "hqinet_eq5"] = "standard") -> float:
    """Peak signal-to-noise ratio in dB.

    ``standard``
        ``10·log10(1 / MSE) = −20·log10(RMSE)``, the peak being the width of the window. The rows of the DCSCN paper's
        Table 1 obey it.
    ``hqinet_eq5``
        ``10·log10(MAX(I)² / √MSE)`` with the maximum of the truth on [0, 1], as equation 5 of the HQINet paper is
        printed. A typing error: the root is too much. The paper's own table (L1 0.043, PSNR 25.81 dB) fits the
        standard formula, the printed one would give 13 dB. Never compare it with any other PSNR.

    Returns
    -------
    float
        dB; infinite for equal images.
    """
    error = rmse(image, truth, window)
    if error == 0:
        return math.inf
    if mode == "standard":
        return -20 * math.log10(error)
    peak = float(window.normalise(truth).max())
    if peak == 0:
        raise ValueError(f"truth is nowhere above {window.low_hu:g} HU, so it has no peak: take a lower window")
    return 10 * math.log10(peak**2 / error)


def _gaussian_mean(image: Float64) -> Float64:
    """Mean under the 11 × 11 Gaussian of each place in the plane where it fits."""
    x = np.arange(-_SSIM_RADIUS_PX, _SSIM_RADIUS_PX + 1)
    weights = np.exp(-(x**2) / (2 * _SSIM_SIGMA_PX**2))
    weights /= weights.sum()
    mean = correlate1d(correlate1d(image, weights, axis=-2), weights, axis=-1)
    inside = slice(_SSIM_RADIUS_PX, -_SSIM_RADIUS_PX)
    return np.asarray(mean[..., inside, inside])


def ssim(image: Array, truth: Array, window: Window) -> float:
    """Mean structural similarity on [0, 1] (Wang et al., IEEE Trans Image Process 2004;13:600-612, eq. 13).

    ``(2 μx μy + C1)(2 σxy + C2) / ((μx² + μy² + C1)(σx² + σy² + C2))``, C1 = 0.01², C2 = 0.03², moments under an
    11 × 11 Gaussian of σ 1.5 pixels, averaged over all places where it fits. Luminance counts from the window's lower
    end: on HU that are not shifted the number is another.

    Parameters
    ----------
    image, truth
        HU, (y, x), or (z, y, x): then the mean over axial slices.
    window
        Where it is measured.

    Raises
    ------
    ValueError
        Also if a slice is smaller than 11 × 11.
    """
    x, y = _pair(image, truth, window)
    size = 2 * _SSIM_RADIUS_PX + 1
    if x.ndim not in (2, 3) or min(x.shape[-2:]) < size:
        raise ValueError(f"image of shape {x.shape}: SSIM needs (y, x) or (z, y, x) of at least {size} × {size} pixels")
    mx, my = _gaussian_mean(x), _gaussian_mean(y)
    vx, vy = _gaussian_mean(x * x) - mx * mx, _gaussian_mean(y * y) - my * my
    covariance = _gaussian_mean(x * y) - mx * my
    c1, c2 = _K1**2, _K2**2
    likeness = (2 * mx * my + c1) * (2 * covariance + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(likeness.mean())


def mutual_information(image: Array, truth: Array, window: Window) -> float:
    """Mutual information in nats, ``Σ p(a, b) ln[p(a, b) / (p(a) p(b))]`` (HQINet, Table 1).

    The paper leaves bins and logarithm open: here 256 equal bins over the window, natural logarithm. The estimate of
    a histogram is too high for few pixels, by about (occupied bins of the joint histogram) / (2 · pixels).
    """
    a, b = _pair(image, truth, window)
    counts, _, _ = np.histogram2d(a.ravel(), b.ravel(), bins=_MI_BINS, range=((0, 1), (0, 1)))
    p = counts / counts.sum()
    independent = np.outer(p.sum(axis=1), p.sum(axis=0))
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / independent[seen])).sum())
