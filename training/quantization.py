"""A network in 8 bits, to be calibrated, judged and fine-tuned in PyTorch before a node runs it by OpenVINO.

Jacob B. et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR
2018: the input of each convolution and its weights lie on grids of 8 bits, products are summed exactly, everything
between two convolutions (additions of skips, activations, concatenations) stays in float. Gradients pass the rounding
as if it were not there (the straight-through estimator). Weights have one step for each output, both signs alike;
activations have one step and as many codes below zero as they need. Zero is a code of every grid, so that the zeros
around an image stay zeros. Volumes have the grids of `pipelines.openvino_segments`: both signs alike, or none below.

Channels of one activation differ in size, and one step for all is too coarse for the small ones. So each channel may be
divided by a number that its weights are multiplied with, which shares the trouble between both (Nagel M. et al.,
"Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019; Xiao G. et al., "SmoothQuant",
ICML 2023, equation 4): see `BALANCES`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torch.nn.utils import fuse_conv_bn_eval

from pipelines.openvino_segments import LARGEST_WEIGHT, LEVELS, SIGNED_ZERO, Reach, parts
from training.data import Batch
from training.loop import Predict

BINS = 4096
"""Of the histogram that a range is chosen by: 16 for each code."""
CANDIDATES = np.geomspace(1, 0.2, 33)
"""Ranges that are tried, in parts of what occurs."""
HEADROOM = 1.25
"""A range in units of the best one: images are noisier than any that taught. What exceeds a range is cut off, which
costs far more than a coarser grid: in a chest of a sharp kernel at a tenth of the dose 15.9 HU rms instead of 5.0 with
`fast-2.5d`, while the validated loss rises from 0.06 to 0.09 dB."""
BALANCES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Powers of the largest magnitude of a channel that it is divided by: not at all, up to all channels alike."""
LEAST_PART = 1 / 32
"""Of the largest channel, that each has at least: one that is nearly nothing while the ranges are found may be more."""
DIGITS = 4
"""Of what a channel is divided by."""
_SMALLEST = 1e-6
"""Of a step: one of 0, as of a tensor of zeros, has no codes."""

Convolution = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d


@dataclass(frozen=True, slots=True)
class Range:
    """The codes of an activation.

    step
        Between two codes, of the channel with the largest.
    zero
        Codes below that of 0.
    parts
        Of the step that each channel has; empty: all have it.
    """

    step: float
    zero: int
    parts: tuple[float, ...] = ()

    @classmethod
    def of(cls, reach: Reach, *, signed: bool) -> Range:
        """From the largest magnitude, or that of each channel, as in a file of ranges."""
        zero = SIGNED_ZERO if signed else 0
        step = float(np.max(reach)) / (LEVELS - 1 - zero)
        return cls(step, zero, tuple(map(float, parts(reach))) if isinstance(reach, Sequence) else ())

    @classmethod
    def spanning(cls, lowest: float, highest: float) -> Range:
        """The finest with codes for 0 and for all from `lowest`, at most 0, to `highest`, at least 0.

        Codes below 0 are even in number, or what lies halfway between two codes would be rounded to the other one by
        OpenVINO, which counts from the lowest.
        """
        below = -lowest / max(highest - lowest, _SMALLEST)
        zero = min(2 * math.ceil((LEVELS - 1) / 2 * below - _SMALLEST), LEVELS - 2)
        return cls(float(max(highest / (LEVELS - 1 - zero), -lowest / max(zero, 1), _SMALLEST)), zero)

    @property
    def reach(self) -> Reach:
        """The opposite of `of`."""
        largest = self.step * self.codes[1]
        return [largest * part for part in self.parts] if self.parts else largest

    @property
    def codes(self) -> tuple[int, int]:
        """The lowest and the highest; zero is 0."""
        return -self.zero, LEVELS - 1 - self.zero


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
    _parts: torch.Tensor

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
        self.register_buffer("_parts", torch.ones(1), persistent=False)
        self.range = None

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

    @property
    def even(self) -> bool:
        """Are both signs to reach as far, as streams have them?"""
        return self.weight.ndim == 5

    @property
    def range(self) -> Range | None:
        """Of its input; None: it stays in float."""
        return self._range

    @range.setter
    def range(self, reach: Range | None) -> None:
        self._range = reach
        values = reach.parts if reach is not None and reach.parts else (1.0,)
        self._parts = torch.tensor(values, device=self.weight.device)

    def divisor(self, x: torch.Tensor) -> torch.Tensor:
        """What each channel of an input (or weights) like `x` is divided by, and its weights multiplied with."""
        return self._parts.view(1, -1, *[1] * (x.ndim - 2))

    def get_extra_state(self) -> dict[str, Any]:
        """The range, so that a checkpoint holds it."""
        return {} if self.range is None else asdict(self.range)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """See `get_extra_state`."""
        self.range = Range(**state) if state else None

    def _convolve(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        stride, padding, dilation, groups = self.stride, self.padding, self.dilation, self.groups
        if weight.ndim == 4:
            return functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # no stub
            return functional.conv3d(x, weight, bias, stride, padding, dilation, groups)
        flat, deep = weight.shape[2] == 1, weight.shape[3:] == (1, 1)
        if isinstance(padding, str) or not (flat or deep):
            return functional.conv3d(x, weight, bias, stride, padding, dilation, groups)
        # PyTorch is several times as fast in two dimensions, where two are enough
        if flat:
            images = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
            y = functional.conv2d(images, weight[:, :, 0], bias, stride[1:], padding[1:], dilation[1:], groups)
            return y.view(len(x), -1, *y.shape[1:]).transpose(1, 2)
        images = x.flatten(3).contiguous(memory_format=torch.channels_last)
        y = functional.conv2d(images, weight[..., 0], bias, stride[:2], padding[:2], dilation[:2], groups)
        return y.view(*y.shape[:3], *x.shape[3:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        reach = self.range
        y = self._convolve(x, self.weight, self.bias) if reach is None else self._in_8_bits(x.float(), reach)
        return y if self.shuffle == 1 else functional.pixel_shuffle(y, self.shuffle)

    def _rounded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights on their grid, and its step for each output."""
        weight = self.weight * self.divisor(self.weight)
        scale = weight.detach().abs().flatten(1).amax(1).clamp(min=_SMALLEST) / LARGEST_WEIGHT
        return torch.fake_quantize_per_channel_affine(
            weight, scale, self._zeros, 0, -LARGEST_WEIGHT, LARGEST_WEIGHT
        ), scale

    def round_weights(self) -> None:
        """Put the weights on their grid for good: one halfway between two codes is rounded here, and nowhere else."""
        if self.range is not None:
            self.weight.data = (self._rounded()[0] / self.divisor(self.weight)).detach()

    def _in_8_bits(self, x: torch.Tensor, reach: Range) -> torch.Tensor:
        weight, scale = self._rounded()
        if reach.parts:
            x = x * (1 / self.divisor(x))
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
    ends: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def see_ends(name: str, _: QuantisedConvolution, given: torch.Tensor, result: torch.Tensor) -> None:
        values = given.float().transpose(0, 1).flatten(1)
        low, high = ends.get(name, [values.new_zeros(len(values))] * 2)
        ends[name] = torch.minimum(low, values.amin(1)), torch.maximum(high, values.amax(1))

    _watch(network, predict, batches, see_ends)
    balanced: dict[str, Range] = {}

    def balance(name: str, module: QuantisedConvolution, given: torch.Tensor, result: torch.Tensor) -> None:
        if name not in balanced:
            balanced[name] = _balanced(module, *ends[name], given)

    _watch(network, predict, batches[:1], balance)
    counts = {name: np.zeros(BINS) for name in balanced}

    def count(name: str, module: QuantisedConvolution, given: torch.Tensor, result: torch.Tensor) -> None:
        counts[name] += _histogram(module, given, balanced[name])

    _watch(network, predict, batches, count)
    found = convolutions(network)
    best = {name: _best(counts[name], reach, even=found[name].even) for name, reach in balanced.items()}
    return {name: replace(reach, step=HEADROOM * reach.step) for name, reach in best.items()}


def _balanced(module: QuantisedConvolution, lowest: torch.Tensor, highest: torch.Tensor, given: torch.Tensor) -> Range:
    """The range from `lowest` to `highest`, of each channel of the input, with the parts that change the result least.

    What watches the module sees nothing of this.

    Parameters
    ----------
    given
        An input to compare the results of.
    """
    exact = module.forward(given)
    largest = torch.maximum(highest, -lowest).double().clamp(min=_SMALLEST)
    parts = (largest / largest.max()).clamp(min=LEAST_PART)
    candidates = []
    for power in BALANCES if module.groups == 1 and len(largest) > 1 else BALANCES[:1]:
        divided = [float(f"{part:.{DIGITS}g}") for part in parts**power]
        # the channels that reach farthest once all are divided; one at the least part may, of those that do not
        low, high = (float((end.double() / torch.tensor(divided)).abs().max()) for end in (lowest, highest))
        whole = Range.of(max(low, high, _SMALLEST), signed=low > 0) if module.even else Range.spanning(-low, high)
        candidates.append(replace(whole, parts=tuple(divided) if power else ()))
    errors = []
    for whole in candidates:
        cut = _best(_histogram(module, given, whole), whole, even=module.even)
        module.range = replace(cut, step=HEADROOM * cut.step)
        errors.append(float((module.forward(given) - exact).square().mean()))
        module.range = None
    return candidates[int(np.argmin(errors))]


def _histogram(module: QuantisedConvolution, given: torch.Tensor, whole: Range) -> NDArray[np.float64]:
    """Of an input as it is rounded, divided by the parts of `whole`, from its lowest code to its highest."""
    module.range = whole
    divided = given.float() / module.divisor(given)
    module.range = None
    return torch.histc(divided, BINS, *(code * whole.step for code in whole.codes)).double().numpy()


def _best(counts: NDArray[np.float64], whole: Range, *, even: bool) -> Range:
    """The part of the range `whole` with the least squared error for values in it with this histogram.

    Each end is cut off by itself, where they are not to be `even`.
    """
    low, high = (code * whole.step for code in whole.codes)
    values = low + (np.arange(len(counts)) + 0.5) / len(counts) * (high - low)

    def error(reach: Range) -> float:
        codes = np.clip(np.rint(values / reach.step), *reach.codes)
        return float(counts @ (codes * reach.step - values) ** 2)

    if even or not whole.zero:
        return min((replace(whole, step=float(part * whole.step)) for part in CANDIDATES), key=error)
    ranges = [Range.spanning(below * low, above * high) for below in CANDIDATES for above in CANDIDATES]
    return replace(min(ranges, key=error), parts=whole.parts)


def quantise(network: nn.Module, ranges: Mapping[str, Range]) -> None:
    """Quantise the convolutions in `ranges`, and no others."""
    for name, module in convolutions(network).items():
        module.range = ranges.get(name)
