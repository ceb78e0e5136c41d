"""Networks that were never trained, on disk as training leaves them, and what their pipelines must make of a volume."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from pipelines.base import Execution, ModelCard
from pipelines.body import inside
from pipelines.runtime import WEIGHTS
from pipelines.safety import Rail, network_input
from pipelines.volume import Volume

FP32 = Execution(device="cpu", precision="fp32")
"""What the definition of a network says, but for rounding."""


def install(
    folder: Path,
    name: str,
    network: nn.Module,
    given: Literal["slice", "slab3", "volume"],
    *,
    noise_map: bool = False,
    halo: int = 0,
) -> None:
    """Write ``NAME.safetensors`` (half precision) and ``NAME.json``; `halo` is the overlap of rows and columns."""
    weights = save({key: tensor.half().contiguous() for key, tensor in network.state_dict().items()})
    card = ModelCard(
        name=name,
        version="1",
        paper="",
        doi="",
        input=given,
        patch_zyx=(1, 64, 64),
        overlap_zyx=(0, halo, halo),
        hu_window=(-1024.0, 4000.0),
        precision="fp32",
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        noise_map=noise_map,
    )
    (folder / f"{name}.safetensors").write_bytes(weights)
    (folder / f"{name}.json").write_text(json.dumps(asdict(card)), encoding="utf-8")


def damaged(name: str, folder: Path) -> None:
    """Copy card and weights of the installed network `name` into `folder`, but for the last bit of the weights."""
    (folder / f"{name}.json").write_bytes((WEIGHTS / f"{name}.json").read_bytes())
    content = bytearray((WEIGHTS / f"{name}.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / f"{name}.safetensors").write_bytes(content)


def reach(network: nn.Module, size: int) -> tuple[int, int]:
    """Rows and columns of the input that the middle pixel of the output depends on: its receptive field.

    The weights are made positive, so that nothing cancels and no ReLU closes; of one channel, `size` × `size` pixels.
    """
    network = network.eval().double()
    for parameter in network.parameters():
        parameter.data.uniform_(0.1, 1.0, generator=torch.Generator().manual_seed(0))
    x = torch.ones(1, 1, size, size, dtype=torch.double, requires_grad=True)
    network(x)[0, 0, size // 2, size // 2].backward()
    assert x.grad is not None
    rows, columns = (x.grad[0, 0].abs().sum(axis).nonzero().flatten() for axis in (1, 0))
    assert rows[0] > 0, "the receptive field is larger than the image"
    return int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1


def through_rails(volume: Volume, denoised: NDArray[np.float32]) -> NDArray[np.float32]:
    """What must leave a pipeline whose network makes `denoised`, (z, y, x) HU, of its input."""
    pixel_mm = volume.geometry.spacing_mm[1]
    rail, given = Rail(pixel_mm, 1.0), network_input(volume)
    return np.stack([rail(volume.plane(k), given[k], hu, inside(given[k], pixel_mm)) for k, hu in enumerate(denoised)])
