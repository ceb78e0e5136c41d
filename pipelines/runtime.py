"""Weights, cards and execution: the only place that knows how a network is run (PyTorch on the CPU, fp32)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import nn

from pipelines.base import Envelope, ModelCard, Progress
from pipelines.scaling import to_hu, to_network
from pipelines.streaming import Stream, slices, strips, triples

Array = NDArray[np.float32]

WEIGHTS = Path(__file__).parent / "weights"
PIXELS_AT_ONCE = 512 * 128
"""Pixels of a strip of a network that streams in depth: bounds the memory that its layers hold."""


class WeightsDamaged(RuntimeError):
    """Weights and card do not belong together."""


def read_card(name: str, folder: Path = WEIGHTS) -> ModelCard:
    """The card of the pipeline `name`; what the card says beyond `ModelCard` is for people."""
    values = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    known: dict[str, Any] = {field.name: values[field.name] for field in fields(ModelCard) if field.name in values}
    for key in ("patch_zyx", "overlap_zyx", "hu_window"):
        known[key] = tuple(known[key])
    envelope: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values["valid_for"].items()}
    return ModelCard(**{**known, "valid_for": Envelope(**envelope)})


def load_network(network: nn.Module, card: ModelCard, folder: Path = WEIGHTS) -> nn.Module:
    """Fill `network` with the weights of `card` and make it ready to run.

    Raises
    ------
    WeightsDamaged
        If the file is not the one that the card was written for.
    """
    path = folder / f"{card.name}.safetensors"
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != card.weights_sha256:
        raise WeightsDamaged(
            f"{path.name} has SHA-256 {digest}, its card says {card.weights_sha256}: install both files again"
        )
    network.load_state_dict({name: tensor.float() for name, tensor in load(content).items()})
    return network.eval().requires_grad_(False)


def run_volume(network: Callable[[Stream], Stream], halo: int, hu: Array, progress: Progress) -> Array:
    """Run a network that streams in depth over a volume.

    Parameters
    ----------
    network
        Stream of one channel in, stream of one channel out, in network units.
    halo
        Rows that a result depends on above and below.
    hu
        (z, y, x), any size.
    progress
        Called after every slice.
    """
    out = np.empty_like(hu)
    height = max(PIXELS_AT_ONCE // hu.shape[2], 1)
    with torch.inference_mode():
        for read, keep, rows in strips(hu.shape[1], height, halo):
            part = to_network(torch.from_numpy(np.ascontiguousarray(hu[:, read])))
            for k, result in enumerate(network(slices(part))):
                out[k, rows] = to_hu(result[0, 0, keep]).numpy()
                progress((rows.start + (rows.stop - rows.start) * (k + 1) / len(hu)) / hu.shape[1])
    return out


def run_triples(network: nn.Module, stride: int, noise_hu: float, hu: Array, progress: Progress) -> Array:
    """Run a network of three slices and a noise map (constant, at the resolution of the network) over a volume.

    Parameters
    ----------
    network
        Takes (batch, 3, y, x) and (batch, 1, y/stride, x/stride), gives (batch, 1, y, x), in network units.
    stride
        Rows and columns are reflected up to a multiple of it and cropped after.
    noise_hu
        Value of the noise map.
    hu
        (z, y, x), any size.
    progress
        Called after every slice.
    """
    out = np.empty_like(hu)
    rows, columns = hu.shape[1:]
    pad = ((0, 0), (0, -rows % stride), (0, -columns % stride))
    with torch.inference_mode():
        volume = to_network(torch.from_numpy(np.pad(hu, pad, mode="symmetric")))
        noise_map = torch.full((1, 1, volume.shape[1] // stride, volume.shape[2] // stride), to_network(noise_hu))
        for k, three in enumerate(triples(volume)):
            result = network(three.contiguous(memory_format=torch.channels_last), noise_map)
            out[k] = to_hu(result[0, 0, :rows, :columns]).numpy()
            progress((k + 1) / len(hu))
    return out
