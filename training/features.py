"""Perceptual loss: distance of the features that a fixed network finds in output and target, without the internet.

Backbones:

``ct-ae``
    Encoder of our own CT auto-encoder, shipped (`training.autoencoder`). The default: VGG has seen cats, this one CT,
    and Li et al. (IEEE Trans Med Imaging 2020;39:2289-2301) found it as good or better.
``vgg16``, ``vgg19``
    Simonyan and Zisserman, ICLR 2015, as the papers use them. From a local file of torchvision's state dict, never
    downloaded: the parameter `weights`, else the file that the environment variable LDCT_VGG_WEIGHTS names.
``random``
    The encoder of ``ct-ae`` with random weights that preserve the variance. Liu et al. (CVPR 2021, "Generic perceptual
    loss for modeling structured output dependencies") get most of the gain from such a network.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Literal, get_args

import safetensors.torch
import torch
from torch import nn

from training.losses import mse, unit_range
from training.metrics import SOFT_TISSUE, Window

Backbone = Literal["ct-ae", "vgg16", "vgg19", "random"]

CT_AE_WEIGHTS = Path(__file__).parent / "weights" / "ct-ae.safetensors"
CT_AE_WIDTHS = (32, 64, 128)
CT_AE_SLOPE = 0.1
"""Of the LeakyReLU."""
VGG_VARIABLE = "LDCT_VGG_WEIGHTS"
VGG_WIDTHS = (64, 128, 256, 512, 512)
VGG_BLOCKS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
"""Convolutions of each block."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_SD = (0.229, 0.224, 0.225)


class WeightsMissing(FileNotFoundError):
    """A file of weights that must come from the user is not there."""


def read_torch_weights(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """State dict in a file that ``torch.save`` wrote, and the SHA-256 of the file. Code in the file is not run.

    Raises
    ------
    WeightsMissing
        If there is no such file.
    ValueError
        If it holds anything but named tensors.
    """
    if not path.is_file():
        raise WeightsMissing(f"no file {path}: give the path of a PyTorch state dict")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path.name} is no PyTorch state dict: save the state_dict() alone") from error
    if not (isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())):
        raise ValueError(f"{path.name} holds more than named tensors: save the state_dict() alone")
    return state, digest


def ct_encoder() -> nn.Sequential:
    """Three 3×3 convolutions, the last two of stride 2, LeakyReLU after each: 32, 64, 128 features.

    (n, 1, y, x) in network units to (n, 128, y/4, x/4), rounded up. Reflection at the border: zeros would be a frame
    of water around each patch.
    """
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip((1, *CT_AE_WIDTHS), CT_AE_WIDTHS, (1, 2, 2), strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, padding_mode="reflect"), nn.LeakyReLU(CT_AE_SLOPE)]
    return nn.Sequential(*layers)


def _vgg(backbone: str, blocks: int) -> nn.Sequential:
    """The first `blocks` blocks, numbered as in torchvision's ``features``."""
    layers: list[nn.Module] = []
    inputs = 3
    for width, convolutions in zip(VGG_WIDTHS[:blocks], VGG_BLOCKS[backbone][:blocks], strict=True):
        for _ in range(convolutions):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


def _convolutions(stack: nn.Sequential) -> list[int]:
    return [i for i, layer in enumerate(stack) if isinstance(layer, nn.Conv2d)]


def _levels(stack: nn.Sequential) -> list[int]:
    """Index of the last activation of each level: of each convolution, or before each pooling where there is any."""
    pools = [i - 1 for i, layer in enumerate(stack) if isinstance(layer, nn.MaxPool2d)]
    return pools or [i + 1 for i in _convolutions(stack)]


def _load_vgg(stack: nn.Sequential, backbone: str, weights: Path | None) -> str:
    """Fill `stack` from the user's file; return its SHA-256."""
    path = weights or (Path(os.environ[VGG_VARIABLE]) if os.environ.get(VGG_VARIABLE) else None)
    if path is None or not path.is_file():
        raise WeightsMissing(
            f"no weights for {backbone}" + (f" at {path}" if path else "") + ": give a file of torchvision's "
            f"{backbone} state dict (features.0.weight, …) as weights or in the environment variable {VGG_VARIABLE}; "
            "nothing is downloaded. The backbone ct-ae is shipped and needs no file"
        )
    state, digest = read_torch_weights(path)
    prefix, suffix = "features.", ".weight"
    found = {name for name in state if name.startswith(prefix) and name.endswith(suffix)}
    expected = {f"{prefix}{i}{suffix}" for i in _convolutions(_vgg(backbone, len(VGG_WIDTHS)))}
    if found != expected:
        wrong = ", ".join(sorted(found ^ expected))
        raise ValueError(f"{path.name} has not the layers of {backbone} (differs in {wrong}): give torchvision's file")
    stack.load_state_dict({name: state[prefix + name] for name in stack.state_dict()})
    return digest


def _load_ct_ae(stack: nn.Sequential, weights: Path | None) -> str:
    """Fill `stack` with the shipped or given encoder; return the SHA-256 of the file, which its card must know."""
    path = weights or CT_AE_WEIGHTS
    if not path.is_file():
        raise WeightsMissing(
            f"no weights of the CT auto-encoder at {path}: train it with python -m training.autoencoder"
        )
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    stated = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["weights_sha256"]
    if digest != stated:
        raise ValueError(f"{path.name} has SHA-256 {digest}, its card says {stated}: install both files again")
    state = safetensors.torch.load(content)
    stack.load_state_dict({name: state[f"encoder.{name}"].float() for name in stack.state_dict()})
    return digest


def _randomise(stack: nn.Sequential, seed: int) -> None:
    """Weights that keep the mean square of white features from level to level (He et al. 2015), the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    for layer in stack:
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.kaiming_normal_(layer.weight, a=CT_AE_SLOPE, generator=generator)
            nn.init.zeros_(layer.bias)


class FeatureLoss(nn.Module):
    """``L_P = Σ 1/(h w d)·‖φ(ŷ) − φ(y)‖²`` over the levels φ, mean over the batch (Ataei et al.).

    Frozen: no gradient reaches the backbone. Move it to the device of the images with ``.to``.

    Parameters
    ----------
    backbone
        See the module.
    weights
        File of the backbone's weights; see the module for what is taken without.
    layers
        Levels to compare, from 1: blocks 1 to 5 of VGG, each at the activation of its last convolution, or the three
        convolutions of the encoder. Without: 1 to 4 of VGG as in the paper's text (its code uses 1 to 3), all three of
        the encoder.
    window
        VGG only: what becomes [0, 1], clipped, so that what lies outside gets no gradient from this loss. The encoder
        sees HU/1000 as it is.
    imagenet_norm
        VGG only: take the ImageNet mean away and divide by its standard deviation, as VGG was trained. The paper's code
        does not.
    seed
        Of the random backbone.

    Attributes
    ----------
    sha256
        Of the file of weights, for the log and the card; empty for the random backbone.

    Raises
    ------
    WeightsMissing
        If there is no file for VGG.
    ValueError
        If the file is not of that backbone, or a layer does not exist.
    """

    mean: torch.Tensor
    sd: torch.Tensor

    def __init__(
        self,
        backbone: Backbone = "ct-ae",
        weights: Path | None = None,
        layers: tuple[int, ...] | None = None,
        window: Window = SOFT_TISSUE,
        imagenet_norm: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if backbone not in get_args(Backbone):
            raise ValueError(f"no backbone {backbone!r}: choose one of {', '.join(get_args(Backbone))}")
        if backbone == "random" and weights is not None:
            raise ValueError("the random backbone has no file of weights: leave weights out or choose ct-ae")
        self.is_vgg = backbone in VGG_BLOCKS
        layers = layers or ((1, 2, 3, 4) if self.is_vgg else (1, 2, 3))
        available = len(VGG_WIDTHS if self.is_vgg else CT_AE_WIDTHS)
        if not set(layers) <= set(range(1, available + 1)):
            raise ValueError(f"{backbone} has no layers {layers}: choose from 1 to {available}")
        stack = _vgg(backbone, max(layers)) if self.is_vgg else ct_encoder()
        levels = _levels(stack)
        self.taps = frozenset(levels[layer - 1] for layer in layers)
        self.stack = nn.Sequential(*list(stack)[: max(self.taps) + 1])
        self.window = window
        self.sha256 = ""
        if self.is_vgg:
            self.sha256 = _load_vgg(self.stack, backbone, weights)
        elif backbone == "ct-ae":
            self.sha256 = _load_ct_ae(self.stack, weights)
        else:
            _randomise(self.stack, seed)
        for name, values, neutral in (("mean", IMAGENET_MEAN, 0.0), ("sd", IMAGENET_SD, 1.0)):
            numbers = torch.tensor(values if imagenet_norm else [neutral] * 3).view(1, 3, 1, 1)
            self.register_buffer(name, numbers, persistent=False)
        self.requires_grad_(False).eval()

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps (n, d, h, w) of each level, float32; of (…, y, x) every plane is one image."""
        with torch.autocast(images.device.type, enabled=False):
            x = images.float().reshape(-1, 1, *images.shape[-2:])
            if self.is_vgg:
                x = (unit_range(x, self.window).clamp(0, 1) - self.mean) / self.sd  # 1 channel becomes 3
            found = []
            for i, layer in enumerate(self.stack):
                x = layer(x)
                if i in self.taps:
                    found.append(x)
            return found

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """L_P of (n, c, y, x) or (n, c, z, y, x) in network units; a scalar, with a gradient to `output` only."""
        with torch.no_grad():
            truth = self.features(target)
        pairs = zip(self.features(output), truth, strict=True)
        return torch.stack([(ours - theirs).square().mean() for ours, theirs in pairs]).sum()


class ShareWeight(nn.Module):
    """The λ that makes λ·L_P a given share of the whole loss, measured over the first batches and then fixed.

    The share Ψ is what carries over from one backbone to another, where a λ does not (Viana et al. 2025,
    arXiv 2509.23025, best near 0.95 for pretrained encoders). What was measured is in the state dict: keep it with the
    checkpoint, or a resumed training measures anew and gets another λ.

    Parameters
    ----------
    share
        Ψ, from 0 to below 1.
    batches
        How many are measured; until then λ is that of the batches so far.
    """

    seen: torch.Tensor
    sums: torch.Tensor

    def __init__(self, share: float, batches: int = 50) -> None:
        super().__init__()
        if not 0 <= share < 1:
            raise ValueError(f"perceptual share {share:g} must be at least 0 and below 1")
        self.share, self.batches = share, batches
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float64))

    def forward(self, pixel: torch.Tensor, perceptual: torch.Tensor) -> torch.Tensor:
        """λ for a batch with these two losses. Only batches that train are measured."""
        if self.training and torch.is_grad_enabled() and int(self.seen) < self.batches:
            self.seen += 1
            self.sums += torch.stack([pixel.detach(), perceptual.detach()]).double()
        ratio = self.sums[0] / self.sums[1].clamp_min(torch.finfo(torch.float64).tiny)
        return (self.share / (1 - self.share) * ratio).float()


class PerceptualLoss(nn.Module):
    """``MSE + λ·L_P`` (Ataei et al.: mean square error, λ = 0.1, VGG16).

    Parameters
    ----------
    features
        L_P.
    weight
        λ, or how to find it. A λ printed for images on [0, 1] of W HU is λ·(W/1000)² beside the mean square error of
        network units: 0.1 is 0.016 on 400 HU.
    """

    def __init__(self, features: FeatureLoss, weight: float | ShareWeight) -> None:
        super().__init__()
        self.features, self.weight = features, weight

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar."""
        pixel = mse(output, target)
        perceptual: torch.Tensor = self.features(output, target)
        weight = self.weight(pixel, perceptual) if isinstance(self.weight, ShareWeight) else self.weight
        return pixel + weight * perceptual
