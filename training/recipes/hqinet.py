"""HQINet (Lu et al.): three slices in, the full-dose middle slice out; 0.85·L1 + 0.15·(1 − SSIM).

``hqinet`` has what the paper states: Adam at a fixed rate of 0.01, batch 88, 20 epochs (of the paper's 50 patients,
about 6,000 steps). It is not the paper's training to the letter: averaged weights, clipped gradients and bfloat16 are
ours (`training.loop`), and so are the window of the loss and the data. It needs GPUs with 96 GB together;
``hqinet-lite`` is what a CPU can train.
"""

from __future__ import annotations

from typing import Any

import torch

from pipelines.ct_header import MAX_MATRIX
from pipelines.hqinet import HQINet
from training.data import Batch
from training.loop import Schedule
from training.losses import l1_ssim
from training.recipes import Recipe, flat, plane

WHOLE = "Every pixel depends on means over the whole image, so what lies elsewhere in it can change a region."


def _card(name: str, limits: str) -> dict[str, Any]:
    return {
        "name": name,
        "paper": "Lu et al. High-quality Low-dose CT Reconstruction Using Convolutional Neural Networks with Spatial "
        "and Channel Squeeze and Excitation.",
        "doi": "",
        "input": "slab3",
        "overlap_zyx": [1, MAX_MATRIX, MAX_MATRIX],  # means over the image: the whole of it
        "noise_map": False,
        "limits": limits,
    }


def _loss(denoised: torch.Tensor, target: torch.Tensor, batch: Batch) -> torch.Tensor:
    return l1_ssim(denoised, target)


RECIPES = {
    "hqinet": Recipe(
        card=_card("hqinet", f"Blind to the noise level. {WHOLE}"),
        network=lambda: flat(HQINet()),
        predict=plane,
        loss=lambda: _loss,
        patch_zyx=(3, 512, 512),
        batch=88,
        schedule=Schedule(steps=6_000, learning_rate=0.01, betas=(0.9, 0.999), warm_up=0, decay_part=0),
    ),
    "hqinet-lite": Recipe(
        card=_card("hqinet-lite", f"A small HQINet for the CPU. Blind to the noise level. {WHOLE}"),
        network=lambda: flat(HQINet.lite()),
        predict=plane,
        loss=lambda: _loss,
        patch_zyx=(3, 256, 256),  # the dilated convolutions of the last block need as much
        batch=4,
        schedule=Schedule(steps=10_000, learning_rate=5e-4),  # the paper's rate belongs to its batch
    ),
}
