"""HQINet: its size against ResNet-50, its attention against numpy, its whole slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from untrained import FP32, install, through_rails

from pipelines.base import denoise_volume
from pipelines.hqinet import ASPP, SCSE, Bottleneck, HQINet
from pipelines.safety import network_input
from pipelines.shipped import hqinet_lite
from pipelines.testing import check_pipeline, water_volume
from training.measuring.cases import volume_of

RESNET50_STAGES = 25_557_032 - 2_049_000 - 9_408 - 128
"""Parameters of the four stages of ResNet-50: all but its classifier and its stem."""


def _count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_the_encoder_is_that_of_resnet50() -> None:
    with torch.device("meta"):
        full = HQINet()
    attention = [module for module in full.modules() if isinstance(module, SCSE)]
    assert _count(full.stages) - _count(*attention) == RESNET50_STAGES
    assert [sum(1 for _ in stage.children()) - 1 for stage in full.stages] == [3, 4, 6, 3]
    assert _count(full) == 34_472_709


def test_the_lite_one_is_small_enough_for_a_repository() -> None:
    with torch.device("meta"):
        lite = HQINet.lite()
    assert 2 * sum(tensor.numel() for tensor in lite.state_dict().values()) < 3_000_000
    assert _count(lite) == 1_338_321


def test_squeeze_and_excitation_by_numpy() -> None:
    torch.manual_seed(0)
    module = SCSE(8, 2).double()
    x = torch.randn(2, 8, 5, 7, dtype=torch.double)
    w = {name: tensor.numpy() for name, tensor in module.state_dict().items()}

    def sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(1 / (1 + np.exp(-values)))

    expected = np.empty(x.shape)
    for k, image in enumerate(x.numpy()):
        hidden = np.maximum(w["squeeze.weight"][:, :, 0, 0] @ image.mean((1, 2)) + w["squeeze.bias"], 0)
        channels = sigmoid(w["excite.weight"][:, :, 0, 0] @ hidden + w["excite.bias"])
        pixels = sigmoid(np.tensordot(w["pixels.weight"][0, :, 0, 0], image, 1) + w["pixels.bias"])
        expected[k] = channels[:, None, None] * image + pixels * image
    assert np.allclose(module(x).detach().numpy(), expected, atol=1e-12)


def test_bottleneck_has_its_stride_in_the_middle() -> None:
    torch.manual_seed(0)
    block = Bottleneck(8, 4, 2).eval().double()
    x = torch.randn(1, 8, 10, 10, dtype=torch.double)
    w = block.state_dict()
    by = (1 + 1e-5) ** -0.5  # an untrained normalisation divides by √(1 + ε)
    inner = functional.conv2d(x, w["reduce.0.weight"]).mul(by).relu()
    inner = functional.conv2d(inner, w["across.0.weight"], stride=2, padding=1).mul(by).relu()
    shortcut = functional.conv2d(x[..., ::2, ::2], w["shortcut.0.weight"])
    expected = (functional.conv2d(inner, w["expand.0.weight"]) * by + shortcut * by).relu()
    assert expected.shape == (1, 16, 5, 5)
    assert torch.allclose(block(x), expected, atol=1e-12)
    assert len(Bottleneck(16, 4, 1).shortcut) == 0


@pytest.mark.parametrize("pool", [True, False])
def test_aspp_reaches_as_far_as_its_rates(pool: bool) -> None:
    """Nine places for each rate, and the mean over the image everywhere."""
    module = ASPP(2, 3, pool=pool).eval()
    for parameter in module.parameters():
        nn.init.constant_(parameter, 0.5)
    x = torch.ones(1, 2, 51, 51, requires_grad=True)
    module(x)[0, 0, 25, 25].backward()
    assert x.grad is not None
    reached = set(map(tuple, (x.grad[0, 0] > x.grad[0, 0, 0, 0]).nonzero().tolist()))
    assert reached == {(25 + rate * i, 25 + rate * j) for rate in (6, 12, 18) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    assert (float(x.grad[0, 0, 0, 0]) > 0) == pool


def test_options_change_what_they_say() -> None:
    torch.manual_seed(0)
    slices = torch.randn(1, 3, 64, 48)
    small: dict[str, Any] = {
        "blocks": (1, 1, 1, 1),
        "base": 4,
        "aspp": 8,
        "skip": 4,
        "decoders": (8, 8, 4, 4),
        "fused": 4,
    }
    plain = HQINet(**small).eval()
    residual = HQINet(**small, residual=True).eval()
    residual.load_state_dict(plain.state_dict())
    assert torch.allclose(residual(slices) - plain(slices), slices[:, 1:2], atol=1e-6)
    strided = HQINet(**small, stem_strides=(2, 2)).eval()
    assert strided(slices).shape == (1, 1, 64, 48)
    assert strided.stem[0](slices).shape[2:] == (32, 24)
    assert strided.stem[1](strided.stem[0](slices)).shape[2:] == (16, 12)
    assert _count(HQINet(**small, pool=False)) < _count(plain)


def test_reconstruction_is_of_all_decoders_together() -> None:
    """As of their concatenation, of which only one part is held at a time."""
    torch.manual_seed(0)
    network = HQINet.lite().eval().double()
    decoded: list[torch.Tensor] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    for decoder in network.decoders:
        decoder.register_forward_hook(lambda module, given, made: decoded.append(made))
    slices = torch.randn(1, 3, 64, 48, dtype=torch.double)
    with torch.inference_mode():
        out = network(slices)
        full = [functional.interpolate(y, (64, 48), mode="bilinear", align_corners=False) for y in decoded]
        expected = slices[:, 1:2] + network.reconstruction(network.fuse(torch.cat(full, 1)))
    assert [y.shape[1:] for y in decoded] == [(64, 8, 6), (32, 16, 12), (32, 32, 24), (16, 64, 48)]
    assert float((expected - slices[:, 1:2]).abs().mean()) > 0.1
    assert torch.allclose(out, expected, rtol=1e-10)


def test_initialisation_is_the_stated_one() -> None:
    torch.manual_seed(0)
    weights = torch.cat([m.weight.detach().flatten() for m in HQINet.lite().modules() if isinstance(m, nn.Conv2d)])
    assert float(weights.abs().max()) <= 0.02
    # a normal distribution of σ = 0.01, cut at 2σ, has a standard deviation of 0.8796 σ
    assert float(weights.std()) == pytest.approx(0.008796, rel=0.01)


def test_odd_sizes_are_reflected_to_the_stride(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = HQINet.lite().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    network = network.half().float()  # as the weights on disk
    install(tmp_path, "hqinet-lite", network, "slab3")
    volume = volume_of(np.random.default_rng(0).normal(0, 300, (2, 101, 77)).astype(np.float32), 0.7, 2.0)
    out = denoise_volume(hqinet_lite(FP32, tmp_path), volume)
    padded = np.pad(network_input(volume) / 1000, ((0, 0), (0, 11), (0, 3)), mode="symmetric")
    assert padded.shape == (2, 112, 80)
    triples = torch.from_numpy(padded[[[0, 0, 1], [0, 1, 1]]])
    expected = network(triples)[:, 0, :101, :77].numpy() * 1000
    assert float(np.abs(expected[0] - volume.hu[0]).mean()) > 10
    assert np.allclose(out, through_rails(volume, expected), atol=0.01)


def test_pipeline_keeps_the_contract(tmp_path: Path) -> None:
    """With weights that answer the image: those of the stated initialisation let through next to nothing."""
    torch.manual_seed(0)
    network = HQINet.lite()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    network.reconstruction.weight.data *= 0.0015
    install(tmp_path, "hqinet-lite", network, "slab3")
    pipeline = hqinet_lite(FP32, tmp_path)
    check_pipeline(pipeline)
    volume = water_volume((3, 101, 77))
    assert 0.1 < float(np.abs(denoise_volume(pipeline, volume) - volume.hu).mean()) < 3
