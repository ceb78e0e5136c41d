"""The losses: against formulas in numpy, scikit-image, `training.metrics`, and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity
from torch import nn

from pipelines.scaling import to_network
from training import metrics
from training.losses import (
    CHARBONNIER_EPSILON,
    charbonnier,
    contrast_loss,
    gradient_penalty,
    l1,
    l1_ssim,
    mse,
    ssim,
    wgan_critic_loss,
    wgan_generator_loss,
)
from training.metrics import FULL, SOFT_TISSUE

Float64 = NDArray[np.float64]


@pytest.fixture(scope="module")
def pair() -> tuple[Float64, Float64]:
    """Noisy image and truth, (3, 48, 40) HU within the soft-tissue window, flat in one corner."""
    rng = np.random.default_rng(5)
    texture = gaussian_filter(rng.standard_normal((3, 48, 40)), (0, 3, 3))
    truth = np.clip(texture / texture.std() * 60 + 40, -130, 210)
    truth[:, :20, :20] = 30
    return np.clip(truth + rng.normal(0, 15, truth.shape), -159, 239), truth


def tensors(pair: tuple[Float64, Float64]) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, 1, z, y, x) in network units."""
    one, two = (to_network(torch.from_numpy(image)).float()[None, None] for image in pair)
    return one, two


def test_pixel_losses_are_their_formulas(pair: tuple[Float64, Float64]) -> None:
    output, target = tensors(pair)
    d = (pair[0] - pair[1]) / 1000
    assert l1(output, target).item() == pytest.approx(np.abs(d).mean(), rel=1e-5)
    assert mse(output, target).item() == pytest.approx(np.square(d).mean(), rel=1e-5)
    e = CHARBONNIER_EPSILON
    assert charbonnier(output, target).item() == pytest.approx(np.sqrt(d**2 + e**2).mean() - e, rel=1e-5)


def test_pixel_losses_are_those_of_the_window_times_its_width(pair: tuple[Float64, Float64]) -> None:
    output, target = tensors(pair)
    assert l1(output, target).item() == pytest.approx(0.4 * metrics.l1(*pair, SOFT_TISSUE), rel=1e-5)
    assert mse(output, target).item() == pytest.approx(0.4**2 * metrics.rmse(*pair, SOFT_TISSUE) ** 2, rel=1e-5)


def test_charbonnier_is_quadratic_then_linear() -> None:
    e, zero = CHARBONNIER_EPSILON, torch.zeros(1)
    assert charbonnier(zero, zero).item() == 0
    assert charbonnier(zero + e / 10, zero).item() == pytest.approx(e / 200, rel=0.01)
    assert charbonnier(zero + 100 * e, zero).item() == pytest.approx(99.005 * e, rel=1e-4)


def test_ssim_is_that_of_the_metric_and_of_scikit_image(pair: tuple[Float64, Float64]) -> None:
    ours = ssim(*tensors(pair), SOFT_TISSUE).item()
    assert ours == pytest.approx(metrics.ssim(*pair, SOFT_TISSUE), abs=1e-5)
    maps = []
    for a, b in zip(*pair, strict=True):
        a, b = ((v + 160) / 400 for v in (a, b))
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
        maps.append(structural_similarity(a, b, full=True, **settings)[1][5:-5, 5:-5])
    assert ours == pytest.approx(np.mean(maps), abs=1e-5)
    assert 0.3 < ours < 0.95


def test_ssim_of_planes_is_that_of_the_volume(pair: tuple[Float64, Float64]) -> None:
    output, target = tensors(pair)
    planes = ssim(output[0].transpose(0, 1), target[0].transpose(0, 1), SOFT_TISSUE)
    assert planes.item() == pytest.approx(ssim(output, target, SOFT_TISSUE).item(), abs=1e-7)


@pytest.mark.parametrize(("mean_hu", "within"), [(40, 1e-5), (-1000, 1e-4), (3000, 2e-3)])
def test_ssim_beyond_the_window(mean_hu: float, within: float) -> None:
    a, b = np.random.default_rng(3).normal(mean_hu, 20, (2, 48, 48))
    x, y = (to_network(torch.from_numpy(v)[None, None]).float() for v in (a, b))
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    _, exact = structural_similarity((a + 160) / 400, (b + 160) / 400, full=True, **settings)
    assert ssim(x, y, SOFT_TISSUE).item() == pytest.approx(exact[5:-5, 5:-5].mean(), abs=within)
    assert ssim(x, x, SOFT_TISSUE).item() == 1


@pytest.mark.parametrize("loss", [lambda a, b: ssim(a, b, FULL), l1_ssim], ids=["ssim", "l1_ssim"])
def test_gradient_is_the_finite_difference(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], pair: tuple[Float64, Float64]
) -> None:
    output, target = (v[:, :, 0, :24, :24] for v in tensors(pair))
    output = output.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(output, target), output)
    # along the gradient itself: one large difference instead of many that drown in float32
    direction = gradient / gradient.norm()
    h = 2e-3
    with torch.no_grad():
        rise = (loss(output + h * direction, target) - loss(output - h * direction, target)).item() / (2 * h)
    assert rise == pytest.approx(gradient.norm().item(), rel=0.02)
    assert gradient.norm().item() > 0


def test_l1_ssim_is_the_papers_mixture_on_the_unit_range(pair: tuple[Float64, Float64]) -> None:
    expected = 0.85 * metrics.l1(*pair, SOFT_TISSUE) + 0.15 * (1 - metrics.ssim(*pair, SOFT_TISSUE))
    assert l1_ssim(*tensors(pair)).item() == pytest.approx(expected, abs=1e-5)


def test_what_lies_outside_the_window_still_teaches() -> None:
    output = torch.full((1, 1, 16, 16), -0.9, requires_grad=True)
    (gradient,) = torch.autograd.grad(l1_ssim(output, torch.full((1, 1, 16, 16), -0.8)), output)
    assert (gradient < 0).all()


def test_small_planes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 11 × 11"):
        ssim(torch.zeros(1, 1, 10, 40), torch.zeros(1, 1, 10, 40), FULL)


@pytest.mark.parametrize("loss", [l1, mse, charbonnier, l1_ssim])
def test_float32_under_autocast(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], pair: tuple[Float64, Float64]
) -> None:
    output, target = tensors(pair)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(output, target)
    assert inside.dtype == torch.float32
    assert inside.item() == loss(output, target).item()
    assert loss(output.bfloat16(), target).dtype == torch.float32


class Smooth(nn.Module):
    """A critic with a curvature, recording what it sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv2d(1, 4, 3)
        self.last = nn.Linear(4 * 16, 1)
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.detach().double())
        y: torch.Tensor = self.last(torch.tanh(2 * self.conv(x)).flatten(1))
        return y


def images(seed: int) -> torch.Tensor:
    return torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def slope_norms(critic: Smooth, places: torch.Tensor) -> Float64:
    """‖∇D‖₂ at each image by central differences in float64."""
    h = 1e-5
    norms = []
    for place in places:
        steps = h * torch.eye(place.numel(), dtype=torch.float64).reshape(-1, *place.shape)
        with torch.no_grad():
            rise = (critic(place + steps) - critic(place - steps)) / (2 * h)
        norms.append(rise.norm().item())
    return np.array(norms)


def test_gradient_penalty_is_that_of_finite_differences() -> None:
    critic, real, fake = Smooth(), images(0), images(1)
    ours = gradient_penalty(critic, real, fake, torch.Generator().manual_seed(7)).item()
    places = critic.seen[-1]
    # on the segments, somewhere else on each
    part = (places - real) / (fake - real).double()
    assert torch.allclose(part, part[:, :, :1, :1].expand_as(part), atol=1e-4)
    assert 0 < part.min() < part.max() < 1
    assert len(part[:, 0, 0, 0].unique()) == 5
    norms = slope_norms(critic.double(), places)
    assert ours == pytest.approx(10 * np.square(norms - 1).mean(), rel=1e-4)


def test_gradient_penalty_of_a_linear_critic() -> None:
    weights = torch.full((1, 1, 6, 6), 0.5)  # slope of norm 3 everywhere

    def critic(x: torch.Tensor) -> torch.Tensor:
        return (x * weights).sum(dim=(1, 2, 3))

    assert gradient_penalty(critic, images(0), images(1)).item() == pytest.approx(10 * (3 - 1) ** 2, rel=1e-5)


def test_gradient_penalty_teaches_the_critic() -> None:
    critic, real, fake = Smooth(), images(0), images(1)

    def penalty() -> torch.Tensor:
        return gradient_penalty(critic, real, fake, torch.Generator().manual_seed(7))

    gradient = torch.autograd.grad(penalty(), critic.last.weight)[0]
    direction, h = gradient / gradient.norm(), 1e-2
    with torch.no_grad():
        critic.last.weight += h * direction
    above = penalty().item()
    with torch.no_grad():
        critic.last.weight -= 2 * h * direction
    rise = (above - penalty().item()) / (2 * h)
    assert rise == pytest.approx(gradient.norm().item(), rel=1e-3)


def test_wgan_losses_and_where_their_gradients_go() -> None:
    critic = Smooth()
    output, target = images(1).requires_grad_(), images(0)
    scores = [critic(v).mean().item() for v in (output, target)]
    penalty = gradient_penalty(critic, target, output, torch.Generator().manual_seed(7)).item()
    terms = wgan_critic_loss(critic, target, output, torch.Generator().manual_seed(7))
    assert terms.distance.item() == pytest.approx(scores[1] - scores[0], rel=1e-5)
    assert terms.penalty.item() == pytest.approx(penalty, rel=1e-5)
    assert terms.value.item() == pytest.approx(scores[0] - scores[1] + penalty, rel=1e-5)
    terms.value.backward()
    assert output.grad is None
    assert critic.conv.weight.grad is not None
    adversarial = wgan_generator_loss(critic, output)
    assert adversarial.item() == pytest.approx(-scores[0], rel=1e-5)
    adversarial.backward()
    assert output.grad is not None


def test_the_best_linear_critic_has_the_slope_it_should() -> None:
    # two point masses 0.5 apart: a·x makes 10 (a − 1)² − a/2 smallest where 20 (a − 1) = 1/2
    real, fake = torch.zeros(4, 1, 1, 1), torch.full((4, 1, 1, 1), -0.5)

    def gradient(slope: float) -> float:
        a = torch.tensor(slope, requires_grad=True)
        return float(torch.autograd.grad(wgan_critic_loss(lambda x: a * x.flatten(1), real, fake).value, a)[0])

    assert gradient(1.025) == pytest.approx(0, abs=1e-5)
    assert gradient(1.0) == pytest.approx(-0.5, rel=1e-5)
    assert gradient(1.5) == pytest.approx(9.5, rel=1e-5)


def test_wgan_losses_are_float32_under_autocast() -> None:
    critic, real, fake = Smooth(), images(0), images(1)
    runs = []
    for enabled in (False, True):
        generator = torch.Generator().manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            runs.append(
                [
                    wgan_critic_loss(critic, real, fake, generator).value.item(),
                    wgan_generator_loss(critic, fake).item(),
                ]
            )
    assert runs[0] == runs[1]
    assert all(math.isfinite(value) for value in runs[0])


def test_contrast_loss_is_the_square_of_what_a_lesion_lost() -> None:
    """A filter that gives back a known part of what was inserted, whatever else it does."""
    generator = torch.Generator().manual_seed(0)
    without = torch.randn(3, 1, 12, 12, generator=generator)
    lesions = torch.zeros(3, 1, 12, 12)
    lesions[0, :, 3:6, 3:6], lesions[1, :, 4:9, 4:9] = 0.03, -0.02
    lesions[2, :, 0, 0] = 0.001  # too faint to count
    parts = torch.tensor([0.7, 0.4, 0.0]).view(3, 1, 1, 1)
    elsewhere = torch.randn(3, 1, 12, 12, generator=generator) * (lesions == 0)  # no business of the lesion's
    output = torch.cat([without, without + parts * lesions + elsewhere])
    assert contrast_loss(output, lesions).item() == pytest.approx((0.3**2 + 0.6**2) / 2, rel=1e-4)
    assert contrast_loss(output, torch.zeros_like(lesions)).item() == 0
