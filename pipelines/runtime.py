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

from pipelines.base import Envelope, ModelCard, Progress, WeightsDamaged, WeightsMissing
from pipelines.scaling import to_hu, to_network
from pipelines.streaming import Stream, slices, strips

Array = NDArray[np.float32]

WEIGHTS = Path(__file__).parent / "weights"
PIXELS_AT_ONCE = 512 * 128
"""Pixels of a strip of a network that streams in depth: bounds the memory that its layers hold."""
PLANE_PIXELS_AT_ONCE = 512 * 512
"""Pixels of a strip of a network that makes one slice at a time: the usual slice as a whole."""


def _content(name: str, suffix: str, folder: Path) -> bytes:
    path = folder / f"{name}.{suffix}"
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise WeightsMissing(
            f"there are no weights of {name!r} in {folder.name} ({path.name} is missing): train them "
            "(docs/training.md) and install them by `python -m training export`"
        ) from error


def read_card(name: str, folder: Path = WEIGHTS) -> ModelCard:
    """The card of the pipeline `name`; what the card says beyond `ModelCard` is for people.

    Raises
    ------
    pipelines.base.WeightsMissing
        If there is no card.
    pipelines.base.WeightsDamaged
        If it cannot be read, or lacks something.
    """
    content = _content(name, "json", folder)
    try:
        return _card(json.loads(content))
    except (ValueError, KeyError, TypeError) as error:  # no JSON, or without what a card has
        raise WeightsDamaged(
            f"the card of {name!r} is damaged ({name}.json, {type(error).__name__}: {error}): "
            "install card and weights again"
        ) from error


def _card(values: Any) -> ModelCard:
    known: dict[str, Any] = {field.name: values[field.name] for field in fields(ModelCard) if field.name in values}
    for key in ("patch_zyx", "overlap_zyx", "hu_window"):
        known[key] = tuple(known[key])
    envelope: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values["valid_for"].items()}
    return ModelCard(**{**known, "valid_for": Envelope(**envelope)})


def load_network(network: nn.Module, card: ModelCard, folder: Path = WEIGHTS) -> nn.Module:
    """Fill `network` with the weights of `card` and make it ready to run.

    Raises
    ------
    pipelines.base.WeightsMissing
        If there is no file of weights.
    pipelines.base.WeightsDamaged
        If the file is not the one that the card was written for, or both are those of another network.
    """
    content = _content(card.name, "safetensors", folder)
    digest = hashlib.sha256(content).hexdigest()
    if digest != card.weights_sha256:
        raise WeightsDamaged(
            f"the weights of {card.name!r} are damaged: {card.name}.safetensors has SHA-256 {digest}, its card says "
            f"{card.weights_sha256}; install card and weights again"
        )
    try:
        network.load_state_dict({name: tensor.float() for name, tensor in load(content).items()})
    except RuntimeError as error:  # other names or shapes, listed on many lines
        raise WeightsDamaged(
            f"card and weights of {card.name!r} are those of another network: install those of this version"
        ) from error
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


def run_planes(
    network: Callable[..., torch.Tensor],
    stack: Callable[[torch.Tensor], Stream],
    hu: Array,
    progress: Progress,
    *,
    noise_hu: float | None = None,
    stride: int = 1,
    noise_map_stride: int = 1,
    halo: int | None = None,
) -> Array:
    """Run a network that makes one slice at a time over a volume.

    Parameters
    ----------
    network
        Takes (batch, channels, y, x), and with `noise_hu` a noise map (batch, 1, y/noise_map_stride,
        x/noise_map_stride); gives (batch, 1, y, x). All in network units.
    stack
        What of the volume it is given for each slice: `pipelines.streaming.slices` or `triples`.
    hu
        (z, y, x), any size.
    progress
        Called after every slice.
    noise_hu
        Value of the constant noise map; None: the network takes none.
    stride
        Rows and columns are reflected up to a multiple of it and cropped after.
    noise_map_stride
        Pixels of the image per pixel of the noise map.
    halo
        Rows that a result depends on above and below: large slices are run in strips. None: always as a whole. Only
        for a network of stride 1.
    """
    out = np.empty_like(hu)
    rows, columns = (-(-size // stride) * stride for size in hu.shape[1:])
    pad = ((0, 0), (0, 0), (0, rows - hu.shape[1]), (0, columns - hu.shape[2]))
    height = rows if halo is None else max(PLANE_PIXELS_AT_ONCE // columns, 1)
    with torch.inference_mode():
        for k, seen in enumerate(stack(torch.from_numpy(hu))):
            plane = to_network(torch.from_numpy(np.pad(seen.numpy(), pad, mode="symmetric")))
            for read, keep, where in strips(rows, height, halo or 0):
                given = [plane[:, :, read].contiguous(memory_format=torch.channels_last)]
                if noise_hu is not None:
                    size = (1, 1, given[0].shape[2] // noise_map_stride, columns // noise_map_stride)
                    given.append(torch.full(size, to_network(noise_hu)))
                place = out[k, where]
                place[...] = to_hu(network(*given)[0, 0, keep])[: place.shape[0], : place.shape[1]].numpy()
            progress((k + 1) / len(hu))
    return out
