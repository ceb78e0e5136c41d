"""Image metrics: against scikit-image, against exact cases, and against the printed table of a paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.stats import entropy
from skimage.metrics import (
    normalized_mutual_information,
    normalized_root_mse,
    peak_signal_noise_ratio,
    structural_similarity,
)

from training.metrics import (
    FULL,
    LUNG,
    SOFT_TISSUE,
    Window,
    l1,
    mutual_information,
    nmse,
    psnr,
    rmse,
    ssim,
)

Array = NDArray[np.float32]
WINDOWS = [SOFT_TISSUE, LUNG, FULL]


@pytest.fixture(scope="module")
def pair() -> tuple[Array, Array]:
    """A noisy image and its truth, (z, y, x), that reach beyond the soft-tissue and the lung window."""
    rng = np.random.default_rng(11)
    texture = gaussian_filter(rng.standard_normal((3, 96, 96)), (0, 4, 4))
    truth = (texture / texture.std() * 400 - 100).astype(np.float32)
    return truth + rng.normal(0, 30, truth.shape).astype(np.float32), truth


def clipped(hu: Array, window: Window) -> NDArray[np.float64]:
    return hu.clip(window.low_hu, window.high_hu).astype(np.float64)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_errors_are_those_of_scikit_image(pair: tuple[Array, Array], window: Window) -> None:
    image, truth = (clipped(hu, window) for hu in pair)
    width = window.high_hu - window.low_hu
    assert psnr(*pair, window) == pytest.approx(peak_signal_noise_ratio(truth, image, data_range=width), abs=1e-9)
    range_rmse = normalized_root_mse(truth, image, normalization="min-max") * np.ptp(truth)
    assert rmse(*pair, window) * width == pytest.approx(range_rmse, rel=1e-9)
    relative = normalized_root_mse(truth - window.low_hu, image - window.low_hu, normalization="euclidean")
    assert nmse(*pair, window) == pytest.approx(relative**2, rel=1e-9)
    assert l1(*pair, window) * width == pytest.approx(np.linalg.norm((image - truth).ravel(), 1) / truth.size, rel=1e-9)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_ssim_is_that_of_scikit_image(pair: tuple[Array, Array], window: Window) -> None:
    # the term of luminance has no place for negative values: from the window's lower end, not from 0 HU
    image, truth = (clipped(hu, window) - window.low_hu for hu in pair)
    slices = [
        structural_similarity(
            b,
            a,
            data_range=window.high_hu - window.low_hu,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(image, truth, strict=True)
    ]
    assert ssim(*pair, window) == pytest.approx(np.mean(slices), abs=1e-9)
    assert ssim(pair[0][0], pair[1][0], window) == pytest.approx(slices[0], abs=1e-9)


def test_mutual_information_is_that_of_scikit_image(pair: tuple[Array, Array]) -> None:
    # scikit-image spreads its bins over each image's own range, which is the whole window here
    image, truth = (clipped(hu, SOFT_TISSUE) for hu in pair)
    joint = np.histogram2d(image.ravel(), truth.ravel(), bins=256)[0]
    normalised = normalized_mutual_information(image, truth, bins=256)  # (H(a) + H(b)) / H(a, b)
    assert mutual_information(*pair, SOFT_TISSUE) == pytest.approx((normalised - 1) * entropy(joint.ravel()), rel=1e-9)


def test_mutual_information_of_exact_cases() -> None:
    levels = (np.arange(256) + 0.5) / 256 * 400 - 160
    image, other = np.meshgrid(levels, levels)
    assert mutual_information(image, image, SOFT_TISSUE) == pytest.approx(math.log(256), rel=1e-12)
    assert mutual_information(image, other, SOFT_TISSUE) == pytest.approx(0, abs=1e-12)


def test_mutual_information_of_correlated_gaussians() -> None:
    # -½ ln(1 − ρ²), plus the bias of the histogram that the docstring names
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((2, 1_000_000))
    b = 0.8 * a + 0.6 * b
    bias = np.count_nonzero(np.histogram2d(a, b, bins=256, range=((-16, 16), (-16, 16)))[0]) / 2e6
    found = mutual_information(a, b, Window(-16, 16))
    assert found == pytest.approx(-0.5 * math.log(1 - 0.8**2) + bias, abs=0.002)


@pytest.mark.parametrize(
    ("psnr_db", "printed_rmse", "within_db"),
    [
        (22.818, 0.0723, 0.01),
        (27.79, 0.0408, 0.01),
        (25.73, 0.0517, 0.01),
        (28.02, 0.0397, 0.01),
        (26.93, 0.0449, 0.03),
    ],
    ids=["low dose", "CNN-L1", "WGAN", "DCSCN", "DCSWGAN"],
)
def test_psnr_of_the_printed_rmse_is_the_printed_psnr(psnr_db: float, printed_rmse: float, within_db: float) -> None:
    # DCSCN paper, Table 1; printed with four decimals, RMSE fixes PSNR to 0.01 dB; the last row's is 0.0001 too low
    truth = np.zeros((16, 16))
    image = truth + 400 * printed_rmse
    assert rmse(image, truth, SOFT_TISSUE) == pytest.approx(printed_rmse, rel=1e-12)
    assert psnr(image, truth, SOFT_TISSUE) == pytest.approx(-20 * math.log10(printed_rmse), abs=1e-9)
    assert psnr(image, truth, SOFT_TISSUE) == pytest.approx(psnr_db, abs=within_db)


def test_printed_equation_5_cannot_be_what_its_table_used() -> None:
    # RMSE 0.051 goes with the table's L1 of 0.043 and PSNR of 25.81 dB; the printed formula gives half of it
    truth = np.linspace(-160, 240, 400).reshape(20, 20)[:, ::-1]
    image = truth + np.where(truth < 40, 1, -1) * 400 * 0.051
    assert psnr(image, truth, SOFT_TISSUE) == pytest.approx(25.85, abs=0.01)
    assert psnr(image, truth, SOFT_TISSUE, mode="hqinet_eq5") == pytest.approx(12.92, abs=0.01)
    # a peak of half the window costs 20·log10(2) in the printed form, nothing in the standard one
    low = np.full((8, 8), 40.0)
    assert psnr(low - 4, low, SOFT_TISSUE) == pytest.approx(40)
    assert psnr(low - 4, low, SOFT_TISSUE, mode="hqinet_eq5") == pytest.approx(20 - 20 * math.log10(2))


def test_errors_of_a_known_shift() -> None:
    truth = np.zeros((1, 16, 16), np.float32)
    window = Window(-200, 200)
    assert psnr(truth + 4, truth, window) == pytest.approx(40)
    assert psnr(truth + 1e6, truth, window) == pytest.approx(20 * math.log10(2))
    assert l1(truth - 4, truth, window) == pytest.approx(0.01)
    assert nmse(truth + 4, truth, window) == pytest.approx(0.01**2 / 0.5**2)


def test_equal_images() -> None:
    image = np.random.default_rng(1).uniform(-1000, 1000, (2, 16, 16))
    assert (l1(image, image, FULL), rmse(image, image, FULL), nmse(image, image, FULL)) == (0, 0, 0)
    assert psnr(image, image, FULL) == math.inf
    assert ssim(image, image, FULL) == pytest.approx(1)


def test_windows_say_what_they_are() -> None:
    assert [str(window) for window in WINDOWS] == ["-160 to 240 HU", "-1000 to 400 HU", "-1024 to 3071 HU"]
    assert SOFT_TISSUE.normalise(np.array([-1000.0, -160, 40, 240, 3000])).tolist() == [0, 0, 0.5, 1, 1]


def test_what_cannot_be_measured_says_why() -> None:
    truth = np.zeros((16, 16))
    with pytest.raises(ValueError, match="empty: give the lower end first"):
        Window(240, -160)
    with pytest.raises(ValueError, match=r"\(16, 15\).*must be equal"):
        rmse(truth[:, :15], truth, FULL)
    with pytest.raises(ValueError, match="NaN"):
        rmse(np.full((16, 16), np.nan), truth, FULL)
    with pytest.raises(ValueError, match="nowhere above -160 HU, so NMSE"):
        nmse(truth, truth - 500, SOFT_TISSUE)
    with pytest.raises(ValueError, match="nowhere above -160 HU, so it has no peak"):
        psnr(truth, truth - 500, SOFT_TISSUE, mode="hqinet_eq5")
    with pytest.raises(ValueError, match="at least 11 × 11"):
        ssim(truth[:10], truth[:10], FULL)
