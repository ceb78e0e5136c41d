"""What is trained and how: one module per network, each with one `RECIPE`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from training.loop import Batch


@dataclass(frozen=True, slots=True)
class Recipe:
    """A network and its training.

    card
        The fields of `pipelines.base.ModelCard` that training does not change.
    network
        Makes the untrained network.
    loss
        The loss of a batch of patches.
    patch_zyx, batch, learning_rate, steps
        The training itself.
    real_part
        Part of the patches from real series, if there are any.
    """

    card: dict[str, Any]
    network: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    patch_zyx: tuple[int, int, int]
    batch: int
    learning_rate: float
    steps: int
    real_part: float = 0.3
