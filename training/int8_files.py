"""What a node runs a quantised network from, and how that is compared with the network in PyTorch.

A network that makes one slice at a time becomes a graph of its own with its own weights, ``NAME.int8.xml`` and
``NAME.int8.bin``. One for whole volumes is made by `pipelines.openvino_stream` from the ranges of its activations,
``NAME.int8.ranges``, and the weights that are there anyway; after fine-tuning from ``NAME.int8.safetensors``.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load
from safetensors.torch import save
from torch import nn

from pipelines.openvino_core import ov
from pipelines.openvino_planes import OpenVINOPlanes
from pipelines.openvino_stream import StreamEngine
from training.data import Batch
from training.ir import name_parts
from training.loop import Predict
from training.quantization import convolutions

PLANES = ("int8.xml", "int8.bin")
RANGES = "int8.ranges"
TUNED = "int8.safetensors"


class _Recorder(nn.Module):
    """Keeps what a network would be given."""

    given: tuple[torch.Tensor, ...] = ()

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        self.given = given
        return given[0]


def inputs(predict: Predict, batch: Batch) -> tuple[torch.Tensor, ...]:
    """What `predict` gives to a network of a batch."""
    recorder = _Recorder()
    predict(recorder, batch)
    return recorder.given


def plane_files(network: nn.Module, predict: Predict, batch: Batch, name: str) -> dict[str, bytes]:
    """The graph of a quantised network for images of any size, and its weights.

    Parameters
    ----------
    network
        From `training.quantization`, for inference.
    predict, batch
        Of its recipe; its sizes are those that the network is traced with.
    name
        Of the network.
    """
    given = tuple(tensor[:1].contiguous() for tensor in inputs(predict, batch))
    finished = copy.deepcopy(network).requires_grad_(False).eval()
    for one in convolutions(finished).values():
        one.round_weights()
    with warnings.catch_warnings():
        # PyTorch wants its exporter in place of the tracer; OpenVINO's way in is the tracer
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        model = ov.convert_model(finished, example_input=given)
    model.reshape({port: [1, tensor.shape[1], -1, -1] for port, tensor in zip(model.inputs, given, strict=True)})
    name_parts(model, name)
    with tempfile.TemporaryDirectory() as scratch:
        xml = Path(scratch) / "graph.xml"
        ov.save_model(model, xml, compress_to_fp16=False)  # what is not in 8 bits is little, and steps must be exact
        return dict(zip(PLANES, (xml.read_bytes(), xml.with_suffix(".bin").read_bytes()), strict=True))


def stream_files(network: nn.Module, *, tuned: bool) -> dict[str, bytes]:
    """The ranges of a quantised network for whole volumes, and its weights (half precision) if they are new."""
    reach = {name: one.range.reach for name, one in convolutions(network).items() if one.range is not None}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(each)}" for name, each in reach.items())
    files = {RANGES: f"{{\n{lines}\n}}\n".encode("ascii")}
    if tuned:
        own = {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, torch.Tensor)}
        files[TUNED] = save({name: tensor.detach().half().contiguous() for name, tensor in own.items()})
    return files


class Deployed(nn.Module):
    """What a node runs, in place of the network that it was made from.

    Parameters
    ----------
    files
        From `plane_files` or `stream_files`.
    weights
        Content of ``NAME.safetensors``, for a network of whole volumes that was not fine-tuned.
    threads
        CPU cores to use.
    """

    def __init__(self, files: Mapping[str, bytes], weights: bytes, threads: int) -> None:
        super().__init__()
        self._files, self._threads = files, threads
        self._weights = load(files.get(TUNED, weights))
        self._planes: OpenVINOPlanes | None = None
        if RANGES not in files:
            graph, own = (files[suffix] for suffix in PLANES)
            self._planes = OpenVINOPlanes(graph, own, "int8", threads)
        self._streams: StreamEngine | None = None

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        if self._planes is None:
            return torch.stack([self._volume(volume) for volume in given[0]])
        results = []
        for items in zip(*given, strict=True):
            arrays = [np.ascontiguousarray(item.numpy()) for item in items]
            results.append(torch.from_numpy(self._planes(arrays[0], arrays[1] if len(arrays) > 1 else None))[None])
        return torch.stack(results)

    def _volume(self, volume: torch.Tensor) -> torch.Tensor:
        """(1, z, y, x)."""
        shape = (volume.shape[2], volume.shape[3])
        if self._streams is None or self._streams.shape != shape:
            self._streams = StreamEngine(
                self._weights,
                shape,
                precision="int8",
                ranges=json.loads(self._files[RANGES]),
                threads=self._threads,
            )
        planes = self._streams.stream(iter(np.ascontiguousarray(volume[0].numpy())))
        return torch.from_numpy(np.stack(list(planes)))[None]
