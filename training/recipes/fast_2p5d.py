"""FFDNet on three slices: the noise of the centre slice, told the noise level."""

from __future__ import annotations

import torch
from torch import nn

from pipelines.ffdnet import SLICES, STRIDE, FFDNet
from training.loop import Batch, charbonnier
from training.recipes import Recipe


def loss(network: nn.Module, batch: Batch) -> torch.Tensor:
    """Charbonnier on the centre slice; the noise map is constant over a patch."""
    noisy, target, level = batch
    height, width = noisy.shape[2] // STRIDE, noisy.shape[3] // STRIDE
    noise_map = level[:, None, None, None].expand(-1, 1, height, width)
    centre = target[:, SLICES // 2 : SLICES // 2 + 1]
    return charbonnier(network(noisy.contiguous(memory_format=torch.channels_last), noise_map), centre)


def network() -> nn.Module:
    """Channels last: several times faster on the CPU."""
    return FFDNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # no stub


RECIPE = Recipe(
    card={
        "name": "fast-2.5d",
        "paper": "Zhang K., Zuo W., Zhang L. FFDNet: Toward a Fast and Flexible Solution for CNN-Based Image "
        "Denoising. IEEE Transactions on Image Processing 2018;27:4608-4622.",
        "doi": "10.1109/TIP.2018.2839891",
        "input": "slab3",
        "patch_zyx": [3, 96, 96],
        "overlap_zyx": [1, 21, 21],
        "valid_for": {
            "slice_spacing_mm": [0.5, 10.0],
            "pixel_spacing_mm": [0.4, 1.5],
            "min_slices": 1,
            "max_slices": 3000,
        },
        "noise_map": True,
        "limits": "One noise level for the whole series: where the noise is far above that of soft tissue in the middle"
        " (shoulders, pelvis) some stays. It takes nearly all noise away elsewhere, which looks smooth; a "
        "strength or blend below 1 keeps texture.",
    },
    network=network,
    loss=loss,
    patch_zyx=(SLICES, 96, 96),
    batch=16,
    learning_rate=1e-3,
    steps=100_000,
)
