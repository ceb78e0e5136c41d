"""LPIPS: perceptual distance by AlexNet features, for those who have its weights; nothing is downloaded.

Zhang R. et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018, eq. 1, version 0.1
of the published linear heads. The STResNet paper reports it and states neither window nor network; AlexNet is the
reference's default. It was fitted to what people see in photographs: on CT it ranks textures, it diagnoses nothing.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from training.features import WeightsMissing, read_torch_weights
from training.metrics import Window

Array = NDArray[np.floating]

BACKBONE_FILE = "alexnet-owt-7be5be79.pth"
"""Torchvision's state dict of AlexNet, under the name it is published by."""
HEADS_FILE = "alex.pth"
"""The linear heads, ``weights/v0.1/alex.pth`` of the lpips package."""
SMALLEST_PX = 31
"""Below, nothing is left for the third convolution."""

_TAPS = (1, 4, 7, 9, 11)
"""Index of the activation after each convolution in torchvision's ``features``."""
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
"""ImageNet statistics on [−1, 1], as the reference rounds them."""
_EPSILON = 1e-10


class Lpips(nn.Module):
    """``Σ_l 1/(H W) Σ_hw w_l · (φ̂_l(x) − φ̂_l(y))²``, φ̂ of unit length over the channels.

    Parameters
    ----------
    weights
        Folder with `BACKBONE_FILE` and `HEADS_FILE`.

    Attributes
    ----------
    sha256
        Of both files, in this order; they belong beside every number.

    Raises
    ------
    WeightsMissing
        If a file is not there.
    ValueError
        If a file holds something else.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weights: Path) -> None:
        super().__init__()
        for name in (BACKBONE_FILE, HEADS_FILE):
            if not (weights / name).is_file():
                raise WeightsMissing(
                    f"no {name} in {weights}: LPIPS needs torchvision's AlexNet ({BACKBONE_FILE}) and the linear heads "
                    f"of the lpips package (weights/v0.1/{HEADS_FILE}) in one folder; nothing is downloaded. The other "
                    "metrics need no file"
                )
        self.stack = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, 1, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, 1, 1),
            nn.ReLU(),
        )
        backbone, first = read_torch_weights(weights / BACKBONE_FILE)
        heads, second = read_torch_weights(weights / HEADS_FILE)
        self.sha256 = (first, second)
        try:
            self.stack.load_state_dict({name: backbone[f"features.{name}"] for name in self.stack.state_dict()})
            # a convolution of 1×1 to one channel, without bias; (1, channels, 1, 1)
            self.heads = [heads[f"lin{level}.model.1.weight"].float() for level in range(len(_TAPS))]
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"{BACKBONE_FILE} or {HEADS_FILE} in {weights} is not what its name says: get both again"
            ) from error
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def _features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Features of unit length of (n, 3, y, x) on [−1, 1]."""
        x = (images - self.shift) / self.scale
        found = []
        for i, layer in enumerate(self.stack):
            x = layer(x)
            if i in _TAPS:
                found.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON))
        return found

    def forward(self, image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Distance of each pair (n,) of images (n, 3, y, x) on [−1, 1]."""
        distance = torch.zeros(len(image))
        for head, a, b in zip(self.heads, self._features(image), self._features(truth), strict=True):
            distance = distance + ((a - b).square() * head).sum(dim=1).mean(dim=(1, 2))
        return distance


@lru_cache(maxsize=1)
def _network(weights: Path) -> Lpips:
    """One network serves all images of a report: its file has 240 MB."""
    return Lpips(weights)


def digests(weights: Path) -> dict[str, str]:
    """SHA-256 of both files by name; raises as `Lpips`."""
    return dict(zip((BACKBONE_FILE, HEADS_FILE), _network(weights).sha256, strict=True))


def lpips(image: Array, truth: Array, window: Window, weights: Path) -> float:
    """LPIPS of an image against the truth, 0 for equal ones; the mean over axial slices.

    The window becomes [−1, 1], clipped, three equal channels.

    Parameters
    ----------
    image, truth
        HU, (y, x) or (z, y, x), equal shapes, slices of at least 31 × 31.
    window
        Where it is measured; [−1000, 400] HU for the chest. Print it with the number.
    weights
        Folder, see `Lpips`.

    Raises
    ------
    WeightsMissing
        If a file of weights is not there; its text says which.
    ValueError
        If shapes differ or do not fit, a value is not finite, or a file is not what its name says.
    """
    if image.shape != truth.shape or image.ndim not in (2, 3) or image.size == 0:
        raise ValueError(f"image of shape {image.shape} and truth of shape {truth.shape}: LPIPS needs two equal images")
    if min(image.shape[-2:]) < SMALLEST_PX:
        raise ValueError(f"slices of {image.shape[-2:]}: LPIPS needs at least {SMALLEST_PX} × {SMALLEST_PX} pixels")
    network = _network(weights)
    slices = [window.normalise(values).reshape(-1, *values.shape[-2:]) for values in (image, truth)]
    distances = []
    with torch.inference_mode():
        for pair in zip(*slices, strict=True):
            a, b = (torch.from_numpy(2 * plane - 1).float().expand(1, 3, *plane.shape) for plane in pair)
            distances.append(float(network(a, b)))
    return float(np.mean(distances))
