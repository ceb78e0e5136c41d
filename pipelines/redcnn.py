"""RED-CNN, the yardstick of the field (`red-cnn`).

Chen H., Zhang Y., Kalra M. K., Lin F., Chen Y., Liao P., Zhou J., Wang G., "Low-Dose CT With a Residual Encoder-Decoder
Convolutional Neural Network", IEEE TMI 2017;36:2524-2535: five 5×5 convolutions without padding, five transposed ones
that give the size back, 96 features, and three skips, the last from the input to the output; 1,848,865 parameters.

What the paper leaves open or what cannot be kept:

- It closes with a ReLU after the skip from the input, on images scaled to [0, 1]. Here air is −1 and fat −0.1: that
  ReLU would cut off all that is below water. The last layer is therefore linear; all other ReLU stand as published.
- Initialisation: He's, which keeps a signal's size through ten layers of signed values, and a last layer that starts
  small, so that the untrained network is nearly the identity.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

FEATURES = 96
KERNEL = 5
LAYERS = 5
"""Convolutions, and as many transposed ones."""
HALO = 2 * LAYERS * (KERNEL // 2)
"""Pixels that a result depends on in each direction."""


def _start(layer: nn.Conv2d | nn.ConvTranspose2d, inputs: int, scale: float = 1.0) -> None:
    """He's initialisation times `scale`: an output adds up ``inputs × 25`` products in both kinds of layer."""
    nn.init.normal_(layer.weight, std=scale * (2 / (inputs * KERNEL**2)) ** 0.5)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # it has one


class REDCNN(nn.Module):
    """One slice (batch, 1, y, x) to the same denoised, in network units; at least 21 × 21 pixels."""

    def __init__(self, features: int = FEATURES) -> None:
        super().__init__()
        convs = [nn.Conv2d(features if k else 1, features, KERNEL) for k in range(LAYERS)]
        deconvs = [nn.ConvTranspose2d(features, features if k < LAYERS - 1 else 1, KERNEL) for k in range(LAYERS)]
        for k in range(LAYERS):
            _start(convs[k], features if k else 1)
            _start(deconvs[k], features, 1.0 if k < LAYERS - 1 else 0.01)
        self.convs, self.deconvs = nn.ModuleList(convs), nn.ModuleList(deconvs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []  # the input, and the results of the second and of the fourth convolution
        y = x
        for k, conv in enumerate(self.convs):
            if k % 2 == 0:
                skips.append(y)
            y = functional.relu(conv(y), inplace=True)
        for k, deconv in enumerate(self.deconvs):
            y = deconv(y)
            if k % 2 == 0:
                y = y + skips.pop()
            if k < LAYERS - 1:
                y = functional.relu(y, inplace=True)
        return y
