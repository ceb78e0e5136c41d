"""The residual U-Net: its size, its layers, its equivariance."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from untrained import FP32, install

from pipelines.base import denoise_volume
from pipelines.resunet import ResUNet
from pipelines.shipped import quality_2p5d
from pipelines.testing import check_pipeline, water_volume


def _noisy() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 16, 24, generator=generator), 0.05 * torch.rand(2, 1, 16, 24, generator=generator)


def _loud(features: tuple[int, ...]) -> ResUNet:
    """With a last layer that counts."""
    torch.manual_seed(0)
    network = ResUNet(features)
    nn.init.normal_(network.tail.weight, std=0.1)
    return network.double()


def test_number_of_parameters() -> None:
    """Four channels in, two blocks of two convolutions in five places, 2 × 2 kernels between the levels, no biases."""
    blocks = 4 * 9 * (2 * 32**2 + 2 * 64**2 + 128**2)
    between = 2 * 4 * (32 * 64 + 64 * 128)
    expected = 9 * 4 * 32 + blocks + between + 9 * 32
    assert sum(p.numel() for p in ResUNet().parameters()) == expected == 1_041_824


def test_image_and_noise_scale_together() -> None:
    network = _loud((8, 12, 16))
    x, sigma = (t.double() for t in _noisy())
    for factor in (0.3, 2.5):
        assert torch.allclose(network(factor * x, factor * sigma), factor * network(x, sigma), rtol=1e-9, atol=1e-12)


def test_untrained_it_is_nearly_the_identity() -> None:
    torch.manual_seed(0)
    x, sigma = _noisy()
    assert 0 < float((ResUNet()(x, sigma) - x[:, 1:2]).detach().std()) < 0.05 * float(x.std())


def test_forward_is_the_published_order_of_layers() -> None:
    """Written out once more, from the weights alone, for two levels."""
    network = _loud((8, 12))
    x, sigma = (t.double() for t in _noisy())
    w = dict(network.state_dict())

    def blocks(name: str, y: torch.Tensor) -> torch.Tensor:
        for k in range(2):
            inner = functional.conv2d(y, w[f"{name}.{k}.first.weight"], padding=1).relu()
            y = y + functional.conv2d(inner, w[f"{name}.{k}.second.weight"], padding=1)
        return y

    top = blocks("encoders.0", functional.conv2d(torch.cat([x, sigma], 1), w["head.weight"], padding=1))
    low = blocks("bottom", functional.conv2d(top, w["downs.0.weight"], stride=2))
    up = functional.conv_transpose2d(low, w["ups.0.weight"], stride=2) + top
    noise = functional.conv2d(blocks("decoders.0", up), w["tail.weight"], padding=1)
    assert float(noise.std()) > 0.1
    assert torch.allclose(network(x, sigma), x[:, 1:2] - noise, atol=1e-12)


def test_three_levels_meet_their_own_skips() -> None:
    """With an empty bottom, what is left is the first level: the second level's skip must not reach the result."""
    network = _loud((8, 12, 16))
    x, sigma = (t.double() for t in _noisy())
    assert network(x, sigma).shape == (2, 1, 16, 24)
    for up in network.ups:
        assert isinstance(up, nn.ConvTranspose2d)
        nn.init.zeros_(up.weight)
    before = network(x, sigma)
    for parameter in network.encoders[1].parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(network(x, sigma), before)
    for parameter in network.encoders[0].parameters():
        nn.init.zeros_(parameter)
    assert not torch.equal(network(x, sigma), before)


def test_pipeline_keeps_the_contract(tmp_path: Path) -> None:
    torch.manual_seed(0)
    install(tmp_path, "quality-2.5d", ResUNet(), "slab3", noise_map=True)
    pipeline = quality_2p5d(FP32, tmp_path)
    check_pipeline(pipeline)
    volume = water_volume((3, 101, 77))
    out = denoise_volume(pipeline, volume)
    assert out.shape == (3, 101, 77)
    assert 0.1 < float(abs(out - volume.hu).mean()) < 50
