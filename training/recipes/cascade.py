"""The cascade (Ataei et al.): DRL with a perceptual loss, then DRL with MSE on what is still wrong; and its parts.

The paper states Adam at 1e-3, batches of 32 patches of 64×64, 15 epochs of the first and 10 of the second stage (of
281,660 patches: 132,000 and 88,000 steps), and a perceptual loss of four levels of VGG16 beside the MSE. Without those
weights (training.features) the levels are those of our own auto-encoder of CT images. The steps are ours, eleven times
fewer; so are warm-up and decay of the rate, averaged weights, clipped gradients and bfloat16 (`training.loop`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from pipelines.cascade import CNN10_HALO, DRL, DRL_HALO, Cascade, WuCNN10
from pipelines.runtime import read_card
from pipelines.torch_engine import load_network
from training.data import Batch
from training.features import Backbone, FeatureLoss, PerceptualLoss, ShareWeight
from training.loop import Loss, Schedule
from training.losses import mse
from training.recipes import Recipe, flat, plane

VGG_WEIGHT = 0.1 * 0.4**2
"""The paper's λ = 0.1 belongs to images that are 1 at 400 HU; network units are 1 at 1000 HU."""
PERCEPTUAL_SHARE = 0.5
"""Part of the perceptual term in the loss with any other backbone."""
FIRST_STEPS, SECOND_STEPS = 12_000, 8_000
"""Ours, what a CPU trains in hours; the paper: 132,000 and 88,000. ``--steps 132000`` trains as long as it did."""
PERCEPTUAL = "Trained with a perceptual loss: texture counts as well as values."


class Perceptual(nn.Module):
    """MSE and the difference of features; its weight is a part of the checkpoint."""

    def __init__(self, backbone: Backbone = "ct-ae", weights: Path | None = None) -> None:
        super().__init__()
        features = FeatureLoss(backbone, weights)
        weight = VGG_WEIGHT if features.is_vgg else ShareWeight(PERCEPTUAL_SHARE)
        self.both = PerceptualLoss(features, weight)
        self.steady_after = weight.batches if isinstance(weight, ShareWeight) else 0
        """Steps after which the loss no longer changes."""
        self.features = f"{backbone} {features.sha256}".strip()
        """Backbone and digest of its weights."""

    def forward(self, denoised: torch.Tensor, target: torch.Tensor, batch: Batch) -> torch.Tensor:
        value: torch.Tensor = self.both(denoised, target)
        return value


def _mse(denoised: torch.Tensor, target: torch.Tensor, batch: Batch) -> torch.Tensor:
    return mse(denoised, target)


def _after(name: str) -> Callable[[nn.Module, Path], None]:
    """Fill all stages but the last with the weights of `name`: a cascade of one stage less, or DRL alone."""

    def start(network: nn.Module, folder: Path) -> None:
        stages = cast(Cascade, network).stages[:-1]
        if len(stages) == 1:
            load_network(stages[0], read_card(name, folder), folder)
        else:
            before = Cascade(len(stages))
            load_network(before, read_card(name, folder), folder)
            stages.load_state_dict(before.stages.state_dict())

    return start


def _card(name: str, halo: int, limits: str) -> dict[str, Any]:
    return {
        "name": name,
        "paper": "Ataei S., Alirezaie J., Babyn P. Cascaded Convolutional Neural Networks with Perceptual Loss for Low "
        "Dose CT Denoising. IJCNN 2020.",
        "doi": "",
        "input": "slice",
        "overlap_zyx": [0, halo, halo],
        "noise_map": False,
        "limits": f"Blind to the noise level; sees one slice at a time. {limits}".strip(),
    }


def _recipe(
    name: str,
    network: Callable[[], nn.Module],
    loss: Callable[[], Loss],
    steps: int,
    begins_with: str = "",
    halo: int = DRL_HALO,
    limits: str = "",
) -> Recipe:
    return Recipe(
        card=_card(name, halo, limits),
        network=lambda: flat(network()),
        predict=plane,
        loss=loss,
        patch_zyx=(1, 64, 64),
        batch=32,
        schedule=Schedule(steps=steps, learning_rate=1e-3, betas=(0.9, 0.999)),
        perceptual=Perceptual if loss is Perceptual else None,
        begins_with=begins_with,
        start=_after(begins_with) if begins_with else None,
    )


RECIPES = {
    "drl": _recipe("drl", DRL, Perceptual, FIRST_STEPS, limits=PERCEPTUAL),
    "drl-mse": _recipe("drl-mse", DRL, lambda: _mse, FIRST_STEPS),
    "cnn10": _recipe("cnn10", WuCNN10, lambda: _mse, FIRST_STEPS, halo=CNN10_HALO),
    "cascade": _recipe("cascade", Cascade, lambda: _mse, SECOND_STEPS, "drl", 2 * DRL_HALO, PERCEPTUAL),
    "cascade-mse": _recipe("cascade-mse", Cascade, lambda: _mse, SECOND_STEPS, "drl-mse", 2 * DRL_HALO),
    "cascade-3": _recipe(
        "cascade-3",
        lambda: Cascade(3),
        lambda: _mse,
        SECOND_STEPS,
        "cascade",
        3 * DRL_HALO,
        PERCEPTUAL,
    ),
}
