"""STResNet and the SRResNet3D it is compared with (Wei and Hsu, MIDL 2021), trained alike on volumes.

The paper states the data (184 chest scans at 10 % of the dose, 2.0 mm to 1.0 mm) and mixed precision; loss, optimiser,
rate, patch and batch are not stated: those of our defaults are taken. Averaged weights, clipped gradients and
bfloat16 as the mixed precision are ours (`training.loop`). ``--z-target-mm 1`` learns thick to thin.

The wide networks, for the speed that the paper compares, begin with what the narrow ones know (`training.widening`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from pipelines.runtime import read_card
from pipelines.stresnet import SRResNet3D, STResNet
from pipelines.torch_engine import load_network
from training.loop import Schedule
from training.recipes import Faithful, Recipe, deep, volume
from training.widening import widen

PATCH_ZYX = (12, 56, 56)
WIDE = 64
"""Features of the wide networks; with 8 blocks, as in EDSR's baseline with half its depth."""


def _card(name: str, limits: str) -> dict[str, Any]:
    return {
        "name": name,
        "paper": "Wei L., Hsu W. Efficient and Accurate Spatial-Temporal Denoising Network for Low-dose CT Scans. "
        "MIDL 2021.",
        "doi": "",
        "input": "volume",
        "overlap_zyx": [19, 19, 19],
        "noise_map": False,
        "limits": limits,
    }


BLIND = "Blind to the noise level. It takes nearly all noise away, which looks smooth; a blend below 1 keeps texture."


def _widened(name: str, narrow: Callable[[], nn.Module]) -> Callable[[nn.Module, Path], None]:
    """Begin with what `name` computes."""

    def start(network: nn.Module, folder: Path) -> None:
        known = narrow()
        load_network(known, read_card(name, folder), folder)
        widen(known, network)

    return start


def _recipe(
    name: str,
    network: Callable[[], nn.Module],
    schedule: Schedule,
    limits: str = "",
    begins_with: str = "",
    narrow: Callable[[], nn.Module] | None = None,
) -> Recipe:
    return Recipe(
        card=_card(name, f"{BLIND} {limits}".strip()),
        network=lambda: deep(network()),
        predict=volume,
        loss=Faithful,  # not stated
        patch_zyx=PATCH_ZYX,  # not stated
        batch=4,  # not stated
        schedule=schedule,
        begins_with=begins_with,
        start=_widened(begins_with, narrow) if narrow else None,
        twins=True,
    )


NARROW_SCHEDULE = Schedule(steps=20_000, learning_rate=1e-3)  # not stated
WIDE_SCHEDULE = Schedule(steps=4_000, learning_rate=3e-4)  # they begin trained

RECIPES = {
    "st3d": _recipe("st3d", STResNet, NARROW_SCHEDULE),
    "srresnet3d": _recipe(
        "srresnet3d", SRResNet3D, NARROW_SCHEDULE, "Twice the operations of st3d; here for comparison."
    ),
    "st3d-wide": _recipe(
        "st3d-wide",
        lambda: STResNet(WIDE),
        WIDE_SCHEDULE,
        "Four times the operations of st3d; here for the speed that the paper compares.",
        "st3d",
        STResNet,
    ),
    "srresnet3d-wide": _recipe(
        "srresnet3d-wide",
        lambda: SRResNet3D(WIDE),
        WIDE_SCHEDULE,
        "Nine times the operations of st3d; here for the speed that the paper compares.",
        "srresnet3d",
        SRResNet3D,
    ),
}
