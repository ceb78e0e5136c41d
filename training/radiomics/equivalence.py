"""Evidence that features agree, which a t-test that finds no difference is not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from training.radiomics.comparison import ALPHA, FeatureComparison, compare

Floats = NDArray[np.float64]

MARGIN_SD = 0.2
"""Margin of equivalence in standard deviations of the feature between regions of the reference: a small effect by
Cohen (Statistical Power Analysis for the Behavioral Sciences, 1988)."""
CONCORDANT = 0.9
"""Lin's coefficient from which a feature counts as reproduced; below it agreement is poor (McBride, NIWA report
HAM2005-062)."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """One feature of the same regions in two sets of images: difference, and equivalence."""

    difference: FeatureComparison
    p_equivalence: float
    """See `tost`, with a margin of `MARGIN_SD`."""

    @property
    def equivalent(self) -> bool:
        """Whether the means are shown to differ by less than the margin."""
        return self.p_equivalence < ALPHA


@dataclass(frozen=True, slots=True)
class Count:
    """How many of some features agree, by each criterion."""

    features: int
    consistent: int
    """Paired t-test p ≥ 0.05, the STResNet paper's count."""
    consistent_holm: int
    """The same after Holm's correction for all features compared."""
    concordant: int
    """Lin's coefficient ≥ `CONCORDANT`."""
    equivalent: int
    median_relative_error: float


def tost(reference: Floats, other: Floats, margin: float) -> float:
    """P-value of two one-sided paired t-tests (Schuirmann, J Pharmacokinet Biopharm 1987;15:657).

    The larger of the two p-values against "the mean difference is −`margin` or less" and "`margin` or more": where it
    is below 0.05, the means are equivalent within the margin, and the 90 % confidence interval lies inside it.
    """
    difference = other - reference
    mean = float(difference.mean())
    error = float(difference.std(ddof=1)) / math.sqrt(difference.size)
    rounding = 1e-12 * float(max(abs(reference).max(), abs(other).max()))
    if error <= rounding:  # the test cannot divide by it: certainty
        return 0.0 if abs(mean) <= max(margin, rounding) else 1.0
    return float(stats.t.sf((margin - abs(mean)) / error, difference.size - 1))


def agree(
    reference: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]], names: Iterable[str]
) -> dict[str, Agreement]:
    """`compare`, and equivalence, of each feature; parameters and errors as there."""
    out = {}
    for name, difference in compare(reference, other, names).items():
        r, o = (np.array([region[name] for region in regions], np.float64) for regions in (reference, other))
        out[name] = Agreement(difference, tost(r, o, MARGIN_SD * float(r.std(ddof=1))))
    return out


def count(agreements: Iterable[Agreement]) -> Count:
    """Count what agrees; of no features the relative error is not a number."""
    all_of = tuple(agreements)
    differences = [one.difference for one in all_of]
    return Count(
        len(all_of),
        sum(d.consistent for d in differences),
        sum(d.p_holm >= ALPHA for d in differences),
        sum(d.concordance >= CONCORDANT for d in differences),
        sum(one.equivalent for one in all_of),
        median(d.relative_error for d in differences) if differences else math.nan,
    )
