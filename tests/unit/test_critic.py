"""The critic of the WGAN: its size, and its arithmetic against plain convolutions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_convolution import convolve

from training.critic import Critic


@pytest.mark.parametrize(("patch", "parameters"), [(80, 27_360_705), (64, 17_923_521)])
def test_parameters(patch: int, parameters: int) -> None:
    with torch.device("meta"):
        critic = Critic(patch)
    # convolutions, then 256 maps of an eighth of the side to 1024 to 1
    maps = sum(9 * i * o + o for i, o in ((1, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256)))
    assert parameters == maps + (256 * (patch // 8) ** 2 + 1) * 1024 + 1025
    assert sum(p.numel() for p in critic.parameters()) == parameters


@pytest.mark.parametrize("patch", [16, 20])
def test_score_is_that_of_plain_convolutions(patch: int) -> None:
    torch.manual_seed(0)
    critic = Critic(patch)
    images = torch.randn(2, 1, patch, patch)
    weights = [p.detach().numpy() for p in critic.parameters()]
    for image, score in zip(images.numpy(), critic(images), strict=True):
        x = image.astype(np.float64)
        for k, stride in enumerate((1, 2, 1, 2, 1, 2)):
            x = convolve(x, weights[2 * k], weights[2 * k + 1], stride)
            x = np.where(x > 0, x, 0.2 * x)
        hidden = weights[12] @ x.ravel() + weights[13]
        hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
        assert score.item() == pytest.approx(float((weights[14] @ hidden + weights[15]).item()), abs=1e-5)


def test_score_of_an_image_is_its_own() -> None:
    # the gradient penalty needs it: no statistics of the batch
    torch.manual_seed(0)
    critic = Critic(16)
    images = torch.randn(3, 1, 16, 16)
    assert torch.allclose(critic(images)[1:2], critic(images[1:2]), atol=1e-6)


def test_other_patches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 16, 16\) was given \(1, 24, 24\)"):
        Critic(16)(torch.zeros(2, 1, 24, 24))
