"""A network as a pipeline: what the card says, run by `pipelines.runtime`, between the rails of `pipelines.safety`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipelines.base import ModelCard, Options, Progress, check_options
from pipelines.noise import noise_level
from pipelines.runtime import WEIGHTS, load_network, read_card, run_planes, run_volume
from pipelines.safety import network_input, restrained
from pipelines.streaming import Stream, slices, triples
from pipelines.volume import Volume


class Streamed(Protocol):
    """What a network for whole volumes (``input="volume"``) must have."""

    @property
    def halo(self) -> int:
        """Pixels that a result depends on in each direction."""
        ...

    def stream(self, stream: Stream) -> Stream:
        """Stream of one channel in, stream of one channel out."""
        ...


class NetworkPipeline:
    """The pipeline of a network with its weights and card.

    `ModelCard.input` says what the network is given: ``slice`` one channel, ``slab3`` three neighbouring slices, and
    with `ModelCard.noise_map` a constant noise map, the noise level of the series; ``volume`` runs it as a stream.

    Parameters
    ----------
    name
        Of card and weights.
    network
        Untrained.
    stride
        The network takes rows and columns in multiples of this.
    noise_map_stride
        Pixels of the image per pixel of the noise map.
    halo
        Pixels that a result depends on in each direction; large slices are then run in strips. None: a slice is run as
        a whole, however large. Only for a network of stride 1.
    folder
        Where card and weights lie.

    Raises
    ------
    pipelines.base.WeightsMissing
        If there is no such card or no weights.
    pipelines.base.WeightsDamaged
        If they do not belong together.
    ValueError
        For a card of a ``volume`` with a noise map, and for a `halo` with a `stride` above 1: nothing runs them.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        stride: int = 1,
        noise_map_stride: int = 1,
        halo: int | None = None,
        folder: Path = WEIGHTS,
    ) -> None:
        self.card: ModelCard = read_card(name, folder)
        if self.card.input == "volume" and self.card.noise_map:
            raise ValueError(
                f"the card of {name!r} says input 'volume' and noise_map true: a network that streams in depth "
                "is given none; correct the card"
            )
        if halo is not None and stride > 1:
            raise ValueError(
                f"{name!r} has halo {halo} and stride {stride}: a strip may begin on any row, so a network of stride "
                "above 1 is run on whole slices; leave the halo out"
            )
        if self.card.input != "volume":  # the quicker order of memory for convolutions in the plane
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self._network = load_network(network, self.card, folder)
        self._stride, self._noise_map_stride, self._halo = stride, noise_map_stride, halo

    def denoise(self, volume: Volume, options: Options, progress: Progress) -> NDArray[np.float32]:
        """Denoised HU, float32, same shape; see `pipelines.base.Options` for `options`.

        Raises
        ------
        pipelines.base.OptionRefused
            For a strength or blend that the network cannot take.
        """
        check_options(self.card, options)
        if options.strength == 0:
            progress(1.0)
            return volume.hu.copy()
        hu = network_input(volume)
        part, noise_hu = options.blend * options.strength, None
        if self.card.noise_map:
            part = options.blend
            noise_hu = noise_level(hu, volume.padding, volume.geometry.spacing_mm[1]) * options.strength
        if self.card.input == "volume":
            network = cast(Streamed, self._network)
            denoised = run_volume(network.stream, network.halo, hu, progress)
        else:
            denoised = run_planes(
                self._network,
                slices if self.card.input == "slice" else triples,
                hu,
                progress,
                noise_hu=noise_hu,
                stride=self._stride,
                noise_map_stride=self._noise_map_stride,
                halo=self._halo,
            )
        return restrained(volume, denoised, part)
