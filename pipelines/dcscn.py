"""DCSCN and DCSWGAN, and what they were compared with (`dcscn`, `dcswgan`, `cnn-l1`, `wgan`).

You C., Yang L., Zhang Y., Wang G., "Low-dose CT via deep CNN with skip connection and network in network", Proc. SPIE
11113 (Developments in X-Ray Tomography XII), 2019: a chain of seven convolutions whose results are all concatenated
(the skip connections), two parallel branches of 1×1 convolutions (network in network), the input added to the result.
DCSCN is trained with L1 alone, DCSWGAN as the generator of a Wasserstein GAN with L1 beside it. Their opponents CNN-L1
and WGAN are the plain generator of Yang Q. et al., "Low-Dose CT Image Denoising Using a Generative Adversarial Network
With Wasserstein Distance and Perceptual Loss", IEEE TMI 2018;37:1348-1357, trained in the same two ways.

What the paper leaves open, and what we chose:

- Its widths are those of the compact network of Yamanaka J., Kuwashima S., Kurita T., "Fast and Accurate Image Super
  Resolution by Deep CNN with Skip Connection and Network in Network", ICONIP 2017 (arXiv 1707.05425), down to the
  parameters of the formula in `widths`; so that network settles the rest: PReLU per channel (starting at 0.1), branches
  of 24 and of 8, 8. The GAN papers of the same group use a leaky ReLU of fixed slope.
- The reconstruction is the 1×1 convolution of the figure's "1×1 CNN" (Yamanaka: 3×3), 26,077 parameters in all.
- "Bicubic-interpolated input" is left over from super-resolution: at scale 1 it is the input itself.
- Yamanaka's dropout and weight decay serve super-resolution; none here.
- He's initialisation as there, and a small last layer: untrained, DCSCN is nearly the identity.
- The plain generator ends with a ReLU where images are scaled to [0, 1]; in signed units (air is −1) its last layer
  must be linear. It has no skip, so untrained it is not the identity.

What could be had and is left out:

- A 3×3 reconstruction (26,333 parameters), which would be Yamanaka's rather than the figure's: nobody asked for it.
- Neighbouring slices as channels: the paper's patches are two-dimensional, and nobody asked for more.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

LAYERS = 7
MOST, LEAST = 32, 8
"""Features of the first and of the last convolution of the chain."""
DECAY = 1.2
"""How the features in between fall (Yamanaka's ``filters_decay_gamma``)."""
BRANCH_A = 24
BRANCH_B = 8
HALO = LAYERS + 1
PLAIN_FEATURES = 32
PLAIN_LAYERS = 8
PLAIN_HALO = PLAIN_LAYERS


def widths(layers: int = LAYERS, most: int = MOST, least: int = LEAST, decay: float = DECAY) -> list[int]:
    """Features of each convolution of the chain: ``⌊(most − least)·(1 − (i/(layers−1))^(1/decay)) + least⌋``."""
    return [int((most - least) * (1 - (i / (layers - 1)) ** (1 / decay)) + least) for i in range(layers)]


def _conv(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    """With zeros around it, He's initialisation, no offset."""
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # it has one
    return conv


def _layer(inputs: int, outputs: int, size: int) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, outputs, size), nn.PReLU(outputs, init=0.1))


class DCSCN(nn.Module):
    """One slice (batch, 1, y, x) to the same denoised, in network units; any size."""

    def __init__(self) -> None:
        super().__init__()
        features = widths()
        self.chain = nn.ModuleList(_layer(inputs, outputs, 3) for inputs, outputs in pairwise([1, *features]))
        self.branch_a = _layer(sum(features), BRANCH_A, 1)
        self.branch_b = nn.Sequential(_layer(sum(features), BRANCH_B, 1), _layer(BRANCH_B, BRANCH_B, 3))
        self.reconstruction = _conv(BRANCH_A + BRANCH_B, 1, 1)
        with torch.no_grad():
            self.reconstruction.weight *= 0.01

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, results = x, []
        for layer in self.chain:
            y = layer(y)
            results.append(y)
        together = torch.cat(results, 1)
        change: torch.Tensor = self.reconstruction(torch.cat([self.branch_a(together), self.branch_b(together)], 1))
        return x + change


class PlainCNN(nn.Module):
    """Eight 3×3 convolutions with ReLU between them; one slice (batch, 1, y, x) in and out, network units, any size."""

    def __init__(self) -> None:
        super().__init__()
        features = [1, *[PLAIN_FEATURES] * (PLAIN_LAYERS - 1), 1]
        self.convs = nn.ModuleList(_conv(inputs, outputs, 3) for inputs, outputs in pairwise(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs[:-1]:
            x = functional.relu(conv(x), inplace=True)
        result: torch.Tensor = self.convs[-1](x)
        return result
