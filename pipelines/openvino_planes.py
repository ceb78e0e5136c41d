"""OpenVINO as engine of the networks that make one slice at a time.

A graph ``NAME.xml`` holds no weights: its constants point into ``NAME.safetensors``, which is there anyway. What it
needs beside them, axes and shapes mostly, stands in the graph as hexadecimal digits and is appended to the weights
before OpenVINO sees them. `training.ir` writes such graphs.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.openvino_core import Precision, compile_model, core

Array = NDArray[np.float32]

OWN = re.compile(rb'<constants value="([0-9a-f]*)" />')
"""The element of a graph that holds the constants which are no weights."""
ALIGNMENT = 8
"""Bytes; they begin at the next multiple of this after the weights."""
SHAPES = 4
"""Image sizes that stay compiled: a series is of one, and its strips differ by a row."""


def read_graph(graph: bytes, weights: bytes) -> Any:
    """The `openvino.Model` of a graph (xml) with its weights (safetensors; of a quantised graph its own bin)."""
    own = OWN.search(graph)
    if own is not None:
        weights += bytes(-len(weights) % ALIGNMENT) + bytes.fromhex(own[1].decode("ascii"))
    return core().read_model(model=graph, weights=weights)


class OpenVINOPlanes:
    """A network of (1, channels, y, x), and a noise map (1, 1, y', x') if it takes one, to (1, 1, y, x).

    It is compiled for each size of image that comes: one of a fixed size is about 10 % faster in INT8 than one of any.

    Parameters
    ----------
    graph, weights
        See `read_graph`.
    precision, threads
        See `pipelines.openvino_core.compile_model`.
    """

    def __init__(self, graph: bytes, weights: bytes, precision: Precision, threads: int) -> None:
        self._model = read_graph(graph, weights)
        self._precision: Precision = precision
        self._threads = threads
        self._requests: OrderedDict[tuple[tuple[int, ...], ...], Any] = OrderedDict()
        """An inference request by the shapes of its inputs, the last used at the end."""

    def __call__(self, slices: Array, noise_map: Array | None) -> Array:
        """See `pipelines.runtime.PlaneEngine`."""
        given = [slices] if noise_map is None else [slices, noise_map]
        request = self._request(tuple((1, *array.shape) for array in given))
        for k, array in enumerate(given):
            request.get_input_tensor(k).data[0] = array
        request.infer(share_outputs=True)  # else it returns a copy, which nobody looks at
        return np.array(request.get_output_tensor(0).data[0, 0])  # a copy: the next slice is written over the original

    def _request(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        if shapes not in self._requests:
            model = self._model.clone()
            model.reshape(dict(zip(model.inputs, map(list, shapes), strict=True)))
            if len(self._requests) == SHAPES:
                self._requests.popitem(last=False)
            self._requests[shapes] = compile_model(model, self._precision, self._threads).create_infer_request()
        self._requests.move_to_end(shapes)
        return self._requests[shapes]
