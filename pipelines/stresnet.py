"""STResNet: a residual network over whole volumes with spatial and temporal convolutions (`st3d`, `srresnet3d`, and
wider, `st3d-wide` and `srresnet3d-wide`).

Wei L., Hsu W., "Efficient and Accurate Spatial-Temporal Denoising Network for Low-dose CT Scans", MIDL 2021: an
EDSR-like 3D residual network (no normalisation, long skip) whose 3×3×3 convolutions are a spatial 1×3×3 and then a
temporal 3×1×1 one, after Li et al., "Fast Spatio-Temporal Residual Network for Video Super-Resolution", CVPR 2019.
SRResNet3D is the network it is compared with, which keeps the 3×3×3 convolutions.

What the paper leaves open, and what we chose:

- Width and depth: 32 features × 8 blocks. The EDSR baseline has 64 × 16, which takes seven times as long on a CPU; the
  wide ones have 64 × 8.
- Nothing stands between the spatial and the temporal convolution; as many features between them as after them.
- The input is added to the output, so that the network predicts the noise; untrained, it is the identity.
- The paper makes slices of 1 mm from slices of 2 mm. The networks keep the grid: whoever wants that resamples first.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional

from pipelines import streaming
from pipelines.streaming import Stream

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


class VolumetricConv(nn.Conv3d):
    """3×3×3 convolution; zero padding keeps the size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    def stream(self, stream: Stream) -> Stream:
        """The same over a stream, as a two-dimensional convolution of three slices."""
        return streaming.volumetric(stream, self.weight, self.bias)


Conv = SpatioTemporalConv | VolumetricConv


class Block(nn.Module):
    """``x + conv(relu(conv(x)))``."""

    def __init__(self, conv: type[Conv], features: int) -> None:
        super().__init__()
        self.first = conv(features, features)
        self.second = conv(features, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(functional.relu(self.first(x), inplace=True))
        return x + y

    def stream(self, stream: Stream) -> Stream:
        """The same over a stream."""
        return streaming.residual(stream, lambda x: self.second.stream(streaming.relu(self.first.stream(x))))


class ResNet3D(nn.Module):
    """Network units in, network units out, (batch, 1, z, y, x); any size.

    Parameters
    ----------
    conv
        What stands for each three-dimensional convolution.
    features, blocks
        Width and number of the residual blocks.
    """

    def __init__(self, conv: type[Conv], features: int, blocks: int) -> None:
        super().__init__()
        self.head = conv(1, features)
        self.blocks = nn.ModuleList(Block(conv, features) for _ in range(blocks))
        self.body = conv(features, features)
        self.tail = conv(features, 1)
        last = self.tail[1] if isinstance(self.tail, SpatioTemporalConv) else self.tail
        for parameter in last.parameters():  # untrained, the network is the identity
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


class STResNet(ResNet3D):
    """Spatial, then temporal convolutions."""

    def __init__(self, features: int = FEATURES, blocks: int = BLOCKS) -> None:
        super().__init__(SpatioTemporalConv, features, blocks)


class SRResNet3D(ResNet3D):
    """Three-dimensional convolutions: what STResNet is compared with."""

    def __init__(self, features: int = FEATURES, blocks: int = BLOCKS) -> None:
        super().__init__(VolumetricConv, features, blocks)
