"""What is trained and how: one module per paper, each with its ``RECIPES`` by name of the pipeline.

Ours in every recipe, whatever its paper says: averaged weights, clipped gradients and bfloat16 (`training.loop`), a
rate that warms up and falls at the end where the recipe does not say otherwise, and the data.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.scaling import to_network
from training.data import Batch
from training.features import Backbone
from training.loop import Adversary, Loss, Predict, Schedule
from training.losses import charbonnier, contrast_loss

MODULES = {
    "quality-2.5d": "resunet",
    "fast-2.5d": "ffdnet",
    "st3d": "stresnet",
    "srresnet3d": "stresnet",
    "st3d-wide": "stresnet",
    "srresnet3d-wide": "stresnet",
    "red-cnn": "redcnn",
    "hqinet": "hqinet",
    "hqinet-lite": "hqinet",
    "dcscn": "dcscn",
    "dcswgan": "dcscn",
    "cnn-l1": "dcscn",
    "wgan": "dcscn",
    "drl": "cascade",
    "drl-mse": "cascade",
    "cnn10": "cascade",
    "cascade": "cascade",
    "cascade-mse": "cascade",
    "cascade-3": "cascade",
}
"""Module of this package that holds the recipe of each name."""
NOISE_FLOOR = to_network(5.0)
"""Limits the weight of patches that hold hardly any noise in `relative_charbonnier`."""
CONTRAST_WEIGHT = 0.4
"""Of `training.losses.contrast_loss` beside `relative_charbonnier`, which is 0.01 to 0.02 for a trained network."""
CONTRAST_STEPS = 2000
"""Over which that weight rises from nothing: the untrained network loses no contrast, and would stay as it is."""
QUADRATIC_UP_TO = 3.0
"""Errors below so many noise levels count by their square. A mean absolute value tends to the median, and the median of
what may be a faint lesion and may be noise is: nothing there."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A network and its training.

    card
        The fields of `pipelines.base.ModelCard` that training does not set, and ``limits``.
    network
        Makes the untrained network.
    predict, loss
        What it makes of a batch; makes the function that says how far that is from what it should be.
    patch_zyx, batch
        Size of a patch, patches in a batch.
    schedule
        Steps and rates.
    adversary
        The critic, if there is one.
    perceptual
        Makes the loss with another feature backbone, and a file of its weights, if the loss compares features.
    begins_with, start
        Name of the network that it begins with, if any; fills it with those weights from the folder that holds them.
    real_part
        Part of the patches from real series, if there are any.
    twins
        Are patches shown twice, once with a faint lesion (`training.data.Sampler`)?
    """

    card: dict[str, Any]
    network: Callable[[], nn.Module]
    predict: Predict
    loss: Callable[[], Loss]
    patch_zyx: tuple[int, int, int]
    batch: int
    schedule: Schedule
    adversary: Adversary | None = None
    perceptual: Callable[[Backbone, Path | None], Loss] | None = None
    begins_with: str = ""
    start: Callable[[nn.Module, Path], None] | None = None
    real_part: float = 0.3
    twins: bool = False


def recipe(name: str) -> Recipe:
    """The recipe `name`, one of `MODULES`."""
    found: Recipe = importlib.import_module(f"training.recipes.{MODULES[name]}").RECIPES[name]
    return found


def plane(network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Slices as channels in, the centre slice out."""
    middle = batch.target.shape[1] // 2
    noisy = batch.noisy.contiguous(memory_format=torch.channels_last)
    return network(noisy), batch.target[:, middle : middle + 1]


def told(stride: int) -> Predict:
    """The same for a network that is told the noise level, as a map at 1/`stride` of the resolution."""

    def predict(network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        count, slices, rows, columns = batch.noisy.shape
        noise_map = batch.level[:, None, None, None].expand(count, 1, rows // stride, columns // stride)
        noisy = batch.noisy.contiguous(memory_format=torch.channels_last)
        return network(noisy, noise_map), batch.target[:, slices // 2 : slices // 2 + 1]

    return predict


def volume(network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """A volume in, the volume out."""
    return network(batch.noisy[:, None]), batch.target[:, None]


def relative_charbonnier(denoised: torch.Tensor, target: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Charbonnier loss of the error over the noise level: a decibel counts alike at every dose."""
    weight = 1 / (batch.level + NOISE_FLOOR).view(-1, *[1] * (target.ndim - 1))
    return charbonnier(denoised.float() * weight, target * weight, QUADRATIC_UP_TO)


class Faithful(nn.Module):
    """`relative_charbonnier`, and faint lesions must come out as they went in; for batches of twins."""

    steady_after = CONTRAST_STEPS
    """Steps after which the loss no longer changes."""
    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, denoised: torch.Tensor, target: torch.Tensor, batch: Batch) -> torch.Tensor:
        value = relative_charbonnier(denoised, target, batch)
        if not len(batch.inserted):  # of a sampler without twins
            return value
        self.steps += 1
        inserted = batch.inserted
        if denoised.ndim == 4:  # the centre slice
            inserted = inserted[:, inserted.shape[1] // 2]
        weight = CONTRAST_WEIGHT * (self.steps / CONTRAST_STEPS).clamp(max=1)
        return value + weight * contrast_loss(denoised, inserted)


def flat(network: nn.Module) -> nn.Module:
    """Channels last in two dimensions: several times faster on the CPU, and on the GPU in half precision."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # no stub


def deep(network: nn.Module) -> nn.Module:
    """Channels last in three dimensions."""
    return network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload, no-any-return]  # no stub
