"""FFDNet: its size and its equivariance."""

from __future__ import annotations

import torch

from pipelines.ffdnet import FFDNet


def test_number_of_parameters() -> None:
    """13 channels in (three slices unshuffled, noise map), 64 × 9 hidden layers, 4 out, no biases."""
    assert sum(p.numel() for p in FFDNet().parameters()) == 9 * (13 * 64 + 8 * 64 * 64 + 64 * 4) == 304_704


def test_image_and_noise_scale_together() -> None:
    torch.manual_seed(0)
    network = FFDNet()
    x, sigma = torch.randn(1, 3, 16, 16), torch.full((1, 1, 8, 8), 0.3)
    assert torch.allclose(network(2.5 * x, 2.5 * sigma), 2.5 * network(x, sigma), rtol=1e-4, atol=1e-5)
