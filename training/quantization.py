"""A network in 8 bits, to be calibrated, judged and fine-tuned in PyTorch before a node runs it by OpenVINO.

Jacob B. et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR
2018: the input of each convolution and its weights lie on grids of 8 bits, products are summed exactly, everything
between two convolutions (additions of skips, activations, concatenations) stays in float. Gradients pass the rounding
as if it were not there (the straight-through estimator). Weights have one step for each output, both signs alike;
activations have one step, and either both signs or none below zero. Zero is a code of every grid, so that the zeros
around an image stay zeros. The grids are those of `pipelines.openvino_segments`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torch.nn.utils import fuse_conv_bn_eval

from pipelines.openvino_segments import LARGEST_WEIGHT, LEVELS, SIGNED_ZERO
from training.data import Batch
from training.loop import Predict

BINS = 4096
"""Of the histogram of magnitudes that a range is chosen by: 16 or more for each code."""
CANDIDATES = np.geomspace(1, 0.2, 33)
"""Ranges that are tried, in parts of the largest magnitude."""
HEADROOM = 1.25
"""A range in units of the best one: images are noisier than any that taught. What exceeds a range is cut off, which
costs far more than a coarser grid: in a chest of a sharp kernel at a tenth of the dose 15.9 HU rms instead of 5.0 with
`fast-2.5d`, while the validated loss rises from 0.06 to 0.09 dB."""
_SMALLEST = 1e-6
"""Largest magnitude of a tensor of zeros: a step of 0 has no codes."""

Convolution = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d


@dataclass(frozen=True, slots=True)
class Range:
    """What the codes of an activation reach.

    largest
        Magnitude of the largest code that both signs have.
    signed
        Both signs, or none below zero.
    """

    largest: float
    signed: bool

    @property
    def codes(self) -> tuple[int, int]:
        """The lowest and the highest; zero is 0."""
        zero = SIGNED_ZERO if self.signed else 0
        return -zero, LEVELS - 1 - zero

    @property
    def step(self) -> float:
        """Between two codes."""
        return self.largest / self.codes[1]


class QuantisedConvolution(nn.Module):
    """A convolution whose input and weights are rounded to 8 bits; without a `range` it is what it was.

    A transposed convolution becomes the convolution that it is, to the last product: one whose stride is its size makes
    each of its pixels from one pixel (a 1×1 convolution, then pixel shuffle), one of stride 1 has turned weights.
    OpenVINO has no 8-bit kernels for transposed ones.

    Parameters
    ----------
    convolution
        What stands here; its weights are taken over under their names where it is no transposed one.

    Raises
    ------
    ValueError
        For a transposed convolution that is none of the two.
    """

    _zeros: torch.Tensor

    def __init__(self, convolution: Convolution) -> None:
        super().__init__()
        weight, bias = convolution.weight, convolution.bias
        self.stride, self.padding = convolution.stride, convolution.padding
        self.dilation, self.groups = convolution.dilation, convolution.groups
        self.shuffle = 1
        if isinstance(convolution, nn.ConvTranspose2d):
            weight, bias = self._turned(convolution)
        self.weight = nn.Parameter(weight.detach(), convolution.weight.requires_grad)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), convolution.weight.requires_grad)
        self.register_buffer("_zeros", torch.zeros(len(weight), dtype=torch.int32), persistent=False)
        self.range: Range | None = None

    def _turned(self, convolution: nn.ConvTranspose2d) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = convolution.weight, convolution.bias
        size = cast(tuple[int, int], convolution.kernel_size)
        plain = convolution.groups == 1 and not any(convolution.output_padding)
        if plain and convolution.stride == size and convolution.padding == (0, 0) and size[0] == size[1]:
            self.shuffle, self.stride = size[0], (1, 1)
            turned = weight.flatten(1).t()[:, :, None, None]
            return turned, None if bias is None else bias.repeat_interleave(size[0] ** 2)
        if plain and convolution.stride == (1, 1) and convolution.dilation == (1, 1):
            padding = cast(tuple[int, int], convolution.padding)
            self.padding = tuple(length - 1 - pad for length, pad in zip(size, padding, strict=True))
            return weight.flip(2, 3).transpose(0, 1), bias
        raise ValueError(
            f"{convolution} is no convolution in disguise (stride 1, or stride and size equal without padding): teach "
            "training.quantization how it is one"
        )

    def get_extra_state(self) -> dict[str, Any]:
        """The range, so that a checkpoint holds it."""
        return {} if self.range is None else {"largest": self.range.largest, "signed": self.range.signed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """See `get_extra_state`."""
        self.range = Range(**state) if state else None

    def _convolve(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        convolve = functional.conv3d if weight.ndim == 5 else functional.conv2d
        return convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        reach = self.range
        y = self._convolve(x, self.weight, self.bias) if reach is None else self._in_8_bits(x.float(), reach)
        return y if self.shuffle == 1 else functional.pixel_shuffle(y, self.shuffle)

    def _rounded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights on their grid, and its step for each output."""
        scale = self.weight.detach().abs().flatten(1).amax(1).clamp(min=_SMALLEST) / LARGEST_WEIGHT
        weight = torch.fake_quantize_per_channel_affine(
            self.weight, scale, self._zeros, 0, -LARGEST_WEIGHT, LARGEST_WEIGHT
        )
        return weight, scale

    def round_weights(self) -> None:
        """Put the weights on their grid for good: one halfway between two codes is rounded here, and nowhere else."""
        if self.range is not None:
            self.weight.data = self._rounded()[0].detach()

    def _in_8_bits(self, x: torch.Tensor, reach: Range) -> torch.Tensor:
        weight, scale = self._rounded()
        x = torch.fake_quantize_per_tensor_affine(x, reach.step, 0, *reach.codes)
        if not torch.is_autocast_enabled(x.device.type):
            return self._convolve(x, weight, self.bias)
        # bfloat16 has 8 bits for the digits: it holds every code, but not every value
        of_outputs = [-1, *[1] * (weight.ndim - 1)]
        y = self._convolve(x / reach.step, weight / scale.view(of_outputs), None)
        y = y * (scale * reach.step).view(of_outputs[:-1])
        return y if self.bias is None else y + self.bias.view(of_outputs[:-1])


def convolutions(network: nn.Module) -> dict[str, QuantisedConvolution]:
    """Those that can be quantised, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantisedConvolution)}


def quantisable(network: nn.Module, predict: Predict, batch: Batch) -> nn.Module:
    """A copy of `network` whose convolutions are `QuantisedConvolution`, none of them quantised yet.

    A normalisation right behind a convolution is multiplied into its weights, as it is for inference. What makes no
    use of its convolution but of the weights alone stays as it is: it is not called, and what it gets is not seen.

    Parameters
    ----------
    network
        Trained; for inference.
    predict, batch
        Of its recipe, and of its size: the network is run on it once, to see what is called.
    """
    made = copy.deepcopy(network).eval()
    called: set[nn.Module] = set()
    hooks = [
        module.register_forward_pre_hook(lambda one, _: called.add(one))
        for module in made.modules()
        if isinstance(module, Convolution)
    ]
    with torch.inference_mode():
        predict(made, batch)
    for hook in hooks:
        hook.remove()
    for chain in [module for module in made.modules() if isinstance(module, nn.Sequential)]:
        for k, (first, second) in enumerate(pairwise(chain)):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d) and first in called:
                called.add(fused := fuse_conv_bn_eval(first, second))
                chain[k], chain[k + 1] = fused, nn.Identity()
    for name, module in list(made.named_modules()):
        if isinstance(module, Convolution) and module in called:
            made.set_submodule(name, QuantisedConvolution(module))
    return made


def _watch(
    network: nn.Module,
    predict: Predict,
    batches: Sequence[Batch],
    see: Callable[[str, QuantisedConvolution, torch.Tensor, torch.Tensor], None],
) -> None:
    """Run `network` on `batches` and call `see` with each convolution, its input and its output."""

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def seen(module: nn.Module, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
            see(name, cast(QuantisedConvolution, module), given[0], result)

        return seen

    hooks = [module.register_forward_hook(hook(name)) for name, module in convolutions(network).items()]
    with torch.inference_mode():
        for batch in batches:
            predict(network, batch)
    for one in hooks:
        one.remove()


def multiplications(network: nn.Module, predict: Predict, batch: Batch) -> dict[str, float]:
    """The part of each convolution in the products of all of them."""
    counts: dict[str, int] = {}

    def see(name: str, module: QuantisedConvolution, given: torch.Tensor, result: torch.Tensor) -> None:
        counts[name] = counts.get(name, 0) + result.numel() * module.weight[0].numel()

    _watch(network, predict, [batch], see)
    return {name: count / sum(counts.values()) for name, count in counts.items()}


def calibrate(network: nn.Module, predict: Predict, batches: Sequence[Batch]) -> dict[str, Range]:
    """The range of the input of each convolution that rounds it with the least squared error, and `HEADROOM`.

    Parameters
    ----------
    network
        From `quantisable`, nothing in it quantised.
    predict, batches
        Of its recipe; typical images.
    """
    lowest: dict[str, float] = {}
    highest: dict[str, float] = {}

    def see_ends(name: str, _: QuantisedConvolution, given: torch.Tensor, result: torch.Tensor) -> None:
        low, high = (float(end) for end in torch.aminmax(given))
        lowest[name], highest[name] = min(low, lowest.get(name, low)), max(high, highest.get(name, high))

    _watch(network, predict, batches, see_ends)
    largest = {name: max(highest[name], -lowest[name], _SMALLEST) for name in highest}
    counts = {name: np.zeros(BINS) for name in largest}

    def see_magnitudes(name: str, _: QuantisedConvolution, given: torch.Tensor, result: torch.Tensor) -> None:
        counts[name] += torch.histc(given.float().abs(), BINS, 0, largest[name]).numpy()

    _watch(network, predict, batches, see_magnitudes)
    best = {name: _best(counts[name], largest[name], signed=lowest[name] < 0) for name in largest}
    return {name: replace(reach, largest=HEADROOM * reach.largest) for name, reach in best.items()}


def _best(counts: NDArray[np.float64], largest: float, *, signed: bool) -> Range:
    """The range with the least squared error for magnitudes up to `largest` with this histogram."""
    magnitudes = (np.arange(len(counts)) + 0.5) / len(counts) * largest

    def error(reach: Range) -> float:
        codes = np.minimum(np.rint(magnitudes / reach.step), reach.codes[1])
        return float(counts @ (codes * reach.step - magnitudes) ** 2)

    return min((Range(float(part * largest), signed) for part in CANDIDATES), key=error)


def quantise(network: nn.Module, ranges: Mapping[str, Range]) -> None:
    """Quantise the convolutions in `ranges`, and no others."""
    for name, module in convolutions(network).items():
        module.range = ranges.get(name)
