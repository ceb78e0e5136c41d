"""The streams of OpenVINO against the same networks in PyTorch on whole volumes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import nn

from pipelines import openvino_segments
from pipelines.base import WeightsDamaged
from pipelines.openvino_core import Precision, compile_model, convolution_precisions, cpu_supports, give_memory_back
from pipelines.openvino_segments import Code, Convolution, Planes, segment
from pipelines.openvino_stream import Plane, StreamEngine
from pipelines.runtime import WEIGHTS
from pipelines.stresnet import ResNet3D, SRResNet3D, STResNet

HU = 1000.0
SHAPE = (47, 61)

Weights = dict[str, NDArray[np.float32]]


def _network(
    kind: type[STResNet] | type[SRResNet3D], features: int, blocks: int, seed: int
) -> tuple[ResNet3D, Weights]:
    """A network of random weights that changes its input by about as much as the input itself."""
    torch.manual_seed(seed)
    network = kind(features, blocks)
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 100.0
        nn.init.normal_(parameter, std=fan_in**-0.5)
    network.eval().requires_grad_(False)
    return network, {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def _volume(slices: int, shape: tuple[int, int] = SHAPE) -> NDArray[np.float32]:
    return np.random.default_rng(slices).normal(0, 0.5, (slices, *shape)).astype(np.float32)


def _whole(network: ResNet3D, volume: NDArray[np.float32]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = network(torch.from_numpy(volume)[None, None])[0, 0].numpy()
    return result


def _largest_inputs(network: ResNet3D, volume: NDArray[np.float32]) -> dict[str, float]:
    """Of each convolution, by hooks; those of one channel and the tail are left in float."""
    found: dict[str, float] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
        def see(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            found[name] = float(inputs[0].abs().max())

        return see

    hooks = [
        module.register_forward_pre_hook(hook(name))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv3d) and not name.startswith("tail") and module.in_channels > 1
    ]
    with torch.inference_mode():
        _whole(network, volume)
    for one in hooks:
        one.remove()
    return found


def _streamed(engine: StreamEngine, volume: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.stack(list(engine.stream(iter(volume))))


def _resident_mib() -> float:
    """Memory of our own; pages of libraries come and go as the system likes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def _noisy_phantom(seed: int) -> NDArray[np.float32]:
    """Lung, soft tissue and bone under noise of 30 HU that is smooth over a few pixels, as a scanner's is."""
    rng = np.random.default_rng(seed)
    z, y, x = np.mgrid[:9, :64, :72].astype(np.float32)
    hu = np.full(z.shape, -1000.0)
    hu[(y - 32) ** 2 + (x - 36) ** 2 < 30**2] = 40.0
    hu[(y - 30) ** 2 + (x - 24) ** 2 < 9**2] = -850.0
    hu[(y - 40) ** 2 + (x - 48) ** 2 < (3 + z / 2) ** 2] = 700.0
    noise = rng.normal(size=(9, 65, 73))
    smooth = noise[:, 1:, 1:] + noise[:, :-1, 1:] + noise[:, 1:, :-1] + noise[:, :-1, :-1]
    return ((hu + 30 * smooth / 2) / HU).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "features", "blocks"),
    [(STResNet, 32, 3), (STResNet, 12, 0), (SRResNet3D, 16, 3)],
    ids=["spatial-temporal", "no blocks", "volumetric"],
)
def test_a_stream_is_the_whole_volume_at_once(
    kind: type[STResNet] | type[SRResNet3D], features: int, blocks: int
) -> None:
    """One engine for volume after volume: shorter and longer than what a result depends on."""
    network, weights = _network(kind, features, blocks, seed=blocks)
    engine = StreamEngine(weights, SHAPE, precision="fp32", ranges=None, threads=1)
    assert engine.halo == 2 * blocks + 3
    assert list(engine.stream(iter(()))) == []
    for slices in (25, 1, 2, 3, 7):
        volume = _volume(slices)
        expected = _whole(network, volume)
        assert np.abs(expected - volume).max() * HU > 100
        assert np.abs(_streamed(engine, volume) - expected).max() * HU <= 0.01


def test_the_shipped_network_in_fewer_bits() -> None:
    """Against fp32 on noise; each slice by itself, for those at the ends see the zeros outside the volume."""
    weights = load_file(WEIGHTS / "st3d.safetensors")
    volume = _noisy_phantom(seed=1)
    network = STResNet()
    network.load_state_dict({name: torch.from_numpy(array).float() for name, array in weights.items()})
    with torch.inference_mode():
        expected = _whole(network, volume)
    ranges = _largest_inputs(network, _noisy_phantom(seed=2))

    def rms_hu(values: NDArray[np.float32]) -> NDArray[np.float32]:
        square = np.square((values - expected) * HU).mean(axis=(1, 2))
        return np.asarray(np.sqrt(square))

    assert rms_hu(volume).min() > 15  # that is what the network changes
    shape = (volume.shape[1], volume.shape[2])
    if cpu_supports("bf16"):
        bf16 = StreamEngine(weights, shape, precision="bf16", ranges=None, threads=1)
        assert rms_hu(_streamed(bf16, volume)).max() < 1.3
        assert set(bf16.precisions.values()) == {"bf16"}
    if cpu_supports("int8"):
        int8 = StreamEngine(weights, shape, precision="int8", ranges=ranges, threads=1)
        assert rms_hu(_streamed(int8, volume)).max() < 2.0
        eight_bit = {name for name, precision in int8.precisions.items() if precision in ("u8", "i8")}
        assert eight_bit == set(ranges)
        assert set(int8.precisions) - eight_bit == {"head.0", "tail.0", "tail.1"}


@pytest.mark.skipif(not cpu_supports("int8"), reason="this CPU has no 8-bit dot products")
def test_volumetric_convolutions_run_in_eight_bits() -> None:
    """Half of them take what a relu left, which has no negative codes."""
    network, weights = _network(SRResNet3D, 16, 3, seed=5)
    volume = _volume(9)
    expected = _whole(network, volume)
    ranges = _largest_inputs(network, volume)
    engine = StreamEngine(weights, SHAPE, precision="int8", ranges=ranges, threads=1)
    assert {name for name, precision in engine.precisions.items() if precision in ("u8", "i8")} == set(ranges)
    error = np.sqrt(np.square(_streamed(engine, volume) - expected).mean(axis=(1, 2)))
    change = np.sqrt(np.square(expected - volume).mean(axis=(1, 2)))
    assert (error / change).max() < 0.03
    kinds = [
        node.get_rt_info()["layerType"].astype(str)
        for made_by in engine._segments
        for compiled in made_by.compiled
        for node in compiled.get_runtime_model().get_ordered_ops()
    ]
    assert "Convolution" in kinds
    assert "Transpose" not in kinds  # the order of the stores is that of the kernels


@pytest.mark.parametrize("precision", [p for p in ("fp32", "bf16", "int8") if cpu_supports(p)])
def test_what_lies_in_new_rings_makes_no_difference(precision: Precision) -> None:
    """Rings are not filled when they are made, and their memory may hold anything, numbers that are none included."""
    network, weights = _network(STResNet, 16, 3, seed=3)
    volume = _volume(7)
    ranges = _largest_inputs(network, volume) if precision == "int8" else None
    engine, other = (StreamEngine(weights, SHAPE, precision=precision, ranges=ranges, threads=1) for _ in range(2))
    for ring in (other._input, other._result, *other._rings, *other._trunks.values()):
        ring.values.view(np.uint8)[...] = 255
    assert np.array_equal(_streamed(other, volume), _streamed(engine, volume))


def test_a_result_comes_when_its_neighbourhood_is_there() -> None:
    _, weights = _network(STResNet, 4, 1, seed=0)
    engine = StreamEngine(weights, SHAPE, precision="fp32", ranges=None, threads=1)
    volume = _volume(12)
    taken = 0

    def planes() -> Iterator[Plane]:
        nonlocal taken
        for plane in volume:
            taken += 1
            yield plane

    counts = [taken for _ in engine.stream(planes())]
    assert counts == [min(k + engine.halo + 1, 12) for k in range(12)]


def test_memory_does_not_grow_with_the_number_of_slices() -> None:
    """One plane of features kept of each of 300 slices would be 85 MB."""
    _, weights = _network(STResNet, 24, 1, seed=0)
    engine = StreamEngine(weights, SHAPE, precision="fp32", ranges=None, threads=1)
    plane = _volume(1)[0]
    results = engine.stream(plane for _ in range(300))
    for _ in range(20):
        next(results)
    before = _resident_mib()
    assert sum(1 for _ in results) == 280
    assert _resident_mib() - before < 4
    features, single = 24 * plane.nbytes, plane.nbytes
    # five windows of three (the last of one channel), the trunk of the head for four, the input for six and the result
    assert engine.state_bytes == (4 * 3 + 4) * features + (3 + 6 + 1) * single


def test_the_sums_of_all_blocks_lie_in_one_ring() -> None:
    """For as many planes as lie between the first block and the last; rings of their own would be three for each."""
    _, weights = _network(STResNet, 4, 3, seed=0)
    engine = StreamEngine(weights, SHAPE, precision="fp32", ranges=None, threads=1)
    single = _volume(1)[0].nbytes
    assert engine.state_bytes == (8 * 3 + 8 + 5) * 4 * single + (3 + 10 + 1) * single


def test_rings_begin_where_a_line_of_the_cache_does() -> None:
    _, weights = _network(STResNet, 4, 1, seed=0)
    engine = StreamEngine(weights, (256, 256), precision="fp32", ranges=None, threads=1)
    rings = [engine._input, engine._result, *engine._rings, *engine._trunks.values()]
    assert [ring.values.ctypes.data % 64 for ring in rings] == [0] * len(rings)


def test_no_plane_is_copied_between_the_segments() -> None:
    """What a segment wrote lies in a ring; OpenVINO would hand out a copy of it too, at every step."""
    _, weights = _network(STResNet, 24, 2, seed=0)
    engine = StreamEngine(weights, SHAPE, precision="fp32", ranges=None, threads=1)
    plane = np.zeros(SHAPE, np.float32)
    planes = (plane for _ in range(4 * engine.halo))
    results = engine.stream(planes)
    next(results)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        next(results)
        most = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert most < 3 * plane.nbytes  # the result is one of its own; one ring's plane has 24 channels


def _mib_beside_the_rings() -> float:
    _, weights = _network(STResNet, 24, 2, seed=0)
    for shape in (SHAPE, (256, 256)):  # the first takes what is taken once
        before = _resident_mib()
        engine = StreamEngine(weights, shape, precision="fp32", ranges=None, threads=1)
        assert len(_streamed(engine, _volume(engine.halo + 1, shape))) == engine.halo + 1
        give_memory_back()
    return _resident_mib() - before - engine.state_bytes / 2**20


def test_models_keep_no_planes_beside_the_rings() -> None:
    """Nine of the 22 add a skip to a convolution; a plane kept by each would be 54 MiB more.

    In a process of its own: what other tests left in this one's heap is not to be measured. 20 MiB are there anyhow, 38
    where the machine is so busy that a thread frees late.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        assert process.submit(_mib_beside_the_rings).result() < 50


@pytest.fixture(params=[False, True], ids=["vectors", "tiles"])
def has_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Codes of both signs lie as a CPU with these instructions has them; whichever this one has, it can read them."""
    monkeypatch.setattr(openvino_segments, "has_int8_tiles", lambda: request.param)
    tiles: bool = request.param
    return tiles


def test_a_code_is_its_formula(has_tiles: bool) -> None:
    """``value = (code − zero) · step``, rounded to the nearest and clipped, both ways."""
    values = np.linspace(-3, 3, 8 * 96, dtype=np.float32).reshape(1, 1, 8, 12, 8)
    for signed in (True, False):
        code = Code.of_range(2.0, signed=signed)
        assert code.step is not None
        lowest = -128 if signed and has_tiles else 0
        assert code.dtype == (np.int8 if lowest else np.uint8)
        stored, plain = Planes(8, 12, 8, code), Planes(8, 12, 8, Code.of_float("fp32"))
        store = segment(window=None, skip=plain, relu=False, trunk=None, plane=stored, across=None)
        codes = compile_model(store, "fp32", 1)({"skip": values})["plane"]
        exact = values / code.step + code.zero
        assert np.abs(codes - np.clip(exact, lowest, lowest + 255)).max() <= 0.5 + 1e-3
        load = segment(window=None, skip=stored, relu=False, trunk=None, plane=plain, across=None)
        loaded = compile_model(load, "fp32", 1)({"skip": codes})["plane"]
        np.testing.assert_allclose(loaded, (codes.astype(np.float32) - code.zero) * code.step, atol=1e-6)
        assert loaded.max() == pytest.approx(2.0)


def test_each_channel_has_a_step_of_its_own(has_tiles: bool) -> None:
    """Stored with its own step, read with the largest: the weights of the convolution make up for it."""
    largest = [2.0, 0.5, 1.0]
    values = np.random.default_rng(4).normal(0, 0.6, (1, 1, 6, 5, 3)).astype(np.float32)
    code = Code.of_range(largest, signed=True)
    stored, plain = Planes(6, 5, 3, code), Planes(6, 5, 3, Code.of_float("fp32"))
    store = segment(window=None, skip=plain, relu=False, trunk=None, plane=stored, across=None)
    codes = compile_model(store, "fp32", 1)({"skip": values})["plane"]
    steps = np.array(largest) / 127
    zero = 0 if has_tiles else 128
    assert np.abs(codes.astype(int) - zero - np.clip(values / steps, -128, 127)).max() <= 0.5 + 1e-3
    weight = np.random.default_rng(5).normal(size=(4, 3, 3, 1, 1)).astype(np.float32)
    along = Convolution("n", weight, np.zeros(4, np.float32), largest)
    window = np.concatenate([codes, codes, codes], axis=1)
    model = segment(
        window=(stored, along, 0), skip=None, relu=False, trunk=None, plane=Planes(6, 5, 4, plain.code), across=None
    )
    result = compile_model(model, "fp32", 1)({"window": window})["plane"]
    balanced = weight * np.reshape(largest, (1, 3, 1, 1, 1)) / 2
    scale = np.abs(balanced).max((1, 2, 3, 4), keepdims=True) / 127
    rounded = (np.round(balanced / scale) * scale).sum((2, 3, 4))
    expected = np.einsum("oc,zyxc->zyxo", rounded, (codes[0].astype(float) - zero) * 2 / 127)
    np.testing.assert_allclose(result[0], expected, atol=1e-4)


@pytest.mark.skipif(not cpu_supports("int8"), reason="needs a CPU with VNNI")
def test_a_window_goes_into_its_convolution_as_it_lies() -> None:
    """Codes that this CPU does not multiply OpenVINO would turn into others, three planes for each that is made."""
    signed, unsigned = (Planes(16, 24, 32, Code.of_range(2.0, signed=both)) for both in (True, False))
    weight = np.random.default_rng(6).normal(size=(32, 32, 3, 1, 1)).astype(np.float32)
    along = Convolution("along", weight, np.zeros(32, np.float32), 2.0)
    model = segment(window=(signed, along, 0), skip=None, relu=True, trunk=None, plane=unsigned, across=None)
    compiled = compile_model(model, "int8", 1)
    assert convolution_precisions(compiled)["along"] in ("u8", "i8")
    windows = [
        node.get_rt_info()["layerType"].astype(str)
        for node in compiled.get_runtime_model().get_ordered_ops()
        if node.get_output_size() and sorted(node.get_output_shape(0)) == sorted([1, 3, 16, 24, 32])
    ]
    assert set(windows) <= {"Input", "Reorder"}  # a reorder of nothing but the names of the axes


def test_refusals() -> None:
    _, weights = _network(STResNet, 4, 1, seed=0)
    with pytest.raises(ValueError, match="int8 needs the ranges"):
        StreamEngine(weights, SHAPE, precision="int8", ranges=None, threads=1)
    incomplete = {name: array for name, array in weights.items() if name != "tail.1.bias"}
    with pytest.raises(WeightsDamaged, match=r"tail\.1\.bias' is missing"):
        StreamEngine(incomplete, SHAPE, precision="fp32", ranges=None, threads=1)
    stranger = {**weights, "neck.weight": weights["head.0.weight"]}
    with pytest.raises(WeightsDamaged, match=r"neck\.weight is not in one of 1 blocks"):
        StreamEngine(stranger, SHAPE, precision="fp32", ranges=None, threads=1)
    with pytest.raises(WeightsDamaged, match=r"blocks\.5\.first\.0 is not in"):
        StreamEngine(weights, SHAPE, precision="int8", ranges={"blocks.5.first.0": 1.0}, threads=1)
    engine = StreamEngine(weights, SHAPE, precision="fp32", ranges=None, threads=1)
    with pytest.raises(ValueError, match=r"plane 1 has \(61, 47\)"):
        list(engine.stream(iter((_volume(1)[0], _volume(1)[0].T))))
    volume = _volume(9)
    first = engine.stream(iter(volume))
    next(first)
    second = _streamed(engine, volume)
    with pytest.raises(RuntimeError, match="another volume was begun"):
        next(first)
    np.testing.assert_array_equal(_streamed(engine, volume), second)
