"""PyTorch as engine: the reference that the others are compared with, and what a GPU runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import nn

from pipelines.base import ModelCard, WeightsDamaged
from pipelines.runtime import WEIGHTS, read_weights

Array = NDArray[np.float32]
Device = Literal["cpu", "cuda"]
Precision = Literal["bf16", "fp16", "fp32"]

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def fastest_of_gpu() -> Literal["bf16", "fp16"] | None:
    """The number format that a GPU here is fastest in; None without a GPU that PyTorch can use."""
    if not torch.cuda.is_available():
        return None
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _convolutions_in(device: Device, precision: Precision) -> torch.autocast:
    """Weights, sums and what leaves the network stay in fp32."""
    return torch.autocast(device, _TYPES[precision], enabled=precision != "fp32")


def _as_promised() -> None:
    """cuDNN by itself may choose another algorithm every time, and replaces fp32 by a format of 10 bits (TF32)."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False


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


class _Torch:
    """A network with its weights on a device.

    `device` is a GPU if there is one (`fastest_of_gpu`); `precision` is fp32 on a CPU.
    """

    def __init__(
        self, network: nn.Module, card: ModelCard, folder: Path, device: Device = "cpu", precision: Precision = "fp32"
    ) -> None:
        _as_promised()
        if card.input != "volume":  # the quicker order of memory for convolutions in the plane
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self._network = load_network(network, card, folder).to(device)
        self._device, self._precision = device, precision


class TorchPlanes(_Torch):
    """A network of (1, channels, y, x), and a noise map (1, 1, y', x') if it takes one, to (1, 1, y, x)."""

    def __call__(self, slices: Array, noise_map: Array | None) -> Array:
        """See `pipelines.runtime.PlaneEngine`."""
        with torch.inference_mode(), _convolutions_in(self._device, self._precision):
            given = [torch.from_numpy(slices)[None].to(self._device, memory_format=torch.channels_last)]
            if noise_map is not None:
                given.append(torch.from_numpy(noise_map)[None].to(self._device))
            return np.asarray(self._network(*given)[0, 0].float().cpu().numpy())


class TorchStream(_Torch):
    """A network with a method ``stream``, see `pipelines.streaming`."""

    def stream(self, planes: Iterator[Array], shape: tuple[int, int]) -> Iterator[Array]:
        """See `pipelines.runtime.StreamEngine`."""
        given = (torch.from_numpy(plane)[None, None].to(self._device) for plane in planes)
        results = self._network.stream(given)  # type: ignore[operator]  # a method, not a tensor
        while True:
            # not across a yield: it would hold for whoever asks, too
            with torch.inference_mode(), _convolutions_in(self._device, self._precision):
                result = next(results, None)
            if result is None:
                return
            yield np.asarray(result[0, 0].float().cpu().numpy())
