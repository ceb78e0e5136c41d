"""Synthetic nodules against their formulas: volume, HU, conserved sums, blur, and a chest whose lungs are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from training import nodules
from training.nodules import Nodule, insert
from training.simulate import F50

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

SPACING_MM = (1.25, 0.8, 0.8)
VOXEL_MM3 = math.prod(SPACING_MM)
LUNG_HU = -850.0


def chest() -> tuple[Array, Mask]:
    """A box of soft tissue in air on a table of foam, with two lungs and a vessel; and where the lungs are."""
    hu = np.full((40, 144, 160), -1000, np.float32)
    hu[:, 128:140, 5:155] = -900
    hu[:, 10:120, 5:155] = 50
    lung = np.zeros(hu.shape, np.bool_)
    lung[:, 20:110, 12:74] = lung[:, 20:110, 86:148] = True
    lung[:, 60:70, 110:120] = False
    hu[lung] = LUNG_HU
    return hu, lung


CHEST, LUNG = chest()


def whole(nodule: Nodule) -> Mask:
    mask = np.zeros(CHEST.shape, np.bool_)
    mask[nodule.box] = nodule.mask
    return mask


def depth_mm(nodule: Nodule) -> NDArray[np.floating]:
    """Distance of each voxel of the box from the next one outside of the mask."""
    depth = ndimage.distance_transform_edt(np.pad(nodule.mask, 1), sampling=SPACING_MM)
    return np.asarray(depth[1:-1, 1:-1, 1:-1])


@pytest.fixture(scope="module")
def placed() -> tuple[Array, tuple[Nodule, ...]]:
    return insert(CHEST, SPACING_MM, 8, seed=5)


def test_diameters_span_the_range_and_both_kinds_and_spicules_occur(placed: tuple[Array, tuple[Nodule, ...]]) -> None:
    found = placed[1]
    diameters = [one.diameter_mm for one in found]
    assert diameters == sorted(diameters, reverse=True)
    step = (20 / 4) ** (1 / 8)
    for k, diameter in enumerate(reversed(diameters)):
        assert 4 * step**k <= diameter <= 4 * step ** (k + 1)
    assert {one.kind for one in found} == {"solid", "part-solid"}
    assert any(one.spiculated for one in found)
    assert all((one.ground_glass_hu is None) == (one.kind == "solid") for one in found)


def test_mask_has_the_volume_of_the_ball(placed: tuple[Array, tuple[Nodule, ...]]) -> None:
    for one in placed[1]:
        volume_mm3 = math.pi / 6 * one.diameter_mm**3
        assert np.count_nonzero(one.mask) * VOXEL_MM3 == pytest.approx(
            volume_mm3, abs=0.03 * volume_mm3 + 4 * VOXEL_MM3
        )


def test_a_small_nodule_between_two_thick_slices_has_a_mask() -> None:
    """Each holds a half ball of 2 mm in 6 mm of slice."""
    plan = nodules._plan(4.0, np.random.default_rng(0))
    drawn = nodules._draw(plan, (3.5, 16.0, 16.0), (6.0, 0.7, 0.7), 6.0, F50, (8, 32, 32))
    inside = np.argwhere(drawn.mask) + [part.start for part in drawn.box]
    assert set(inside[:, 0]) == {3, 4}
    assert 2 * 0.7 * np.hypot(*(inside[:, 1:] - 16).T).max() == pytest.approx(4, abs=1.5)


def test_centre_of_the_mask_is_the_centre(placed: tuple[Array, tuple[Nodule, ...]]) -> None:
    for one in placed[1]:
        gravity = np.argwhere(whole(one)).mean(axis=0)
        away = (gravity - one.centre_zyx) * SPACING_MM
        assert np.linalg.norm(away) < 0.15 * one.diameter_mm


def test_nodules_lie_in_the_lung_and_apart(placed: tuple[Array, tuple[Nodule, ...]]) -> None:
    masks = [whole(one) for one in placed[1]]
    assert not (np.any(masks, axis=0) & ~LUNG).any()
    assert np.sum(masks, axis=0).max() == 1
    grown = [ndimage.binary_dilation(mask) for mask in masks]
    assert np.sum(grown, axis=0).max() == 1


def test_hu_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SOLID_TEXTURE_HU", "GROUND_GLASS_TEXTURE_HU"):
        monkeypatch.setattr(nodules, name, 1e-6)
    volume, found = insert(CHEST, SPACING_MM, 5, seed=4)
    assert {one.kind for one in found[:3]} == {"solid", "part-solid"}
    for one in found[:3]:
        out, depth = volume[one.box], depth_mm(one)
        assert nodules.SOLID_HU[0] <= one.hu <= nodules.SOLID_HU[1]
        if one.ground_glass_hu is None:
            np.testing.assert_allclose(out[depth > 3], one.hu, atol=1)
            continue
        low, high = nodules.GROUND_GLASS_HU
        assert low <= one.ground_glass_hu <= high
        half = (one.hu + one.ground_glass_hu) / 2
        assert out[one.mask].max() == pytest.approx(one.hu, abs=5)
        assert np.median(out[(depth > 1.5) & (out < half)]) == pytest.approx(one.ground_glass_hu, abs=15)
        core = np.count_nonzero(one.mask & (out > half)) * VOXEL_MM3
        part = (6 * core / math.pi) ** (1 / 3) / one.diameter_mm
        assert nodules.CORE_PART[0] - 0.05 < part < nodules.CORE_PART[1] + 0.05


def test_texture_of_the_tissue(placed: tuple[Array, tuple[Nodule, ...]]) -> None:
    out, found = placed
    largest = next(one for one in found if one.kind == "solid")
    assert out[largest.box][depth_mm(largest) > 3].std() == pytest.approx(nodules.SOLID_TEXTURE_HU, rel=0.5)


def test_partial_volume_conserves_what_was_put_in(placed: tuple[Array, tuple[Nodule, ...]]) -> None:
    out, found = placed
    solid = [one for one in found if one.kind == "solid"]
    assert len(solid) >= 3
    for one in solid:
        added = float((out[one.box] - CHEST[one.box]).sum(dtype=np.float64)) * VOXEL_MM3
        assert added == pytest.approx((one.hu - LUNG_HU) * math.pi / 6 * one.diameter_mm**3, rel=0.01)


def test_nothing_changes_elsewhere(placed: tuple[Array, tuple[Nodule, ...]]) -> None:
    out, found = placed
    elsewhere = np.ones(CHEST.shape, np.bool_)
    for one in found:
        elsewhere[one.box] = False
    np.testing.assert_array_equal(out[elsewhere], CHEST[elsewhere])
    assert out.dtype == np.float32


def test_same_seed_same_nodules(placed: tuple[Array, tuple[Nodule, ...]]) -> None:
    again, found = insert(CHEST, SPACING_MM, 8, seed=5)
    np.testing.assert_array_equal(again, placed[0])
    assert [one.centre_zyx for one in found] == [one.centre_zyx for one in placed[1]]
    a, b = (insert(CHEST, SPACING_MM, 2, seed)[0] for seed in (6, 7))
    assert not np.array_equal(a, b)


def test_noise_of_the_scan_is_given_back_and_that_of_the_lung_taken() -> None:
    noise = np.random.default_rng(1).normal(0, 30, CHEST.shape).astype(np.float32)
    # the lung is noisy so little that it is found at the same places
    clean, (one, *_) = insert(CHEST, SPACING_MM, 3, seed=8)
    noisy, (same, *_) = insert(CHEST + noise / np.float32(100), SPACING_MM, 3, seed=8, noise=noise)
    assert same.centre_zyx == one.centre_zyx
    inside = depth_mm(one) > 3
    assert np.count_nonzero(inside) > 50
    np.testing.assert_allclose((noisy - clean)[one.box][inside], noise[one.box][inside], atol=0.02)


@pytest.fixture
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Solid balls without texture."""
    for name, value in {
        "_BEND": 0.0,
        "SOLID_TEXTURE_HU": 1e-6,
        "PART_SOLID_FROM_MM": 99.0,
        "SPICULATED_FROM_MM": 99.0,
    }.items():
        monkeypatch.setattr(nodules, name, value)


@pytest.mark.usefixtures("_plain")
def test_kernel_halves_the_contrast_at_f50() -> None:
    f50 = 0.15
    sharp, (one,) = insert(CHEST, SPACING_MM, 1, seed=9, f50=20.0)
    soft, (same,) = insert(CHEST, SPACING_MM, 1, seed=9, f50=f50)
    assert same.centre_zyx == one.centre_zyx
    frequency = np.fft.rfftfreq(CHEST.shape[2], SPACING_MM[2])

    def spectrum(image: Array) -> NDArray[np.floating]:
        profile = (image - CHEST).sum(axis=(0, 1), dtype=np.float64)
        return np.abs(np.fft.rfft(profile))

    # a Gaussian: one half at f50, one sixteenth at twice that
    expected = 0.5 ** ((frequency / f50) ** 2)
    present = spectrum(sharp) > 0.02 * spectrum(sharp)[0]
    assert np.count_nonzero(present & (frequency > f50)) >= 2
    np.testing.assert_allclose((spectrum(soft) / spectrum(sharp))[present], expected[present], rtol=0.05)


@pytest.mark.usefixtures("_plain")
def test_slice_thickness_widens_along_z_only() -> None:
    thick_mm = 3.75

    def variances(image: Array) -> list[float]:
        weight = (image - CHEST).astype(np.float64)
        out = []
        for axis, d in enumerate(SPACING_MM):
            profile = weight.sum(axis=tuple({0, 1, 2} - {axis}))
            at = np.arange(len(profile)) * d
            mean = (profile @ at) / profile.sum()
            out.append(float(profile @ (at - mean) ** 2 / profile.sum()))
        return out

    thin, (one,) = insert(CHEST, SPACING_MM, 1, seed=10)
    thick, _ = insert(CHEST, SPACING_MM, 1, seed=10, thickness_mm=thick_mm)
    (z, y, x), (z0, y0, x0) = variances(thick), variances(thin)
    # variance of a box of that width; and that of a ball, d²/20, with the voxel's and the kernel's own
    assert z - z0 == pytest.approx((thick_mm**2 - SPACING_MM[0] ** 2) / 12, rel=0.03)
    assert y - y0 == pytest.approx(0, abs=0.02)
    assert x - x0 == pytest.approx(0, abs=0.02)
    assert z0 == pytest.approx(one.diameter_mm**2 / 20 + SPACING_MM[0] ** 2 / 12, rel=0.02)


def test_lungs_are_found_without_table_and_vessel() -> None:
    noisy = CHEST + np.random.default_rng(2).normal(0, 60, CHEST.shape).astype(np.float32)
    coarse, factor = nodules._coarse_lungs(noisy, SPACING_MM)
    found = coarse.repeat(factor, axis=1).repeat(factor, axis=2)
    assert not (found & ~ndimage.binary_dilation(LUNG, iterations=4)).any()
    assert found[LUNG].mean() > 0.95
    assert not found[:, 65, 115].any()


def test_no_room_and_no_lung_are_said() -> None:
    with pytest.raises(ValueError, match=r"no room for nodule \d+ of 400"):
        insert(CHEST, SPACING_MM, 400, seed=1)
    with pytest.raises(ValueError, match="no lung is found"):
        insert(np.full((10, 64, 64), 50, np.float32), SPACING_MM, 1, seed=1)
