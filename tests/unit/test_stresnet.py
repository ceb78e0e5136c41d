"""STResNet and SRResNet3D: their size, their reach, and that a stream is the whole volume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from untrained import FP32, install, through_rails

from pipelines.base import denoise_volume
from pipelines.network import NetworkPipeline
from pipelines.safety import network_input
from pipelines.shipped import Factory, srresnet3d, st3d
from pipelines.stresnet import ResNet3D, SRResNet3D, STResNet
from pipelines.testing import check_pipeline
from training.measuring.cases import volume_of

KINDS = pytest.mark.parametrize("kind", [STResNet, SRResNet3D])


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _pair(inputs: int, outputs: int) -> int:
    """9 weights per pair of channels across, 3 along, and a bias for each output."""
    return inputs * outputs * 9 + outputs + outputs * outputs * 3 + outputs


def _cube(inputs: int, outputs: int) -> int:
    return inputs * outputs * 27 + outputs


@pytest.mark.parametrize(
    ("kind", "conv", "features", "blocks", "printed"),
    [
        (STResNet, _pair, 32, 8, 213_701),
        (SRResNet3D, _cube, 32, 8, 472_321),
        (STResNet, _pair, 64, 8, 851_333),
        (SRResNet3D, _cube, 64, 8, 1_884_673),
        (STResNet, _pair, 64, 16, 1_639_813),
        (SRResNet3D, _cube, 64, 16, 3_655_169),
    ],
)
def test_number_of_parameters(
    kind: Callable[[int, int], ResNet3D], conv: Callable[[int, int], int], features: int, blocks: int, printed: int
) -> None:
    expected = conv(1, features) + (2 * blocks + 1) * conv(features, features) + conv(features, 1)
    with torch.device("meta"):
        assert _count(kind(features, blocks)) == expected == printed


def test_spatial_and_temporal_take_45_percent_of_the_operations() -> None:
    """A convolution that keeps the size takes one multiplication per weight and voxel."""

    def operations(network: nn.Module) -> int:
        return sum(p.numel() for p in network.parameters() if p.dim() > 1)

    with torch.device("meta"):
        ratio = operations(STResNet(64, 8)) / operations(SRResNet3D(64, 8))
    assert ratio == pytest.approx(12 / 27, abs=0.01)
    assert ratio < 0.455


@KINDS
def test_forward_is_the_published_order_of_layers(kind: Callable[..., ResNet3D]) -> None:
    """EDSR: head, blocks of convolution, ReLU, convolution and the input; the head is added behind them, then the tail.

    Written out once more, from the weights alone.
    """
    torch.manual_seed(0)
    network = kind(features=5, blocks=2).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    w = dict(network.state_dict())
    x = torch.randn(2, 1, 4, 9, 8, dtype=torch.double)

    def conv(name: str, y: torch.Tensor) -> torch.Tensor:
        if kind is SRResNet3D:
            return functional.conv3d(y, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)
        across = functional.conv3d(y, w[f"{name}.0.weight"], w[f"{name}.0.bias"], padding=(0, 1, 1))
        return functional.conv3d(across, w[f"{name}.1.weight"], w[f"{name}.1.bias"], padding=(1, 0, 0))

    head = y = conv("head", x)
    for k in range(2):
        y = y + conv(f"blocks.{k}.second", conv(f"blocks.{k}.first", y).clamp_min(0))
    noise = conv("tail", head + conv("body", y))
    assert float(noise.std()) > 0.1
    assert torch.allclose(network(x), x + noise, atol=1e-12)


@KINDS
def test_untrained_it_is_the_identity(kind: Callable[..., ResNet3D]) -> None:
    x = torch.randn(1, 1, 4, 9, 9)
    assert torch.equal(kind()(x), x)


@KINDS
def test_the_reach_of_one_voxel_grows_by_two_with_each_block(kind: Callable[..., ResNet3D]) -> None:
    torch.manual_seed(0)
    network = kind(features=4, blocks=2).double()
    for parameter in network.parameters():
        nn.init.uniform_(parameter, 0.1, 1)  # all positive: nothing cancels, no ReLU closes
    for axis, size in ((2, (41, 1, 1)), (3, (1, 41, 1)), (4, (1, 1, 41))):
        x = torch.zeros(1, 1, *size, dtype=torch.double)
        pulse = x.clone()
        pulse.view(-1)[20] = 1
        reached = ((network(pulse) - network(x)).abs() > 1e-12).flatten().nonzero().flatten().tolist()
        assert reached == list(range(20 - 7, 20 + 8)), axis


@KINDS
@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_stream_is_the_whole_volume(tmp_path: Path, kind: Callable[..., ResNet3D], count: int) -> None:
    """Within rounding: 0.01 HU."""
    torch.manual_seed(0)
    network = kind(features=8, blocks=2).eval()
    for parameter in network.tail.parameters():
        nn.init.normal_(parameter)
    network = network.half().float()  # as the weights on disk
    install(tmp_path, "any", network, "volume")
    volume = volume_of(np.random.default_rng(0).normal(0, 300, (count, 101, 77)).astype(np.float32), 0.7, 2.0)
    pipeline = NetworkPipeline("any", lambda: kind(features=8, blocks=2), execution=FP32, folder=tmp_path)
    with torch.inference_mode():  # in float64, so that only the stream rounds
        given = torch.from_numpy(network_input(volume)).double() / 1000
        whole = network.double()(given[None, None])[0, 0].float().numpy() * 1000
    assert float(np.abs(whole - volume.hu).mean()) > 10
    assert float(np.abs(denoise_volume(pipeline, volume) - through_rails(volume, whole)).max()) < 0.01


@pytest.mark.parametrize(
    ("name", "factory", "kind"), [("st3d", st3d, STResNet), ("srresnet3d", srresnet3d, SRResNet3D)]
)
def test_pipelines_keep_the_contract(
    tmp_path: Path, name: str, factory: Factory, kind: Callable[..., ResNet3D]
) -> None:
    torch.manual_seed(0)
    network = kind(features=8, blocks=2)
    for parameter in network.tail.parameters():
        nn.init.normal_(parameter, std=0.001)
    install(tmp_path, name, network, "volume")
    check_pipeline(factory(FP32, tmp_path))
