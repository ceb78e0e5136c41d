"""STResNet and the SRResNet3D it is compared with (Wei and Hsu, MIDL 2021), trained alike on volumes.

The paper states the data (184 chest scans at 10 % of the dose, 2.0 mm to 1.0 mm) and mixed precision; loss, optimiser,
rate, patch and batch are not stated: those of our defaults are taken. Averaged weights, clipped gradients and
bfloat16 as the mixed precision are ours (`training.loop`). ``--z-target-mm 1`` learns thick to thin.
"""

from __future__ import annotations

from typing import Any

from pipelines.stresnet import SRResNet3D, STResNet
from training.loop import Schedule
from training.recipes import Faithful, Recipe, deep, volume


def _card(name: str, limits: str) -> dict[str, Any]:
    return {
        "name": name,
        "paper": "Wei L., Hsu W. Efficient and Accurate Spatial-Temporal Denoising Network for Low-dose CT Scans. "
        "MIDL 2021.",
        "doi": "",
        "input": "volume",
        "patch_zyx": [12, 56, 56],
        "overlap_zyx": [19, 19, 19],
        "noise_map": False,
        "limits": limits,
    }


BLIND = "Blind to the noise level. It takes nearly all noise away, which looks smooth; a blend below 1 keeps texture."

RECIPES = {
    "st3d": Recipe(
        card=_card("st3d", BLIND),
        network=lambda: deep(STResNet()),
        predict=volume,
        loss=Faithful,  # not stated
        patch_zyx=(12, 56, 56),  # not stated
        batch=4,  # not stated
        schedule=Schedule(steps=20_000, learning_rate=1e-3),  # not stated
        twins=True,
    ),
    "srresnet3d": Recipe(
        card=_card("srresnet3d", f"{BLIND} Twice the operations of st3d; here for comparison."),
        network=lambda: deep(SRResNet3D()),
        predict=volume,
        loss=Faithful,  # not stated
        patch_zyx=(12, 56, 56),  # not stated
        batch=4,  # not stated
        schedule=Schedule(steps=20_000, learning_rate=1e-3),  # not stated
        twins=True,
    ),
}
