"""How a volume passes through a network: slab after slab in depth, strip after strip in the plane.

A stream is an iterator of slabs, tensors of (slices, channels, rows, columns) in channels-last order. A network is a
chain of generators over streams. A temporal convolution holds the last two slices that it saw, a residual holds what
its branch has not answered yet; so every slice is computed once, memory does not grow with the number of slices, and
the result is that of the whole volume at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

Stream = Iterator[torch.Tensor]


def slabs(volume: torch.Tensor, slices: int) -> Stream:
    """A volume (z, y, x) as a stream of one channel, `slices` at a time."""
    for first in range(0, len(volume), slices):
        yield volume[first : first + slices, None]


def triples(volume: torch.Tensor, slices: int) -> Stream:
    """Each slice with its two neighbours as three channels, `slices` at a time; the first and last are their own."""
    last = len(volume) - 1
    for first in range(0, last + 1, slices):
        centre = torch.arange(first, min(first + slices, last + 1))
        yield torch.stack([volume[(centre + step).clamp(0, last)] for step in (-1, 0, 1)], 1)


def spatial(stream: Stream, weight: torch.Tensor, bias: torch.Tensor | None) -> Stream:
    """Convolve each slice, (outputs, inputs, odd, odd) weights, zeros around it."""
    for slab in stream:
        yield functional.conv2d(slab, weight, bias, padding="same")


def temporal(stream: Stream, weight: torch.Tensor, bias: torch.Tensor | None) -> Stream:
    """Convolve three slices into each, (outputs, inputs, 3, 1) weights; a slice of zeros at both ends of the volume."""
    held: torch.Tensor | None = None
    for slab in stream:
        held = torch.cat([torch.zeros_like(slab[:1]) if held is None else held, slab])
        if len(held) > 2:
            yield _across_slices(held, weight, bias)
            held = held[-2:].clone()  # a view would keep the whole slab
    if held is not None:
        yield _across_slices(torch.cat([held, torch.zeros_like(held[:1])]), weight, bias)


def _across_slices(window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Slices become the rows of one image, pixels its columns: in channels-last order that moves no memory."""
    slices, channels, rows, columns = window.shape
    image = window.permute(0, 2, 3, 1).reshape(1, slices, rows * columns, channels).permute(0, 3, 1, 2)
    out = functional.conv2d(image, weight, bias)
    return out.permute(0, 2, 3, 1).reshape(slices - 2, rows, columns, -1).permute(0, 3, 1, 2)


def relu(stream: Stream) -> Stream:
    """Negative values become zero, in place."""
    for slab in stream:
        yield functional.relu(slab, inplace=True)


def residual(stream: Stream, branch: Callable[[Stream], Stream]) -> Stream:
    """``x + branch(x)``, although the branch answers later."""
    held: deque[torch.Tensor] = deque()

    def tapped() -> Stream:
        for slab in stream:
            held.append(slab)
            yield slab

    for answer in branch(tapped()):
        done = 0
        while done < len(answer):
            part = held.popleft()
            fits = len(answer) - done
            if len(part) > fits:
                held.appendleft(part[fits:])
                part = part[:fits]
            answer[done : done + len(part)] += part
            done += len(part)
        yield answer


def strips(rows: int, height: int, halo: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut `rows` into strips of `height` with `halo` more on each side.

    Yields
    ------
    tuple of slice
        Rows to read, rows of the result to keep, rows of the volume where they belong.
    """
    for top in range(0, rows, height):
        bottom = min(top + height, rows)
        first, last = max(top - halo, 0), min(bottom + halo, rows)
        yield slice(first, last), slice(top - first, bottom - first), slice(top, bottom)
