"""The OpenVINO engine of single slices: any size, results of one's own, every precision what it says."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines import openvino_planes
from pipelines.openvino_core import Precision, convolution_precisions, cpu_supports, op, ov
from pipelines.openvino_planes import OWN, OpenVINOPlanes, read_graph
from pipelines.runtime import Choice, plane_engine, read_card, read_file, read_weights

Array = NDArray[np.float32]
HU = 1000


def _engine(name: str, precision: Precision = "fp32") -> OpenVINOPlanes:
    card = read_card(name)
    return OpenVINOPlanes(read_file(card, "xml"), read_weights(card), precision, 1)


def _slices(channels: int, *shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 0.3, (channels, *shape)).astype(np.float32)


def test_a_result_stays_when_the_next_is_computed() -> None:
    engine = _engine("drl")
    one, two = _slices(1, 24, 31, seed=1), _slices(1, 24, 31, seed=2)
    first = engine(one, None)
    kept = first.copy()
    second = engine(two, None)
    assert np.array_equal(first, kept)
    assert not np.array_equal(first, second)
    first[:] = 0  # belongs to whoever asked
    assert np.array_equal(engine(two, None), second)
    assert first.dtype == np.float32
    assert first.flags.owndata


def test_the_input_is_not_written_to_and_need_not_be_contiguous() -> None:
    engine = _engine("fast-2.5d")
    slices, noise_map = _slices(3, 32, 40), np.full((1, 16, 20), 0.02, np.float32)
    given = slices.copy()
    expected = engine(slices, noise_map)
    assert np.array_equal(slices, given)
    assert np.array_equal(engine(np.asfortranarray(slices), noise_map), expected)
    assert np.array_equal(engine(np.repeat(slices, 2, axis=2)[:, :, ::2], noise_map), expected)


def test_a_size_is_compiled_once_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[list[int]] = []
    compile_model = openvino_planes.compile_model

    def counted(model: ov.Model, precision: Precision, threads: int) -> ov.CompiledModel:
        compiled.append(list(model.input(0).shape))
        return compile_model(model, precision, threads)

    monkeypatch.setattr(openvino_planes, "compile_model", counted)
    monkeypatch.setattr(openvino_planes, "SHAPES", 2)
    engine = _engine("drl")
    results = {rows: engine(_slices(1, rows, 20), None) for rows in (10, 12)}
    for rows in (10, 12, 10):
        assert np.array_equal(engine(_slices(1, rows, 20), None), results[rows])
    assert compiled == [[1, 1, 10, 20], [1, 1, 12, 20]]
    engine(_slices(1, 14, 20), None)  # in the place of 12, the longest unused
    assert np.array_equal(engine(_slices(1, 10, 20), None), results[10])
    assert np.array_equal(engine(_slices(1, 12, 20), None), results[12])
    assert [shape[2] for shape in compiled] == [10, 12, 14, 12]


def test_what_a_network_takes_is_what_it_must_be_given() -> None:
    with pytest.raises(ValueError, match="zip"):
        _engine("drl")(_slices(1, 16, 16), np.zeros((1, 16, 16), np.float32))


def test_weights_of_another_network_cannot_be_read() -> None:
    card = read_card("drl")
    with pytest.raises(RuntimeError, match="weights"):
        read_graph(read_file(card, "xml"), read_weights(card)[:1000])


@pytest.mark.skipif(not cpu_supports("bf16"), reason="this CPU has no instructions for bf16")
def test_bf16_is_bf16() -> None:
    """Its 8 bits of mantissa show, and no more."""
    slices, noise_map = _slices(3, 64, 64), np.full((1, 64, 64), 0.03, np.float32)
    exact, short = (_engine("quality-2.5d", precision)(slices, noise_map) for precision in ("fp32", "bf16"))
    change = float(np.std(exact - slices[1]))
    assert 2**-12 * change < float(np.std(short - exact)) < 2**-4 * change


def _quantised(bias: float) -> tuple[bytes, bytes, Array]:
    """Graph and weights of one 3 × 3 convolution of 16 channels in 8 bits between float ones, and its kernel."""
    kernel = np.random.default_rng(0).integers(-127, 128, (16, 16, 3, 3)).astype(np.float32) / 127
    x = op.parameter([1, 1, -1, -1], ov.Type.f32, name="slices")
    spread = op.convolution(x, np.full((16, 1, 1, 1), 1, np.float32), [1, 1], [0, 0], [0, 0], [1, 1])
    codes = op.fake_quantize(spread, np.float32(0), np.float32(2.55), np.float32(0), np.float32(2.55), 256)
    rounded = op.fake_quantize(op.constant(kernel), np.float32(-1), np.float32(1), np.float32(-1), np.float32(1), 255)
    y = op.convolution(codes, rounded, [1, 1], [1, 1], [1, 1], [1, 1])
    total = op.add(op.reduce_sum(y, op.constant(np.array([1])), True), op.constant(np.float32(bias)))
    model = ov.Model([total], [x], "quantised")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.xml"
        ov.save_model(model, path, compress_to_fp16=False)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes(), kernel


@pytest.mark.skipif(not cpu_supports("int8"), reason="this CPU has no instructions for int8")
def test_int8_runs_from_files_of_its_own_and_is_int8(tmp_path: Path) -> None:
    graph, weights, kernel = _quantised(0.5)
    assert OWN.search(graph) is None
    card = replace(read_card("drl"), name="q")
    files = {"int8.xml": graph, "int8.bin": weights}
    for suffix, content in files.items():
        (tmp_path / f"q.{suffix}").write_bytes(content)
    card = replace(card, files_sha256={s: hashlib.sha256(content).hexdigest() for s, content in files.items()})

    def never() -> None:
        raise AssertionError("PyTorch is not needed")

    engine = plane_engine(card, never, Choice("openvino", "cpu", "int8", 1, ""), tmp_path)  # type: ignore[arg-type]  # it makes none
    slices = np.random.default_rng(1).uniform(-0.5, 3, (1, 20, 28)).astype(np.float32)
    made = engine(slices, None)
    assert isinstance(engine, OpenVINOPlanes)
    (request,) = engine._requests.values()
    assert "u8" in {kind.lower() for kind in convolution_precisions(request.get_compiled_model()).values()}
    codes = np.pad(np.rint(np.clip(slices[0], 0, 2.55) * 100) / 100, 1)
    expected = np.full(made.shape, 0.5)
    for row in range(3):
        for column in range(3):
            weight = float(kernel[:, :, row, column].astype(np.float64).sum())
            expected += weight * codes[row : row + made.shape[0], column : column + made.shape[1]]
    error = np.sqrt(np.mean((made - expected) ** 2)) / np.std(expected)
    assert error < 0.01  # the sum is in bf16 where the CPU has it
