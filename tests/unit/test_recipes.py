"""What a recipe trains: the numbers that its paper prints, its loss by other code, the weights it begins with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.cascade import Cascade
from pipelines.runtime import WEIGHTS, read_card
from pipelines.scaling import to_hu
from pipelines.torch_engine import load_network
from training import metrics
from training.data import Batch
from training.features import FeatureLoss
from training.metrics import SOFT_TISSUE
from training.recipes import CONTRAST_STEPS, CONTRAST_WEIGHT, MODULES, Faithful, recipe, relative_charbonnier
from training.recipes import cascade as cascade_recipes
from training.recipes.cascade import Perceptual


def _pair() -> tuple[torch.Tensor, torch.Tensor, Batch]:
    """Denoised and target, (n, 1, y, x) in network units within the soft-tissue window, and a batch of their size."""
    generator = torch.Generator().manual_seed(3)
    target = 0.04 + 0.03 * torch.randn(2, 1, 24, 24, generator=generator)
    denoised = target + 0.01 * torch.randn(target.shape, generator=generator)
    return denoised, target, Batch(denoised, target, torch.tensor([0.02, 0.08]))


def test_what_the_papers_state_is_what_is_trained() -> None:
    """Lu et al.: Adam at a fixed 0.01, batch 88. Ataei et al.: Adam at 1e-3, 32 patches of 64. You et al.: 80."""
    whole = recipe("hqinet")
    assert (whole.batch, whole.schedule.learning_rate, whole.schedule.betas) == (88, 0.01, (0.9, 0.999))
    assert {whole.schedule.rate(step) for step in range(0, whole.schedule.steps, 97)} == {0.01}
    for name in ("drl", "drl-mse", "cnn10", "cascade", "cascade-mse", "cascade-3"):
        how = recipe(name)
        assert (how.patch_zyx, how.batch) == ((1, 64, 64), 32)
        assert (how.schedule.learning_rate, how.schedule.betas) == (1e-3, (0.9, 0.999))
    assert recipe("drl").schedule.steps * 10 == recipe("cascade").schedule.steps * 15  # as many epochs to each other
    for name in ("dcscn", "dcswgan", "cnn-l1", "wgan"):
        assert recipe(name).patch_zyx == (1, 80, 80)


@pytest.mark.parametrize("name", ["hqinet", "hqinet-lite"])
def test_hqinet_learns_by_l1_and_ssim(name: str) -> None:
    denoised, target, batch = _pair()
    hu = tuple(to_hu(values[:, 0]).numpy() for values in (denoised, target))
    expected = 0.85 * metrics.l1(*hu, SOFT_TISSUE) + 0.15 * (1 - metrics.ssim(*hu, SOFT_TISSUE))
    assert float(recipe(name).loss()(denoised, target, batch)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["drl-mse", "cnn10", "cascade", "cascade-mse", "cascade-3"])
def test_stages_after_the_first_learn_by_mse(name: str) -> None:
    denoised, target, batch = _pair()
    expected = float(np.mean((denoised - target).numpy().astype(np.float64) ** 2))
    assert float(recipe(name).loss()(denoised, target, batch)) == pytest.approx(expected, rel=1e-5)


def test_drl_learns_by_mse_and_features_half_of_each() -> None:
    denoised, target, batch = _pair()
    loss = cast(Perceptual, recipe("drl").loss())
    value = float(loss(denoised, target, batch))
    expected = float((denoised - target).square().mean())
    assert value == pytest.approx(2 * expected, rel=1e-5)
    again, shifted = FeatureLoss("ct-ae"), denoised + 0.02  # the weight stays: another pair has another sum
    weight = expected / float(again(denoised, target))
    for _ in range(loss.steady_after):
        loss(denoised.requires_grad_(), target, batch)
    loss.eval()
    found = float(loss(shifted.detach(), target, batch))
    alone = float((shifted - target).square().mean())
    assert found == pytest.approx(alone + weight * float(again(shifted, target)), rel=1e-4)
    assert found != pytest.approx(2 * alone, rel=0.01)


def test_the_printed_weight_of_vgg_belongs_to_images_that_are_1_at_400_hu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ataei et al.: λ = 0.1. A square error is (1000/400)² larger there than in network units."""
    vgg = SimpleNamespace(is_vgg=True, sha256="12ab")
    monkeypatch.setattr(cascade_recipes, "FeatureLoss", lambda backbone, weights: vgg)
    monkeypatch.setattr(cascade_recipes, "PerceptualLoss", lambda features, weight: (features, weight))
    loss = Perceptual("vgg16")
    assert loss.both == (vgg, pytest.approx(0.1 / 2.5**2))
    assert (loss.features, loss.steady_after) == ("vgg16 12ab", 0)


@pytest.mark.parametrize(("name", "weight"), [("dcscn", 1), ("cnn-l1", 1), ("dcswgan", 100), ("wgan", 100)])
def test_dcscn_learns_by_l1_and_its_opponents_by_the_critic_too(name: str, weight: float) -> None:
    denoised, target, batch = _pair()
    expected = weight * float((denoised - target).abs().mean())
    assert float(recipe(name).loss()(denoised, target, batch)) == pytest.approx(expected, rel=1e-5)
    assert (recipe(name).adversary is None) == (weight == 1)


@pytest.mark.parametrize("name", ["dcswgan", "wgan"])
def test_the_critic_gives_full_dose_the_higher_score(name: str) -> None:
    """It makes ``D(denoised) − D(target)`` small, the network ``−D(denoised)``: swapped, both would learn backwards."""
    adversary = recipe(name).adversary
    assert adversary is not None
    mean = nn.Sequential(nn.Flatten(), nn.Linear(24 * 24, 1, bias=False))
    nn.init.constant_(cast(nn.Linear, mean[1]).weight, 1 / 24**2)
    denoised, target, _ = _pair()
    target = target + 0.5
    terms = adversary.critic_loss(mean, denoised, target, 7)
    assert float(terms.distance.detach()) == pytest.approx(float(target.mean() - denoised.mean()), rel=1e-4)
    assert float(terms.penalty.detach()) == pytest.approx(10 * (1 / 24 - 1) ** 2, rel=1e-4)
    assert float(adversary.generator_loss(mean, denoised).detach()) == pytest.approx(-float(denoised.mean()), rel=1e-4)
    curved = nn.Sequential(nn.Flatten(), nn.Linear(24 * 24, 4), nn.Tanh(), nn.Linear(4, 1))
    drawn = [float(adversary.critic_loss(curved, denoised, target, k).penalty.detach()) for k in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]  # the number of the batch seeds the places


def test_a_decibel_counts_alike_at_every_dose() -> None:
    """The error over the noise level and 5 HU, below three of that by its square: twice both is the same loss."""
    denoised, target, batch = _pair()
    scale = np.array([0.02 + 0.005, 0.08 + 0.005]).reshape(2, 1, 1, 1)
    relative = (denoised - target).numpy().astype(np.float64) / scale
    expected = float(np.mean(np.sqrt(relative**2 + 9)) - 3)
    assert float(relative_charbonnier(denoised, target, batch)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dimensions", [4, 5])
def test_faithful_adds_lost_contrast_with_a_weight_that_rises(dimensions: int) -> None:
    """Of twins whose lesions come out at 0.7, a network loses (1 − 0.7)² of contrast, whatever else it does."""
    generator = torch.Generator().manual_seed(5)
    inserted = torch.zeros(2, 3, 16, 16)
    inserted[:, :, 4:9, 4:9] = 0.03
    shown = inserted[:, None] if dimensions == 5 else inserted[:, 1:2]  # the volume, or the slice in the middle
    target = torch.randn(shown.shape, generator=generator) * 0.05
    denoised = torch.cat([target, target + 0.7 * shown])
    target = torch.cat([target, target + shown])
    batch = Batch(denoised, target, torch.full((4,), 0.02), inserted)
    loss, alone = Faithful(), float(relative_charbonnier(denoised, target, batch))
    for step in (1, CONTRAST_STEPS // 2, CONTRAST_STEPS, 3 * CONTRAST_STEPS):
        loss.steps.fill_(step - 1)
        weight = CONTRAST_WEIGHT * min(step / CONTRAST_STEPS, 1)
        assert float(loss(denoised, target, batch)) == pytest.approx(alone + weight * 0.3**2, rel=1e-4)
    assert float(loss(denoised, target, batch._replace(inserted=torch.empty(0)))) == pytest.approx(alone)


def test_ours_and_the_yardstick_learn_by_the_same_loss() -> None:
    """Else the networks would not be compared."""
    for name in ("quality-2.5d", "fast-2.5d", "st3d", "srresnet3d", "st3d-wide", "srresnet3d-wide", "red-cnn"):
        assert isinstance(recipe(name).loss(), Faithful)
        assert recipe(name).twins
    one, other = recipe("st3d"), recipe("srresnet3d")
    assert (one.schedule, one.batch, one.patch_zyx) == (other.schedule, other.batch, other.patch_zyx)


def _installed(name: str) -> nn.Module:
    return load_network(recipe(name).network(), read_card(name), WEIGHTS)


@pytest.mark.parametrize(("name", "first", "stages"), [("cascade", "drl", 1), ("cascade-3", "cascade", 2)])
def test_a_cascade_begins_with_the_stages_before_it(name: str, first: str, stages: int) -> None:
    how = recipe(name)
    assert how.start is not None
    torch.manual_seed(0)
    network = cast(Cascade, how.network())
    untrained = {key: tensor.clone() for key, tensor in network.stages[-1].state_dict().items()}
    how.start(network, WEIGHTS)
    known = _installed(first)
    theirs = [known] if stages == 1 else list(cast(Cascade, known).stages)
    assert len(network.stages) == stages + 1
    for stage, trained in zip(network.stages, theirs, strict=False):
        state = trained.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in stage.state_dict().items())
    assert all(torch.equal(tensor, untrained[key]) for key, tensor in network.stages[-1].state_dict().items())
    assert {key.split(".")[1] for key, p in network.named_parameters() if p.requires_grad} == {str(stages)}


@pytest.mark.parametrize(("name", "first"), [("dcswgan", "dcscn"), ("wgan", "cnn-l1")])
def test_a_generator_begins_with_the_network_without_a_critic_and_learns(name: str, first: str) -> None:
    how = recipe(name)
    assert how.start is not None
    network = how.network()
    how.start(network, WEIGHTS)
    state = _installed(first).state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(("name", "first"), [("st3d-wide", "st3d"), ("srresnet3d-wide", "srresnet3d")])
def test_a_wide_network_begins_with_what_the_narrow_one_computes(name: str, first: str) -> None:
    how = recipe(name)
    assert how.start is not None
    network = how.network()
    how.start(network, WEIGHTS)
    noisy = 0.04 + 0.03 * torch.randn(1, 1, 3, 12, 10, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = _installed(first)(noisy)
        assert float(to_hu((network(noisy) - expected).abs().max())) < 0.05
    assert float(to_hu((expected - noisy).abs().max())) > 5
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_network_is_given_what_its_card_says() -> None:
    """Slices as channels, the level as a map at its stride, a volume whole; the target is the slice in the middle."""
    given: list[tuple[torch.Tensor, ...]] = []

    class Seen(nn.Module):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            given.append(inputs)
            return inputs[0]

    for name in MODULES:
        how = recipe(name)
        z = how.patch_zyx[0]
        noisy = torch.randn(2, z, 16, 24, generator=torch.Generator().manual_seed(0))
        batch = Batch(noisy, noisy + 1, torch.tensor([0.02, 0.08]))
        _, target = how.predict(Seen(), batch)
        inputs = given.pop()
        if how.card["input"] == "volume":
            assert torch.equal(inputs[0][:, 0], noisy)
            assert torch.equal(target[:, 0], batch.target)
        else:
            assert torch.equal(inputs[0], noisy)
            assert torch.equal(target, batch.target[:, z // 2 : z // 2 + 1])
        assert (len(inputs) == 2) == how.card["noise_map"]
        if how.card["noise_map"]:
            rows, columns = (16, 24) if name == "quality-2.5d" else (8, 12)
            expected = batch.level.view(2, 1, 1, 1).expand(2, 1, rows, columns)
            assert torch.equal(inputs[1], expected)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "hqinet"])
def test_every_recipe_makes_a_step(name: str) -> None:
    """Network, prediction and loss fit together: one step, in the layout of a batch of the recipe.

    But for the full HQINet, which takes a minute and has the code and the loss of the lite one.
    """
    how = recipe(name)
    torch.manual_seed(0)
    z, y, x = how.patch_zyx
    noisy = torch.randn(1, z, min(y, 80), min(x, 80)) * 0.03
    network = how.network().train()
    batch = Batch(noisy, noisy * 0.5, torch.tensor([0.03]))
    denoised, target = how.predict(network, batch)
    assert denoised.shape == target.shape
    value = how.loss()(denoised, target, batch)
    if how.adversary:
        value = value + how.adversary.generator_loss(how.adversary.critic(), denoised)
    value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert how.card["name"] == name
