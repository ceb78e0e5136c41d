"""How many products a network takes: what its time is held against."""

from __future__ import annotations

from importlib.metadata import entry_points

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipelines.base import ENTRY_POINT_GROUP, ModelCard
from pipelines.shipped import Factory

CHANNELS = {"slice": 1, "slab3": 3}
"""Of what a network that makes one slice is given, by `ModelCard.input`."""


def factory(name: str) -> Factory:
    """What makes the pipeline `name` of this project."""
    (point,) = entry_points(group=ENTRY_POINT_GROUP, name=name)
    made: Factory = point.load()
    return made


def products(network: nn.Module, *shapes: tuple[int, ...]) -> int:
    """Multiplications of all convolutions for inputs of `shapes`, those with the zeros around an image with them.

    Nothing is computed: `network` is moved to a device of shapes alone.
    """
    given = [torch.empty(shape, device="meta") for shape in shapes]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.to("meta")(*given)
    return int(counter.get_total_flops()) // 2  # a product and its sum are two


def of_slice(factory: Factory, card: ModelCard, rows: int, columns: int) -> int:
    """Products for one slice of a pipeline, whose stride its size is brought up to."""
    size = tuple(-(-length // factory.stride) * factory.stride for length in (rows, columns))
    if card.input == "volume":  # every slice costs the same, however many there are
        return products(factory.network(), (1, 1, 1, *size))
    shapes = [(1, CHANNELS[card.input], *size)]
    if card.noise_map:
        shapes.append((1, 1, *(length // factory.noise_map_stride for length in size)))
    return products(factory.network(), *shapes)
