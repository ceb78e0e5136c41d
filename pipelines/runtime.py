"""Weights and cards of the networks that ship, and what computes them: the only place that knows how a network is run.

An engine takes and gives numpy arrays in network units (`pipelines.scaling`). Nothing here imports PyTorch unless it is
the engine that was chosen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from pipelines.base import Envelope, Execution, ModelCard, WeightsDamaged, WeightsMissing

if TYPE_CHECKING:
    from torch import nn

    from pipelines.openvino_stream import StreamEngine as OpenVINOStream

Array = NDArray[np.float32]

WEIGHTS = Path(__file__).parent / "weights"

INT8_MAX_LOSS_DB = 0.1
"""A network that loses more PSNR in INT8 runs in it only where it is told to."""
GPU = Path("/dev/nvidiactl")
"""Is there where the driver of NVIDIA's GPUs is: PyTorch takes seconds to import and need not be asked elsewhere."""


class PlaneEngine(Protocol):
    """Runs a network that makes one slice at a time."""

    def __call__(self, slices: Array, noise_map: Array | None) -> Array:
        """Denoise one slice.

        Parameters
        ----------
        slices
            (channels, y, x).
        noise_map
            (1, y', x') for a network that takes one.

        Returns
        -------
        ndarray
            (y, x).
        """
        ...


class StreamEngine(Protocol):
    """Runs a network for whole volumes, slice after slice, every slice computed once."""

    def stream(self, planes: Iterator[Array], shape: tuple[int, int]) -> Iterator[Array]:
        """Denoise `planes`, (y, x) of `shape` each; a slice comes as soon as its neighbourhood is there."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """What computes a network here, and why that."""

    backend: Literal["openvino", "torch"]
    device: Literal["cpu", "cuda"]
    precision: Literal["int8", "bf16", "fp16", "fp32"]
    threads: int
    """Of the CPU."""
    reason: str
    floats: str = ""
    """See `pipelines.base.ModelCard`."""


class ExecutionRefused(RuntimeError):
    """A network cannot be run here as it is wanted."""


def _content(name: str, suffix: str, folder: Path) -> bytes:
    path = folder / f"{name}.{suffix}"
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise WeightsMissing(
            f"there are no weights of {name!r} in {folder.name} ({path.name} is missing): train them "
            "(docs/training.md) and install them by `python -m training export`"
        ) from error


def read_card(name: str, folder: Path = WEIGHTS) -> ModelCard:
    """The card of the pipeline `name`; what the card says beyond `ModelCard` is for people.

    Raises
    ------
    pipelines.base.WeightsMissing
        If there is no card.
    pipelines.base.WeightsDamaged
        If it cannot be read, or lacks something.
    """
    content = _content(name, "json", folder)
    try:
        return _card(json.loads(content))
    except (ValueError, KeyError, TypeError) as error:  # no JSON, or without what a card has
        raise WeightsDamaged(
            f"the card of {name!r} is damaged ({name}.json, {type(error).__name__}: {error}): "
            "install card and weights again"
        ) from error


def _card(values: Any) -> ModelCard:
    known: dict[str, Any] = {field.name: values[field.name] for field in fields(ModelCard) if field.name in values}
    for key in ("patch_zyx", "overlap_zyx", "hu_window"):
        known[key] = tuple(known[key])
    if known.get("int8_bound_hu") is not None:
        known["int8_bound_hu"] = tuple(known["int8_bound_hu"])
    envelope: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values["valid_for"].items()}
    return ModelCard(**{**known, "valid_for": Envelope(**envelope)})


def read_weights(card: ModelCard, folder: Path = WEIGHTS) -> bytes:
    """The content of the safetensors file of `card`.

    Raises
    ------
    pipelines.base.WeightsMissing
        If there is none.
    pipelines.base.WeightsDamaged
        If the file is not the one that the card was written for.
    """
    return _verified(card, "safetensors", card.weights_sha256, folder)


def read_file(card: ModelCard, suffix: str, folder: Path = WEIGHTS) -> bytes:
    """The content of another file of `card`, one of `ModelCard.files_sha256`; raises what `read_weights` raises."""
    if suffix not in card.files_sha256:
        raise WeightsDamaged(
            f"the card of {card.name!r} is damaged: it says nothing of {card.name}.{suffix}: "
            "install card and weights again"
        )
    return _verified(card, suffix, card.files_sha256[suffix], folder)


def _verified(card: ModelCard, suffix: str, expected: str, folder: Path) -> bytes:
    content = _content(card.name, suffix, folder)
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected:
        raise WeightsDamaged(
            f"the weights of {card.name!r} are damaged: {card.name}.{suffix} has SHA-256 {digest}, its card says "
            f"{expected}; install card and weights again"
        )
    return content


def choose(card: ModelCard, execution: Execution) -> Choice:
    """What computes the network of `card` here.

    On a GPU that PyTorch can use, PyTorch; on a CPU OpenVINO, in INT8 if the card vouches for it and the CPU is fast in
    it, else in bf16 if the CPU is fast in that. A network without a graph for OpenVINO is left to PyTorch.

    Raises
    ------
    ExecutionRefused
        If it cannot be run as `execution` says; with what to do.
    """
    threads = execution.threads or len(os.sched_getaffinity(0))
    fastest, no_gpu = _gpu(execution)
    if fastest is not None:
        if execution.precision == "auto":
            return Choice("torch", "cuda", fastest, threads, f"the GPU, {fastest}, the fastest on it")
        if execution.precision in (fastest, "fp32"):
            return Choice(
                "torch", "cuda", execution.precision, threads, f"the GPU, {execution.precision} as configured"
            )
        if execution.device == "cuda":
            raise ExecutionRefused(
                f"the GPU does not run {card.name} in {execution.precision}: set precision auto, which takes {fastest}"
            )
        no_gpu = f"no GPU is used for {execution.precision}"
    if card.input != "volume" and "xml" not in card.files_sha256:
        return _without_graph(card, execution, threads)
    precision, why = _of_cpu(card, execution)
    from pipelines.openvino_core import float_of

    floats = float_of(precision) if precision == "int8" else ""
    return Choice("openvino", "cpu", precision, threads, f"the CPU ({no_gpu}), {why}", floats)


def _gpu(execution: Execution) -> tuple[Literal["bf16", "fp16"] | None, str]:
    """What a GPU is fastest in, or None and why none is used."""
    if execution.device == "cpu":
        return None, "as configured"
    demanded = execution.device == "cuda"
    if not demanded and not GPU.exists():
        return None, "there is no GPU"
    if find_spec("torch") is None:
        if demanded:
            raise ExecutionRefused(
                "device cuda needs PyTorch, which is not installed: install the extra gpu, or set device auto"
            )
        return None, "there is a GPU, but not PyTorch, which the extra gpu installs"
    from pipelines.torch_engine import fastest_of_gpu

    fastest = fastest_of_gpu()
    if fastest is None and demanded:
        raise ExecutionRefused("PyTorch finds no GPU that it can use: install its driver, or set device auto")
    return fastest, "PyTorch finds no GPU that it can use"


def _of_cpu(card: ModelCard, execution: Execution) -> tuple[Literal["int8", "bf16", "fp32"], str]:
    """The precision on the CPU, and why that."""
    from pipelines.openvino_core import cpu_supports

    quantised = not {"int8.xml", "int8.ranges"}.isdisjoint(card.files_sha256)
    if execution.precision != "auto":
        if execution.precision == "int8" and not quantised:
            raise ExecutionRefused(
                f"there are no INT8 weights of {card.name}: set precision auto, or make them by "
                f"`python -m training quantize {card.name}`"
            )
        if not cpu_supports(execution.precision):
            raise ExecutionRefused(
                f"{execution.precision} would be no faster on this CPU, which has no instructions for it: set "
                "precision auto"
            )
        return execution.precision, f"{execution.precision} as configured"
    loss = card.int8_loss_db
    if not quantised:
        no_int8 = "there are no INT8 weights"
    elif not cpu_supports("int8"):
        no_int8 = "it has no instructions for int8"
    elif loss is None:
        no_int8 = "nobody has measured what it loses in int8"
    elif loss > INT8_MAX_LOSS_DB:
        no_int8 = f"it loses {loss:.2f} dB in int8, more than {INT8_MAX_LOSS_DB:g}"
    elif card.int8_bound_hu is None:
        no_int8 = "its card has no bound to check its int8 by"
    else:
        return "int8", f"int8, the fastest: measured to lose {max(loss, 0):.2f} dB"
    if cpu_supports("bf16"):
        return "bf16", f"bf16, the fastest left: {no_int8}"
    return "fp32", f"fp32: {no_int8}, and it has no instructions for bf16"


def _without_graph(card: ModelCard, execution: Execution, threads: int) -> Choice:
    """PyTorch in its place, as far as that goes."""
    if find_spec("torch") is None or execution.precision not in ("auto", "fp32"):
        raise ExecutionRefused(
            f"there is no graph of {card.name} for OpenVINO, so it runs only by PyTorch (the extra gpu) in fp32; "
            f"`python -m training export --graph {card.name}` makes one"
        )
    return Choice("torch", "cpu", "fp32", threads, "the CPU, by PyTorch in fp32: there is no graph of it for OpenVINO")


def plane_engine(card: ModelCard, network: Callable[[], nn.Module], choice: Choice, folder: Path) -> PlaneEngine:
    """The engine of a network that makes one slice at a time; `network` makes it untrained, for PyTorch.

    Raises
    ------
    pipelines.base.WeightsMissing
        If a file of it is missing.
    pipelines.base.WeightsDamaged
        If one is not what its card was written for.
    """
    if choice.backend == "torch":
        from pipelines.torch_engine import TorchPlanes

        assert choice.precision != "int8"  # `choose` gives none
        return TorchPlanes(network(), card, folder, choice.device, choice.precision)
    from pipelines.openvino_planes import OpenVINOPlanes

    if choice.precision == "int8":
        graph, weights = (read_file(card, suffix, folder) for suffix in ("int8.xml", "int8.bin"))
    else:
        graph, weights = read_file(card, "xml", folder), read_weights(card, folder)
    assert choice.precision != "fp16"  # that is for GPUs
    return OpenVINOPlanes(graph, weights, choice.precision, choice.threads)


class _OpenVINOStreams:
    """Streams of images of any size: `pipelines.openvino_stream.StreamEngine` is for one; the last stays ready.

    To make one takes some seconds, and the next series is often another reconstruction of the same scan, whose body
    fills the same box. To round boxes up, so that more series share one, does not pay: to 32 pixels it made 14 real
    series 6 % larger, which is two seconds of the forty that 300 slices take, and spared every eighth the making.
    """

    def __init__(self, engine: Callable[[tuple[int, int]], OpenVINOStream]) -> None:
        self._make = engine
        self._engine: OpenVINOStream | None = None

    def stream(self, planes: Iterator[Array], shape: tuple[int, int]) -> Iterator[Array]:
        """See `StreamEngine`."""
        if self._engine is None or self._engine.shape != shape:
            self._engine = None  # its memory goes before that of the next is taken
            self._engine = self._make(shape)
        return self._engine.stream(planes)


def stream_engine(card: ModelCard, network: Callable[[], nn.Module], choice: Choice, folder: Path) -> StreamEngine:
    """The engine of a network for whole volumes; raises what `plane_engine` raises."""
    if choice.backend == "torch":
        from pipelines.torch_engine import TorchStream

        assert choice.precision != "int8"  # `choose` gives none
        return TorchStream(network(), card, folder, choice.device, choice.precision)
    from pipelines.openvino_stream import StreamEngine as OpenVINOStream

    assert choice.precision != "fp16"  # that is for GPUs
    ranges, content = None, read_weights(card, folder)
    if choice.precision == "int8":
        ranges = json.loads(read_file(card, "int8.ranges", folder))
        if "int8.safetensors" in card.files_sha256:  # trained on in INT8
            content = read_file(card, "int8.safetensors", folder)
    return _OpenVINOStreams(
        partial(OpenVINOStream, load(content), precision=choice.precision, ranges=ranges, threads=choice.threads)
    )
