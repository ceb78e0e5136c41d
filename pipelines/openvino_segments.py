"""What OpenVINO runs between two stores of planes: a window of three, two convolutions, one plane.

A network that streams in depth is cut where it looks at other slices. What lies between two cuts is one small model:

::

    window of three planes ──→ convolution in depth ──→ (+ skip) ──→ (relu) ──┬──→ convolution in the plane ──→ plane
                                                                              └──→ trunk

Every part but the plane can be missing. Planes are stored with the channels last, (1, planes, rows, columns, channels),
which is what the kernels of the convolutions read and write: the transpositions below are there for OpenVINO's eyes and
vanish when it compiles (with fixed rows and columns; with free ones they stay, at five times the run time).

8-bit convolutions follow Jacob B. et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018: weights symmetric with one scale per output, activations with one scale
per tensor, sums in 32 bits. A convolution whose input has no range stays in float.

Channels of one tensor may have ranges of their own: each is rounded with its own step, and the weights take its part of
the largest, so that to the convolution all have that one (Nagel M. et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", ICCV 2019, section 4.1, but for one convolution and without touching the one before).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.openvino_core import Float, has_int8_tiles, op, ov

Weights = NDArray[np.float32]
Reach = float | Sequence[float]
Node = Any
"""An output of an OpenVINO operation: its package has no types."""

CHANNELS_SECOND = (0, 4, 1, 2, 3)
"""From the order of the store to (1, channels, planes, rows, columns), in which OpenVINO describes convolutions."""
CHANNELS_LAST = (0, 2, 3, 4, 1)

SIGNED_ZERO = 128
"""Codes below that of 0 in a tensor of both signs."""
LEVELS = 256
_LARGEST = float(np.finfo(np.float32).max)
LARGEST_WEIGHT = 127
"""Code of the largest weight: −128 is left out, so that both signs have the same grid."""


@dataclass(frozen=True)
class Convolution:
    """One convolution of the network.

    Parameters
    ----------
    name
        As in the file of weights, without ``.weight``.
    weight
        (outputs, inputs, depth, rows, columns).
    bias
        (outputs,).
    largest
        Largest magnitude of its input, which 8 bits have to hold: one, or one for each of its channels; None: stays in
        float.
    """

    name: str
    weight: Weights
    bias: Weights
    largest: Reach | None


@dataclass(frozen=True)
class Code:
    """How the numbers of a store are written: ``value = (code − zero) · step``; `step` None: as float.

    Parameters
    ----------
    type
        OpenVINO's element type.
    dtype
        NumPy's; bfloat16, which NumPy lacks, lies in uint16.
    zero, step
        Of the 8-bit code; the step by channel, (1, channels or 1, 1, 1, 1).
    lowest
        Of all 8-bit codes.
    """

    type: Any
    dtype: type[np.generic]
    zero: int = 0
    step: NDArray[np.float64] | None = None
    lowest: int = 0

    @classmethod
    def of_float(cls, precision: Float) -> Code:
        """Numbers as they are."""
        return cls(ov.Type.bf16, np.uint16) if precision == "bf16" else cls(ov.Type.f32, np.float32)

    @classmethod
    def of_range(cls, largest: Reach, *, signed: bool) -> Code:
        """8 bits for magnitudes up to `largest`; both signs, or none below zero.

        Codes of both signs lie as this CPU multiplies them: OpenVINO would turn one kind into the other at every step
        and for all three planes of a window, which takes a third of the time where there are tiles.
        """
        below = SIGNED_ZERO if signed else 0
        step = np.reshape(largest, (1, -1, 1, 1, 1)) / (LEVELS - 1 - below)
        if signed and has_int8_tiles():
            return cls(ov.Type.i8, np.int8, 0, step, -below)
        return cls(ov.Type.u8, np.uint8, below, step)

    def round(self, x: Node) -> Node:
        """Move `x` onto the grid of the code, in place of storing and loading it."""
        if self.step is None:
            return x
        return op.fake_quantize(x, *self._ends(self.step), *self._ends(self.step.max()), LEVELS)

    def store(self, x: Node) -> Node:
        """Codes of `x`."""
        if self.step is None:
            return x if self.type == ov.Type.f32 else op.convert(x, self.type)
        codes = op.fake_quantize(x, *self._ends(self.step), *map(_constant, self._codes), LEVELS)
        return op.convert(codes, self.type)

    def load(self, codes: Node) -> Node:
        """What the codes mean, with the largest step for all channels: `parts` are left to the weights."""
        x = codes if self.type == ov.Type.f32 else op.convert(codes, ov.Type.f32)
        if self.step is None:
            return x
        if self.zero:
            x = op.subtract(x, _constant(self.zero))
        # the values lie on the grid already; rounding them to it is how OpenVINO recognises an 8-bit convolution
        ends = self._ends(self.step.max())
        return op.fake_quantize(op.multiply(x, _constant(self.step.max())), *ends, *ends, LEVELS)

    @property
    def _codes(self) -> tuple[int, int]:
        """The lowest and the highest."""
        return self.lowest, self.lowest + LEVELS - 1

    def _ends(self, step: Any) -> tuple[Node, Node]:
        """Values of the lowest and the highest code."""
        lowest, highest = (_constant((code - self.zero) * step) for code in self._codes)
        return lowest, highest


def parts(largest: Reach) -> Weights:
    """The range of each channel in parts of the largest of them, (channels or 1,)."""
    each = np.atleast_1d(np.asarray(largest, np.float32))
    return np.asarray(each / each.max())


@dataclass(frozen=True)
class Planes:
    """What a store holds: the size and the code of its planes."""

    rows: int
    columns: int
    channels: int
    code: Code

    def parameter(self, name: str, planes: int) -> tuple[Node, Node]:
        """An input of `planes` planes: the parameter, and its values with the channels second."""
        shape = [1, planes, self.rows, self.columns, self.channels]
        parameter = op.parameter(shape, self.code.type, name=name)
        return parameter, self.code.load(op.transpose(parameter, _order(CHANNELS_SECOND)))

    def result(self, name: str, x: Node) -> Node:
        """An output, of values with the channels second."""
        result = op.result(op.transpose(self.code.store(x), _order(CHANNELS_LAST)))
        result.get_output_tensor(0).set_names({name})
        return result


def segment(
    *,
    window: tuple[Planes, Convolution, int] | None,
    skip: Planes | None,
    relu: bool,
    trunk: Planes | None,
    plane: Planes,
    across: Convolution | None,
) -> Any:
    """Make the model of a segment; see the picture above.

    Parameters
    ----------
    window
        Store of the three planes, input ``window``; the convolution in depth; by how many planes its weights are turned
        because the store is a ring.
    skip
        Store of the plane to add, input ``skip``; without `window` it is itself what goes on.
    relu
        Whether negative values become zero.
    trunk
        Store of what lies before `across`, output ``trunk``.
    plane
        Store of the answer, output ``plane``.
    across
        The convolution in the plane.

    Returns
    -------
    openvino.Model
    """
    parameters, results, terms = [], [], []
    if window is not None:
        planes, along, turn = window
        parameter, x = planes.parameter("window", 3)
        parameters.append(parameter)
        y = _convolve(x, along, np.roll(along.weight, turn, axis=2))
        if skip is not None and along.largest is not None:
            # OpenVINO would move the scale of an 8-bit convolution behind the sum and then find no fast way to make
            # codes of it: a step more over all planes, or none of its fast kernels. It moves nothing past an operation
            # that clips.
            y = op.clamp(y, -_LARGEST, _LARGEST)
        terms.append(y)
    if skip is not None:
        parameter, x = skip.parameter("skip", 1)
        parameters.append(parameter)
        if window is not None and window[1].largest is None:
            # A convolution in float is added into the memory of the skip. That is not the model's to write to, so
            # OpenVINO copies it, to where each model would keep a plane for good; the result of an operation, which
            # here changes nothing, goes where `release_memory` reaches.
            x = op.clamp(x, -_LARGEST, _LARGEST)
        terms.append(x)
    y = terms[0] if len(terms) == 1 else op.add(*terms)
    if relu:
        y = op.relu(y)
    if trunk is not None:
        results.append(trunk.result("trunk", y))
    if across is not None:
        if across.largest is not None:
            y = Code.of_range(across.largest, signed=not relu).round(y)
        y = _convolve(y, across, across.weight)
    results.append(plane.result("plane", y))
    return ov.Model(results, parameters, "segment")


def _convolve(x: Node, convolution: Convolution, weight: Weights) -> Node:
    """Convolve with zeros around the rows and columns; in depth the window is as long as the weights."""
    _, _, _, rows, columns = weight.shape
    pads = [0, rows // 2, columns // 2]
    if convolution.largest is None:
        weights = _constant(weight)
    else:
        weights = _eight_bit(weight * parts(convolution.largest).reshape(1, -1, 1, 1, 1))
    y = op.convolution(x, weights, [1, 1, 1], pads, pads, [1, 1, 1], name=convolution.name)
    return op.add(y, _constant(convolution.bias.reshape(1, -1, 1, 1, 1)))


def _eight_bit(weight: Weights) -> Node:
    """Weights in 8 bits, one scale for each output; an output of zeros only stays one."""
    largest = np.abs(weight).max(axis=(1, 2, 3, 4), keepdims=True)
    scale = np.where(largest > 0, largest, 1).astype(np.float32) / LARGEST_WEIGHT
    codes = np.round(weight / scale).astype(np.int8)
    return op.multiply(op.convert(op.constant(codes), ov.Type.f32), _constant(scale))


def _constant(value: Any) -> Node:
    return op.constant(np.asarray(value, np.float32))


def _order(axes: tuple[int, ...]) -> Node:
    return op.constant(np.array(axes))
