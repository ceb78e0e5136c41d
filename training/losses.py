"""What a network is trained on: the losses of the papers, each a function of output and target.

Output and target are float tensors, (n, c, y, x) or (n, c, z, y, x), in network units (HU/1000, `pipelines.scaling`).
The result is a scalar, always computed in float32, also under autocast: bfloat16 has steps of 8 HU at 1000 HU.

Ranges. The papers compute on [0, 1] of a window of W HU; here nothing is clipped, because a network that is told
nothing about what lies outside a window is free to invent HU there. What that does to each loss:

`l1`, `charbonnier`
    In units of 1000 HU. On the paper's range they are 1000/W times larger, a factor that Adam does not see. The ε of
    Charbonnier is 1 HU.
`mse`
    In units of (1000 HU)²: on [0, 1] it is (1000/W)² times larger. That matters beside a second term only: a weight λ
    printed for [0, 1] becomes λ·(W/1000)² (0.1 becomes 0.016 for 400 HU), see `training.features`.
`ssim`, `l1_ssim`
    On the paper's unit range, W a parameter: C1 and C2 are parts of the data range, and the balance between the two
    terms depends on it. Values outside the window go beyond [0, 1] and count.
`wgan_critic_loss`, `wgan_generator_loss`
    In network units. The Wasserstein distance of a 1-Lipschitz critic scales as L1 does, so a λ1 holds in any
    unit; the gradient penalty (‖∇‖ − 1)² has none, and weighs 1000/W times more against a distance so much smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from pipelines.scaling import to_network
from training.metrics import SOFT_TISSUE, Window

Critic = Callable[[torch.Tensor], torch.Tensor]
"""Images (n, c, y, x) to one number each, (n, 1) or (n,)."""

CHARBONNIER_EPSILON = 1e-3
"""1 HU: quadratic below, linear above."""
GRADIENT_PENALTY_WEIGHT = 10.0
L1_PART, SSIM_PART = 0.85, 0.15

_SSIM_SIZE_PX = 11
_SSIM_SIGMA_PX = 1.5
_K1, _K2 = 0.01, 0.03


def _float32(values: torch.Tensor) -> torch.autocast:
    """Context in which convolutions, too, run in float32 on the device of `values`."""
    return torch.autocast(values.device.type, enabled=False)


VISIBLE = to_network(5.0)
"""Contrast that a lesion must have somewhere to count in `contrast_loss`."""


def charbonnier(output: torch.Tensor, target: torch.Tensor, epsilon: float = CHARBONNIER_EPSILON) -> torch.Tensor:
    """``mean(sqrt((output − target)² + ε²)) − ε``: a mean square below ε, a mean absolute value above."""
    error = output.float() - target.float()
    return (error * error + epsilon**2).sqrt().mean() - epsilon


def l1(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``mean |output − target|`` (DCSCN, EDSR)."""
    return (output.float() - target.float()).abs().mean()


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``mean (output − target)²``, over pixels too (DRL and CNN10: their squared Frobenius norm per pixel)."""
    return (output.float() - target.float()).square().mean()


def contrast_loss(output: torch.Tensor, inserted: torch.Tensor) -> torch.Tensor:
    """``mean (1 − g)²``, g the part of an inserted lesion that comes out: ``⟨f(x + δ) − f(x), δ⟩ / ⟨δ, δ⟩``.

    The mean square error alone pays for noise by faint contrasts: its best answer to what may be a lesion and may be
    noise is a fainter lesion.

    Parameters
    ----------
    output
        f of twins, (2n, …): the second half with the lesions.
    inserted
        δ, (n, …) of the shape of `output`; lesions that are nowhere above `VISIBLE` do not count.
    """
    count = len(inserted)
    change = (output[count:] - output[:count]).float().reshape(count, -1)
    delta = inserted.float().reshape(count, -1)
    there = delta.abs().amax(1) > VISIBLE
    gain = (change * delta).sum(1)[there] / delta.square().sum(1)[there]
    return (1 - gain).square().mean() if bool(there.any()) else output.new_zeros(())


def unit_range(values: torch.Tensor, window: Window) -> torch.Tensor:
    """Network units to the range in which `window` is [0, 1], float32, without clipping."""
    low, high = to_network(window.low_hu), to_network(window.high_hu)
    return (values.float() - low) / (high - low)


def _gaussian_mean(planes: torch.Tensor) -> torch.Tensor:
    """Mean under the 11 × 11 Gaussian wherever it fits, (n, 1, y, x) to (n, 1, y − 10, x − 10)."""
    position = torch.arange(_SSIM_SIZE_PX, dtype=torch.float32, device=planes.device) - _SSIM_SIZE_PX // 2
    weights = torch.exp(-position.square() / (2 * _SSIM_SIGMA_PX**2))
    weights = weights / weights.sum()
    return functional.conv2d(functional.conv2d(planes, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def ssim(output: torch.Tensor, target: torch.Tensor, window: Window) -> torch.Tensor:
    """Mean structural similarity of axial slices, 1 for equal images; ``1 − ssim`` is the loss.

    Wang et al., IEEE Trans Image Process 2004;13:600-612, eq. 13, with the 11 × 11 Gaussian of σ 1.5 pixels,
    K1 0.01 and K2 0.03, as `training.metrics.ssim`, from which it differs outside the window: there is no clipping.
    Float32 is good for 1e-5 inside the window, for 1e-4 in air and 1e-3 in bone two and seven widths outside.

    Parameters
    ----------
    output, target
        (n, c, y, x) or (n, c, z, y, x), network units; each (y, x) plane is an image.
    window
        What is [0, 1]: sets the data range and the zero of luminance.

    Raises
    ------
    ValueError
        If a plane is smaller than 11 × 11.
    """
    if min(output.shape[-2:]) < _SSIM_SIZE_PX:
        raise ValueError(f"planes of {tuple(output.shape[-2:])}: SSIM needs at least {_SSIM_SIZE_PX} × {_SSIM_SIZE_PX}")
    with _float32(output):
        x, y = (unit_range(values, window).reshape(-1, 1, *values.shape[-2:]) for values in (output, target))
        mx, my = _gaussian_mean(x), _gaussian_mean(y)
        variances = _gaussian_mean(x * x) - mx.square() + _gaussian_mean(y * y) - my.square()
        covariance = _gaussian_mean(x * y) - mx * my
        c1, c2 = _K1**2, _K2**2
        likeness = (2 * mx * my + c1) * (2 * covariance + c2) / ((mx.square() + my.square() + c1) * (variances + c2))
        return likeness.mean()


def l1_ssim(output: torch.Tensor, target: torch.Tensor, window: Window = SOFT_TISSUE) -> torch.Tensor:
    """``0.85·L1 + 0.15·(1 − SSIM)`` on the unit range (HQINet, eq. 3).

    The equation is printed with statistics of the whole image; here SSIM is the usual windowed one. The window is not
    stated. Its Table 1 fits [−160, 240] HU best: the low-dose L1 of 0.043 is then 17 HU (60 HU on [−1000, 400]), and
    its NMSE of 0.062 with a PSNR of 25.8 dB wants a root mean square of the image of 0.2, where two chest series have
    0.23 and 0.36 on this window and 0.37 and 0.50 on that one.
    """
    difference = unit_range(output, window) - unit_range(target, window)
    return L1_PART * difference.abs().mean() + SSIM_PART * (1 - ssim(output, target, window))


def gradient_penalty(
    critic: Critic, real: torch.Tensor, fake: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """``10·mean (‖∇D(x̂)‖₂ − 1)²``, x̂ uniform between each real image and its fake (Gulrajani et al. 2017, eq. 3).

    Parameters
    ----------
    critic
        D.
    real, fake
        (n, c, y, x); no gradient flows into them.
    generator
        CPU generator of the n random places, so that a resumed training draws the same; torch's own without.
    """
    with _float32(real):
        shape = (len(real), *(1,) * (real.ndim - 1))
        part = torch.rand(shape, generator=generator).to(real.device)
        between = torch.lerp(real.detach().float(), fake.detach().float(), part).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        excess: torch.Tensor = torch.linalg.vector_norm(slope.flatten(1), dim=1) - 1
        return GRADIENT_PENALTY_WEIGHT * excess.square().mean()


class CriticLoss(NamedTuple):
    """The two terms of what a critic makes small."""

    distance: torch.Tensor
    """``E[D(real)] − E[D(fake)]``: the Wasserstein distance, as far as the critic knows it."""
    penalty: torch.Tensor
    """`gradient_penalty`."""

    @property
    def value(self) -> torch.Tensor:
        """What is made small."""
        return self.penalty - self.distance


def wgan_critic_loss(
    critic: Critic, real: torch.Tensor, fake: torch.Tensor, generator: torch.Generator | None = None
) -> CriticLoss:
    """``E[D(fake)] − E[D(real)]`` + gradient penalty, in its two terms (DCSWGAN).

    Parameters
    ----------
    critic
        D.
    real
        Full-dose images, (n, c, y, x).
    fake
        Denoised images, (n, c, y, x); no gradient flows into the generator.
    generator
        As for `gradient_penalty`.
    """
    with _float32(real):
        distance = critic(real.float()).mean() - critic(fake.detach().float()).mean()
        return CriticLoss(distance, gradient_penalty(critic, real, fake, generator))


def wgan_generator_loss(critic: Critic, output: torch.Tensor) -> torch.Tensor:
    """``−E[D(output)]``: what the network makes small beside λ1·L1."""
    with _float32(output):
        return -critic(output.float()).mean()
