"""Widened networks compute what the narrow ones do, and their features learn to differ."""

from __future__ import annotations

import pytest
import torch

from pipelines.stresnet import ResNet3D, SRResNet3D, STResNet
from training.widening import widen


def _trained(kind: type[SRResNet3D | STResNet]) -> ResNet3D:
    torch.manual_seed(3)
    network = kind(4, 2)
    for parameter in network.parameters():  # the last layer is zero in an untrained one
        torch.nn.init.normal_(parameter, std=0.2)
    return network


@pytest.mark.parametrize("kind", [STResNet, SRResNet3D])
def test_computes_what_the_narrow_network_does(kind: type[SRResNet3D | STResNet]) -> None:
    narrow, wide = _trained(kind), kind(8, 2)
    widen(narrow, wide)
    noisy = torch.randn(2, 1, 5, 9, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = narrow(noisy)
        torch.testing.assert_close(wide(noisy), expected, atol=1e-4, rtol=1e-4)
    assert float((expected - noisy).abs().max()) > 1


def test_features_that_are_alike_learn_to_differ() -> None:
    narrow, wide = _trained(STResNet), STResNet(8, 2)
    widen(narrow, wide)
    noisy = torch.randn(1, 1, 5, 9, 8, generator=torch.Generator().manual_seed(5))
    wide(noisy).square().mean().backward()
    gradient = wide.blocks[0].first[0].weight.grad
    assert gradient is not None
    assert float((gradient[:4] - gradient[4:]).abs().max()) > 0.05 * float(gradient.abs().max())


def test_refuses_other_layers_and_other_widths() -> None:
    with pytest.raises(ValueError, match="different layers"):
        widen(STResNet(4, 2), STResNet(8, 3))
    with pytest.raises(ValueError, match=r"head\.0\.weight is \(12, 1, 1, 3, 3\)"):
        widen(STResNet(4, 2), STResNet(12, 2))
