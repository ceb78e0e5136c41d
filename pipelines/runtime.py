"""Weights and cards of the networks that ship, and what computes them: the only place that knows how a network is run.

An engine takes and gives numpy arrays in network units (`pipelines.scaling`). Nothing here imports PyTorch unless it is
the engine that was chosen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.base import Envelope, Execution, ModelCard, WeightsDamaged, WeightsMissing

if TYPE_CHECKING:
    from torch import nn

Array = NDArray[np.float32]

WEIGHTS = Path(__file__).parent / "weights"


class PlaneEngine(Protocol):
    """Runs a network that makes one slice at a time."""

    def __call__(self, slices: Array, noise_map: Array | None) -> Array:
        """Denoise one slice.

        Parameters
        ----------
        slices
            (channels, y, x).
        noise_map
            (1, y', x') for a network that takes one.

        Returns
        -------
        ndarray
            (y, x).
        """
        ...


class StreamEngine(Protocol):
    """Runs a network for whole volumes, slice after slice, every slice computed once."""

    def stream(self, planes: Iterator[Array], shape: tuple[int, int]) -> Iterator[Array]:
        """Denoise `planes`, (y, x) of `shape` each; a slice comes as soon as its neighbourhood is there."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """What computes a network here, and why that."""

    backend: Literal["openvino", "torch"]
    precision: Literal["int8", "bf16", "fp32"]
    reason: str


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


def read_weights(card: ModelCard, folder: Path = WEIGHTS) -> bytes:
    """The content of the safetensors file of `card`.

    Raises
    ------
    pipelines.base.WeightsMissing
        If there is none.
    pipelines.base.WeightsDamaged
        If the file is not the one that the card was written for.
    """
    content = _content(card.name, "safetensors", folder)
    digest = hashlib.sha256(content).hexdigest()
    if digest != card.weights_sha256:
        raise WeightsDamaged(
            f"the weights of {card.name!r} are damaged: {card.name}.safetensors has SHA-256 {digest}, its card says "
            f"{card.weights_sha256}; install card and weights again"
        )
    return content


def choose(card: ModelCard, execution: Execution, folder: Path) -> Choice:
    """What computes the network of `card` here."""
    return Choice("torch", "fp32", "the only one")


def plane_engine(card: ModelCard, network: Callable[[], nn.Module], choice: Choice, folder: Path) -> PlaneEngine:
    """The engine of a network that makes one slice at a time; `network` makes it untrained, for PyTorch."""
    from pipelines.torch_engine import TorchPlanes

    return TorchPlanes(network(), card, folder)


def stream_engine(card: ModelCard, network: Callable[[], nn.Module], choice: Choice, folder: Path) -> StreamEngine:
    """The engine of a network for whole volumes."""
    from pipelines.torch_engine import TorchStream

    return TorchStream(network(), card, folder)
