"""Image quality as medical physicists measure it: noise texture, resolution, contrast, bias, detectability.

After AAPM Task Group 233 (Samei et al., Med Phys 2019;46:e735, doi:10.1002/mp.13763) and ICRU Report 87 (2012). A
network is not linear: its resolution depends on contrast and dose, so measure it on images that went through it with
the noise of that dose, averaged over realisations afterwards. The noise index is in `pipelines.noise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import j1

Array = NDArray[np.floating]
Float64 = NDArray[np.float64]
Mask = NDArray[np.bool_]

LESION_MM = 6.0
LESION_HU = 30.0
"""The low-contrast lesion whose contrast a denoiser must keep."""

_ESF_BIN_PX = 0.1
"""Radial step of the edge spread function."""
_FREQUENCY_STEP = 0.005
"""1/mm, of the TTF, at most; the line spread function is padded with zeros to get there."""
_SUPERSAMPLING = 7


@dataclass(frozen=True, slots=True)
class Curve:
    """A function of radial spatial frequency: `frequency` in 1/mm from 0 upwards, and `value` there."""

    frequency: Float64
    value: Float64

    def at(self, frequency: Float64) -> Float64:
        """Linear interpolation; 0 beyond the end."""
        return np.asarray(np.interp(frequency, self.frequency, self.value, right=0.0))


def trend_basis(n: int) -> Float64:
    """Orthonormal polynomials of second order in x and y on n × n pixels, (n², 6)."""
    x = np.linspace(-1, 1, n)
    yy, xx = (axis.ravel() for axis in np.meshgrid(x, x, indexing="ij"))
    basis, _ = np.linalg.qr(np.stack([np.ones_like(xx), xx, yy, xx * xx, xx * yy, yy * yy], axis=1))
    return np.asarray(basis)


def _detrended(rois: Float64) -> Float64:
    """Each region less its least-squares polynomial of second order in x and y."""
    basis = trend_basis(rois.shape[-1])
    flat = rois.reshape(len(rois), -1)
    return np.asarray((flat - flat @ basis @ basis.T).reshape(rois.shape))


def nps_2d(rois: Array, pixel_mm: float) -> Float64:
    """Noise power spectrum, ``NPS(u, v) = (Δ² / N²) · ⟨|DFT(ROI − polynomial)|²⟩`` (TG-233; ICRU 87).

    Its sum times the area of a frequency cell, ``1/(NΔ)²``, is the variance that the polynomial of second order leaves:
    ``1 − 6/N²`` of that of white noise. Of patients, take regions of a difference of two images; if these are two
    realisations of equal noise, halve the spectrum.

    Parameters
    ----------
    rois
        (region, N, N) HU, each uniform but for noise; 64 × 64 or 32 × 32 are usual.
    pixel_mm
        Δ, of square pixels.

    Returns
    -------
    (N, N) float64
        HU² mm², in the order of `numpy.fft.fftfreq`.

    Raises
    ------
    ValueError
        If the regions are not a stack of squares of at least 4 × 4.
    """
    if rois.ndim != 3 or rois.shape[1] != rois.shape[2] or rois.shape[1] < 4 or len(rois) == 0:
        raise ValueError(f"regions of shape {rois.shape}: give (region, N, N) with N of at least 4")
    power = np.abs(np.fft.fft2(_detrended(rois.astype(np.float64)))) ** 2
    return np.asarray(power.mean(axis=0) * pixel_mm**2 / rois.shape[1] ** 2)


def radial_nps(nps: Float64, pixel_mm: float) -> Curve:
    """`nps` (N, N) averaged over rings ``1/(NΔ)`` wide, from 0 to the Nyquist frequency ``1/(2Δ)``."""
    n = len(nps)
    axis = np.fft.fftfreq(n, pixel_mm)
    radius = np.asarray(np.hypot(axis[:, None], axis[None, :]), np.float64).ravel()
    ring = np.rint(radius * n * pixel_mm).astype(np.int64)
    cells = np.bincount(ring)
    inside = slice(n // 2 + 1)
    return Curve(
        np.asarray((np.bincount(ring, radius) / cells)[inside]),
        np.asarray((np.bincount(ring, nps.ravel()) / cells)[inside]),
    )


def peak_frequency(nps: Curve) -> float:
    """Where the radial NPS is highest (TG-233), 1/mm."""
    return float(nps.frequency[nps.value.argmax()])


def mean_frequency(nps: Curve) -> float:
    """``f_av = ∫ f·NPS(f) df / ∫ NPS(f) df`` of the radial NPS (TG-233), 1/mm.

    After denoising it falls; a fall of a quarter is the look of plastic. The detrend of `nps_2d` takes the lowest bins:
    the mean comes out too high, the more so the smoother the noise, by 20 % where it is 4 steps of the curve. Larger
    regions take less.

    Raises
    ------
    ValueError
        If there is no noise.
    """
    total = float(np.trapezoid(nps.value, nps.frequency))
    if total == 0:
        raise ValueError("noise power is 0 at all frequencies: the regions have no noise")
    return float(np.trapezoid(nps.frequency * nps.value, nps.frequency)) / total


def _centred_radius(image: Float64, centre_px: tuple[float, float], radius_px: float) -> Float64:
    """Distance of each pixel from the insert's centre of gravity, px; `centre_px` is where to start."""
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    y, x = centre_px
    for _ in range(3):  # the window follows the centre: after three rounds it stands still
        r = np.hypot(rows - y, columns - x)
        around, near = (r > 1.5 * radius_px) & (r < 2 * radius_px), r < 1.5 * radius_px
        weight = image[near] - image[around].mean()
        if weight.sum() == 0:
            raise ValueError(f"insert at {centre_px} has the HU of its surrounding: it has no edge")
        y, x = (float((axis[near] * weight).sum() / weight.sum()) for axis in (rows, columns))
    return np.asarray(np.hypot(rows - y, columns - x))


def ttf(image: Array, pixel_mm: float, centre_px: tuple[float, float], radius_mm: float) -> Curve:
    """Task transfer function of a circular insert (TG-233; Richard et al., Med Phys 2012;39:4115).

    The edge spread function is the mean over the circle in radial steps of 0.1 pixel around the insert's centre of
    gravity; its derivative, under a Hann window as wide as the insert, is the line spread function; the modulus of its
    Fourier transform, 1 at frequency 0, is the TTF. For a linear system it is the MTF.

    Parameters
    ----------
    image
        (y, x) HU, uniform around the insert to twice its radius. Average realisations: noise bends the curve up.
    pixel_mm
        Of square pixels.
    centre_px, radius_mm
        Of the insert: centre (y, x) to a pixel or two, radius as manufactured.

    Returns
    -------
    Curve
        From 0 to 1/pixel_mm; dimensionless.

    Raises
    ------
    ValueError
        If the surrounding is not in the image, or the insert is less than 5 pixels in radius or has no contrast.
    """
    radius_px = radius_mm / pixel_mm
    reach = 2 * radius_px
    if any(c < reach or c > n - 1 - reach for c, n in zip(centre_px, image.shape, strict=True)):
        raise ValueError(f"insert at {centre_px} of {radius_mm:g} mm: twice its radius leaves the image {image.shape}")
    if radius_px < 5:
        raise ValueError(f"insert of {radius_mm:g} mm is {radius_px:.1f} pixels in radius: at least 5 make an edge")
    hu = image.astype(np.float64)
    r = _centred_radius(hu, centre_px, radius_px)
    bins = np.rint(r / _ESF_BIN_PX).astype(np.int64)[r < reach - 1]
    cells = np.bincount(bins)
    seen = cells > 0
    where = np.bincount(bins, r[r < reach - 1])[seen] / cells[seen]
    esf = np.bincount(bins, hu[r < reach - 1])[seen] / cells[seen]
    fine = np.arange(math.floor(reach - 2) / _ESF_BIN_PX) * _ESF_BIN_PX
    lsf = -np.diff(np.interp(fine, where, esf))
    offset = fine[:-1] + _ESF_BIN_PX / 2 - radius_px
    lsf *= np.where(np.abs(offset) < radius_px, np.cos(np.pi * offset / (2 * radius_px)) ** 2, 0)
    step_mm = _ESF_BIN_PX * pixel_mm
    n = max(len(lsf), math.ceil(1 / (_FREQUENCY_STEP * step_mm)))
    transfer, frequency = np.abs(np.fft.rfft(lsf, n)), np.fft.rfftfreq(n, step_mm)
    shown = frequency <= 1 / pixel_mm
    return Curve(np.asarray(frequency[shown], np.float64), np.asarray(transfer[shown] / transfer[0]))


def falls_to(curve: Curve, level: float) -> float:
    """Where `curve` first falls to `level`, 1/mm: f50 of a TTF at 0.5, f10 at 0.1.

    Raises
    ------
    ValueError
        If it stays above.
    """
    below = curve.value <= level
    if not below.any():
        raise ValueError(f"curve stays above {level:g} up to {curve.frequency[-1]:.3g} per mm")
    k = int(below.argmax())
    if k == 0:
        return float(curve.frequency[0])
    part = (curve.value[k - 1] - level) / (curve.value[k - 1] - curve.value[k])
    return float(curve.frequency[k - 1] + part * (curve.frequency[k] - curve.frequency[k - 1]))


def disc_task() -> Callable[[Float64], Float64]:
    """The task "is a disc of `LESION_MM` and `LESION_HU` there" (TG-233).

    ``W(f) = C·R·J1(2πRf)/f``, its Fourier transform, HU mm² of f in 1/mm.
    """
    radius = LESION_MM / 2

    def task(frequency: Float64) -> Float64:
        x = 2 * np.pi * radius * frequency
        area = LESION_HU * np.pi * radius**2
        return np.asarray(area * np.where(x > 0, 2 * j1(x) / np.where(x > 0, x, 1), 1))

    return task


def detectability(transfer: Curve, nps: Curve, task: Callable[[Float64], Float64]) -> float:
    """Detectability index d′ of the non-prewhitening observer (TG-233; ICRU 87), dimensionless.

    ``d′² = [2π ∫ |W|² TTF² f df]² / (2π ∫ |W|² TTF² NPS f df)`` over the frequencies of both curves.

    Parameters
    ----------
    transfer
        TTF at the contrast of the task.
    nps
        Radial NPS, HU² mm². Its lowest bins are detrended away: of a task broader than its regions d′ is too high.
    task
        W, HU mm², of the frequency in 1/mm; see `disc_task`.

    Raises
    ------
    ValueError
        If there is no noise where the task is.
    """
    end = min(transfer.frequency[-1], nps.frequency[-1])
    f = np.linspace(0, end, 2001)
    signal = 2 * np.pi * f * (task(f) * transfer.at(f)) ** 2
    noise = float(np.trapezoid(signal * nps.at(f), f))
    if noise == 0:
        raise ValueError("noise power is 0 at the frequencies of the task: there is no d' without noise")
    return float(np.trapezoid(signal, f)) / math.sqrt(noise)


def cnr(image: Array, feature: Mask, background: Mask) -> float:
    """Contrast-to-noise ratio, ``|mean(feature) − mean(background)| / SD(background)`` (ICRU 87), of HU under masks.

    Raises
    ------
    ValueError
        If the background has no noise, or a mask selects nothing.
    """
    if not feature.any() or not background.any():
        raise ValueError("mask of the feature or of the background is empty")
    inside, outside = image[feature].astype(np.float64), image[background].astype(np.float64)
    if outside.std() == 0:
        raise ValueError("background has no noise: its CNR is infinite")
    return float(abs(inside.mean() - outside.mean()) / outside.std())


def lesion(shape: tuple[int, int, int], voxel_mm: tuple[float, float, float]) -> Float64:
    """A ball of `LESION_MM` and `LESION_HU` on zero, to be added to an image; blur it to the band of that image.

    Parameters
    ----------
    shape, voxel_mm
        (z, y, x); the ball is in the middle. A voxel that its surface crosses has the fraction covered.

    Returns
    -------
    (z, y, x) float64
        HU.
    """
    fine = [
        (((np.arange(n * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING - n / 2) * size) ** 2
        for n, size in zip(shape, voxel_mm, strict=True)
    ]
    ball = np.zeros(shape)
    plane = fine[1][:, None] + fine[2]
    for k, z2 in enumerate(fine[0]):
        if z2 > (LESION_MM / 2) ** 2:
            continue
        covered = (plane + z2 <= (LESION_MM / 2) ** 2).reshape(shape[1], _SUPERSAMPLING, shape[2], _SUPERSAMPLING)
        ball[k // _SUPERSAMPLING] += covered.mean(axis=(1, 3)) / _SUPERSAMPLING
    return ball * LESION_HU


def contrast_recovery(with_lesion: Array, without_lesion: Array, inserted: Array) -> float:
    """How much of an inserted contrast is left, ``contrast out / contrast in``, dimensionless.

    Denoise an image with and without the lesion, under the same noise: the difference is what came through, free of
    anatomy and of noise. Contrast is the mean over the voxels that hold at least half of the lesion's highest value.

    Parameters
    ----------
    with_lesion, without_lesion
        The two results, HU.
    inserted
        What was added before denoising, HU, of one sign, of the same shape.

    Raises
    ------
    ValueError
        If nothing was inserted.
    """
    core = np.abs(inserted) >= np.abs(inserted).max() / 2
    contrast_in = float(inserted[core].mean(dtype=np.float64))
    if contrast_in == 0:
        raise ValueError("nothing was inserted: the lesion is 0 HU everywhere")
    difference = with_lesion[core].astype(np.float64) - without_lesion[core]
    return float(difference.mean()) / contrast_in


def hu_bias(after: Array, before: Array, masks: dict[str, Mask]) -> dict[str, float]:
    """``mean(after − before)`` in HU of each tissue that is there; `masks` of `training.tissues`."""
    return {
        name: float((after[mask].astype(np.float64) - before[mask]).mean())
        for name, mask in masks.items()
        if mask.any()
    }
