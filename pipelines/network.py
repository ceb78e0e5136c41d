"""A network as a pipeline: what the card says, run by `pipelines.runtime`, between the rails of `pipelines.safety`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipelines.base import Execution, ModelCard, Options, check_options
from pipelines.body import NOWHERE, Box, box, inside
from pipelines.noise import series_noise_level
from pipelines.runtime import WEIGHTS, choose, plane_engine, read_card, stream_engine
from pipelines.safety import Rail, network_input
from pipelines.scaling import to_hu, to_network
from pipelines.volume import Series

if TYPE_CHECKING:
    from torch import nn

Array = NDArray[np.float32]

log = logging.getLogger(__name__)

PIXELS_AT_ONCE = 512 * 512
"""Pixels of a strip of a network that makes one slice at a time: the usual slice as a whole."""


class NetworkPipeline:
    """The pipeline of a network with its weights and card.

    `ModelCard.input` says what the network is given: ``slice`` one channel, ``slab3`` three neighbouring slices, and
    with `ModelCard.noise_map` a constant noise map, the noise level of the series; ``volume`` runs it as a stream.

    Parameters
    ----------
    name
        Of card and weights.
    network
        Makes it untrained; called only where PyTorch runs it.
    stride
        The network takes rows and columns in multiples of this.
    noise_map_stride
        Pixels of the image per pixel of the noise map.
    execution
        On what, and in which precision.
    folder
        Where card and weights lie.

    Raises
    ------
    pipelines.base.WeightsMissing
        If there is no such card or no weights.
    pipelines.base.WeightsDamaged
        If they do not belong together.
    pipelines.runtime.ExecutionRefused
        If it cannot be run here like that.
    ValueError
        For a card of a ``volume`` with a noise map: nothing runs it.
    """

    def __init__(
        self,
        name: str,
        network: Callable[[], nn.Module],
        *,
        stride: int = 1,
        noise_map_stride: int = 1,
        execution: Execution | None = None,
        folder: Path = WEIGHTS,
    ) -> None:
        card = read_card(name, folder)
        if card.input == "volume" and card.noise_map:
            raise ValueError(
                f"the card of {name!r} says input 'volume' and noise_map true: a network that streams in depth "
                "is given none; correct the card"
            )
        choice = choose(card, execution or Execution())
        log.info("%s runs on %s", name, choice.reason)
        self.card: ModelCard = replace(
            card, precision=choice.precision, backend=choice.backend, floats=choice.floats, reason=choice.reason
        )
        if card.input == "volume":
            self._volumes = stream_engine(card, network, choice, folder)
        else:
            self._planes = plane_engine(card, network, choice, folder)
        self._stride, self._noise_map_stride = stride, noise_map_stride

    def denoise(self, series: Series, options: Options) -> Iterator[Array]:
        """Denoised slices, HU; see `pipelines.base.Pipeline`, and `pipelines.base.Options` for `options`.

        Before the first, all are read once to find the body, whose box has to be one for the whole series.

        Raises
        ------
        pipelines.base.OptionRefused
            For a strength or blend that the network cannot take.
        """
        check_options(self.card, options)
        body = box(series) if options.strength and options.blend else NOWHERE
        if body == NOWHERE:
            return (series.plane(k).hu.copy() for k in range(series.shape[0]))
        return self._denoise(series, options, self._seen(body, series.shape[1:]))

    def _denoise(self, series: Series, options: Options, seen: Box) -> Iterator[Array]:
        part, noise = options.blend * options.strength, None
        if self.card.noise_map:
            part = options.blend
            noise = np.float32(to_network(series_noise_level(series) * options.strength))
        pixel_mm = series.geometry.spacing_mm[1]
        rail = Rail(pixel_mm, part)
        given: deque[Array] = deque()

        def feed() -> Iterator[Array]:
            for k in range(series.shape[0]):
                given.append(network_input(series.plane(k)))
                yield np.ascontiguousarray(to_network(given[-1][seen]))

        if self.card.input == "volume":
            size = (seen[0].stop - seen[0].start, seen[1].stop - seen[1].start)
            results = self._volumes.stream(feed(), size)
        else:
            stacks = (plane[None] for plane in feed()) if self.card.input == "slice" else triples(feed())
            results = (self._run(stack, noise) for stack in stacks)
        for k, result in enumerate(results):
            before = given.popleft()
            after = before.copy()
            after[seen] = to_hu(result)
            yield rail(series.plane(k), before, after, inside(before, pixel_mm))

    def _seen(self, body: Box, size: tuple[int, int]) -> Box:
        """What of each slice the network is given: `body`, and as far around as its results depend on.

        It begins where the network would begin a new step on the whole slice, so that it sees the same.
        """
        halo, stride = self.card.overlap_zyx[1], self._stride
        rows, columns = (
            slice(max(part.start - halo, 0) // stride * stride, min(part.stop + halo, length))
            for part, length in zip(body, size, strict=True)
        )
        return rows, columns

    def _run(self, stack: Array, noise: np.float32 | None) -> Array:
        """One slice (y, x) from its channels (c, y, x): reflected up to the stride, in strips if it is large."""
        size = stack.shape[1:]
        rows, columns = (-(-length // self._stride) * self._stride for length in size)
        padded = np.pad(stack, ((0, 0), (0, rows - size[0]), (0, columns - size[1])), mode="symmetric")
        # a strip may begin on any row, which a network of a stride does not allow
        height = rows if self._stride > 1 else max(PIXELS_AT_ONCE // columns, 1)
        out = np.empty((rows, columns), np.float32)
        for read, keep, where in strips(rows, height, self.card.overlap_zyx[1]):
            part, noise_map = np.ascontiguousarray(padded[:, read]), None
            if noise is not None:
                noise_map = np.full((1, *(length // self._noise_map_stride for length in part.shape[1:])), noise)
            out[where] = self._planes(part, noise_map)[keep]
        return out[: size[0], : size[1]]


def triples(planes: Iterator[Array]) -> Iterator[Array]:
    """Each slice with its two neighbours as three channels; the first and the last are their own neighbours."""
    before = here = next(planes)
    for after in planes:
        yield np.stack([before, here, after])
        before, here = here, after
    yield np.stack([before, here, here])


def strips(rows: int, height: int, halo: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut `rows` into equal strips of at most `height`, with `halo` more on each side.

    Yields
    ------
    tuple of slice
        Rows to read, rows of the result to keep, rows of the volume where they belong.
    """
    count = -(-rows // height)
    edges = [rows * k // count for k in range(count + 1)]
    for top, bottom in pairwise(edges):
        first, last = max(top - halo, 0), min(bottom + halo, rows)
        yield slice(first, last), slice(top - first, bottom - first), slice(top, bottom)
