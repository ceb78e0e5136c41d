"""FFDNet: its size, its layers, its equivariance."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from pipelines.ffdnet import FFDNet


def test_number_of_parameters() -> None:
    """13 channels in (three slices unshuffled, noise map), 64 × 9 hidden layers, 4 out, no biases."""
    assert sum(p.numel() for p in FFDNet().parameters()) == 9 * (13 * 64 + 8 * 64 * 64 + 64 * 4) == 304_704


def test_image_and_noise_scale_together() -> None:
    torch.manual_seed(0)
    network = FFDNet()
    x, sigma = torch.randn(1, 3, 16, 16), torch.full((1, 1, 8, 8), 0.3)
    assert torch.allclose(network(2.5 * x, 2.5 * sigma), 2.5 * network(x, sigma), rtol=1e-4, atol=1e-5)


def test_forward_is_the_published_order_of_layers() -> None:
    """At half the resolution: the four pixels of a square as channels, slice after slice, then the noise map."""
    torch.manual_seed(0)
    network = FFDNet(6, 4).double()
    convs = [conv for conv in network.convs if isinstance(conv, nn.Conv2d)]
    nn.init.normal_(convs[-1].weight, std=0.2)
    x, sigma = torch.randn(2, 3, 8, 12, dtype=torch.double), torch.rand(2, 1, 4, 6, dtype=torch.double)
    squares = [x[:, k : k + 1, i::2, j::2] for k in range(3) for i in (0, 1) for j in (0, 1)]
    y = torch.cat([*squares, sigma], 1)
    for conv in convs[:-1]:
        y = functional.conv2d(y, conv.weight, padding=1).clamp_min(0)
    y = functional.conv2d(y, convs[-1].weight, padding=1)
    noise = torch.empty(2, 1, 8, 12, dtype=torch.double)
    for k, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        noise[:, 0, i::2, j::2] = y[:, k]
    assert len(convs) == 4
    assert float(noise.detach().std()) > 0.1
    assert torch.allclose(network(x, sigma), x[:, 1:2] - noise, atol=1e-12)
