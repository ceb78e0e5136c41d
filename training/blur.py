"""Blur of a reconstruction kernel, where a Gaussian stands for it."""

from __future__ import annotations

import math


def sigma_mm(f50: float) -> float:
    """Standard deviation in mm of the Gaussian that halves the frequency `f50` in 1/mm: ``√(ln 2 / 2) / (π·f50)``."""
    return math.sqrt(math.log(2) / 2) / (math.pi * f50)
