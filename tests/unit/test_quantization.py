"""Rounding to 8 bits against whole numbers; the network in PyTorch against the one that OpenVINO runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pipelines import openvino_core, openvino_stream
from pipelines.cascade import DRL
from pipelines.dcscn import DCSCN
from pipelines.ffdnet import FFDNet
from pipelines.openvino_core import compile_model, convolution_precisions, cpu_supports
from pipelines.openvino_planes import OpenVINOPlanes, read_graph
from pipelines.openvino_segments import SIGNED_ZERO, Code, Reach, parts
from pipelines.resunet import ResUNet
from pipelines.scaling import to_hu
from pipelines.stresnet import SRResNet3D, STResNet
from training import quantization
from training.data import Batch
from training.float_layers import Comparison
from training.float_layers import choose as choose_layers
from training.int8_files import Deployed, inputs, plane_files, stream_files
from training.loop import Predict
from training.quantization import (
    HEADROOM,
    QuantisedConvolution,
    Range,
    calibrate,
    convolutions,
    multiplications,
    quantisable,
    quantise,
)
from training.recipes import plane, told, volume

vnni = pytest.mark.skipif(not cpu_supports("int8"), reason="needs a CPU with VNNI: others saturate")

STEP = 1 / 64
"""With weights that are whole numbers of 1/512 every product and sum is exact in float32."""


def _exact(network: nn.Module) -> nn.Module:
    """Give `network` weights that are whole numbers of 1/512, the largest of each output 127."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d):
            codes = torch.randint(-20, 21, module.weight.shape, generator=generator)
            if isinstance(module, nn.ConvTranspose2d):  # each pixel of the result is an output of its own
                codes[0] = 127
            else:
                codes.view(len(codes), -1)[:, 0] = 127
            module.weight.data = codes / 512
            if module.bias is not None:
                module.bias.data = torch.randint(-64, 65, module.bias.shape, generator=generator) / 512
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
        if isinstance(module, nn.PReLU):
            nn.init.constant_(module.weight, 0.125)
    return network.eval().requires_grad_(False)


def _batch(slices: int, size: int = 32, count: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(2)
    noisy = torch.randint(-64, 65, (count, slices, size, size), generator=generator) / 64
    return Batch(noisy, noisy.roll(1, -1), torch.full((count,), 0.25))


def _quantised(network: nn.Module, predict: Predict, batch: Batch, *, exact: bool = False) -> nn.Module:
    """All convolutions in 8 bits; where it is to be exact, every other channel in steps of half the size."""
    made = quantisable(network, predict, batch)
    ranges = calibrate(made, predict, [batch])
    if exact:
        widths = {name: one.weight.shape[1] for name, one in convolutions(made).items()}
        ranges = {name: Range(STEP, found.zero, _halves(widths[name])) for name, found in ranges.items()}
    quantise(made, ranges)
    return made


def _halves(channels: int) -> tuple[float, ...]:
    return tuple(1 / (1 + k % 2) for k in range(channels))


NETWORKS: list[tuple[Callable[[], nn.Module], Predict, int]] = [
    (lambda: FFDNet(8, 4), told(2), 3),
    (lambda: ResUNet((8, 8, 16)), told(1), 3),
    (DRL, plane, 1),
    (DCSCN, plane, 1),
]


def test_rounds_as_whole_numbers_do() -> None:
    torch.manual_seed(0)
    x, conv = torch.randn(1, 3, 6, 7), nn.Conv2d(3, 4, 3)
    quantised = QuantisedConvolution(conv)
    quantised.range = Range(1.5 / 127, 100)
    codes = np.clip(np.rint(x.numpy()[0] / (1.5 / 127)), -100, 155).astype(np.int64)
    weight = conv.weight.detach().numpy()
    scale = np.abs(weight).max((1, 2, 3), keepdims=True) / 127
    windows = np.lib.stride_tricks.sliding_window_view(codes, (3, 3), (1, 2))
    sums = np.einsum("cyxij,ocij->oyx", windows, np.rint(weight / scale).astype(np.int64))
    assert conv.bias is not None
    expected = sums * scale[:, 0] * (1.5 / 127) + conv.bias.detach().numpy()[:, None, None]
    assert np.allclose(quantised(x).detach().numpy()[0], expected, atol=1e-5)


def test_channels_of_a_size_of_their_own_lose_less() -> None:
    torch.manual_seed(0)
    sizes = torch.tensor([1.0, 0.1, 0.02, 0.3]).view(1, -1, 1, 1)
    conv = nn.Conv2d(4, 3, 3, padding=1).requires_grad_(False)
    conv.weight /= sizes  # so that all count
    x = torch.randn(2, 4, 16, 16) * sizes
    batch = Batch(x, x, torch.ones(2))
    made = quantisable(nn.Sequential(conv).eval(), plane, batch)
    (reach,) = calibrate(made, plane, [batch]).values()
    assert reach.parts[0] == 1
    assert np.argsort(reach.parts).tolist() == [2, 1, 3, 0]
    assert parts(reach.reach) == pytest.approx(np.array(reach.parts))  # as a node reads it from the file
    assert Range.of(reach.reach, signed=True).parts == pytest.approx(reach.parts)
    losses = []
    for each in (reach, replace(reach, parts=())):
        quantise(made, {"0": each})
        losses.append(float((made(x) - conv(x)).square().mean()))
    assert losses[0] < losses[1] / 4
    quantised = convolutions(made)["0"]
    quantised.range = reach
    codes = torch.round(x / (torch.tensor(reach.parts).view(1, -1, 1, 1) * reach.step)).clamp(*reach.codes)
    weight = conv.weight * torch.tensor(reach.parts).view(1, -1, 1, 1)
    scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    expected = functional.conv2d(codes * reach.step, torch.round(weight / scale) * scale, conv.bias, padding=1)
    assert torch.allclose(quantised(x), expected, atol=1e-4)


def test_gradient_passes_the_rounding_but_not_the_end_of_the_range() -> None:
    torch.manual_seed(0)
    x = torch.tensor([[0.3, -0.2, 5.0]]).view(1, 1, 1, 3).requires_grad_()
    quantised = QuantisedConvolution(nn.Conv2d(1, 2, 1))
    quantised.range = Range(1 / 127, 128)
    quantised(x).sum().backward()
    assert x.grad is not None
    assert quantised.weight.grad is not None
    rounded = quantised._rounded()[0]
    assert torch.allclose(x.grad.flatten(), torch.tensor([1.0, 1.0, 0.0]) * rounded.sum(), atol=1e-6)
    reached = torch.tensor([38 / 127, -25 / 127, 1.0]).sum()  # what the weights are multiplied with
    assert torch.allclose(quantised.weight.grad.flatten(), reached.expand(2), atol=1e-6)


def test_mixed_precision_multiplies_the_codes() -> None:
    torch.manual_seed(0)
    x, quantised = torch.randn(1, 16, 8, 8), QuantisedConvolution(nn.Conv2d(16, 8, 3))
    quantised.range = Range(3 / 127, 128)
    exact = quantised(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantised(x)
    assert torch.allclose(mixed, exact, rtol=2**-7, atol=2**-7)  # the sums alone are rounded
    assert not torch.equal(mixed, exact)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("size", "stride", "padding"), [(2, 2, 0), (5, 1, 0), (3, 1, 1)])
def test_transposed_convolutions_are_convolutions(size: int, stride: int, padding: int, bias: bool) -> None:
    torch.manual_seed(0)
    transposed = nn.ConvTranspose2d(6, 4, size, stride, padding, bias=bias)
    x = torch.randn(2, 6, 9, 8)
    assert torch.allclose(QuantisedConvolution(transposed)(x), transposed(x), atol=1e-5)


def test_other_transposed_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stride=\(2, 2\).* is no convolution in disguise"):
        QuantisedConvolution(nn.ConvTranspose2d(2, 2, 3, 2))


def test_normalisation_goes_into_the_weights() -> None:
    torch.manual_seed(0)
    network, batch = DRL().eval(), _batch(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var, module.running_mean = torch.rand(64) + 0.5, torch.randn(64)
            nn.init.normal_(module.bias)
    made = quantisable(network, plane, batch)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in made.modules())
    assert torch.allclose(plane(made, batch)[0], plane(network, batch)[0], atol=1e-4)


class _Borrowed(nn.Module):
    """Uses the weights of a convolution that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.lent = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1))
        self.own = nn.Conv2d(1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.get_parameter("lent.0.weight")
        result: torch.Tensor = self.own(self.lent[1](functional.conv2d(x, weight, padding=1)))
        return result


def test_what_is_not_called_stays() -> None:
    made = quantisable(_Borrowed().eval(), plane, _batch(1))
    assert list(convolutions(made)) == ["own"]
    assert isinstance(made.get_submodule("lent.1"), nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("lowest", "highest", "step", "zero"),
    [
        (-1, 3, 3 / 191, 64),
        (-2, 2, 2 / 127, 128),
        (-99, 156, 156 / 155, 100),
        (0, 2, 2 / 255, 0),
        (-2, 0, 2 / 254, 254),
    ],
)
def test_range_spans_what_occurs(lowest: float, highest: float, step: float, zero: int) -> None:
    reach = Range.spanning(lowest, highest)
    assert reach.step == pytest.approx(step)
    assert reach.zero == zero
    ends = [code * reach.step for code in reach.codes]
    assert ends[0] <= lowest
    assert ends[1] >= highest * (1 - 1e-9)


def test_range_of_zeros_has_codes() -> None:
    assert Range.spanning(0, 0).step > 0


@pytest.mark.parametrize(("reach", "signed"), [(1.5, True), (2.0, False), ([1.0, 0.5, 2.0], True)])
def test_range_is_that_of_its_file(reach: Reach, signed: bool) -> None:
    assert Range.of(reach, signed=signed).reach == pytest.approx(reach)
    largest = Code.of_range(reach, signed=signed)
    assert largest.step is not None
    assert Range.of(reach, signed=signed).step == pytest.approx(largest.step.max())
    assert Range.of(reach, signed=signed).zero == largest.zero - largest.lowest


def _squared_error(x: torch.Tensor, reach: Range) -> float:
    return float((torch.fake_quantize_per_tensor_affine(x, reach.step, 0, *reach.codes) - x).square().sum())


@pytest.mark.parametrize("side", [1, -1])
def test_range_has_the_least_squared_error(side: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1))
    made = quantisable(network.eval(), plane, _batch(1))
    x = side * (torch.randn(1, 1, 512, 512).abs() - 0.5)
    x[0, 0, 0, 0] = -side * 2  # alone on that side so far away: worth cutting off
    batch = Batch(x, x, torch.ones(1))
    ranges = calibrate(made, plane, [batch])
    assert ranges["2"].zero == 0
    best = replace(ranges["0"], step=ranges["0"].step / HEADROOM)
    near, far = np.linspace(0.4, 2, 9), np.linspace(2, 5, 13)
    ends = [(-low, high) if side > 0 else (-high, low) for low in near for high in far]
    least = min(_squared_error(x, Range.spanning(*pair)) for pair in ends)
    assert _squared_error(x, best) <= 1.02 * least
    assert max(-best.codes[0] if side > 0 else best.codes[1], 1) * best.step < 1  # cut off


def test_parts_of_the_channels_are_those_that_change_the_result_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the range that each would have: here a channel reaches far in one place, and is small elsewhere."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, 3, 32, 32) * torch.tensor([1.0, 0.3, 0.05]).view(1, -1, 1, 1)
    x[0, 2, 5, 5] = 4
    batch = Batch(x, x, torch.ones(2))
    made = quantisable(nn.Sequential(conv).eval(), plane, batch)

    def error() -> float:
        quantise(made, {})
        quantise(made, calibrate(made, plane, [batch]))
        return float((made(x) - conv(x)).square().mean())

    chosen, errors = error(), []
    for power in quantization.BALANCES:
        monkeypatch.setattr(quantization, "BALANCES", (power,))
        errors.append(error())
    assert chosen == min(errors)
    assert max(errors) > 1.2 * chosen


def test_volumes_have_the_two_zeros_of_streams() -> None:
    batch = _batch(5, 16, 1)
    made = quantisable(STResNet(8, 1).eval(), volume, batch)
    ranges = calibrate(made, volume, [batch])
    assert {reach.zero for reach in ranges.values()} == {SIGNED_ZERO, 0}


def test_checkpoint_holds_the_range() -> None:
    one, other = (QuantisedConvolution(nn.Conv2d(1, 1, 1)) for _ in range(2))
    one.range = Range(STEP, 3, (0.5,))
    other.load_state_dict(one.state_dict())
    assert other.range == one.range


def test_products_are_counted() -> None:
    parts = multiplications(quantisable(FFDNet(8, 3).eval(), told(2), _batch(3)), told(2), _batch(3))
    whole = 13 * 8 + 8 * 8 + 8 * 4
    assert parts == pytest.approx({"convs.0": 13 * 8 / whole, "convs.1": 64 / whole, "convs.2": 32 / whole})


def test_dear_layers_stay_in_float(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 32, 1), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 2, 1), nn.Conv2d(2, 1, 1)
    ).eval()
    batch = _batch(1)
    made = quantisable(network, plane, batch)
    ranges = calibrate(made, plane, [batch])
    ranges["2"] = replace(ranges["2"], step=ranges["2"].step / 10)  # cuts off nearly all
    parts = multiplications(made, plane, batch)
    chosen = choose_layers(made, ranges, parts, Comparison(network, plane, [batch]), 0.1)
    assert set(chosen) == {"1"}  # the first and the last have one channel, "2" is dear and small
    assert [name for name, one in convolutions(made).items() if one.range is not None] == ["1"]
    assert "without 2" in capsys.readouterr().out


def _run(files: dict[str, bytes], predict: Predict, batch: Batch) -> torch.Tensor:
    """By OpenVINO, all but the convolutions in fp32."""
    engine = OpenVINOPlanes(files["int8.xml"], files["int8.bin"], "fp32", 1)
    slices, *noise_map = ([item.numpy() for item in given] for given in inputs(predict, batch))
    maps = noise_map[0] if noise_map else [None] * len(slices)
    pairs = zip(slices, maps, strict=True)
    return torch.from_numpy(np.stack([engine(np.ascontiguousarray(one), noise) for one, noise in pairs])[:, None])


@vnni
@pytest.mark.parametrize(("make", "predict", "slices"), NETWORKS, ids=["ffdnet", "resunet", "drl", "dcscn"])
def test_openvino_runs_the_very_network(make: Callable[[], nn.Module], predict: Predict, slices: int) -> None:
    batch = _batch(slices)
    made = _quantised(_exact(make()), predict, batch, exact=True)
    before, _ = predict(_exact(make()), batch)
    expected, _ = predict(made, batch)
    files = plane_files(made, predict, batch, "n")
    assert torch.equal(_run(files, predict, batch), expected)
    assert not torch.allclose(before, expected, atol=1e-3)  # it was rounded indeed
    model = read_graph(files["int8.xml"], files["int8.bin"])
    model.reshape(
        {port: list(tensor[:1].shape) for port, tensor in zip(model.inputs, inputs(predict, batch), strict=True)}
    )
    for precision in ("fp32", "int8"):
        kinds = convolution_precisions(compile_model(model, precision, 1))
        assert set(kinds.values()) <= {"u8", "i8"}
        assert len(kinds) == len(convolutions(made))


@vnni
@pytest.mark.parametrize(("make", "predict", "slices"), NETWORKS, ids=["ffdnet", "resunet", "drl", "dcscn"])
def test_one_layer_differs_by_float_rounding_alone(
    make: Callable[[], nn.Module], predict: Predict, slices: int
) -> None:
    torch.manual_seed(0)
    batch = _batch(slices)
    made = _quantised(make().eval(), predict, batch)
    ranges = {name: one.range for name, one in convolutions(made).items() if one.range is not None}
    name = list(ranges)[1]
    quantise(made, {name: ranges[name]})
    with torch.inference_mode():
        expected, _ = predict(made, batch)
    difference = to_hu((_run(plane_files(made, predict, batch, "n"), predict, batch) - expected).abs())
    # a value halfway between two codes is rounded up by the one and down by the other
    assert float((difference > 0.01).float().mean()) < 0.02
    assert float(difference.median()) < 1e-3


@vnni
@pytest.mark.parametrize("make", [lambda: STResNet(8, 2), lambda: SRResNet3D(8, 2)])
def test_streams_are_the_very_network(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (openvino_core, openvino_stream):
        monkeypatch.setattr(module, "float_of", lambda precision: "fp32")
    batch = _batch(5, 16, 1)
    made = _quantised(_exact(make()), volume, batch, exact=True)
    with torch.inference_mode():
        expected, _ = volume(made, batch)
        files = stream_files(made, tuned=True)
        assert torch.equal(Deployed(files, b"", 1)(*inputs(volume, batch)), expected)
    assert set(json.loads(files["int8.ranges"])) == set(convolutions(made))
