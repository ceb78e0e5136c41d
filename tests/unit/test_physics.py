"""Physics metrics against what is known without measuring: spectra, transfer functions and d' with a formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.ndimage import gaussian_filter
from scipy.special import j1

from training.physics import (
    LESION_HU,
    LESION_MM,
    Curve,
    cnr,
    contrast_recovery,
    detectability,
    disc_task,
    falls_to,
    lesion,
    mean_frequency,
    nps_2d,
    peak_frequency,
    radial_nps,
    ttf,
)

Float64 = NDArray[np.float64]
PIXEL_MM = 0.6
N = 64
SD_HU = 20.0
FINE = np.linspace(0, 4, 4001)
FLAT = Curve(FINE, np.ones_like(FINE))
WHITE = Curve(FINE, np.full_like(FINE, 144.0))


def regions(image: Float64) -> Float64:
    """`image` cut into squares of N × N."""
    k = len(image) // N
    return image[: k * N, : k * N].reshape(k, N, k, N).swapaxes(1, 2).reshape(-1, N, N)


def coloured(amplitude_of: Callable[[Float64], Float64], seed: int) -> Float64:
    """Noise of 640 × 640 whose NPS is (SD · Δ · amplitude)²."""
    white = np.random.default_rng(seed).normal(0, SD_HU, (640, 640))
    axis = np.fft.fftfreq(640, PIXEL_MM)
    return np.fft.ifft2(np.fft.fft2(white) * amplitude_of(np.hypot(axis[:, None], axis[None, :]))).real


def disc(sigma_mm: float, radius_mm: float, contrast_hu: float, offset_px: tuple[float, float]) -> Float64:
    """A blurred disc in 50 HU, drawn eight times finer; its centre is off the centre of the image."""
    n, fine = 120, 8
    axes = [((np.arange(n * fine) + 0.5) / fine - 0.5 - (n - 1) / 2 - o) * PIXEL_MM for o in offset_px]
    drawn = (np.hypot(axes[0][:, None], axes[1][None, :]) <= radius_mm) * contrast_hu
    blurred = gaussian_filter(drawn, sigma_mm / PIXEL_MM * fine, mode="nearest")
    return np.asarray(blurred.reshape(n, fine, n, fine).mean(axis=(1, 3)) + 50)


def test_nps_of_white_noise_is_flat_and_integrates_to_the_variance() -> None:
    rois = regions(np.random.default_rng(3).normal(0, SD_HU, (640, 640)))
    nps = nps_2d(rois + 40, PIXEL_MM)
    left = rois.size / len(rois)
    # Parseval, with the six degrees of freedom that the polynomial takes; 409,600 pixels know a variance to 0.22 %
    variance = nps.sum() / (N * PIXEL_MM) ** 2
    assert variance == pytest.approx(rois.var() * (1 - 6 / left), rel=1e-3)
    assert variance == pytest.approx(SD_HU**2, rel=0.01)
    curve = radial_nps(nps, PIXEL_MM)
    assert curve.value[4:] == pytest.approx(np.full(N // 2 - 3, SD_HU**2 * PIXEL_MM**2), rel=0.1)
    assert curve.frequency[-1] == pytest.approx(1 / (2 * PIXEL_MM), rel=0.01)
    assert mean_frequency(curve) == pytest.approx(1 / (4 * PIXEL_MM), rel=0.05)


def test_nps_ignores_a_background_of_second_order() -> None:
    noise = np.random.default_rng(4).normal(0, SD_HU, (5, N, N))
    y, x = np.mgrid[:N, :N] / N
    cupping = 300 * x - 200 * y + 150 * x * x - 90 * x * y + 500 * y * y
    assert nps_2d(noise + cupping, PIXEL_MM) == pytest.approx(nps_2d(noise, PIXEL_MM), abs=1e-6)


def test_nps_of_blurred_noise_is_the_square_of_the_blur() -> None:
    s = 0.4  # mm
    rois = regions(coloured(lambda f: np.exp(-2 * (np.pi * s * f) ** 2), seed=6))
    curve = radial_nps(nps_2d(rois, PIXEL_MM), PIXEL_MM)
    truth = SD_HU**2 * PIXEL_MM**2 * np.exp(-4 * (np.pi * s * curve.frequency) ** 2)
    # below that, power leaks in from low frequencies through the edges of the regions
    strong = (truth > truth[0] / 30) & (np.arange(len(truth)) >= 4)
    assert curve.value[strong] == pytest.approx(truth[strong], rel=0.15)
    # ∫ f exp(-a f²) df / ∫ exp(-a f²) df = 1 / √(π a), a = (2π s)²; the detrended lowest bins move it up
    mean = 1 / (2 * math.pi**1.5 * s)
    assert mean_frequency(Curve(FINE, np.exp(-4 * (np.pi * s * FINE) ** 2))) == pytest.approx(mean, rel=1e-4)
    assert mean_frequency(curve) == pytest.approx(mean, rel=0.1)


def test_nps_peak_of_band_noise() -> None:
    # f² exp(-a f²) is highest at 1/√a: filtered back-projection's ramp under a soft kernel
    peak = 0.3
    rois = regions(coloured(lambda f: f * np.exp(-((f / peak) ** 2) / 2), seed=8))
    curve = radial_nps(nps_2d(rois, PIXEL_MM), PIXEL_MM)
    assert peak_frequency(curve) == pytest.approx(peak, abs=2 / (N * PIXEL_MM))
    truth = Curve(curve.frequency, curve.frequency**2 * np.exp(-((curve.frequency / peak) ** 2)))
    assert mean_frequency(curve) == pytest.approx(mean_frequency(truth), rel=0.02)


@pytest.mark.parametrize("contrast_hu", [-100.0, 900.0])
def test_ttf_of_a_blurred_disc_is_that_of_the_blur(contrast_hu: float) -> None:
    s, radius = 0.7, 14.0  # mm
    image = disc(s, radius, contrast_hu, (0.37, -1.21))
    curve = ttf(image, PIXEL_MM, (59.0, 60.0), radius)
    # exp(-2 (π s f)²) of the blur; averaging over the pixel adds its variance Δ²/12, in all directions alike
    truth = np.exp(-2 * (np.pi * curve.frequency) ** 2 * (s**2 + PIXEL_MM**2 / 12))
    assert np.abs(curve.value - truth)[curve.frequency < 0.7].max() < 0.01
    total = math.hypot(s, PIXEL_MM / math.sqrt(12))
    assert falls_to(curve, 0.5) == pytest.approx(math.sqrt(math.log(2) / 2) / (math.pi * total), rel=0.02)
    assert falls_to(curve, 0.1) == pytest.approx(math.sqrt(math.log(10) / 2) / (math.pi * total), rel=0.02)


def test_ttf_survives_the_noise_of_averaged_realisations() -> None:
    s, radius = 0.7, 14.0
    image = disc(s, radius, 300, (0.2, 0.4)) + np.random.default_rng(9).normal(0, SD_HU / math.sqrt(20), (120, 120))
    total = math.hypot(s, PIXEL_MM / math.sqrt(12))
    found = falls_to(ttf(image, PIXEL_MM, (60.0, 60.0), radius), 0.5)
    assert found == pytest.approx(math.sqrt(math.log(2) / 2) / (math.pi * total), rel=0.05)


def test_detectability_in_white_noise_has_a_formula() -> None:
    # task C exp(-r²/2s²), blur of σ b: W·TTF = 2π s² C exp(-2π² (s² + b²) f²); ∬ its square = π C² s⁴ / (s² + b²)
    s, b, contrast = 1.5, 0.5, 10.0
    blur = Curve(FINE, np.exp(-2 * (np.pi * b * FINE) ** 2))
    expected = math.sqrt(math.pi * contrast**2 * s**4 / (s**2 + b**2) / 144)
    found = detectability(blur, WHITE, lambda f: 2 * np.pi * s**2 * contrast * np.exp(-2 * (np.pi * s * f) ** 2))
    assert found == pytest.approx(expected, rel=1e-4)


def test_detectability_of_a_disc() -> None:
    # Parseval: ∬ |W|² = C² π R² over all frequencies; up to 4 per mm 2 % of it is missing
    energy, _ = quad(lambda f: 2 * math.pi * f * (LESION_HU * 3 * j1(2 * math.pi * 3 * f) / f) ** 2, 1e-9, 4, limit=500)
    assert detectability(FLAT, WHITE, disc_task()) == pytest.approx(math.sqrt(energy / 144), rel=1e-3)
    assert energy == pytest.approx(LESION_HU**2 * math.pi * (LESION_MM / 2) ** 2, rel=0.02)
    assert disc_task()(np.zeros(1))[0] == pytest.approx(LESION_HU * math.pi * (LESION_MM / 2) ** 2)


def test_detectability_is_that_of_an_observer_with_a_template() -> None:
    # the observer correlates the image with what it looks for; d' is how far apart its answers are, in their SD
    s, blur, n = 2.0, 0.8, 64
    image = coloured(lambda f: np.exp(-2 * (np.pi * blur * f) ** 2), seed=12)
    image = np.concatenate(
        [image] + [coloured(lambda f: np.exp(-2 * (np.pi * blur * f) ** 2), k) for k in range(13, 18)]
    )
    y = (np.arange(n) - n / 2) * PIXEL_MM
    template = 5 * np.exp(-(y[:, None] ** 2 + y[None, :] ** 2) / (2 * s**2))
    rois = image.reshape(60, n, 10, n).swapaxes(1, 2).reshape(-1, n * n)
    found = (template**2).sum() / (rois @ template.ravel()).std()
    f = np.linspace(0, 1 / (2 * PIXEL_MM), 500)
    nps = Curve(f, SD_HU**2 * PIXEL_MM**2 * np.exp(-4 * (np.pi * blur * f) ** 2))
    ideal = detectability(FLAT, nps, lambda f: 2 * np.pi * s**2 * 5 * np.exp(-2 * (np.pi * s * f) ** 2))
    assert found == pytest.approx(ideal, rel=0.1)  # 600 regions know an SD to 3 %


def test_cnr_of_known_contrast_and_noise() -> None:
    image = np.random.default_rng(2).normal(40, 12, (300, 300))
    feature = np.zeros(image.shape, np.bool_)
    feature[100:200, 100:200] = True
    image[feature] -= 30
    assert cnr(image, feature, ~feature) == pytest.approx(30 / 12, rel=0.03)


def test_lesion_has_its_volume_and_contrast() -> None:
    voxel = (2.5, 0.75, 0.75)
    ball = lesion((9, 32, 32), voxel)
    volume = 4 / 3 * math.pi * (LESION_MM / 2) ** 3
    assert ball.sum() * math.prod(voxel) == pytest.approx(LESION_HU * volume, rel=0.01)
    assert ball.max() == pytest.approx(LESION_HU)
    centre = [(ball * axis).sum() / ball.sum() for axis in np.indices(ball.shape)]
    assert centre == pytest.approx([4, 15.5, 15.5], abs=1e-6)


def test_contrast_recovery_of_a_known_loss() -> None:
    ball = lesion((9, 32, 32), (2.5, 0.75, 0.75))
    anatomy = np.random.default_rng(7).normal(40, 300, ball.shape)
    assert contrast_recovery(anatomy + ball, anatomy, ball) == pytest.approx(1)
    assert contrast_recovery(anatomy - 0.8 * ball, anatomy, -ball) == pytest.approx(0.8)
    # blurred in the plane, the lesion loses what the blur takes from its core
    smooth = gaussian_filter(ball, (0, 2, 2))
    core = ball >= ball.max() / 2
    assert contrast_recovery(smooth, 0 * smooth, ball) == pytest.approx(smooth[core].sum() / ball[core].sum())


def test_what_cannot_be_measured_says_why() -> None:
    flat = np.zeros((120, 120))
    everywhere = np.ones(flat.shape, np.bool_)
    none = Curve(FINE, np.zeros_like(FINE))
    with pytest.raises(ValueError, match=r"give \(region, N, N\)"):
        nps_2d(np.zeros((2, 8, 9)), PIXEL_MM)
    with pytest.raises(ValueError, match="have no noise"):
        mean_frequency(none)
    with pytest.raises(ValueError, match="twice its radius leaves the image"):
        ttf(flat, PIXEL_MM, (20.0, 60.0), 10.0)
    with pytest.raises(ValueError, match="at least 5 make an edge"):
        ttf(flat, PIXEL_MM, (60.0, 60.0), 2.0)
    with pytest.raises(ValueError, match="HU of its surrounding"):
        ttf(flat, PIXEL_MM, (60.0, 60.0), 10.0)
    with pytest.raises(ValueError, match=r"stays above 0\.5"):
        falls_to(FLAT, 0.5)
    with pytest.raises(ValueError, match="no d' without noise"):
        detectability(FLAT, none, disc_task())
    with pytest.raises(ValueError, match="background has no noise"):
        cnr(flat, everywhere, everywhere)
    with pytest.raises(ValueError, match="background is empty"):
        cnr(flat, everywhere, ~everywhere)
    with pytest.raises(ValueError, match="nothing was inserted"):
        contrast_recovery(flat, flat, flat)
