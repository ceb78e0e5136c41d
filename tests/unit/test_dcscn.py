"""DCSCN and the plain network: their sizes and layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from untrained import FP32, install, reach, through_rails

from pipelines import network as running
from pipelines.base import denoise_volume
from pipelines.dcscn import DCSCN, HALO, PLAIN_HALO, PlainCNN, widths
from pipelines.network import NetworkPipeline
from pipelines.safety import network_input
from pipelines.shipped import Factory, cnn_l1, dcscn, dcswgan, wgan
from pipelines.testing import check_pipeline
from training.measuring.cases import volume_of


def test_widths_are_the_printed_ones() -> None:
    assert widths() == [32, 26, 22, 18, 14, 11, 8]


def test_the_formula_is_that_of_the_large_network_too() -> None:
    """DCSCN of Yamanaka et al.: 12 layers from 196 to 48, decay 1.5; their Table 1."""
    assert widths(12, 196, 48, 1.5) == [196, 166, 148, 133, 120, 108, 97, 86, 76, 66, 57, 48]


def test_number_of_parameters() -> None:
    printed = [32, 26, 22, 18, 14, 11, 8]
    chain = sum(9 * a * b + 2 * b for a, b in zip([1, *printed], printed, strict=False))  # bias and slope per channel
    branches = (131 * 24 + 48) + (131 * 8 + 16) + (9 * 8 * 8 + 16)
    assert sum(p.numel() for p in DCSCN().parameters()) == chain + branches + 33 == 26_077
    network = DCSCN()
    layers = [network.branch_a, *network.branch_b]
    assert [layer[0].weight.shape[0] for layer in layers] == [24, 8, 8]
    assert sum(p.numel() for p in PlainCNN().parameters()) == 320 + 6 * 9_248 + 289 == 56_097


def test_receptive_fields() -> None:
    assert reach(DCSCN(), 25) == (2 * HALO + 1, 2 * HALO + 1) == (17, 17)
    assert reach(PlainCNN(), 25) == (2 * PLAIN_HALO + 1, 2 * PLAIN_HALO + 1) == (17, 17)


def test_dcscn_written_out_once_more() -> None:
    torch.manual_seed(0)
    network = DCSCN().double()
    nn.init.normal_(network.reconstruction.weight)
    for parameter in network.parameters():
        if parameter.dim() == 1:  # biases and slopes, no two alike
            nn.init.uniform_(parameter, -0.3, 0.3)
    x = torch.randn(2, 1, 13, 17, dtype=torch.double)
    w = network.state_dict()

    def layer(name: str, y: torch.Tensor, padding: int) -> torch.Tensor:
        y = functional.conv2d(y, w[f"{name}.0.weight"], w[f"{name}.0.bias"], padding=padding)
        return torch.where(y > 0, y, w[f"{name}.1.weight"][:, None, None] * y)

    y, results = x, []
    for k in range(7):
        y = layer(f"chain.{k}", y, 1)
        results.append(y)
    dense = torch.cat(results, 1)
    a, b = layer("branch_a", dense, 0), layer("branch_b.1", layer("branch_b.0", dense, 0), 1)
    last = torch.einsum("oi,biyx->boyx", w["reconstruction.weight"][:, :, 0, 0], torch.cat([a, b], 1))
    expected = x + last + w["reconstruction.bias"]
    assert float((expected - x).detach().std()) > 0.1
    assert torch.allclose(network(x), expected, atol=1e-10)


def test_plain_network_written_out_once_more() -> None:
    torch.manual_seed(0)
    network = PlainCNN().double()
    x = torch.randn(2, 1, 13, 17, dtype=torch.double)
    y = x
    for k in range(8):
        conv = network.convs[k]
        assert isinstance(conv, nn.Conv2d)
        y = functional.conv2d(y, conv.weight, conv.bias, padding=1)
        y = y.clamp_min(0) if k < 7 else y
    assert float(y.detach().min()) < 0
    assert torch.allclose(network(x), y, atol=1e-12)


def test_untrained_dcscn_is_nearly_the_identity() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, 32, 32)
    assert 0 < float((DCSCN()(x) - x).detach().std()) < 0.05


@pytest.mark.parametrize(("make", "halo"), [(DCSCN, HALO), (PlainCNN, PLAIN_HALO)])
def test_strips_are_the_whole_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], halo: int
) -> None:
    """Within rounding: 0.01 HU."""
    torch.manual_seed(0)
    network = make().eval().requires_grad_(False).half().float()  # as the weights on disk
    volume = volume_of(np.random.default_rng(0).normal(0, 300, (1, 101, 77)).astype(np.float32), 0.7, 2.0)
    install(tmp_path, "any", network, "slice", halo=halo)
    monkeypatch.setattr(running, "PIXELS_AT_ONCE", 20 * 77)
    in_strips = denoise_volume(NetworkPipeline("any", make, execution=FP32, folder=tmp_path), volume)
    whole = network(torch.from_numpy(network_input(volume)[:, None] / 1000))[:, 0].numpy() * 1000
    assert float(np.abs(in_strips - through_rails(volume, whole)).max()) < 0.01


@pytest.mark.parametrize(
    ("name", "factory", "make"),
    [("dcscn", dcscn, DCSCN), ("dcswgan", dcswgan, DCSCN), ("cnn-l1", cnn_l1, PlainCNN), ("wgan", wgan, PlainCNN)],
)
def test_pipelines_keep_the_contract(
    tmp_path: Path, name: str, factory: Factory, make: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(0)
    network = make()
    if isinstance(network, PlainCNN):  # it has no skip: give it one through its first feature, which stays positive
        _pass_through(network)
    install(tmp_path, name, network, "slice")
    check_pipeline(factory(FP32, tmp_path))


def _pass_through(network: PlainCNN) -> None:
    """A trained network gives an image back; this one gives its input back, shifted above the ReLU and down again."""
    for k, conv in enumerate(cast(list[nn.Conv2d], network.convs)):
        assert conv.bias is not None
        conv.weight.data *= 0.02
        conv.weight.data[0] = 0
        conv.weight.data[0, 0, 1, 1] = 1
        conv.bias.data[0] = {0: 4.0, 7: -4.0}.get(k, 0.0)
