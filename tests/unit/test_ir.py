"""Graphs for OpenVINO: they compute what PyTorch computes, hold no weight of their own, and nothing calls home."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import require_peer
from safetensors.numpy import load as load_tensors
from torch import nn
from untrained import install

from pipelines.base import ENTRY_POINT_GROUP, ModelCard
from pipelines.cascade import DRL, Cascade, WuCNN10
from pipelines.dcscn import DCSCN, PlainCNN
from pipelines.ffdnet import FFDNet
from pipelines.hqinet import HQINet
from pipelines.openvino_core import ov
from pipelines.openvino_planes import OWN, OpenVINOPlanes, read_graph
from pipelines.redcnn import REDCNN
from pipelines.resunet import ResUNet
from pipelines.runtime import WEIGHTS, read_card, read_file, read_weights
from pipelines.shipped import Factory
from pipelines.torch_engine import TorchPlanes
from training import ir
from training.__main__ import main
from training.ir import NotConvertible, graph

MAX_ERROR_HU = 0.01
HU = 1000

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int, tuple[int, int]]] = {
    # network, pixels of the image per pixel of its noise map (0: it takes none), its stride, a size in strides
    "quality-2.5d": (ResUNet, 1, 4, (9, 11)),
    "fast-2.5d": (FFDNet, 2, 2, (15, 23)),
    "red-cnn": (lambda: REDCNN(24), 0, 1, (41, 33)),
    "drl": (DRL, 0, 1, (41, 33)),
    "cnn10": (WuCNN10, 0, 1, (29, 33)),
    "cascade": (Cascade, 0, 1, (41, 33)),
    "dcscn": (DCSCN, 0, 1, (41, 33)),
    "cnn-l1": (PlainCNN, 0, 1, (41, 33)),
    "hqinet-lite": (HQINet.lite, 0, 16, (3, 2)),
}


def _lively(network: nn.Module) -> nn.Module:
    """Weights and statistics of a size at which every layer counts in the output; none is trained, some start at 0."""
    generator = torch.Generator().manual_seed(3)
    state = network.state_dict()
    for name, tensor in state.items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim == 4:
            inputs = tensor.numel() / tensor.shape[0]
            part = 0.1 if name.endswith("second.weight") else 1.5  # added to what it is made of, ten times in a row
            tensor.normal_(0, (part / inputs) ** 0.5, generator=generator)
        elif tensor.ndim == 1:
            tensor.normal_(0.8 if name.endswith("weight") else 0, 0.1, generator=generator)
    return network


def _installed(folder: Path, name: str) -> ModelCard:
    make, map_stride, _, _ = NETWORKS[name]
    given = "slab3" if map_stride or name.startswith("hqinet") else "slice"
    install(folder, name, _lively(make()), given, noise_map=map_stride > 0)
    return read_card(name, folder)


def _inputs(
    card: ModelCard, map_stride: int, shape: tuple[int, int], seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(seed)
    slices = rng.normal(-0.2, 0.4, (1 if card.input == "slice" else 3, *shape)).astype(np.float32)
    if not map_stride:
        return slices, None
    return slices, rng.uniform(0, 0.1, (1, *(length // map_stride for length in shape))).astype(np.float32)


def _worst_error_hu(
    network: nn.Module, map_stride: int, card: ModelCard, folder: Path, xml: bytes, *shapes: tuple[int, int]
) -> tuple[float, float]:
    """Largest difference between the graph and PyTorch, and what the network changes, root mean square; both HU."""
    ours, reference = OpenVINOPlanes(xml, read_weights(card, folder), "fp32", 1), TorchPlanes(network, card, folder)
    worst, change = 0.0, 0.0
    for seed, shape in enumerate(shapes):
        slices, noise_map = _inputs(card, map_stride, shape, seed)
        expected = reference(slices, noise_map)
        worst = max(worst, float(np.abs(ours(slices, noise_map) - expected).max()))
        change = float(np.sqrt(np.mean((expected - slices[len(slices) // 2]) ** 2)))
    return worst * HU, change * HU


@pytest.mark.parametrize("name", NETWORKS)
def test_a_graph_computes_what_pytorch_computes(tmp_path: Path, name: str) -> None:
    make, map_stride, stride, size = NETWORKS[name]
    card = _installed(tmp_path, name)
    xml = graph(make(), card, tmp_path, noise_map_stride=map_stride or 1)
    rows, columns = (stride * count for count in size)
    shapes = (rows, columns), (columns, rows + stride), (rows, columns)
    error, change = _worst_error_hu(make(), map_stride, card, tmp_path, xml, *shapes)
    assert change > 100
    assert error <= MAX_ERROR_HU


GRAPHS = sorted(path.stem for path in WEIGHTS.glob("*.xml") if not path.stem.endswith(".int8"))
"""Those that share their weights with PyTorch; one in INT8 has its own, see `training.int8_files`."""


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_ships_computes_what_pytorch_computes(name: str) -> None:
    card = read_card(name)
    (point,) = entry_points(group=ENTRY_POINT_GROUP, name=name)
    factory: Factory = point.load()
    map_stride = factory.noise_map_stride if card.noise_map else 0
    shapes = (48, 64), (112, 32)  # multiples of every stride
    error, _ = _worst_error_hu(factory.network(), map_stride, card, WEIGHTS, read_file(card, "xml"), *shapes)
    assert error <= MAX_ERROR_HU


def test_every_network_of_single_slices_ships_with_its_graph() -> None:
    cards = [read_card(path.stem) for path in WEIGHTS.glob("*.json")]
    assert {card.name for card in cards if card.input != "volume"} == {*GRAPHS}


@pytest.mark.parametrize("name", ["drl", "hqinet-lite"])
def test_weights_are_there_once(tmp_path: Path, name: str) -> None:
    """Every number of the graph is a tensor of the file, to the last bit; what it holds itself are axes and shapes."""
    card = _installed(tmp_path, name)
    weights = read_weights(card, tmp_path)
    xml = graph(NETWORKS[name][0](), card, tmp_path)
    tensors = {tensor.tobytes(): key for key, tensor in load_tensors(weights).items()}
    used = set()
    for node in read_graph(xml, weights).get_ops():
        if node.get_type_name() != "Constant":
            continue
        values = node.get_data()
        if node.get_element_type() == ov.Type.f16 and values.any():
            used.add(tensors[values.tobytes()])
        else:
            assert values.size == 1 or (node.get_element_type() in (ov.Type.i32, ov.Type.i64) and values.size <= 8)
    assert used == {key for key in tensors.values() if not key.endswith("num_batches_tracked")}
    own = OWN.search(xml)
    assert own is not None
    assert len(own[1]) // 2 < 500


def test_a_graph_is_the_same_every_time(tmp_path: Path) -> None:
    card = _installed(tmp_path, "fast-2.5d")
    first = graph(FFDNet(), card, tmp_path, noise_map_stride=2)
    _installed(tmp_path, "cnn-l1")
    graph(PlainCNN(), read_card("cnn-l1", tmp_path), tmp_path)
    assert graph(FFDNet(), card, tmp_path, noise_map_stride=2) == first
    assert str(tmp_path).encode() not in first


class _Scaled(nn.Module):
    """Multiplies by what is no weight."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, len(factors), 3, padding=1, bias=False)
        self.factors = torch.tensor(factors).view(1, -1, 1, 1)  # and no buffer either

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (self.conv(x) * self.factors).sum(1, keepdim=True)
        return result


def test_one_number_of_the_definition_may_be_in_the_graph(tmp_path: Path) -> None:
    install(tmp_path, "scaled", _Scaled(0.37), "slice")
    card = read_card("scaled", tmp_path)
    ours = OpenVINOPlanes(graph(_Scaled(0.37), card, tmp_path), read_weights(card, tmp_path), "fp32", 1)
    slices = np.random.default_rng(0).normal(0, 1, (1, 20, 30)).astype(np.float32)
    assert np.allclose(ours(slices, None), TorchPlanes(_Scaled(0.37), card, tmp_path)(slices, None), atol=1e-6)


def test_more_numbers_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    install(tmp_path, "scaled", _Scaled(0.3, 0.4), "slice")
    with pytest.raises(NotConvertible, match=r"scaled: a constant of \d bytes \(f\d+\) is no tensor .* as a buffer"):
        graph(_Scaled(0.3, 0.4), read_card("scaled", tmp_path), tmp_path)


def test_a_graph_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = _installed(tmp_path, "cnn-l1")
    monkeypatch.setattr(ir, "MAX_ERROR", 0.0)
    with pytest.raises(NotConvertible, match=r"cnn-l1: the graph differs from the network by .* HU"):
        graph(PlainCNN(), card, tmp_path)


def test_the_command_makes_the_graph_of_installed_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in ("json", "safetensors"):
        for name in ("drl", "st3d"):
            shutil.copy(WEIGHTS / f"{name}.{suffix}", tmp_path)
    path = tmp_path / "drl.json"
    before = {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("int8")}
    before["limits"] = "−5 °C"
    path.write_text(json.dumps({**before, "files_sha256": {"int8.xml": "old"}, "int8_loss_db": 0.05}))
    (tmp_path / "drl.int8.xml").write_bytes(b"of another graph")
    (tmp_path / "st3d.int8.ranges").write_bytes(b"of no graph")
    untouched = (tmp_path / "st3d.json").read_bytes()
    for _ in range(2):
        main(["export", "--graph", "drl", "st3d", "--weights", str(tmp_path)])
        digest = hashlib.sha256((tmp_path / "drl.xml").read_bytes()).hexdigest()
        assert json.loads(path.read_text()) == {**before, "files_sha256": {"xml": digest}}
        assert '"limits": "−5 °C"' in path.read_text(encoding="utf-8")  # as people read it
    assert not (tmp_path / "drl.int8.xml").exists()
    assert not (tmp_path / "st3d.xml").exists()
    assert (tmp_path / "st3d.int8.ranges").exists()
    assert (tmp_path / "st3d.json").read_bytes() == untouched
    assert capsys.readouterr().out.splitlines()[-1] == "st3d is run without a graph"


CALLS = "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)"
WORKS = """
import numpy as np
import torch
from pathlib import Path
import sys
from pipelines.base import Execution, denoise_volume, load
from pipelines.cascade import DRL
from pipelines.runtime import WEIGHTS, read_card
from pipelines.testing import water_volume
from training.ir import graph

assert graph(DRL(), read_card("drl"), WEIGHTS).startswith(b"<?xml")
out = denoise_volume(load("drl", Execution("cpu", "fp32", 1)), water_volume((1, 40, 32)))
assert out.shape == (1, 40, 32)
"""


def _internet_calls(code: str, folder: Path) -> tuple[int, list[str]]:
    """Exit code of an interpreter that runs `code`, and its system calls that have to do with the internet."""
    trace = folder / "trace"
    environment = {key: value for key, value in os.environ.items() if key != "CI"}
    done = subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=network", "-o", trace, sys.executable, "-c", code],
        env={**environment, "HOME": str(folder), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        timeout=240,
        check=False,
    )
    return done.returncode, [line for line in trace.read_text().splitlines() if "AF_INET" in line]


@pytest.mark.peer
def test_import_conversion_and_inference_never_touch_the_network(tmp_path: Path) -> None:
    """OpenVINO reports its use, unless CI is set; the first run shows that a call would be seen."""
    require_peer("strace")
    assert _internet_calls(CALLS, tmp_path)[1]
    assert _internet_calls(WORKS, tmp_path) == (0, [])
    assert {path.name for path in tmp_path.iterdir()} == {"trace"}  # nor did it leave an identity behind
