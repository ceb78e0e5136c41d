"""A residual U-Net on three slices with a noise map (`quality-2.5d`).

Zhang K., Li Y., Zuo W., Zhang L., Van Gool L., Timofte R., "Plug-and-Play Image Restoration with Deep Denoiser Prior",
IEEE TPAMI 2022;44:6360-6376 (DRUNet): a U-Net of residual blocks without normalisation, with strided convolutions down,
transposed ones up, additive skips, and the noise level as an input map. It is bias-free as there, so image and noise
may be scaled together (Mohan et al., "Robust and Interpretable Blind Image Denoising via Bias-Free Convolutional
Neural Networks", ICLR 2020).

Ours, not the paper's: three neighbouring slices in and the noise of the centre slice out; 32, 64 and 128 features in
three levels of two blocks each (there 64 to 512 in four levels of four), because it must run on the CPU of a node; and
the last layers start small, so that the untrained network is nearly the identity. The 3×3 convolutions start with He's
initialisation, the strided and transposed ones keep PyTorch's.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

SLICES = 3
FEATURES = (32, 64, 128)
BLOCKS = 2
STRIDE = 4
"""Image sizes must be multiples of this: two levels lie below the first."""


def _conv(inputs: int, outputs: int, scale: float = 1.0) -> nn.Conv2d:
    """3×3 without bias, He's initialisation times `scale`."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    with torch.no_grad():
        conv.weight *= scale
    return conv


class Block(nn.Module):
    """``x + conv(relu(conv(x)))``."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first = _conv(features, features)
        self.second = _conv(features, features, 0.1)  # ten blocks in a row must not blow up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(functional.relu(self.first(x), inplace=True))
        return x + y


def _blocks(features: int) -> nn.Sequential:
    return nn.Sequential(*(Block(features) for _ in range(BLOCKS)))


class ResUNet(nn.Module):
    """Three slices (batch, 3, y, x) and a noise map (batch, 1, y, x) to the centre slice (batch, 1, y, x).

    All in network units; y and x are multiples of `STRIDE`.
    """

    def __init__(self, features: tuple[int, ...] = FEATURES) -> None:
        super().__init__()
        levels = list(pairwise(features))
        self.head = _conv(SLICES + 1, features[0])
        self.encoders = nn.ModuleList(_blocks(upper) for upper, _ in levels)
        self.downs = nn.ModuleList(nn.Conv2d(upper, lower, 2, stride=2, bias=False) for upper, lower in levels)
        self.bottom = _blocks(features[-1])
        self.ups = nn.ModuleList(nn.ConvTranspose2d(lower, upper, 2, stride=2, bias=False) for upper, lower in levels)
        self.decoders = nn.ModuleList(_blocks(upper) for upper, _ in levels)
        self.tail = _conv(features[0], 1, 0.01)

    def forward(self, slices: torch.Tensor, noise_map: torch.Tensor) -> torch.Tensor:
        y = self.head(torch.cat([slices, noise_map], 1))
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            y = encoder(y)
            skips.append(y)
            y = down(y)
        y = self.bottom(y)
        for up, decoder, skip in zip(reversed(self.ups), reversed(self.decoders), reversed(skips), strict=True):
            y = decoder(up(y) + skip)
        noise: torch.Tensor = self.tail(y)
        return slices[:, SLICES // 2 : SLICES // 2 + 1] - noise
