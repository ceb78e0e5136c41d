"""Radiomic features against IBSI's published values and against their definitions written as plain loops."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from radiomics_loops import DIRECTIONS, Voxel, loop_features, loop_runs

from training.radiomics import FEATURES, PRESET_57, compare, features, holm, lin_concordance

# IBSI's digital phantom: four slices side by side, rows y, columns x, an x for voxels outside the region. From the IBSI
# reference manual (arXiv 1612.07003), section 5.1; image and mask from github.com/theibsi/data_sets,
# ibsi_1_digital_phantom (CC BY 4.0).
PHANTOM = """
1 4 4 1 1   1 4 4 1 1   1 4 4 x x   1 4 4 x x
1 4 6 1 1   1 1 6 1 1   1 1 1 1 1   1 1 1 1 1
4 1 6 4 1   x 1 3 1 1   1 1 x 1 1   1 1 1 1 1
4 4 6 4 1   4 4 6 1 1   1 1 6 1 1   1 1 6 1 1
"""
PHANTOM_VOXEL_MM3 = 8.0

# Reference manual (github.com/theibsi/ibsi-doc, 13 December 2021), rows "dig. phantom" in the tables of sections 3.3
# (intensity statistics), 3.4 (entropy and uniformity of the intensity histogram), 3.6 and 3.7 ("3D, averaged") and 3.8
# ("3D"), as printed: three significant digits
IBSI = {
    "firstorder_Energy": 567,
    "firstorder_Entropy": 1.27,
    "firstorder_Minimum": 1,
    "firstorder_10Percentile": 1,
    "firstorder_90Percentile": 4,
    "firstorder_Maximum": 6,
    "firstorder_Mean": 2.15,
    "firstorder_Median": 1,
    "firstorder_InterquartileRange": 3,
    "firstorder_Range": 5,
    "firstorder_MeanAbsoluteDeviation": 1.55,
    "firstorder_RobustMeanAbsoluteDeviation": 1.11,
    "firstorder_RootMeanSquared": 2.77,
    "firstorder_Skewness": 1.08,
    "firstorder_Variance": 3.05,
    "firstorder_Uniformity": 0.512,
    "glcm_Autocorrelation": 5.06,
    "glcm_JointAverage": 2.14,
    "glcm_ClusterProminence": 145,
    "glcm_ClusterShade": 16.6,
    "glcm_ClusterTendency": 7.07,
    "glcm_Contrast": 5.32,
    "glcm_Correlation": 0.157,
    "glcm_DifferenceAverage": 1.43,
    "glcm_DifferenceEntropy": 1.56,
    "glcm_DifferenceVariance": 3.06,
    "glcm_JointEnergy": 0.303,
    "glcm_JointEntropy": 2.40,
    "glcm_Imc1": -0.157,
    "glcm_Imc2": 0.520,
    "glcm_Idm": 0.618,
    "glcm_Idmn": 0.898,
    "glcm_Id": 0.677,
    "glcm_Idn": 0.851,
    "glcm_InverseVariance": 0.0604,
    "glcm_MaximumProbability": 0.503,
    "glcm_SumAverage": 4.29,
    "glcm_SumEntropy": 1.92,
    "glcm_SumSquares": 3.10,
    "glrlm_ShortRunEmphasis": 0.705,
    "glrlm_LongRunEmphasis": 3.06,
    "glrlm_GrayLevelNonUniformity": 21.8,
    "glrlm_GrayLevelNonUniformityNormalized": 0.430,
    "glrlm_RunLengthNonUniformity": 26.9,
    "glrlm_RunLengthNonUniformityNormalized": 0.513,
    "glrlm_RunPercentage": 0.680,
    "glrlm_GrayLevelVariance": 3.46,
    "glrlm_RunVariance": 0.574,
    "glrlm_RunEntropy": 2.43,
    "glrlm_LowGrayLevelRunEmphasis": 0.603,
    "glrlm_HighGrayLevelRunEmphasis": 9.70,
    "glrlm_ShortRunLowGrayLevelEmphasis": 0.352,
    "glrlm_ShortRunHighGrayLevelEmphasis": 8.54,
    "glrlm_LongRunLowGrayLevelEmphasis": 2.39,
    "glrlm_LongRunHighGrayLevelEmphasis": 17.6,
    "glszm_SmallAreaEmphasis": 0.255,
    "glszm_LargeAreaEmphasis": 550,
    "glszm_GrayLevelNonUniformity": 1.40,
    "glszm_GrayLevelNonUniformityNormalized": 0.280,
    "glszm_SizeZoneNonUniformity": 1,
    "glszm_SizeZoneNonUniformityNormalized": 0.200,
    "glszm_ZonePercentage": 0.0676,
    "glszm_GrayLevelVariance": 2.64,
    "glszm_ZoneVariance": 331,
    "glszm_ZoneEntropy": 2.32,
    "glszm_LowGrayLevelZoneEmphasis": 0.253,
    "glszm_HighGrayLevelZoneEmphasis": 15.6,
    "glszm_SmallAreaLowGrayLevelEmphasis": 0.0256,
    "glszm_SmallAreaHighGrayLevelEmphasis": 2.76,
    "glszm_LargeAreaLowGrayLevelEmphasis": 503,
    "glszm_LargeAreaHighGrayLevelEmphasis": 1490,
}
IBSI_EXCESS_KURTOSIS = -0.355
PYRADIOMICS_MCC = 0.4405429703401288
"""pyradiomics 3.0.1 on the phantom, ``binWidth=1``; IBSI does not define it."""


def _phantom() -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    rows = [line.split() for line in PHANTOM.split("\n") if line]
    letters = np.array(rows).reshape(4, 4, 5).swapaxes(0, 1)
    mask = letters != "x"
    return np.where(mask, letters, "9").astype(np.float64), mask


def _half_a_digit(value: float) -> float:
    return 0.5 * 10.0 ** (math.floor(math.log10(abs(value))) - 2) * (1 + 1e-9)


@pytest.fixture(scope="module", params=["width", "number"])
def phantom_features(request: pytest.FixtureRequest) -> dict[str, float]:
    hu, mask = _phantom()
    if request.param == "width":
        return features(hu, mask, bin_width_hu=1.0, voxel_mm3=PHANTOM_VOXEL_MM3)
    return features(hu, mask, bins=6, voxel_mm3=PHANTOM_VOXEL_MM3)


@pytest.mark.parametrize("name", IBSI)
def test_ibsi_phantom(phantom_features: dict[str, float], name: str) -> None:
    assert phantom_features[name] == pytest.approx(IBSI[name], abs=_half_a_digit(IBSI[name]))


def test_ibsi_phantom_where_the_definitions_differ(phantom_features: dict[str, float]) -> None:
    assert phantom_features["firstorder_Kurtosis"] - 3 == pytest.approx(IBSI_EXCESS_KURTOSIS, abs=0.0005)
    assert phantom_features["firstorder_TotalEnergy"] == 567 * PHANTOM_VOXEL_MM3
    assert phantom_features["glcm_MCC"] == pytest.approx(PYRADIOMICS_MCC, rel=1e-9)
    assert {*FEATURES} - {*IBSI} == {"firstorder_Kurtosis", "firstorder_TotalEnergy", "glcm_MCC"}


@pytest.mark.parametrize(("seed", "sd_hu"), [(1, 20.0), (2, 60.0), (3, 150.0)])
def test_definitions_as_loops(seed: int, sd_hu: float) -> None:
    rng = np.random.default_rng(seed)
    hu = rng.normal(-30, sd_hu, (5, 6, 7))
    mask = rng.random(hu.shape) < 0.8
    expected = loop_features(hu, mask, 25.0)
    assert features(hu, mask) == {name: pytest.approx(v, rel=1e-9, abs=1e-9) for name, v in expected.items()}


# --- what must not matter ---------------------------------------------------------------------------------------------


def _nodule(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """20 mm across at 1 mm."""
    mask = np.sum((np.indices((25, 25, 25)) - 12) ** 2, axis=0) <= 100
    hu = np.random.default_rng(seed).normal(np.where(mask, 20.0, -850.0), 40.0)
    return hu.astype(np.float32), mask


def test_axes_and_surroundings_do_not_matter() -> None:
    hu, mask = _nodule()
    mask[:, :10] = False
    expected = {name: pytest.approx(v, rel=1e-9, abs=1e-12) for name, v in features(hu, mask).items()}
    assert features(hu.transpose(2, 0, 1)[:, ::-1], mask.transpose(2, 0, 1)[:, ::-1]) == expected
    assert features(np.where(mask, hu, 3000).astype(np.float32), mask) == expected
    assert features(np.pad(hu, 3), np.pad(mask, 3)) == expected


def test_a_nodule_of_4000_voxels() -> None:
    hu, mask = _nodule()
    assert np.count_nonzero(mask) == 4169
    found = features(hu, mask)
    assert tuple(found) == FEATURES
    assert all(type(v) is float and math.isfinite(v) for v in found.values())
    # independent noise: neither neighbouring levels nor halves know of each other
    assert found["glcm_Correlation"] == pytest.approx(0, abs=0.02)
    assert found["firstorder_Variance"] == pytest.approx(1600, rel=0.05)
    assert found["firstorder_Kurtosis"] == pytest.approx(3, abs=0.2)


def test_levels_begin_at_a_multiple_of_the_width() -> None:
    # pyradiomics' own example: 54 to 166 HU in bins of 25 have the edges 50, 75, …, 175
    hu = np.array([54.0, 74.99, 75.0, 100.0, 124.0, 125.0, 149.0, 166.0]).reshape(1, 1, 8)
    found = features(hu, np.ones(hu.shape, np.bool_))
    # levels 1 1 2 3 3 4 4 5
    assert found["firstorder_Entropy"] == pytest.approx(3 * 0.25 * 2 + 2 * 0.125 * 3)
    assert found["glrlm_HighGrayLevelRunEmphasis"] == pytest.approx((1 + 4 + 9 + 16 + 25) / 5)


def test_a_region_one_slice_thick_has_the_four_directions_of_a_plane() -> None:
    level = np.array([[1, 2, 2], [1, 1, 2]], np.float64)
    found = features(level[None], np.ones((1, 2, 3), np.bool_), bin_width_hu=1.0)
    runs = [loop_runs({(0, y, x): int(v) for (y, x), v in np.ndenumerate(level)}, by) for by in DIRECTIONS]
    in_plane = [r for r, by in zip(runs, DIRECTIONS, strict=True) if by[0] == 0]
    assert len(in_plane) == 4
    assert found["glrlm_RunPercentage"] == pytest.approx(np.mean([len(r) for r in in_plane]) / 6)


def test_a_flat_region() -> None:
    found = features(np.full((3, 3, 3), 0.1, np.float32), np.ones((3, 3, 3), np.bool_))
    assert found["firstorder_Skewness"] == found["firstorder_Kurtosis"] == found["firstorder_Entropy"] == 0
    assert found["glcm_Correlation"] == found["glcm_MCC"] == found["glcm_JointEnergy"] == 1
    assert found["glcm_Imc1"] == found["glcm_Imc2"] == found["glcm_Contrast"] == found["glcm_InverseVariance"] == 0
    assert found["glszm_LargeAreaEmphasis"] == 27**2
    assert features(np.full((3, 3, 3), 0.1), np.ones((3, 3, 3), np.bool_), bins=8)["firstorder_Uniformity"] == 1


def _only(*voxels: Voxel) -> NDArray[np.bool_]:
    mask = np.zeros((3, 3, 3), np.bool_)
    for at in voxels:
        mask[at] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (_only(), "the mask is empty"),
        (_only((1, 1, 1)), "the mask has one voxel"),
        (_only((0, 0, 0), (2, 2, 2)), "none of the 2 voxels of the mask touch"),
        (_only((0, 0, 0), (0, 0, 1)), "1 of 2 voxels of the region are not finite"),
        (_only((1, 1, 1))[1:], "boolean mask of that shape"),
        (_only((1, 1, 1)).astype(np.uint8), "boolean mask of that shape"),
    ],
)
def test_regions_without_texture_are_refused(mask: NDArray[np.bool_], says: str) -> None:
    hu = np.zeros((3, 3, 3))
    hu[0, 0, 1] = np.nan
    with pytest.raises(ValueError, match=says):
        features(hu, mask)


def test_impossible_levels_are_refused() -> None:
    hu, mask = _phantom()
    with pytest.raises(ValueError, match="wider than 0 HU"):
        features(hu, mask, bin_width_hu=0.0)
    with pytest.raises(ValueError, match="at least one grey level"):
        features(hu, mask, bins=0)


def test_preset_57() -> None:
    assert len(set(FEATURES)) == 74
    assert Counter(name.split("_")[0] for name in FEATURES) == {"firstorder": 18, "glcm": 24, "glrlm": 16, "glszm": 16}
    assert len(set(PRESET_57)) == 57
    assert Counter(name.split("_")[0] for name in PRESET_57) == {"firstorder": 15, "glcm": 20, "glrlm": 11, "glszm": 11}
    assert [name for name in FEATURES if name in PRESET_57] == list(PRESET_57)
    left_out = {name.partition("_")[2] for name in FEATURES if name not in PRESET_57 and name[:5] in ("first", "glcm_")}
    assert left_out == {"TotalEnergy", "Range", "RobustMeanAbsoluteDeviation", "SumAverage", "MCC", "Imc2", "Id"}
    classical = {
        *("ShortRunEmphasis", "LongRunEmphasis", "GrayLevelNonUniformity", "RunLengthNonUniformity", "RunPercentage"),
        *("LowGrayLevelRunEmphasis", "HighGrayLevelRunEmphasis"),
        *("ShortRunLowGrayLevelEmphasis", "ShortRunHighGrayLevelEmphasis"),
        *("LongRunLowGrayLevelEmphasis", "LongRunHighGrayLevelEmphasis"),
    }
    assert {name[6:] for name in PRESET_57 if name.startswith("glrlm_")} == classical
    of_zones = {
        *("SmallAreaEmphasis", "LargeAreaEmphasis", "GrayLevelNonUniformity", "SizeZoneNonUniformity"),
        *("ZonePercentage", "LowGrayLevelZoneEmphasis", "HighGrayLevelZoneEmphasis"),
        *("SmallAreaLowGrayLevelEmphasis", "SmallAreaHighGrayLevelEmphasis"),
        *("LargeAreaLowGrayLevelEmphasis", "LargeAreaHighGrayLevelEmphasis"),
    }
    assert {name[6:] for name in PRESET_57 if name.startswith("glszm_")} == of_zones


# --- comparison -------------------------------------------------------------------------------------------------------

# Student's own sleep data (Biometrika 1908;6:1): hours gained by ten patients with two drugs; t = 4.0621, p = 0.00283
DRUG_1 = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
DRUG_2 = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


def _regions(**columns: tuple[float, ...]) -> list[dict[str, float]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_comparison_of_students_sleep_data() -> None:
    found = compare(_regions(a=DRUG_1, b=DRUG_1), _regions(a=DRUG_2, b=DRUG_1), ("a", "b"))
    assert found["a"].t == pytest.approx(4.0621, abs=5e-5)
    assert found["a"].p == pytest.approx(0.00283, abs=5e-6)
    assert found["a"].p_holm == pytest.approx(2 * found["a"].p)
    assert not found["a"].consistent
    assert found["a"].relative_error == pytest.approx(15.8 / 13.7)
    assert (found["b"].t, found["b"].p, found["b"].p_holm, found["b"].concordance) == (0.0, 1.0, 1.0, 1.0)
    assert found["b"].consistent
    assert found["b"].relative_error == 0


def test_a_shift_of_all_regions_alike_is_a_difference() -> None:
    found = compare(_regions(a=(0.1, 0.2, 0.3)), _regions(a=(0.0, 0.1, 0.2)), ("a",))["a"]
    assert (found.t, found.p, found.consistent) == (-math.inf, 0.0, False)


def test_concordance_by_its_formula() -> None:
    # n = 4, means 2.5 and 3.5, variances 1.25 and 1.25, covariance 1.25: 2.5 / (2.5 + 1)
    assert lin_concordance(np.array([1.0, 2, 3, 4]), np.array([2.0, 3, 4, 5])) == pytest.approx(2.5 / 3.5)
    assert lin_concordance(np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 1])) == pytest.approx(-1)
    assert lin_concordance(np.array([2.0, 2]), np.array([2.0, 2])) == 1


def test_holm() -> None:
    # by hand: 4·0.005, 3·0.01, then 2·0.03 = 0.06, and 0.04 may not fall below it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_preset_on_two_sets_of_nodules() -> None:
    reference = [features(*_nodule(seed)) for seed in range(3)]
    other = [features(*_nodule(seed + 10)) for seed in range(3)]
    assert tuple(compare(reference, other)) == PRESET_57
    same = compare(reference, reference)
    assert all(c.consistent and c.concordance == pytest.approx(1) for c in same.values())


@pytest.mark.parametrize(
    ("reference", "other", "says"),
    [
        ([{"a": 1.0}], [{"a": 1.0}], "two or more regions in pairs, got 1 and 1"),
        ([{"a": 1.0}] * 2, [{"a": 1.0}] * 3, "two or more regions in pairs, got 2 and 3"),
        ([{"a": 1.0}] * 2, [{"a": 1.0}, {"b": 1.0}], "region 1 has no feature a"),
        ([{"a": 1.0}] * 2, [{"a": 1.0}, {"a": math.nan}], "a of region 1 is not finite"),
    ],
)
def test_regions_that_cannot_be_compared(
    reference: list[dict[str, float]], other: list[dict[str, float]], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        compare(reference, other, ("a",))
