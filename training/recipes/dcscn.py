"""DCSCN and DCSWGAN, and the plain networks they were compared with (You et al.): L1, and Wasserstein with L1.

The paper states 80×80 patches, L1 for DCSCN and CNN-L1, and the Wasserstein distance with gradient penalty for the
others. It states no weights, optimiser, rate, batch or number of steps. Averaged weights, clipped gradients and
bfloat16 are ours (`training.loop`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.dcscn import DCSCN, HALO, PLAIN_HALO, PlainCNN
from pipelines.runtime import read_card
from pipelines.torch_engine import load_network
from training.critic import Critic
from training.data import Batch
from training.loop import Adversary, Schedule
from training.losses import CriticLoss, l1, wgan_critic_loss, wgan_generator_loss
from training.recipes import Recipe, flat, plane

PATCH = 80
L1_WEIGHT = 100.0
"""λ1 of DCSWGAN; not stated. It holds in any unit (`training.losses`)."""
REDRAWN = "It has no skip: it redraws the whole image, and edges of bone and lung come out less exact than they were."
ADVERSARIAL = "Adversarial training makes texture that looks right; it may make structure that is not there."


def _critic_loss(critic: nn.Module, denoised: torch.Tensor, target: torch.Tensor, number: int) -> CriticLoss:
    return wgan_critic_loss(critic, target, denoised, torch.Generator().manual_seed(number))


def _l1(denoised: torch.Tensor, target: torch.Tensor, batch: Batch) -> torch.Tensor:
    return l1(denoised, target)


def _weighted_l1(denoised: torch.Tensor, target: torch.Tensor, batch: Batch) -> torch.Tensor:
    return L1_WEIGHT * l1(denoised, target)


ADVERSARY = Adversary(
    critic=lambda: Critic(PATCH),
    critic_loss=_critic_loss,
    generator_loss=wgan_generator_loss,
    critic_steps=1,  # not stated; 1 is what Eulig et al. (Med Phys 2024) found for WGAN-VGG
    learning_rate=1e-4,  # not stated
    betas=(0.5, 0.9),  # not stated
)


def _from(name: str) -> Callable[[nn.Module, Path], None]:
    """Begin with the weights of `name`, the same network trained without a critic."""

    def start(network: nn.Module, folder: Path) -> None:
        load_network(network, read_card(name, folder), folder)
        network.requires_grad_(True)

    return start


def _card(name: str, halo: int, limits: str) -> dict[str, Any]:
    return {
        "name": name,
        "paper": "You C., Yang L., Zhang Y., Wang G. Low-dose CT via deep CNN with skip connection and network in "
        "network. Proc. SPIE 11113, Developments in X-Ray Tomography XII, 2019.",
        "doi": "",
        "input": "slice",
        "overlap_zyx": [0, halo, halo],
        "noise_map": False,
        "limits": f"Blind to the noise level; sees one slice at a time. {limits}".strip(),
    }


def _alone(name: str, network: Callable[[], nn.Module], halo: int, limits: str = "") -> Recipe:
    return Recipe(
        card=_card(name, halo, limits),
        network=lambda: flat(network()),
        predict=plane,
        loss=lambda: _l1,
        patch_zyx=(1, PATCH, PATCH),
        batch=32,  # not stated
        schedule=Schedule(steps=20_000, learning_rate=1e-3),  # not stated
    )


def _adversarial(
    name: str,
    begun_with: str,
    network: Callable[[], nn.Module],
    halo: int,
    limits: str = ADVERSARIAL,
) -> Recipe:
    return Recipe(
        card=_card(name, halo, limits),
        network=lambda: flat(network()),
        predict=plane,
        loss=lambda: _weighted_l1,
        patch_zyx=(1, PATCH, PATCH),
        batch=16,  # not stated
        schedule=Schedule(steps=4_000, learning_rate=1e-4, betas=(0.5, 0.9), warm_up=0),  # not stated
        adversary=ADVERSARY,
        begins_with=begun_with,
        start=_from(begun_with),
    )


RECIPES = {
    "dcscn": _alone("dcscn", DCSCN, HALO),
    "cnn-l1": _alone("cnn-l1", PlainCNN, PLAIN_HALO, REDRAWN),
    "dcswgan": _adversarial("dcswgan", "dcscn", DCSCN, HALO),
    # Whether the paper's WGAN has the L1 term is not stated. Without it 1200 steps made an image worse than it came in
    # (52.83 → 43.95 dB over the whole range of a phantom at quarter dose): a critic alone holds no tissue in place.
    # With it, WGAN differs from DCSWGAN by the network alone, as CNN-L1 from DCSCN.
    "wgan": _adversarial("wgan", "cnn-l1", PlainCNN, PLAIN_HALO, f"{REDRAWN} {ADVERSARIAL}"),
}
