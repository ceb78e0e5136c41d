"""The graph of a network for OpenVINO, without its weights: what a node runs on a CPU.

OpenVINO's own conversion folds batch normalisation into the weights, which would then be there twice in two versions.
Here the conversion stops before that, and OpenVINO folds when it compiles: each constant of the graph is a tensor of
``NAME.safetensors`` to the last bit, and the graph points to it there. Left over are integers (axes, shapes) and single
numbers of the network's definition, which go into the graph itself; see `pipelines.openvino_planes`.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipelines.base import ModelCard
from pipelines.openvino_core import ov
from pipelines.openvino_planes import ALIGNMENT, OpenVINOPlanes
from pipelines.runtime import read_weights
from pipelines.scaling import to_hu, to_network
from pipelines.torch_engine import load_network

# after pipelines.openvino_core, which keeps it from reporting its use
from openvino.frontend import FrontEndManager  # type: ignore[import-untyped]  # isort: skip
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder  # type: ignore[import-untyped]  # isort: skip

MAX_ERROR = to_network(0.01)
"""Between the graph in fp32 and PyTorch; network units."""
INPUTS = ("slices", "noise_map")
OUTPUT = "denoised"
_EXAMPLE = 64
"""Rows and columns that the network is traced with; a multiple of every stride."""
_CONSTANT = re.compile(rb'<data element_type="(\w+)" shape="[^"]*" offset="(\d+)" size="(\d+)" />')
_BYTES = {b"f16": 2, b"f32": 4}
_END = b"\t</rt_info>\n</net>"
"""Of a graph, after the version of OpenVINO that wrote it."""


class NotConvertible(ValueError):
    """A network cannot become a graph that points into its weights."""


def graph(network: nn.Module, card: ModelCard, folder: Path, *, noise_map_stride: int = 1) -> bytes:
    """The graph of a network that makes one slice at a time, for images of any size; the same bytes every time.

    Parameters
    ----------
    network
        Untrained; it is filled with the weights of `card` in `folder`.
    noise_map_stride
        Pixels of the image per pixel of the noise map.

    Raises
    ------
    NotConvertible
        If it needs constants that are none of its weights, or computes something else than the network.
    pipelines.base.WeightsMissing, pipelines.base.WeightsDamaged
        As `pipelines.torch_engine.load_network`.
    """
    generator = torch.Generator().manual_seed(0)
    given = [0.4 * torch.randn(1, 1 if card.input == "slice" else 3, _EXAMPLE, _EXAMPLE, generator=generator)]
    if card.noise_map:
        given.append(torch.full((1, 1, *[_EXAMPLE // noise_map_stride] * 2), to_network(20.0)))
    network = load_network(network, card, folder)
    weights = read_weights(card, folder)
    model = _converted(network, tuple(given))
    model.reshape({port: [1, tensor.shape[1], -1, -1] for port, tensor in zip(model.inputs, given, strict=True)})
    name_parts(model, card.name)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "graph.xml"
        ov.save_model(model, path, compress_to_fp16=True)
        xml = _pointing_into(weights, path.read_bytes(), path.with_suffix(".bin").read_bytes(), card)
    noise_map = given[1][0].numpy() if card.noise_map else None
    made = OpenVINOPlanes(xml, weights, "fp32", 1)(given[0][0].numpy(), noise_map)
    error = float(np.abs(made - network(*given)[0, 0].numpy()).max())
    if not error <= MAX_ERROR:
        raise NotConvertible(f"{card.name}: the graph differs from the network by {to_hu(error):g} HU")
    return xml


def _converted(network: nn.Module, example: tuple[torch.Tensor, ...]) -> Any:
    """The `openvino.Model` as the frontend makes it, nothing folded."""
    with warnings.catch_warnings():
        # OpenVINO traces, which PyTorch wants to be done by export some day. Graphs by `torch.export` compute the same
        # to the last bit, but OpenVINO 2026.4 logs tracebacks over decompositions that PyTorch 2.13 no longer has, and
        # every graph that ships would get another digest, and so every derived object another UID, for nothing.
        warnings.filterwarnings("ignore", "`torch.jit.*` is deprecated", DeprecationWarning)
        decoder = TorchScriptPythonDecoder(network, example_input=example)  # must outlive the model made of it
    frontend = FrontEndManager().load_by_framework("pytorch")
    return frontend.convert(frontend.load(decoder))


def name_parts(model: Any, name: str) -> None:
    """Name what would carry a running number of this process."""
    model.set_friendly_name(name)
    for port, tensor_name in zip(model.inputs, INPUTS, strict=False):
        port.get_tensor().set_names({tensor_name})
    model.output(0).get_tensor().set_names({OUTPUT})
    for k, node in enumerate(model.get_ordered_ops()):
        plain = re.sub(r"_\d+$", "", node.get_friendly_name())
        node.set_friendly_name(f"{k} {plain}")


def _pointing_into(weights: bytes, xml: bytes, values: bytes, card: ModelCard) -> bytes:
    """`xml` whose constants, now at offsets of `values`, are tensors of `weights` or its own."""
    tensors = _tensors(weights)
    own: dict[bytes, int] = {}  # where each begins; in this order
    end = -(-len(weights) // ALIGNMENT) * ALIGNMENT

    def moved(constant: re.Match[bytes]) -> bytes:
        nonlocal end
        kind, offset, size = constant[1], int(constant[2]), int(constant[3])
        content = values[offset : offset + size]
        place = tensors.get(content) if kind == b"f16" else None
        if place is None and (kind in (b"i32", b"i64") or size == _BYTES.get(kind)):
            padded = content + bytes(-size % ALIGNMENT)
            place = own.setdefault(padded, end)
            end = max(end, place + len(padded))
        if place is None:
            raise NotConvertible(
                f"{card.name}: a constant of {size} bytes ({kind.decode('ascii')}) is no tensor of its weights; "
                "register it as a buffer of the network, so that it is saved with them"
            )
        return constant[0].replace(b'offset="%d"' % offset, b'offset="%d"' % place)

    if xml.count(b'type="Const"') != len(_CONSTANT.findall(xml)) or not xml.rstrip().endswith(_END):
        raise NotConvertible(f"{card.name}: OpenVINO writes its graphs in another form than this version knows")
    pointing = _CONSTANT.sub(moved, xml).rstrip().removesuffix(_END)  # fills `own`, too
    element = b'\t\t<constants value="%s" />\n' % b"".join(own).hex().encode("ascii")
    return pointing + element + _END + b"\n"


def _tensors(weights: bytes) -> dict[bytes, int]:
    """Where each content of a tensor is in a safetensors file: its header is JSON after eight bytes of length."""
    begin = 8 + int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8:begin])
    header.pop("__metadata__", None)
    ranges = [[begin + offset for offset in entry["data_offsets"]] for entry in header.values()]
    return {weights[first:last]: first for first, last in ranges}
