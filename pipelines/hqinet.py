"""HQINet: a ResNet-50 U-net with squeeze and excitation on three slices (`hqinet`, `hqinet-lite`).

Lu J. et al., "High-quality Low-dose CT Reconstruction Using Convolutional Neural Networks with Spatial and Channel
Squeeze and Excitation", arXiv, April 2021: three neighbouring slices in, the middle one out. A ResNet-50 encoder whose
7×7 convolution and pooling are replaced by 3×3 convolutions, with concurrent spatial and channel squeeze and excitation
(scSE: Roy A. G., Navab N., Wachinger C., MICCAI 2018) and atrous separable convolutions at its end (ASPP: Chen L.-C. et
al., DeepLabv3, arXiv 1706.05587, and DeepLabv3+, ECCV 2018); four decoders, each with a skip; a reconstruction from all
of them.

What the paper leaves open, and what we chose:

- Strides of the two convolutions of the stem: (1, 2), so that four decoders of ×2 end at full resolution and meet a
  skip there. The authors' batch of 88 whole slices fits their memory with (2, 2) only: `stem_strides`.
- Where scSE stands: after the last block of each of the four stages; reduction 2 as in Roy et al., sum of the two.
- ASPP: rates 6, 12 and 18 (a sixteenth of the resolution), 256 features, and a branch of the mean over the image
  (`pool`), as in DeepLabv3.
- Decoders: bilinear ×2, a skip reduced to 48 features (DeepLabv3+), two 3×3 convolutions of 256, 128, 64 and 32
  features; reconstruction: all four at full size, 3×3 to 64, 1×1 to 1.
- Whether the input is added to the output (`residual`): not in the paper, so not in the full network. The lite one
  adds it, because that keeps the HU of what the network does not know.
- Initialisation is stated: a normal distribution of σ = 0.01, truncated (at 2σ here), no offsets.

`HQINet()` is the full network: 34.47 million parameters, 69 MB in half precision, which no repository should hold.
`HQINet.lite()` has basic widths of 16 instead of 64 and two blocks a stage. (With 32 it would be 10 MB.)

Squeeze and excitation and `pool` look at the mean over all they are given. So it is run on whole slices, and patches in
training should be large, 256 or more; the ASPP rates alone reach 18 × 16 pixels to each side.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import nn
from torch.nn import functional

SLICES = 3
RATES = (6, 12, 18)
STRIDE = 16
"""Image sizes should be multiples of this, with strides of the stem of (1, 2)."""
_EXPANSION = 4
"""Outputs of a bottleneck in units of its width."""


def _layer(inputs: int, outputs: int, size: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    padding = size // 2 * dilation
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Bottleneck(nn.Module):
    """The block of ResNet-50: 1×1, 3×3 (with the stride), 1×1 to four times the width, and the input added."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = _EXPANSION * width
        self.reduce = _layer(inputs, width, 1)
        self.across = _layer(width, width, 3, stride)
        self.expand = nn.Sequential(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False)).append(nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.expand(self.across(self.reduce(x))) + self.shortcut(x), inplace=True)


class SCSE(nn.Module):
    """``x·c(x) + x·s(x)``: weights of channels from their means, and of pixels from all channels, both 0 to 1."""

    def __init__(self, features: int, reduction: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(features, features // reduction, 1)
        self.excite = nn.Conv2d(features // reduction, features, 1)
        self.pixels = nn.Conv2d(features, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        means = x.mean((2, 3), keepdim=True)
        channels = torch.sigmoid(self.excite(functional.relu(self.squeeze(means))))
        return x * (channels + torch.sigmoid(self.pixels(x)))


class ASPP(nn.Module):
    """Parallel convolutions of growing dilation, joined by a 1×1 convolution."""

    def __init__(self, inputs: int, outputs: int, *, pool: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList([_layer(inputs, outputs, 1)])
        for rate in RATES:
            across = _layer(inputs, inputs, 3, dilation=rate, groups=inputs)
            self.branches.append(nn.Sequential(across, _layer(inputs, outputs, 1)))
        self.mean = nn.Conv2d(inputs, outputs, 1) if pool else None
        self.join = _layer((len(self.branches) + pool) * outputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = [branch(x) for branch in self.branches]
        if self.mean is not None:
            mean = functional.relu(self.mean(x.mean((2, 3), keepdim=True)))
            results.append(mean.expand(-1, -1, *x.shape[2:]))
        joined: torch.Tensor = self.join(torch.cat(results, 1))
        return joined


def _resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


class HQINet(nn.Module):
    """Three slices (batch, 3, y, x) to the centre slice (batch, 1, y, x), in network units.

    Parameters
    ----------
    blocks, base
        Bottlenecks of each of the four stages, and the width of the first; it doubles from stage to stage.
    stem_strides
        Strides of the two convolutions before the stages.
    reduction
        By how much scSE squeezes the channels.
    aspp, skip, decoders, fused
        Features of ASPP, of a reduced skip, of each decoder, of the reconstruction.
    pool
        Has ASPP a branch of the mean over the image?
    residual
        Add the centre slice to the output?
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int] = (3, 4, 6, 3),
        base: int = 64,
        stem_strides: tuple[int, int] = (1, 2),
        reduction: int = 2,
        aspp: int = 256,
        skip: int = 48,
        decoders: tuple[int, int, int, int] = (256, 128, 64, 32),
        fused: int = 64,
        *,
        pool: bool = True,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.stem = nn.ModuleList([_layer(SLICES, base, 3, stem_strides[0]), _layer(base, base, 3, stem_strides[1])])
        self.stages = nn.ModuleList()
        outputs = [base]
        for level, count in enumerate(blocks):
            width = base * 2**level
            stage = nn.Sequential(Bottleneck(outputs[-1], width, 2 if level else 1))
            outputs.append(_EXPANSION * width)
            for _ in range(count - 1):
                stage.append(Bottleneck(outputs[-1], width, 1))
            self.stages.append(stage.append(SCSE(outputs[-1], reduction)))
        self.aspp = ASPP(outputs[-1], aspp, pool=pool)
        self.skips = nn.ModuleList(_layer(inputs, skip, 1) for inputs in outputs[-2::-1])
        self.decoders = nn.ModuleList(
            nn.Sequential(_layer(before + skip, after, 3), _layer(after, after, 3))
            for before, after in pairwise([aspp, *decoders])
        )
        self.fused_from = list(decoders)
        self.fuse = _layer(sum(decoders), fused, 3)
        self.reconstruction = nn.Conv2d(fused, 1, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.01, a=-0.02, b=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def lite(cls) -> HQINet:
        """The small one: below 3 MB in half precision."""
        return cls((2, 2, 2, 2), 16, reduction=16, aspp=64, skip=24, decoders=(64, 32, 32, 16), fused=32, residual=True)

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        full = self.stem[0](slices)
        y = self.stem[1](full)
        results = [full]
        for stage in self.stages:
            y = stage(y)
            results.append(y)
        y = self.aspp(y)
        # the convolution of `fuse` over all decoders is the sum of one over each: only one is held at full size
        parts = torch.split(cast(nn.Conv2d, self.fuse[0]).weight, self.fused_from, 1)
        fused = slices.new_zeros(())
        for reduced, decoder, result, part in zip(self.skips, self.decoders, results[-2::-1], parts, strict=True):
            y = decoder(torch.cat([_resized(y, result), reduced(result)], 1))
            fused = fused + functional.conv2d(_resized(y, slices), part, padding=1)
        image: torch.Tensor = self.reconstruction(self.fuse[1:](fused))
        return slices[:, SLICES // 2 : SLICES // 2 + 1] + image if self.residual else image
