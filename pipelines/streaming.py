"""How a volume passes through a network: slice after slice in depth.

A stream is an iterator of slices, tensors of (1, channels, rows, columns) in channels-last order. A network is a chain
of iterators over streams. A temporal convolution holds the last three slices that it saw, a residual holds what its
branch has not answered yet; so every slice is computed once, memory does not grow with the number of slices, and the
result is that of the whole volume at once. Steps are mapped, not looped over in generators: the frame of a waiting
generator would keep its slice, and there are dozens of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import torch
from torch.nn import functional

Stream = Iterator[torch.Tensor]


def spatial(stream: Stream, weight: torch.Tensor, bias: torch.Tensor | None) -> Stream:
    """Convolve each slice, (outputs, inputs, odd, odd) weights, zeros around it."""
    return map(partial(functional.conv2d, weight=weight, bias=bias, padding="same"), stream)


def relu(stream: Stream) -> Stream:
    """Negative values become zero, in place."""
    return map(partial(functional.relu, inplace=True), stream)


def temporal(stream: Stream, weight: torch.Tensor, bias: torch.Tensor | None) -> Stream:
    """Convolve three slices into each, (outputs, inputs, 3, 1) weights; a slice of zeros at both ends of the volume."""
    return _windowed(stream, _Along(weight, bias))


def volumetric(stream: Stream, weight: torch.Tensor, bias: torch.Tensor | None) -> Stream:
    """Convolve in three dimensions, (outputs, inputs, 3, odd, odd) weights, zeros around the volume."""
    return _windowed(stream, _Around(weight, bias))


def _windowed(stream: Stream, window: _Window) -> Stream:
    first = window.start(next(stream))
    return chain(first, map(window.push, stream), window.end())


class _Window(ABC):
    """The last three slices, in a ring: slice t lies in place t mod 3, and the weights turn with it.

    Parameters
    ----------
    turned
        The weights for each place of the newest slice.
    bias
        One for each output, or None.
    """

    def __init__(self, turned: list[torch.Tensor], bias: torch.Tensor | None) -> None:
        self.turned = [weight.contiguous(memory_format=torch.channels_last) for weight in turned]
        self.bias = bias
        self.ring = torch.empty(0)
        self.t = 0

    @abstractmethod
    def empty(self, x: torch.Tensor) -> torch.Tensor:
        """A ring of zeros for slices like `x`."""

    @abstractmethod
    def place(self) -> torch.Tensor:
        """Where slice `t` lies in the ring, (channels, rows, columns)."""

    @abstractmethod
    def answer(self) -> torch.Tensor:
        """The result for the slice before slice `t`."""

    def start(self, x: torch.Tensor) -> Stream:
        """Take the first slice, before which all is zero; nothing can be answered yet."""
        self.ring = self.empty(x).contiguous(memory_format=torch.channels_last)
        self.place().copy_(x[0])
        return iter(())

    def push(self, x: torch.Tensor | None) -> torch.Tensor:
        """Take the next slice (None: zeros, the volume has ended), answer the one before."""
        self.t += 1
        if x is None:
            self.place().zero_()
        else:
            self.place().copy_(x[0])
        return self.answer()

    def end(self) -> Stream:
        """The answer for the last slice, when it is asked for."""
        return (self.push(None) for _ in range(1))


class _Along(_Window):
    """Three slices under one another, each pixel convolved with itself in its neighbours."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__([weight.roll(t + 1, 2) for t in range(3)], bias)

    def empty(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros((3, *x.shape[1:]))

    def place(self) -> torch.Tensor:
        return self.ring[self.t % 3]

    def answer(self) -> torch.Tensor:
        # slices become the rows of one image, pixels its columns: in channels-last order that moves no memory
        _, channels, rows, columns = self.ring.shape
        image = self.ring.permute(0, 2, 3, 1).reshape(1, 3, rows * columns, channels).permute(0, 3, 1, 2)
        out = functional.conv2d(image, self.turned[self.t % 3], self.bias)
        return out.permute(0, 2, 3, 1).reshape(1, rows, columns, -1).permute(0, 3, 1, 2)


class _Around(_Window):
    """The channels of three slices as the channels of one, convolved in the plane."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        # (outputs, inputs, 3, y, x) to (outputs, 3·inputs, y, x)
        super().__init__([weight.roll(t + 1, 2).transpose(1, 2).flatten(1, 2) for t in range(3)], bias)

    def empty(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros((1, 3 * x.shape[1], *x.shape[2:]))

    def place(self) -> torch.Tensor:
        return self.ring[0].chunk(3)[self.t % 3]

    def answer(self) -> torch.Tensor:
        return functional.conv2d(self.ring, self.turned[self.t % 3], self.bias, padding="same")


def residual(stream: Stream, branch: Callable[[Stream], Stream]) -> Stream:
    """``x + branch(x)``, although the branch answers later."""
    held: deque[torch.Tensor] = deque()

    def tap(x: torch.Tensor) -> torch.Tensor:
        held.append(x)
        return x

    def add(answer: torch.Tensor) -> torch.Tensor:
        return answer.add_(held.popleft())

    return map(add, branch(map(tap, stream)))
