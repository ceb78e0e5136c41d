"""A denoised version passes, anything else is withheld, and the numbers are those of a formula."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, uniform_filter
from skimage.restoration import denoise_nl_means

from pipelines import guard
from pipelines.guard import Guard, Verdict
from pipelines.volume import Geometry, Volume, read_volume

SIZE = 256
NOISE_HU = 20.0


def body(z: float = 0.0) -> Any:
    """A chest of (y, x) HU without noise, edges as soft as a standard kernel makes them; `z` in 0 to 1 moves it."""
    y, x = np.mgrid[:SIZE, :SIZE] / (SIZE - 1) * 2 - 1
    hu = np.full((SIZE, SIZE), -1000.0)
    hu[x**2 + (y * 1.2) ** 2 < 0.92**2] = -100
    hu[x**2 + (y * 1.2) ** 2 < 0.85**2] = 50
    for side in (-1, 1):
        hu[((x - side * 0.42) / 0.28) ** 2 + (y / (0.4 + 0.1 * z)) ** 2 < 1] = -860
    hu[x**2 + (y - 0.5) ** 2 < 0.12**2] = 600
    for angle in np.linspace(0, 2 * np.pi, 24, endpoint=False) + 0.1 * z:
        hu[(x - 0.8 * np.cos(angle)) ** 2 + (y - 0.66 * np.sin(angle)) ** 2 < 0.03**2] = 500
    return gaussian_filter(hu, 0.8)


def noisy(clean: Any, sigma: float = NOISE_HU, seed: int = 0) -> Any:
    """Noise correlated over a pixel, as a kernel makes it."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(0, 1, clean.shape), (0, 0.6, 0.6))
    return (clean + sigma * noise / noise.std()).astype(np.float32)


CLEAN = np.stack([body(z) for z in (0, 0.5, 1)])


def volume(hu: Any, pixel_mm: float = 0.7) -> Volume:
    n = hu.shape[0]
    return Volume(
        hu=hu.astype(np.float32),
        geometry=Geometry((0, 0, 0), (2.0, pixel_mm, pixel_mm), ((0, 0, 1), (0, 1, 0), (1, 0, 0)), "2.25.1"),
        slice_uids=tuple(f"2.25.{k}" for k in range(n)),
        slice_paths=tuple(Path(str(k)) for k in range(n)),
        padding=np.zeros(hu.shape, np.bool_),
    )


def check(before: Volume, after: Any) -> Verdict:
    """All slices through one guard."""
    judge = Guard((before.geometry.spacing_mm[1], before.geometry.spacing_mm[2]))
    for k, plane in enumerate(after):
        judge.add(k, before.plane(k), plane)
    return judge.verdict()


BEFORE = volume(noisy(CLEAN))


def denoised(part: float = 0.8) -> Any:
    """What a perfect denoiser with this part of the output makes."""
    return (BEFORE.hu + part * (CLEAN - BEFORE.hu)).astype(np.float32)


# --- what passes ------------------------------------------------------------------------------------------------------


def test_identity_passes_and_changes_nothing() -> None:
    verdict = check(BEFORE, BEFORE.hu.copy())
    assert verdict.withheld == ""
    assert set(verdict.bias_hu) >= {"air", "lung", "soft"}
    assert set(verdict.bias_hu.values()) == {0.0}
    assert verdict.noise_after_hu == verdict.noise_before_hu
    assert (verdict.change_hu, verdict.structure_mm2) == (0.0, 0.0)
    assert verdict.edge_slope == pytest.approx(1.0)


@pytest.mark.parametrize("part", [0.5, 0.8, 1.0])
def test_a_perfect_denoiser_passes(part: float) -> None:
    verdict = check(BEFORE, denoised(part))
    assert verdict.withheld == ""
    assert verdict.change_hu == pytest.approx(part * NOISE_HU, rel=0.1)


@pytest.mark.parametrize("sigma", [5.0, 20.0, 60.0])
def test_non_local_means_passes(sigma: float) -> None:
    before = volume(noisy(CLEAN[:1], sigma))
    after = denoise_nl_means(before.hu[0], patch_size=5, patch_distance=5, h=0.7 * sigma, sigma=sigma, fast_mode=True)
    verdict = check(before, after[None].astype(np.float32))
    assert verdict.withheld == ""
    assert verdict.noise_before_hu is not None
    assert verdict.noise_after_hu is not None
    assert verdict.noise_after_hu < verdict.noise_before_hu


# --- what is withheld -------------------------------------------------------------------------------------------------


def blurred(after: Any) -> None:
    after[:] = gaussian_filter(BEFORE.hu, (0, 2.5, 2.5))


def zeroed(after: Any) -> None:
    after[1] = 0


def swapped(after: Any) -> None:
    after[[0, 2]] = after[[2, 0]]


def shifted_sideways(after: Any) -> None:
    after[:] = np.roll(after, 2, axis=2)


def other_noise(after: Any) -> None:
    after[:] = noisy(CLEAN, seed=1)


def not_a_number(after: Any) -> None:
    after[2, 100, 100] = np.nan


def infinite(after: Any) -> None:
    after[2, 100, 100] = np.inf


def offset(after: Any) -> None:
    after += 5


def offset_in_one_slice(after: Any) -> None:
    after[1] += 5


def patch_of_another_place(after: Any) -> None:
    after[1, 40:60, 120:140] = after[1, 120:140, 50:70]


BAD: list[tuple[Callable[[Any], None], str]] = [
    (blurred, "edges kept"),
    (zeroed, "mm² of slice 1 moved"),
    (swapped, "mm² of slice"),
    (shifted_sideways, "mm² of slice"),
    (other_noise, "flat regions changed"),
    (not_a_number, "1 voxels are no number"),
    (infinite, "1 voxels are no number"),
    (offset, "mean HU of soft moved by +5.0"),
    (offset_in_one_slice, "in one slice (limit 4)"),
    (patch_of_another_place, "mm² of slice 1 moved"),
]


@pytest.mark.parametrize(("spoil", "reason"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
@pytest.mark.parametrize("part", [0.0, 0.8])
def test_what_is_no_denoised_version_is_withheld(spoil: Callable[[Any], None], reason: str, part: float) -> None:
    after = denoised(part)
    spoil(after)
    assert reason in check(BEFORE, after).withheld


@pytest.mark.parametrize("pixel_mm", [0.45, 0.7, 1.37])
@pytest.mark.parametrize("sign", [1, -1], ids=["erased", "invented"])
@pytest.mark.parametrize("sigma", [5.0, 20.0])
def test_a_lesion_of_10_mm_and_100_hu_neither_vanishes_nor_appears(pixel_mm: float, sign: int, sigma: float) -> None:
    y, x = np.mgrid[:SIZE, :SIZE]
    lesion = np.zeros_like(CLEAN)
    lesion[1][np.hypot(y - 60, x - 128) < 5 / pixel_mm] = 100
    lesion = gaussian_filter(lesion, (0, 0.8, 0.8))
    noise = noisy(CLEAN, sigma)
    before = volume(noise + lesion if sign > 0 else noise, pixel_mm)
    after = CLEAN if sign > 0 else CLEAN + lesion
    assert check(before, (CLEAN + (lesion if sign > 0 else 0)).astype(np.float32)).withheld == ""
    verdict = check(before, after.astype(np.float32))
    assert "mm² of slice 1 moved by more than noise explains" in verdict.withheld
    assert verdict.structure_slice == 1


def test_noise_must_not_grow() -> None:
    after = BEFORE.hu + 0.5 * (BEFORE.hu - CLEAN)
    assert "noise grew from" in check(BEFORE, after.astype(np.float32)).withheld


def test_padding_must_not_be_touched_and_is_not_judged() -> None:
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    padding = np.broadcast_to(x**2 + y**2 > (SIZE / 2) ** 2, BEFORE.hu.shape).copy()
    before = replace(BEFORE, hu=np.where(padding, np.float32(-3024), BEFORE.hu), padding=padding)
    after = np.where(padding, before.hu, denoised())
    verdict = check(before, after)
    assert (verdict.withheld, verdict.padding_changed) == ("", 0)
    after[0, 0, :7] = -1000
    verdict = check(before, after)
    assert verdict.padding_changed == 7
    assert verdict.withheld == "7 voxels outside the field of view were changed"


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_local_mean_and_deviation_are_those_of_a_uniform_filter() -> None:
    image = BEFORE.hu[0].astype(np.float64)
    mean, deviation = guard._local(BEFORE.hu[0], 8)
    expected = uniform_filter(image, 8, origin=-4)[: mean.shape[0], : mean.shape[1]]
    np.testing.assert_allclose(mean, expected, atol=1e-2)
    square = uniform_filter(image**2, 8, origin=-4)[: mean.shape[0], : mean.shape[1]]
    np.testing.assert_allclose(deviation, np.sqrt(square - expected**2), atol=0.5)


def test_the_noise_is_found_among_edges() -> None:
    for sigma in (5.0, 20.0, 60.0):
        verdict = check(volume(noisy(CLEAN, sigma)), noisy(CLEAN, sigma))
        assert verdict.noise_before_hu == pytest.approx(sigma, rel=0.12)


def test_bias_is_not_faked_by_noise() -> None:
    """Regions thresholded on the noisy input itself would show a bias where a perfect denoiser has none."""
    before = volume(noisy(CLEAN, 30))
    verdict = check(before, CLEAN.astype(np.float32))
    assert abs(verdict.bias_hu["soft"]) < 0.5
    low, high = guard.TISSUES_HU["soft"]
    thresholded = (before.hu > low) & (before.hu < high)
    assert (CLEAN - before.hu)[thresholded].mean() < -2


def test_edge_slope_is_the_known_one_of_a_blend() -> None:
    blur = gaussian_filter(CLEAN, (0, 2.5, 2.5))
    clean = volume(CLEAN)
    slope = check(clean, blur.astype(np.float32)).edge_slope
    half = check(clean, ((CLEAN + blur) / 2).astype(np.float32)).edge_slope
    assert slope is not None
    assert half == pytest.approx((1 + slope) / 2, abs=1e-3)


def test_a_verdict_is_json() -> None:
    verdict = asdict(check(BEFORE, BEFORE.hu + np.float32(5)))
    assert json.loads(json.dumps(verdict)) == verdict


def test_small_or_empty_images_are_not_judged_on_what_they_lack() -> None:
    tiny = volume(np.full((2, 5, 7), -1000.0))
    verdict = check(tiny, tiny.hu)
    assert (verdict.withheld, verdict.noise_before_hu, verdict.edge_slope) == ("", None, None)


def test_its_memory_does_not_grow_with_the_series() -> None:
    def peak(slices: int) -> int:
        before = volume(noisy(np.repeat(CLEAN[:1], slices, axis=0)))
        after = before.hu.copy()
        tracemalloc.start()
        check(before, after)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(1)
    assert peak(12) < peak(2) + 2**16


@pytest.mark.data
@pytest.mark.parametrize(
    "name",
    [
        "ge-vct-cmbcrc-chest-LUNG-2p5mm",
        "philips-brilliance16-lungdxA0001-B-5mm",
        "siemens-sensation10-lungdxA0002-B70f-8mm",
    ],
)
def test_real_series(name: str, ct_series: Callable[[str], list[Path]]) -> None:
    whole = read_volume(ct_series(name)[20:23])
    noise = check(whole, whole.hu.copy()).noise_before_hu
    assert noise is not None
    air = np.where(whole.padding, np.float32(-1000), whole.hu)
    quiet = np.stack(
        [denoise_nl_means(p, patch_size=5, patch_distance=5, h=0.7 * noise, sigma=noise, fast_mode=True) for p in air]
    )
    assert check(whole, np.where(whole.padding, whole.hu, quiet)).withheld == ""
    for bad in (gaussian_filter(air, (0, 2, 2)), air + np.float32(5), air[[2, 1, 0]]):
        assert check(whole, np.where(whole.padding, whole.hu, bad)).withheld != ""
