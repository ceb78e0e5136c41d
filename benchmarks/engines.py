"""OpenVINO, ONNX Runtime and PyTorch on two of our networks, one of slices and one of volumes: which is the fastest?

    python benchmarks/engines.py [--planes fast-2.5d] [--volumes st3d]

ONNX Runtime is no part of this project and is measured where it is found:

    pip install --target ort --no-deps onnxruntime onnx protobuf flatbuffers ml_dtypes
    PYTHONPATH=ort python benchmarks/engines.py

INT8 is static quantisation of all convolutions, weights in a step for each output; ranges are those of the one image
that is timed, and each engine is quantised by its own means (OpenVINO by ours). The error is that of the output against
PyTorch in fp32.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import Machine, arguments, command, interleaved, median, number, own_cores, seconds, table
from numpy.typing import NDArray
from operations import factory, products
from torch import nn

from pipelines.base import WeightsMissing
from pipelines.openvino_core import Precision, compile_model, convolution_precisions, cpu_supports, ov
from pipelines.runtime import WEIGHTS, read_card
from pipelines.scaling import to_hu, to_network
from pipelines.testing import water_volume
from pipelines.torch_engine import load_network
from training.data import Batch
from training.int8_files import inputs
from training.quantization import calibrate, quantisable, quantise
from training.recipes import Recipe, recipe

PLANE, TILE = (512, 512), (16, 128, 128)
"""What the networks are given: a slice with its neighbours, a tile of a volume."""
NOISE_HU = 25.0
HIGHEST_HU = 300.0
"""No metal: a range that holds it has few codes for tissue."""
OPSET = 17

Array = NDArray[np.float32]
Run = Callable[[], Array]


class Refused(RuntimeError):
    """An engine cannot run this network like that; the table has no row for it."""


@dataclass(frozen=True)
class Job:
    """A network and what it is given."""

    name: str
    network: nn.Module
    """As it is defined."""
    how: Recipe
    batch: Batch
    cores: int

    @property
    def given(self) -> tuple[torch.Tensor, ...]:
        """Inputs of the network."""
        return tuple(tensor.contiguous() for tensor in inputs(self.how.predict, self.batch))

    @property
    def products(self) -> int:
        """Of one run."""
        return products(factory(self.name).network(), *(tuple(tensor.shape) for tensor in self.given))


def job(name: str, cores: int) -> Job:
    """The network `name` with its weights, or with random ones; of a volume a tile, else a slice."""
    how = recipe(name)
    network = factory(name).network().eval().requires_grad_(False)
    try:
        load_network(network, read_card(name), WEIGHTS)
    except WeightsMissing:
        print(f"{name} has no weights: random ones are timed, and its errors say nothing", file=sys.stderr)
    shape = TILE if how.card["input"] == "volume" else (3, *PLANE)
    hu = np.minimum(water_volume(shape, noise_hu=NOISE_HU).hu, np.float32(HIGHEST_HU))
    noisy = torch.from_numpy(to_network(hu))[None]
    batch = Batch(noisy, noisy, torch.full((1,), float(to_network(NOISE_HU))))
    return Job(name, network, how, batch, cores)


@contextmanager
def legacy() -> Iterator[None]:
    """No warnings: tracing, FX quantisation and export by tracing are called old, and are the only ways to engines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def by_torch(one: Job, precision: Precision, *, channels_last: bool) -> Run:
    """Eager PyTorch, in its own order of memory or in the one that is quicker for convolutions."""
    network, given = copy.deepcopy(one.network), one.given
    if channels_last:
        order = torch.channels_last if given[0].ndim == 4 else torch.channels_last_3d
        network = network.to(memory_format=order)  # type: ignore[call-overload]  # torch's stubs lack it
        given = tuple(tensor.to(memory_format=order) for tensor in given)
    if precision == "bf16":
        network, given = network.bfloat16(), tuple(tensor.bfloat16() for tensor in given)
    elif precision == "int8":
        network = _quantised_by_torch(network, given)
    return lambda: np.asarray(network(*given).float().numpy())


def _quantised_by_torch(network: nn.Module, given: tuple[torch.Tensor, ...]) -> nn.Module:
    """FX graph mode quantisation with the kernels of oneDNN."""
    quantisation, fx = import_module("torch.ao.quantization"), import_module("torch.ao.quantization.quantize_fx")
    torch.backends.quantized.engine = "onednn"
    try:
        with legacy():
            prepared = fx.prepare_fx(network, quantisation.get_default_qconfig_mapping("onednn"), given)
            prepared(*given)
            made: nn.Module = fx.convert_fx(prepared)
            made(*given)
    except Exception as error:  # FX tells what it cannot do by errors of every kind; the table says which
        raise Refused(f"PyTorch cannot quantise it: {type(error).__name__}: {error}") from error
    return made


def by_openvino(one: Job, precision: Precision) -> Run:
    """OpenVINO, set up as in a node; exits if it runs in float what has ranges."""
    given = one.given
    network = quantisable(one.network, one.how.predict, one.batch).requires_grad_(False)
    ranges = calibrate(network, one.how.predict, [one.batch]) if precision == "int8" else {}
    quantise(network, ranges)
    with legacy():
        model = ov.convert_model(network, example_input=given, input=[[*tensor.shape] for tensor in given])
    compiled = compile_model(model, precision, one.cores)
    in_8_bits = sum(kind in ("i8", "u8") for kind in convolution_precisions(compiled).values())
    if in_8_bits < len(ranges):
        print(f"{one.name}: OpenVINO runs {in_8_bits} of {len(ranges)} convolutions in 8 bits", file=sys.stderr)
    request = compiled.create_infer_request()

    def run() -> Array:
        for k, tensor in enumerate(given):
            request.get_input_tensor(k).data[...] = tensor.numpy()
        request.infer()
        return np.array(request.get_output_tensor(0).data)

    return run


def by_onnxruntime(one: Job, precision: Precision) -> Run:
    """ONNX Runtime; in INT8 with its own static quantisation (QDQ, unsigned activations, signed weights)."""
    if find_spec("onnxruntime") is None or find_spec("onnx") is None:
        raise Refused("ONNX Runtime is not installed, see the head of this file")
    runtime, given = import_module("onnxruntime"), one.given
    names = [f"input{k}" for k in range(len(given))]
    feed = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
    options = runtime.SessionOptions()
    options.intra_op_num_threads = one.cores
    with tempfile.TemporaryDirectory() as scratch, legacy():
        path = Path(scratch) / "fp32.onnx"
        torch.onnx.export(one.network, given, str(path), dynamo=False, opset_version=OPSET, input_names=names)
        if precision == "int8":
            tools = import_module("onnxruntime.quantization")
            ready, path = Path(scratch) / "ready.onnx", Path(scratch) / "int8.onnx"
            import_module("onnxruntime.quantization.shape_inference").quant_pre_process(
                str(Path(scratch) / "fp32.onnx"), str(ready), skip_symbolic_shape=True
            )
            tools.quantize_static(
                str(ready),
                str(path),
                _once(tools, feed),
                quant_format=tools.QuantFormat.QDQ,
                per_channel=True,
                activation_type=tools.QuantType.QUInt8,
                weight_type=tools.QuantType.QInt8,
            )
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: np.asarray(session.run(None, feed)[0])


def _once(tools: Any, feed: Mapping[str, Array]) -> Any:
    """A reader of calibration data that gives `feed` and ends."""
    data = iter([feed])
    return type("Reader", (tools.CalibrationDataReader,), {"get_next": lambda _: next(data, None)})()


ENGINES: dict[tuple[str, Precision], Callable[[Job], Run]] = {
    ("PyTorch, eager", "fp32"): partial(by_torch, precision="fp32", channels_last=False),
    ("PyTorch, channels last", "fp32"): partial(by_torch, precision="fp32", channels_last=True),
    ("PyTorch, channels last", "bf16"): partial(by_torch, precision="bf16", channels_last=True),
    ("PyTorch, FX graph mode", "int8"): partial(by_torch, precision="int8", channels_last=True),
    ("ONNX Runtime", "fp32"): partial(by_onnxruntime, precision="fp32"),
    ("ONNX Runtime", "int8"): partial(by_onnxruntime, precision="int8"),
    ("OpenVINO", "fp32"): partial(by_openvino, precision="fp32"),
    ("OpenVINO", "bf16"): partial(by_openvino, precision="bf16"),
    ("OpenVINO", "int8"): partial(by_openvino, precision="int8"),
}
EXACT: tuple[str, Precision] = ("PyTorch, eager", "fp32")

HEAD = ("network", "engine", "type", "seconds", "× eager", "GMAC/s", "% of peak", "error (HU rms)")


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument(
        "--planes", default="fast-2.5d", metavar="NAME", help="a network of slices (default %(default)s)"
    )
    parser.add_argument("--volumes", default="st3d", metavar="NAME", help="a network of volumes (default %(default)s)")
    options = parser.parse_args()
    cores = own_cores()
    torch.set_num_threads(cores)
    runs: dict[tuple[str, str, Precision], Run] = {}
    errors: dict[tuple[str, str, Precision], float] = {}
    jobs = {name: job(name, cores) for name in (options.planes, options.volumes)}
    with torch.inference_mode():
        for name, one in jobs.items():
            for (engine, precision), make in ENGINES.items():
                if not cpu_supports(precision):
                    continue
                try:
                    runs[name, engine, precision] = run = make(one)
                except Refused as error:
                    print(f"left out, {name} by {engine} in {precision}: {error}", file=sys.stderr)
                    continue
                off = to_hu(run() - runs[name, *EXACT]())
                errors[name, engine, precision] = float(np.sqrt(np.square(off, dtype=np.float64).mean()))
        with Machine(cores) as machine:
            timed = {turn: seconds(run) for turn, run in runs.items()}
            rounds = interleaved(machine, timed, options.rounds, options.quiet)
            description, peak = machine.describe(), machine.peak
    rows = []
    for turn in runs:
        name, engine, precision = turn
        taken, base = (statistics.median(rounds.of(one)) for one in (turn, (name, *EXACT)))
        gmacs = jobs[name].products / taken / 1e9
        rows.append(
            [
                *(name, engine, precision, median(rounds.of(turn), 3), f"{base / taken:.2f}", f"{gmacs:.0f}"),
                *(number(100 * gmacs / peak[precision], 0), f"{errors[turn]:.2f}"),
            ]
        )
    slices, tile = (" × ".join(map(str, shape)) for shape in (PLANE, TILE))
    print(command([]))
    print(f"{description}\n{options.planes}: a slice of {slices}; {options.volumes}: a tile of {tile}.")
    print(f"{rounds.describe()}\n\n{table(HEAD, rows)}")


if __name__ == "__main__":
    main()
