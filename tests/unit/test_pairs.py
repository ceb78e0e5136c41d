"""Aligned pairs: every slice has a value of its own, so that a wrong match shows in the numbers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ct_builder import edit, uid, write_series
from numpy.typing import ArrayLike, NDArray

from pipelines.volume import SeriesRefused
from training.sources.layouts import Case
from training.sources.pairs import PairRefused, load_pair

LEVELS = np.array([-400, 30, 250, -90, 700, 45, -850, 120, 60, 333])
"""HU of the full-dose slices, in no order: interpolating or shifting them gives other numbers."""
EXCESS = 17
"""How much higher the low-dose slice at the same place is."""
FIRST_MM = -100.0
SIZE = 6
PLANE = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)


def stack(levels: ArrayLike) -> NDArray[Any]:
    """Slices of these levels with a ramp in the plane; (z, y, x)."""
    return np.asarray(levels)[:, None, None] + PLANE


def write(folder: Path, hu: NDArray[Any], first_mm: float = FIRST_MM, step_mm: float = 1.0, **more: Any) -> list[Path]:
    """Write slices under names in a shuffled order."""
    more = {"origin_mm": (-22.0, -22.0, first_mm), "spacing_mm": (step_mm, 0.7, 0.7), **more}
    paths = write_series(folder, hu, name=folder.name, **more)
    names = np.random.default_rng(3).permutation(len(paths))
    return [path.rename(folder / f"{name}.ima") for path, name in zip(paths, names, strict=True)]


def case(full: list[Path], low: list[Path] | None) -> Case:
    if low is None:
        return Case("L001", "L001 B30f 1 mm", tuple(sorted(full)), None, None, "B30f", 1.0)
    return Case("L001", "L001 B30f 1 mm", tuple(sorted(full)), tuple(sorted(low)), 0.25, "B30f", 1.0)


def test_slices_are_matched_by_position(tmp_path: Path) -> None:
    full = write(tmp_path / "full", stack(LEVELS))
    low = write(tmp_path / "low", stack(LEVELS + EXCESS))
    pair = load_pair(case(full, low))
    assert pair.full.dtype == pair.low.dtype == np.float32
    np.testing.assert_array_equal(pair.full, stack(LEVELS))
    np.testing.assert_array_equal(pair.low, stack(LEVELS + EXCESS))
    assert (pair.subject, pair.name, pair.dose) == ("L001", "L001 B30f 1 mm", 0.25)
    assert (pair.pixel_mm, pair.spacing_mm) == (0.7, 1.0)


def test_only_common_slices_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The low-dose series begins and ends later and lacks the slice of 45 HU."""
    full = write(tmp_path / "full", stack(LEVELS))
    low = write(tmp_path / "low", stack([*LEVELS[2:] + EXCESS, 9, 9]), FIRST_MM + 2)
    low.pop(3).unlink()
    pair = load_pair(case(full, low))
    kept = np.array([250, -90, 700, -850, 120, 60, 333])
    np.testing.assert_array_equal(pair.full, stack(kept))
    np.testing.assert_array_equal(pair.low, stack(kept + EXCESS))
    assert pair.spacing_mm == 1.0
    assert "L001 B30f 1 mm: 1 gaps where slices are missing" in caplog.text


@pytest.mark.parametrize("shift_mm", [-0.08, 0.08])
def test_slices_a_rounding_apart_are_the_same(tmp_path: Path, shift_mm: float) -> None:
    full = write(tmp_path / "full", stack(LEVELS))
    low = write(tmp_path / "low", stack(LEVELS + EXCESS), FIRST_MM + shift_mm)
    pair = load_pair(case(full, low))
    np.testing.assert_array_equal(pair.full, stack(LEVELS))
    np.testing.assert_array_equal(pair.low, stack(LEVELS + EXCESS))


@pytest.mark.parametrize("first_mm", [FIRST_MM, FIRST_MM + 0.6, FIRST_MM - 3])
def test_thick_low_dose_slices_are_interpolated_to_thin_full_dose_ones(tmp_path: Path, first_mm: float) -> None:
    full = write(tmp_path / "full", stack(LEVELS))
    thick = np.array([500, -120, 80, 940])
    low = write(tmp_path / "low", stack(thick), first_mm, 2.0)
    pair = load_pair(case(full, low))
    thin_mm, thick_mm = FIRST_MM + np.arange(10), first_mm + 2 * np.arange(4)
    inside = (thin_mm >= thick_mm[0] - 1e-9) & (thin_mm <= thick_mm[-1] + 1e-9)
    assert inside.sum() in (4, 6, 7)
    np.testing.assert_array_equal(pair.full, stack(LEVELS[inside]))
    np.testing.assert_allclose(pair.low, stack(np.interp(thin_mm[inside], thick_mm, thick)), atol=1e-3)
    assert pair.spacing_mm == 1.0


@pytest.mark.parametrize("z_target_mm", [None, 1.0])
def test_nothing_is_interpolated_across_a_missing_slice(tmp_path: Path, z_target_mm: float | None) -> None:
    full = write(tmp_path / "full", stack(LEVELS))
    low = write(tmp_path / "low", stack([500, -120, 80, 940, 10]), step_mm=2.0)
    low.pop(2).unlink()  # that of -96 mm
    pair = load_pair(case(full, low), z_target_mm)
    np.testing.assert_array_equal(pair.full, stack(LEVELS[[0, 1, 2, 6, 7, 8]]))
    np.testing.assert_array_equal(pair.low, stack([500, 190, -120, 940, 475, 10]))


def test_z_target_resamples_both(tmp_path: Path) -> None:
    thick = np.array([500, -120, 80, 940])
    full = write(tmp_path / "full", stack(LEVELS))
    low = write(tmp_path / "low", stack(thick), FIRST_MM + 1.5, 2.0)
    pair = load_pair(case(full, low), z_target_mm=0.8)
    thin_mm, thick_mm = FIRST_MM + np.arange(10), FIRST_MM + 1.5 + 2 * np.arange(4)
    places = FIRST_MM + 2 + 0.8 * np.arange(7)  # from the first full-dose slice that both have to the last low-dose one
    np.testing.assert_allclose(pair.full, stack(np.interp(places, thin_mm, LEVELS)), atol=1e-3)
    np.testing.assert_allclose(pair.low, stack(np.interp(places, thick_mm, thick)), atol=1e-3)
    assert pair.spacing_mm == pytest.approx(0.8)


def test_z_target_of_the_full_dose_series_leaves_it_as_it_is(tmp_path: Path) -> None:
    full = write(tmp_path / "full", stack(LEVELS))
    low = write(tmp_path / "low", stack([500, -120, 80, 940, 10]), step_mm=2.0)
    both, one = load_pair(case(full, low), z_target_mm=1.0), load_pair(case(full, low))
    np.testing.assert_array_equal(both.full, one.full)
    np.testing.assert_array_equal(both.low, one.low)


@pytest.mark.parametrize("step_mm", [1.0, 2.0])
def test_padding_is_air_in_both_and_does_not_leak_into_interpolated_slices(tmp_path: Path, step_mm: float) -> None:
    """-3024 HU outside the field of view, that no element declares; a larger field in one slice of one series."""
    outside = np.zeros((SIZE, SIZE), np.bool_)
    outside[0], outside[:, 0] = True, True
    full_hu, low_hu = stack(LEVELS[:5]), stack(LEVELS[:5:2] if step_mm == 2 else LEVELS[:5]) + EXCESS
    full_hu[:, outside] = low_hu[:, outside] = -3024
    full_hu[2, 0, 3] = 55  # measured at full dose alone: nothing to learn from
    low_hu[1, 3, 3] = -3024
    lacking = [1] if step_mm == 1 else [1, 2, 3]  # that slice, and those interpolated from it
    full = write(tmp_path / "full", full_hu, intercept=0.0)
    low = write(tmp_path / "low", low_hu, step_mm=step_mm, intercept=0.0)
    pair = load_pair(case(full, low))
    assert len(pair.full) == 5
    for hu in (pair.full, pair.low):
        assert (hu[:, outside] == -1000).all()
    levels = np.interp(np.arange(5), np.arange(0, 5, step_mm), LEVELS[: 5 : int(step_mm)]) + EXCESS
    for hu, expected in ((pair.full, stack(LEVELS[:5])), (pair.low, stack(levels))):
        expected[lacking, 3, 3] = -1000
        np.testing.assert_array_equal(hu[:, ~outside], expected[:, ~outside])


def test_noise_below_air_is_a_measurement(tmp_path: Path) -> None:
    full_hu, low_hu = stack(LEVELS), stack(LEVELS + EXCESS)
    full_hu[6, 2, 2], low_hu[6, 2, 2] = -870, -1190
    pair = load_pair(case(*(write(tmp_path / n, hu, intercept=-2000.0) for n, hu in (("f", full_hu), ("l", low_hu)))))
    np.testing.assert_array_equal(pair.full, full_hu)
    np.testing.assert_array_equal(pair.low, low_hu)


def test_a_tilted_gantry_shifts_the_slices_of_both(tmp_path: Path) -> None:
    """The low-dose series begins four slices later, so that its first corner lies elsewhere in the plane too."""
    tilt = np.radians(18)
    plane = (1, 0, 0, 0, float(np.cos(tilt)), float(-np.sin(tilt)))
    low_origin = (-22.0, -22.0, FIRST_MM + 4)
    full = write(tmp_path / "full", stack(LEVELS), orientation=plane)
    low = write(tmp_path / "low", stack(LEVELS[4:] + EXCESS), orientation=plane, origin_mm=low_origin)
    pair = load_pair(case(full, low))
    np.testing.assert_array_equal(pair.full, stack(LEVELS[4:]))
    np.testing.assert_array_equal(pair.low, stack(LEVELS[4:] + EXCESS))


@pytest.mark.parametrize(
    ("low", "reason"),
    [
        ({"hu": np.zeros((4, 6, 8))}, r"\(6, 6\) and \(6, 8\) pixels"),
        ({"spacing_mm": (1.0, 0.71, 0.71)}, r"pixels of \(0.7, 0.7\) and \(0.71, 0.71\) mm"),
        ({"orientation": (1, 0, 0, 0, 0.999, -0.0447)}, r"planes 1\\0\\0\\0\\1\\0 and 1\\0\\0\\0\\0.999\\-0.0447"),
        ({"origin_mm": (-22.0, -21.5, FIRST_MM)}, r"0.50 mm beside each other in the plane"),
        ({"first_mm": FIRST_MM + 0.4}, r"share no slice: -100.00 to -97.00 mm every 1.00 mm"),
        ({"first_mm": FIRST_MM + 40}, r"share no slice"),
        ({"step_mm": 0.5}, r"1.00 and 0.50 mm apart"),
    ],
)
def test_series_that_do_not_lie_on_each_other_are_refused(tmp_path: Path, low: dict[str, Any], reason: str) -> None:
    full = write(tmp_path / "full", stack(LEVELS[:4]))
    other = write(tmp_path / "low", **{"hu": stack(LEVELS[:4]), **low})
    with pytest.raises(PairRefused, match=reason) as refused:
        load_pair(case(full, other))
    assert f"L001: series {uid('full')} (full dose) and {uid('low')} (low dose)" in str(refused.value)


def test_pixels_that_are_not_square_are_refused(tmp_path: Path) -> None:
    both = [write(tmp_path / name, stack(LEVELS[:4]), spacing_mm=(1.0, 0.7, 0.8)) for name in ("full", "low")]
    with pytest.raises(PairRefused, match="not square"):
        load_pair(case(*both))


def test_one_slice_each_is_a_pair(tmp_path: Path) -> None:
    full = write(tmp_path / "full", stack(LEVELS[:4]))
    low = write(tmp_path / "low", stack(LEVELS[1:2] + EXCESS), FIRST_MM + 1)
    pair = load_pair(case(full, low))
    np.testing.assert_array_equal(pair.full, stack(LEVELS[1:2]))
    np.testing.assert_array_equal(pair.low, stack(LEVELS[1:2] + EXCESS))


def test_without_low_dose_there_is_no_pair(tmp_path: Path) -> None:
    with pytest.raises(PairRefused, match="no low-dose series"):
        load_pair(case(write(tmp_path / "full", stack(LEVELS)), None))


@pytest.mark.parametrize("z_target_mm", [0.0, -1.0, float("nan")])
def test_a_slice_distance_is_above_zero(tmp_path: Path, z_target_mm: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        load_pair(case([tmp_path], [tmp_path]), z_target_mm)


def test_what_is_no_volume_is_refused_by_the_reader(tmp_path: Path) -> None:
    full = write(tmp_path / "full", stack(LEVELS))
    low = write(tmp_path / "low", stack(LEVELS))
    edit(low[4], lambda ds: setattr(ds, "PatientID", "another"))
    with pytest.raises(SeriesRefused, match="mixed-patient"):
        load_pair(case(full, low))


@pytest.mark.data
def test_kernel_pair_of_real_series(ct_series: Callable[[str], list[Path]]) -> None:
    """The same acquisition twice: in smooth tissue the sharp kernel has the same HU and more noise."""
    soft, sharp = (ct_series(f"siemens-sensation10-lungdxA0002-{kernel}-8mm") for kernel in ("B40f", "B70f"))
    pair = load_pair(case(soft, sharp))
    assert pair.full.shape == (30, 512, 512)
    edges = [np.abs(np.gradient(pair.full, axis=axis)) < 15 for axis in (1, 2)]
    tissue = (np.abs(pair.full - 50) < 40) & edges[0] & edges[1]
    difference = (pair.low - pair.full)[tissue]
    assert abs(difference.mean()) < 3
    assert difference.std() > 20
    # a slice further the anatomy is another one
    assert all(np.abs(a - b).mean() > 20 for a, b in pairwise(pair.full[:5]))
    assert np.abs(pair.low - pair.full).mean() < np.abs(pair.low[1:] - pair.full[:-1]).mean()
