"""HU to network units and back: the one pair of functions that training and inference share."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # the node runs without it
    import torch

Values = TypeVar("Values", NDArray[np.float32], "torch.Tensor", float)

HU_PER_UNIT = 1000.0
"""One network unit in HU: air is −1, water 0, dense bone about 1. Nothing is clipped, so metal passes through."""


def to_network(hu: Values) -> Values:
    """HU (or a noise level in HU) in network units."""
    return hu / HU_PER_UNIT


def to_hu(values: Values) -> Values:
    """Network units in HU."""
    return values * HU_PER_UNIT
