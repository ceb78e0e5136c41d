"""A network in 8 bits, to be calibrated, judged and fine-tuned in PyTorch before a node runs it by OpenVINO.

Jacob B. et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR
2018: the input of each convolution and its weights lie on grids of 8 bits, products are summed exactly, everything
between two convolutions (additions of skips, activations, concatenations) stays in float. Gradients pass the rounding
as if it were not there (the straight-through estimator). Weights have one step for each output, both signs alike;
activations have one step, and either both signs or none below zero. Zero is a code of every grid, so that the zeros
around an image stay zeros. The grids are those of `pipelines.openvino_segments`.

Channels of one activation differ in size, and one step for all is too coarse for the small ones. So each channel may be
divided by a number that its weights are multiplied with, which shares the trouble between both (Nagel M. et al.,
"Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019; Xiao G. et al., "SmoothQuant",
ICML 2023, equation 4): see `BALANCES`.
"""

from __future__ import annotations

import copy
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
"""Of the histogram of magnitudes that a range is chosen by: 16 or more for each code."""
CANDIDATES = np.geomspace(1, 0.2, 33)
"""Ranges that are tried, in parts of the largest magnitude."""
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
"""Largest magnitude of a tensor of zeros: a step of 0 has no codes."""

Convolution = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d


@dataclass(frozen=True, slots=True)
class Range:
    """What the codes of an activation reach.

    largest
        Magnitude of the largest code that both signs have.
    signed
        Both signs, or none below zero.
    parts
        Of it that each channel reaches; empty: all reach it.
    """

    largest: float
    signed: bool
    parts: tuple[float, ...] = ()

    @classmethod
    def of(cls, reach: Reach, *, signed: bool) -> Range:
        """From the largest magnitude, or that of each channel, as in a file."""
        if isinstance(reach, Sequence):
            return cls(max(reach), signed, tuple(map(float, parts(reach))))
        return cls(reach, signed)

    @property
    def reach(self) -> Reach:
        """The opposite of `of`."""
        return [self.largest * part for part in self.parts] if self.parts else self.largest

    @property
    def codes(self) -> tuple[int, int]:
        """The lowest and the highest; zero is 0."""
        zero = SIGNED_ZERO if self.signed else 0
        return -zero, LEVELS - 1 - zero

    @property
    def step(self) -> float:
        """Between two codes, of the largest channel."""
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
    lowest: dict[str, float] = {}
    highest: dict[str, torch.Tensor] = {}

    def see_ends(name: str, _: QuantisedConvolution, given: torch.Tensor, result: torch.Tensor) -> None:
        lowest[name] = min(float(given.min()), lowest.get(name, 0))
        ends = given.float().abs().transpose(0, 1).flatten(1).amax(1)
        highest[name] = torch.maximum(ends, highest.get(name, ends))

    _watch(network, predict, batches, see_ends)
    balanced: dict[str, Range] = {}

    def balance(name: str, module: QuantisedConvolution, given: torch.Tensor, result: torch.Tensor) -> None:
        if name not in balanced:
            balanced[name] = _balanced(module, highest[name], lowest[name] < 0, given)

    _watch(network, predict, batches[:1], balance)
    counts = {name: np.zeros(BINS) for name in balanced}

    def see_magnitudes(name: str, module: QuantisedConvolution, given: torch.Tensor, result: torch.Tensor) -> None:
        module.range = balanced[name]  # for its parts
        given = given.float().abs() / module.divisor(given)
        module.range = None
        counts[name] += torch.histc(given, BINS, 0, balanced[name].largest).numpy()

    _watch(network, predict, batches, see_magnitudes)
    best = {name: _best(counts[name], reach) for name, reach in balanced.items()}
    return {name: replace(reach, largest=HEADROOM * reach.largest) for name, reach in best.items()}


def _balanced(module: QuantisedConvolution, largest: torch.Tensor, signed: bool, given: torch.Tensor) -> Range:
    """The range up to `largest`, of each channel of the input, with the parts that change the result for `given` least.

    What watches the module sees nothing of this.
    """
    whole = max(float(largest.max()), _SMALLEST)
    exact = module.forward(given)
    candidates = [Range(whole, signed)]
    if module.groups == 1 and len(largest) > 1:
        parts = (largest / whole).clamp(min=LEAST_PART).double()
        for power in BALANCES[1:]:
            divided = [float(f"{part:.{DIGITS}g}") for part in parts**power]
            # the channel that reaches farthest once all are divided; one at the least part may, of those that do not
            reach = float((largest.double() / torch.tensor(divided)).max())
            candidates.append(Range(max(reach, _SMALLEST), signed, tuple(divided)))
    errors = []
    for module.range in candidates:
        errors.append(float((module.forward(given) - exact).square().mean()))
    module.range = None
    return candidates[int(np.argmin(errors))]


def _best(counts: NDArray[np.float64], whole: Range) -> Range:
    """The part of the range `whole` with the least squared error for magnitudes up to it with this histogram."""
    magnitudes = (np.arange(len(counts)) + 0.5) / len(counts) * whole.largest

    def error(reach: Range) -> float:
        codes = np.minimum(np.rint(magnitudes / reach.step), reach.codes[1])
        return float(counts @ (codes * reach.step - magnitudes) ** 2)

    return min((replace(whole, largest=float(part * whole.largest)) for part in CANDIDATES), key=error)


def quantise(network: nn.Module, ranges: Mapping[str, Range]) -> None:
    """Quantise the convolutions in `ranges`, and no others."""
    for name, module in convolutions(network).items():
        module.range = ranges.get(name)
