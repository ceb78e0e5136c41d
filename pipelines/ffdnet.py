"""FFDNet on three slices with a noise map (`fast-2.5d`).

Zhang K., Zuo W., Zhang L., "FFDNet: Toward a Fast and Flexible Solution for CNN-Based Image Denoising", IEEE TIP
2018;27:4608-4622: the network works at half resolution on pixel-unshuffled images and takes the noise level as an
input map. Here the input is three neighbouring slices, and it is bias-free (Mohan et al., "Robust and Interpretable
Blind Image Denoising via Bias-Free Convolutional Neural Networks", ICLR 2020), so image and noise may be scaled
together. It predicts the noise of the centre slice.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

SLICES = 3
FEATURES = 64
DEPTH = 10
STRIDE = 2
"""Image sizes must be multiples of this."""


class FFDNet(nn.Module):
    """Three slices (batch, 3, y, x) and a noise map (batch, 1, y/2, x/2) to the centre slice (batch, 1, y, x).

    All in network units.
    """

    def __init__(self, features: int = FEATURES, depth: int = DEPTH) -> None:
        super().__init__()
        widths = [SLICES * STRIDE**2 + 1, *[features] * (depth - 1), STRIDE**2]
        convs = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False) for inputs, outputs in pairwise(widths)]
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        with torch.no_grad():  # untrained, the network is nearly the identity
            convs[-1].weight *= 0.01
        self.convs = nn.ModuleList(convs)

    def forward(self, slices: torch.Tensor, noise_map: torch.Tensor) -> torch.Tensor:
        y = torch.cat([functional.pixel_unshuffle(slices, STRIDE), noise_map], 1)
        for conv in self.convs[:-1]:
            y = functional.relu(conv(y), inplace=True)
        noise = functional.pixel_shuffle(self.convs[-1](y), STRIDE)
        return slices[:, SLICES // 2 : SLICES // 2 + 1] - noise
