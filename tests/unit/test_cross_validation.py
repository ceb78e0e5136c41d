"""Whole series of a subject that was left out, and the table of all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipelines.identity import Identity
from training.cross_validation import Fold, measured, table
from training.sources.scans import Scan, Spacing

SHAPE = (5, 40, 40)
SPACING = Spacing(2.0, 0.8)
FLAT = np.full(SHAPE, 40, np.float16)


def test_a_real_pair_is_measured_as_it_is() -> None:
    scan = Scan("L010 B30f 1 mm", "L010", FLAT, FLAT + np.float16(16), (), 5.0, 20.0, ())
    fold = measured(Identity(), scan, SPACING)
    assert (fold.subject, fold.series, fold.slices) == ("L010", "L010 B30f 1 mm", 5)
    assert (fold.before, fold.after) == pytest.approx((20 * math.log10(400 / 16),) * 2)


def test_a_series_without_a_partner_gets_the_noise_of_a_quarter_of_its_dose() -> None:
    """Four times the variance: to 5 HU of its own, 5·√3 are added."""
    noises = tuple(np.random.default_rng(k).normal(0, 8, SHAPE).astype(np.float16) for k in range(2))
    fold = measured(Identity(), Scan("1.2.3", "ab", FLAT, FLAT, noises, 5.0, 5.0, (8.0, 8.0)), SPACING)
    assert fold.before == pytest.approx(20 * math.log10(400 / (5 * math.sqrt(3))), abs=0.1)


def test_mean_and_deviation_are_over_subjects_not_series() -> None:
    folds = [
        Fold("a", "a soft", 10, 20.0, 24.0),
        Fold("a", "a sharp", 10, 22.0, 28.0),
        Fold("b", "b soft", 300, 30.0, 32.0),
    ]
    lines = table(folds).splitlines()
    assert "| a | a sharp | 10 | 22.00 | 28.00 | +6.00 |" in lines
    # of a 21, 26 and 5 dB, of b 30, 32 and 2 dB
    assert lines[-1] == "| **mean ± SD of 2 subjects** | | | 25.50 ± 6.36 | 29.00 ± 4.24 | 3.50 ± 2.12 |"


def test_one_subject_has_no_deviation() -> None:
    assert table([Fold("a", "a", 1, 20.0, 24.0)]).endswith("| 20.00 ± — | 24.00 ± — | 4.00 ± — |\n")
