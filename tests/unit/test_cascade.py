"""DRL, CNN10 and their cascade: the printed counts, the layers, what learns and what does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from untrained import FP32, install, reach, through_rails

from pipelines import network as running
from pipelines.base import denoise_volume
from pipelines.cascade import CNN10_HALO, DRL, DRL_HALO, Cascade, WuCNN10
from pipelines.network import NetworkPipeline
from pipelines.safety import network_input
from pipelines.shipped import Factory, cascade, cascade_3, cascade_mse, cnn10, drl, drl_mse
from pipelines.testing import check_pipeline, water_volume
from training.measuring.cases import volume_of


def _random(network: nn.Module, seed: int = 0) -> nn.Module:
    """Evaluated in double, with statistics as after a training and last layers that count."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            for values, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                values.data.uniform_(low, high, generator=generator)
        if isinstance(module, DRL):
            module.last.weight.data.uniform_(-0.1, 0.1, generator=generator)
        if isinstance(module, WuCNN10):
            module.tail.weight.data.uniform_(-0.1, 0.1, generator=generator)
    return network.eval().double().requires_grad_(False)


def _image(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 1, 21, 26, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def _keras_parameters(network: nn.Module) -> int:
    """Running mean and variance of a normalisation are parameters (not trainable ones) in Keras."""
    return sum(p.numel() for p in network.parameters()) + sum(
        b.numel() for name, b in network.named_buffers() if not name.endswith("num_batches_tracked")
    )


def test_number_of_parameters_as_printed() -> None:
    assert _keras_parameters(DRL()) == 225_601
    assert _keras_parameters(DRL(residual=False)) == 225_601
    assert _keras_parameters(WuCNN10()) == 335_873
    assert _keras_parameters(Cascade(3)) == 3 * 225_601


def test_receptive_fields() -> None:
    assert reach(DRL(), 45) == (2 * DRL_HALO + 1, 2 * DRL_HALO + 1) == (35, 35)
    assert reach(WuCNN10(), 33) == (2 * CNN10_HALO + 1, 2 * CNN10_HALO + 1) == (23, 23)


def _layer(w: dict[str, torch.Tensor], name: str, y: torch.Tensor, dilation: int) -> torch.Tensor:
    """Convolution, normalisation by the running statistics (ε = 1e-3), ReLU."""
    y = functional.conv2d(y, w[f"{name}.0.weight"], w[f"{name}.0.bias"], padding=dilation, dilation=dilation)
    scale = w[f"{name}.1.weight"] / (w[f"{name}.1.running_var"] + 1e-3).sqrt()
    shift = w[f"{name}.1.bias"] - scale * w[f"{name}.1.running_mean"]
    return (scale[:, None, None] * y + shift[:, None, None]).clamp_min(0)


def test_drl_written_out_once_more() -> None:
    network, x = _random(DRL()), _image()
    w = dict(network.state_dict())
    one = functional.conv2d(x, w["first.weight"], w["first.bias"], padding=2).clamp_min(0)
    two = _layer(w, "second", one, 2)
    five = _layer(w, "middle.2", _layer(w, "middle.1", _layer(w, "middle.0", two, 3), 4), 3)
    six = _layer(w, "sixth", torch.cat([five, two], 1), 2)
    change = functional.conv2d(torch.cat([six, one], 1), w["last.weight"], w["last.bias"], padding=1)
    assert float(change.std()) > 0.1
    assert torch.allclose(network(x), x + change, atol=1e-10)
    difference = _random(DRL(residual=False))
    difference.load_state_dict(w)
    assert torch.allclose(difference(x), change, atol=1e-10)


def test_cnn10_written_out_once_more() -> None:
    network, x = _random(WuCNN10()), _image()
    w = dict(network.state_dict())
    y = functional.conv2d(x, w["head.weight"], w["head.bias"], padding=1).clamp_min(0)
    for k in range(9):
        y = _layer(w, f"layers.{k}", y, 1)
    noise = functional.conv2d(y, w["tail.weight"], w["tail.bias"], padding=1)
    assert float(noise.std()) > 0.01
    assert torch.allclose(network(x), x - noise, atol=1e-10)


@pytest.mark.parametrize("make", [DRL, WuCNN10, Cascade])
def test_untrained_they_are_nearly_the_identity(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    x = _image().float()
    assert 0 < float((make().eval()(x) - x).detach().std()) < 0.05


def test_each_stage_subtracts_what_it_predicts() -> None:
    network, x = _random(Cascade(3)), _image()
    assert isinstance(network, Cascade)
    first, second, third = network.stages
    one = first(x)
    two = one - second(one)
    assert torch.allclose(network(x), two - third(two), atol=1e-12)
    assert [stage.residual for stage in network.stages] == [True, False, False]


def test_only_the_last_stage_learns() -> None:
    """Neither weights nor running statistics of the stages before it move."""
    torch.manual_seed(0)
    network = Cascade(2).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network(_image().float()).square().mean().backward()
    learns = {name.split(".")[1] for name, parameter in network.named_parameters() if parameter.grad is not None}
    moved = {name.split(".")[1] for name, tensor in network.state_dict().items() if not tensor.equal(before[name])}
    assert learns == moved == {"1"}
    assert not network.stages[0].training
    assert network.stages[1].training


@pytest.mark.parametrize(("make", "halo"), [(DRL, DRL_HALO), (WuCNN10, CNN10_HALO), (lambda: Cascade(2), 2 * DRL_HALO)])
def test_strips_are_the_whole_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], halo: int
) -> None:
    """Within rounding: 0.01 HU."""
    network = _random(make()).half().float()  # as the weights on disk
    volume = volume_of(np.random.default_rng(0).normal(0, 300, (1, 101, 77)).astype(np.float32), 0.7, 2.0)
    install(tmp_path, "any", network, "slice", halo=halo)
    monkeypatch.setattr(running, "PIXELS_AT_ONCE", 40 * 77)
    in_strips = denoise_volume(NetworkPipeline("any", make, execution=FP32, folder=tmp_path), volume)
    whole = network(torch.from_numpy(network_input(volume)[:, None] / 1000))[:, 0].numpy() * 1000
    assert float(np.abs(whole - volume.hu).mean()) > 10
    assert float(np.abs(in_strips - through_rails(volume, whole)).max()) < 0.01


def test_pipeline_keeps_the_contract(tmp_path: Path) -> None:
    torch.manual_seed(0)
    install(tmp_path, "drl", DRL(), "slice")
    check_pipeline(drl(FP32, tmp_path))


@pytest.mark.parametrize(
    ("name", "factory", "make"),
    [
        ("cnn10", cnn10, WuCNN10),
        ("cascade", cascade, Cascade),
        ("drl-mse", drl_mse, DRL),
        ("cascade-mse", cascade_mse, Cascade),
        ("cascade-3", cascade_3, lambda: Cascade(3)),
    ],
)
def test_pipelines_run_their_own_network(
    tmp_path: Path, name: str, factory: Factory, make: Callable[[], nn.Module]
) -> None:
    network = _random(make()).half().float()  # as the weights on disk
    install(tmp_path, name, network, "slice")
    volume = water_volume((1, 45, 37))
    given = torch.from_numpy(network_input(volume)[:, None] / 1000)
    expected = through_rails(volume, network(given)[:, 0].numpy() * 1000)
    out = denoise_volume(factory(FP32, tmp_path), volume)
    assert float(np.abs(out - volume.hu).mean()) > 1
    assert np.allclose(out, expected, atol=0.05)
