"""The Gaussian that stands for a kernel halves the frequency it is named by."""

from __future__ import annotations

import math

import pytest

from training.blur import sigma_mm


@pytest.mark.parametrize("f50", [0.25, 0.5, 1.2])
def test_the_frequency_is_halved(f50: float) -> None:
    assert math.exp(-2 * (math.pi * sigma_mm(f50) * f50) ** 2) == pytest.approx(0.5)
