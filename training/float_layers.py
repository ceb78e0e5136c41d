"""Which convolutions of a quantised network stay in float: those that cost the image more than the processor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipelines.scaling import to_hu
from training.data import Batch
from training.loop import Predict
from training.metrics import LUNG, SOFT_TISSUE, psnr
from training.quantization import Range, convolutions, quantise

WINDOWS = (SOFT_TISSUE, LUNG)
FLOAT_PART = 0.08
"""Of all products, at most so many in float, in which a product takes two (bf16) or four times (fp32) as long."""
PAYS = 4.0
"""A convolution stays in float for nothing but its error if its part of all squared error is so many times its part of
the products."""
GROUP = 16
"""Patches that have one PSNR together: of different dose and content, as a series shows them."""
MARGIN = 0.5
"""Part of the allowed loss that is aimed at: other images may lose more."""

Array = NDArray[np.float32]


class Comparison:
    """What a network loses against the one that it was made of, on fixed batches.

    Parameters
    ----------
    network
        The one in float.
    predict, batches
        Of its recipe; what both are run on.
    """

    def __init__(self, network: nn.Module, predict: Predict, batches: Sequence[Batch]) -> None:
        self._predict, self._batches = predict, batches
        self._before = self._results(network)

    def _results(self, network: nn.Module) -> list[tuple[Array, Array]]:
        """Images and truths of each group of patches, HU."""
        device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
        results = []
        with torch.inference_mode():
            for batch in self._batches:
                image, truth = self._predict(network, Batch(*(tensor.to(device) for tensor in batch)))
                results.append((to_hu(image.float()).cpu().numpy(), to_hu(truth.float()).cpu().numpy()))
        images, truths = (np.concatenate(arrays) for arrays in zip(*results, strict=True))
        return [(images[k : k + GROUP], truths[k : k + GROUP]) for k in range(0, len(images), GROUP)]

    def of(self, network: nn.Module) -> Loss:
        """Compare `network`."""
        after = self._results(network)
        decibels: dict[str, tuple[float, float]] = {}
        for window in WINDOWS:
            values = [[psnr(*pair, window) for pair in results] for results in (self._before, after)]
            decibels[str(window)] = (float(np.mean(values[0])), float(np.mean(values[1])))
        images = zip(self._before, after, strict=True)
        squares = [np.square(one - other, dtype=np.float64).mean() for (one, _), (other, _) in images]
        return Loss(decibels, math.sqrt(float(np.mean(squares))))


@dataclass(frozen=True, slots=True)
class Loss:
    """What a network loses in 8 bits.

    psnr_db
        By window: in float, and in 8 bits.
    rms_hu
        Of the difference between the two.
    """

    psnr_db: Mapping[str, tuple[float, float]]
    rms_hu: float

    @property
    def loss_db(self) -> dict[str, float]:
        """By window."""
        return {window: before - after for window, (before, after) in self.psnr_db.items()}

    @property
    def worst_db(self) -> float:
        """In the window that loses most."""
        return max(self.loss_db.values())

    def __str__(self) -> str:
        windows = ", ".join(f"{loss:.3f} dB ({window})" for window, loss in self.loss_db.items())
        return f"{self.rms_hu:.2f} HU rms, loses {windows}"


def one_channel(network: nn.Module) -> set[str]:
    """Convolutions with a single channel on one side: 8 bits make those no faster."""
    return {name for name, one in convolutions(network).items() if 1 in one.weight.shape[:2]}


def choose(
    network: nn.Module,
    ranges: Mapping[str, Range],
    parts: Mapping[str, float],
    comparison: Comparison,
    max_loss_db: float,
) -> dict[str, Range]:
    """Ranges of the convolutions that are worth quantising; the table of how each counts is printed.

    Each is quantised alone to see its error. Then those whose squared error is largest for their products are left in
    float, one after the other: as long as the loss is too large, or the next is worth it anyhow (`PAYS`), and up to
    `FLOAT_PART` of all products.

    Parameters
    ----------
    network
        From `training.quantization.quantisable`; quantised as chosen when this returns.
    ranges, parts
        From `training.quantization.calibrate` and ``multiplications``.
    comparison
        On images that belong to the training.
    max_loss_db
        Allowed.
    """
    chosen = {name: reach for name, reach in ranges.items() if name not in one_channel(network)}
    squared: dict[str, float] = {}
    for name, reach in chosen.items():
        quantise(network, {name: reach})
        loss = comparison.of(network)
        squared[name] = loss.rms_hu**2
        print(f"  {name}: {100 * parts[name]:.1f} % of the products, alone {loss}", flush=True)
    whole = sum(squared.values())
    in_float = sum(part for name, part in parts.items() if name not in chosen)
    quantise(network, chosen)
    loss = comparison.of(network)
    print(f"  all of them: {loss}", flush=True)
    for name in sorted(squared, key=lambda name: squared[name] / parts[name], reverse=True):
        if loss.worst_db <= MARGIN * max_loss_db and squared[name] < PAYS * parts[name] * whole:
            break
        if in_float + parts[name] > FLOAT_PART:
            continue
        in_float += parts[name]
        del chosen[name]
        quantise(network, chosen)
        loss = comparison.of(network)
        print(f"  without {name}: {loss}", flush=True)
    return chosen
