"""Whether features of the same regions agree between two sets of images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from training.radiomics.extraction import PRESET_57

Floats = NDArray[np.float64]

ALPHA = 0.05
"""The STResNet paper's level of significance."""
_ROUNDING = 1e-12
"""Differences below this part of the values are rounding."""


@dataclass(frozen=True, slots=True)
class FeatureComparison:
    """One feature of n regions in two sets of images.

    t, p
        Paired t-test, two-sided; `t` is positive where the feature is larger than in the reference.
    p_holm
        `p` corrected for the number of features compared.
    concordance
        Lin's concordance correlation coefficient, 1 for equal values.
    relative_error
        Mean absolute difference over the mean absolute reference.
    """

    name: str
    t: float
    p: float
    p_holm: float
    concordance: float
    relative_error: float

    @property
    def consistent(self) -> bool:
        """Whether the paired t-test finds no difference, uncorrected, as the STResNet paper counts (its 31 of 57).

        With few regions this is lack of evidence and no proof of equality: read it beside `concordance`.
        """
        return self.p >= ALPHA


def compare(
    reference: Sequence[Mapping[str, float]],
    other: Sequence[Mapping[str, float]],
    names: Iterable[str] = PRESET_57,
) -> dict[str, FeatureComparison]:
    """Compare each feature over regions measured in two sets of images.

    Parameters
    ----------
    reference, other
        What `features` gave for each region, the same regions in the same order.
    names
        The features to compare. Holm's correction is for their number.

    Returns
    -------
    dict
        By name, in the order of `names`.

    Raises
    ------
    ValueError
        If the regions are not in pairs, are fewer than two, or lack a feature or have one that is not finite.
    """
    if len(reference) != len(other) or len(reference) < 2:
        raise ValueError(f"expected two or more regions in pairs, got {len(reference)} and {len(other)}")
    names = tuple(names)
    pairs = [(_column(reference, name), _column(other, name)) for name in names]
    tests = [_paired_t(r, o) for r, o in pairs]
    corrected = holm([p for _, p in tests])
    return {
        name: FeatureComparison(name, t, p, p_holm, lin_concordance(r, o), _relative_error(r, o))
        for name, (r, o), (t, p), p_holm in zip(names, pairs, tests, corrected, strict=True)
    }


def _column(regions: Sequence[Mapping[str, float]], name: str) -> Floats:
    lacking = [k for k, region in enumerate(regions) if name not in region]
    if lacking:
        raise ValueError(f"region {lacking[0]} has no feature {name}; names are family_Feature, as in FEATURES")
    column = np.array([region[name] for region in regions], np.float64)
    if not np.isfinite(column).all():
        raise ValueError(f"{name} of region {int(np.flatnonzero(~np.isfinite(column))[0])} is not finite")
    return column


def _paired_t(reference: Floats, other: Floats) -> tuple[float, float]:
    """t and p; differences that are all the same, which the test cannot divide by, are no evidence or certainty."""
    difference = other - reference
    rounding = _ROUNDING * float(max(abs(reference).max(), abs(other).max()))
    if np.ptp(difference) <= rounding:
        shift = float(difference.mean())
        return (0.0, 1.0) if abs(shift) <= rounding else (math.copysign(math.inf, shift), 0.0)
    result = stats.ttest_rel(other, reference)
    return float(result.statistic), float(result.pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm, Scand J Statist 1979;6:65), in the order given."""
    corrected = [0.0] * len(p)
    running = 0.0
    for rank, k in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        running = max(running, min(1.0, (len(p) - rank) * p[k]))
        corrected[k] = running
    return corrected


def lin_concordance(x: Floats, y: Floats) -> float:
    """Concordance correlation coefficient (Lin, Biometrics 1989;45:255, eq. 8), with moments over n as there.

    1 for equal values, also where they are all the same.
    """
    covariance = float(np.mean((x - x.mean()) * (y - y.mean())))
    scale = float(x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    return 2 * covariance / scale if scale > 0 else 1.0


def _relative_error(reference: Floats, other: Floats) -> float:
    error, scale = float(np.mean(abs(other - reference))), float(np.mean(abs(reference)))
    if scale > 0:
        return error / scale
    return math.inf if error > 0 else 0.0
