"""A wider network that computes what a trained one does: where the training of a wide network begins.

Chen T., Goodfellow I., Shlens J., "Net2Net: Accelerating Learning via Knowledge Transfer", ICLR 2016 (Net2WiderNet).
Every feature stands several times in the wide network, and who reads it takes a part from each. The parts are drawn, so
that features that are alike now learn to differ.
"""

from __future__ import annotations

import torch
from torch import nn

SMALLEST_PART = 0.25
"""Of a feature that is there twice, what a reader takes at least from each; halves would keep them alike for ever."""
_SEED = 1
"""Of the parts."""


def widen(narrow: nn.Module, wide: nn.Module) -> None:
    """Fill `wide` so that it computes what `narrow` does, to rounding.

    Parameters
    ----------
    narrow
        Trained; of convolutions that know no groups, of sums, and of functions of single features.
    wide
        The same with twice as many features, and as many inputs and outputs.

    Raises
    ------
    ValueError
        `wide` is not that.
    """
    generator = torch.Generator().manual_seed(_SEED)
    wider = {name: parameter for name, parameter in wide.named_parameters() if parameter.requires_grad}
    weights = dict(narrow.named_parameters())
    if weights.keys() != wider.keys():
        raise ValueError(f"these networks have different layers: {sorted(weights.keys() ^ wider.keys())}")
    with torch.no_grad():
        for name, weight in weights.items():
            outputs = torch.cat([weight] * _times(name, weight, wider[name], 0))
            if weight.ndim > 1 and _times(name, weight, wider[name], 1) == 2:
                part = torch.rand(outputs.shape[:2], generator=generator) * (1 - 2 * SMALLEST_PART) + SMALLEST_PART
                part = part.view(*part.shape, *[1] * (weight.ndim - 2))
                outputs = torch.cat([outputs * part, outputs * (1 - part)], 1)
            wider[name].copy_(outputs)


def _times(name: str, narrow: torch.Tensor, wide: torch.Tensor, axis: int) -> int:
    times, rest = divmod(wide.shape[axis], narrow.shape[axis])
    if rest or times not in (1, 2) or narrow.shape[2:] != wide.shape[2:]:
        raise ValueError(f"{name} is {tuple(wide.shape)}: neither as wide as {tuple(narrow.shape)} nor twice")
    return times
