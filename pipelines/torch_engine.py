"""PyTorch as engine: the reference that the others are compared with, and what a GPU runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import nn

from pipelines.base import ModelCard, WeightsDamaged
from pipelines.runtime import WEIGHTS, read_weights

Array = NDArray[np.float32]


def load_network(network: nn.Module, card: ModelCard, folder: Path = WEIGHTS) -> nn.Module:
    """Fill `network` with the weights of `card` and make it ready to run.

    Raises
    ------
    pipelines.base.WeightsMissing
        If there is no file of weights.
    pipelines.base.WeightsDamaged
        If the file is not the one that the card was written for, or both are those of another network.
    """
    content = read_weights(card, folder)
    try:
        network.load_state_dict({name: tensor.float() for name, tensor in load(content).items()})
    except RuntimeError as error:  # other names or shapes, listed on many lines
        raise WeightsDamaged(
            f"card and weights of {card.name!r} are those of another network: install those of this version"
        ) from error
    return network.eval().requires_grad_(False)


class TorchPlanes:
    """A network of (1, channels, y, x), and a noise map (1, 1, y', x') if it takes one, to (1, 1, y, x)."""

    def __init__(self, network: nn.Module, card: ModelCard, folder: Path) -> None:
        # the quicker order of memory for convolutions in the plane
        flat = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self._network = load_network(flat, card, folder)

    def __call__(self, slices: Array, noise_map: Array | None) -> Array:
        """See `pipelines.runtime.PlaneEngine`."""
        with torch.inference_mode():
            given = [torch.from_numpy(slices)[None].contiguous(memory_format=torch.channels_last)]
            if noise_map is not None:
                given.append(torch.from_numpy(noise_map)[None])
            return np.asarray(self._network(*given)[0, 0].numpy())


class TorchStream:
    """A network with a method ``stream``, see `pipelines.streaming`."""

    def __init__(self, network: nn.Module, card: ModelCard, folder: Path) -> None:
        self._network = load_network(network, card, folder)

    def stream(self, planes: Iterator[Array], shape: tuple[int, int]) -> Iterator[Array]:
        """See `pipelines.runtime.StreamEngine`."""
        given = (torch.from_numpy(plane)[None, None] for plane in planes)
        with torch.inference_mode():
            results = self._network.stream(given)  # type: ignore[operator]  # a method, not a tensor
        while True:
            with torch.inference_mode():  # not across a yield: it would hold for whoever asks, too
                result = next(results, None)
            if result is None:
                return
            yield np.asarray(result[0, 0].numpy())
