"""STResNet: a residual network over whole volumes with spatial and temporal convolutions (`st3d`).

Wei L., Hsu W., "Efficient and Accurate Spatial-Temporal Denoising Network for Low-dose CT Scans", MIDL 2021: an
EDSR-like 3D residual network (no normalisation, long skip) whose 3×3×3 convolutions are a spatial 1×3×3 and then a
temporal 3×1×1 one, after Li et al., "Fast Spatio-Temporal Residual Network for Video Super-Resolution", CVPR 2019. The
paper leaves width and depth open: 32 features × 8 blocks here, and the input is added to the output, so that the
network predicts the noise.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from pipelines import streaming
from pipelines.base import ModelCard, Options, Progress
from pipelines.runtime import load_network, read_card, run_volume
from pipelines.safety import network_input, restrained
from pipelines.streaming import Stream
from pipelines.volume import Volume

FEATURES = 32
BLOCKS = 8


class SpatioTemporalConv(nn.Sequential):
    """1×3×3 then 3×1×1 convolution with nothing between them; zero padding keeps the size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv3d(inputs, outputs, (1, 3, 3), padding=(0, 1, 1)),
            nn.Conv3d(outputs, outputs, (3, 1, 1), padding=(1, 0, 0)),
        )

    def stream(self, stream: Stream) -> Stream:
        """The same over a stream, as two-dimensional convolutions."""
        across, along = (cast(nn.Conv3d, conv) for conv in self)
        plane = across.weight.squeeze(2).contiguous(memory_format=torch.channels_last)
        depth = along.weight.squeeze(-1)
        return streaming.temporal(streaming.spatial(stream, plane, across.bias), depth, along.bias)


class Block(nn.Module):
    """``x + conv(relu(conv(x)))``."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first = SpatioTemporalConv(features, features)
        self.second = SpatioTemporalConv(features, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(functional.relu(self.first(x), inplace=True))
        return x + y

    def stream(self, stream: Stream) -> Stream:
        """The same over a stream."""
        return streaming.residual(stream, lambda x: self.second.stream(streaming.relu(self.first.stream(x))))


class STResNet(nn.Module):
    """Network units in, network units out, (batch, 1, z, y, x); any size."""

    def __init__(self, features: int = FEATURES, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.head = SpatioTemporalConv(1, features)
        self.blocks = nn.ModuleList(Block(features) for _ in range(blocks))
        self.body = SpatioTemporalConv(features, features)
        self.tail = SpatioTemporalConv(features, 1)
        for parameter in self.tail[1].parameters():  # untrained, the network is the identity
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        head = self.head(x)
        y = head
        for block in self.blocks:
            y = block(y)
        noise: torch.Tensor = self.tail(head + self.body(y))
        return x + noise

    def stream(self, stream: Stream) -> Stream:
        """The same over a stream of any number of slices."""

        def deep(x: Stream) -> Stream:
            for block in self.blocks:
                x = cast(Block, block).stream(x)
            return self.body.stream(x)

        return streaming.residual(stream, lambda x: self.tail.stream(streaming.residual(self.head.stream(x), deep)))

    @property
    def halo(self) -> int:
        """Pixels (and slices) that a result depends on in each direction."""
        return 2 * len(self.blocks) + 3


class St3d:
    """The pipeline: `STResNet` with its weights."""

    def __init__(self) -> None:
        self.card: ModelCard = read_card("st3d")
        self._network = cast(STResNet, load_network(STResNet(), self.card))

    def denoise(self, volume: Volume, options: Options, progress: Progress) -> NDArray[np.float32]:
        """Denoised HU, float32, same shape; the network is blind, so ``options.strength`` changes nothing."""
        denoised = run_volume(self._network.stream, self._network.halo, network_input(volume), progress)
        return restrained(volume, denoised, options.blend)


def st3d() -> St3d:
    """Make the pipeline (entry point)."""
    return St3d()
