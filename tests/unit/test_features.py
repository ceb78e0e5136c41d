"""Perceptual loss: each backbone against plain convolutions in float64, its files, and how it is weighted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ct_builder import write_series
from numpy.typing import NDArray
from plain_convolution import convolve, max_pool
from safetensors.torch import load_file

from training import autoencoder
from training.autoencoder import CtAutoEncoder, patches, reconstruction_rmse_hu, train_autoencoder
from training.features import (
    CT_AE_WEIGHTS,
    VGG_VARIABLE,
    FeatureLoss,
    PerceptualLoss,
    ShareWeight,
    WeightsMissing,
)
from training.losses import mse
from training.metrics import SOFT_TISSUE
from training.sources.phantom import chest_abdomen

Float64 = NDArray[np.float64]

VGG_CONVOLUTIONS = {
    # index in torchvision's features, inputs, outputs: configurations D and E of the paper
    "vgg16": [
        *((0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256)),
        *((17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512)),
    ],
    "vgg19": [
        *((0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256)),
        *((16, 256, 256), (19, 256, 512), (21, 512, 512), (23, 512, 512), (25, 512, 512), (28, 512, 512)),
        *((30, 512, 512), (32, 512, 512), (34, 512, 512)),
    ],
}
LAST_OF_BLOCK = {"vgg16": (2, 7, 14, 21, 28), "vgg19": (2, 7, 16, 25, 34)}


def vgg_state(backbone: str, deepest: int) -> dict[str, torch.Tensor]:
    """Random weights up to the convolution `deepest`; beyond, one zero seen from everywhere, to keep the file small."""
    generator = torch.Generator().manual_seed(4)
    state: dict[str, torch.Tensor] = {}
    for index, inputs, outputs in VGG_CONVOLUTIONS[backbone]:
        weight, bias = torch.zeros(()).expand(outputs, inputs, 3, 3), torch.zeros(()).expand(outputs)
        if index <= deepest:
            weight = torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
            bias = torch.randn(outputs, generator=generator) * 0.1
        state |= {f"features.{index}.weight": weight, f"features.{index}.bias": bias}
    return state | {"classifier.0.weight": torch.zeros(1)}


def images(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and target in network units, within and around the soft-tissue window."""
    generator = torch.Generator().manual_seed(seed)
    target = 0.04 + 0.2 * torch.randn(shape, generator=generator)
    return target + 0.05 * torch.randn(shape, generator=generator), target


def level_distance(one: list[Float64], two: list[Float64]) -> float:
    """L_P of one image as the paper writes it, one level after the other."""
    total = 0.0
    for a, b in zip(one, two, strict=True):
        d, h, w = a.shape
        total += 1 / (h * w * d) * float(((a - b) ** 2).sum())
    return total


def vgg_levels(image: Float64, state: dict[str, torch.Tensor], backbone: str, blocks: tuple[int, ...]) -> list[Float64]:
    mean, sd = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    unit = np.clip((1000 * image + 160) / 400, 0, 1)
    x = np.stack([(unit - m) / s for m, s in zip(mean, sd, strict=True)])
    found = {}
    for index, _, _ in VGG_CONVOLUTIONS[backbone]:
        x = convolve(x, state[f"features.{index}.weight"].numpy(), state[f"features.{index}.bias"].numpy())
        x = np.maximum(x, 0)
        if index in LAST_OF_BLOCK[backbone]:
            block = LAST_OF_BLOCK[backbone].index(index) + 1
            found[block] = x
            if block == max(blocks):
                break
            x = max_pool(x, 2, 2)
    return [found[block] for block in blocks]


@pytest.mark.parametrize(
    ("backbone", "layers"), [("vgg16", (1, 2, 3, 4)), ("vgg16", (1, 2, 3)), ("vgg19", (3,)), ("vgg19", (2, 4))]
)
def test_vgg_loss_is_the_papers_sum(backbone: Any, layers: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "vgg.pth"
    state = vgg_state(backbone, LAST_OF_BLOCK[backbone][max(layers) - 1])
    torch.save(state, path)
    loss = FeatureLoss(backbone, path, layers)
    assert loss.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    output, target = images(2, 1, 16, 16)
    one, two = (
        [vgg_levels(image.double().numpy()[0], state, backbone, layers) for image in batch]
        for batch in (output, target)
    )
    expected = np.mean([level_distance(a, b) for a, b in zip(one, two, strict=True)])
    assert loss(output, target).item() == pytest.approx(expected, rel=1e-4)


def test_vgg_defaults_to_four_blocks_and_may_skip_the_imagenet_statistics(tmp_path: Path) -> None:
    path = tmp_path / "vgg.pth"
    torch.save(state := vgg_state("vgg16", 21), path)
    assert len(FeatureLoss("vgg16", path).features(torch.zeros(1, 1, 16, 16))) == 4
    raw = FeatureLoss("vgg16", path, (1,), imagenet_norm=False).features(torch.full((1, 1, 8, 8), 0.14))
    x = np.full((3, 8, 8), 0.75)  # 140 HU of [−160, 240]
    for index in (0, 2):
        weight, bias = (state[f"features.{index}.{name}"].numpy() for name in ("weight", "bias"))
        x = np.maximum(convolve(x, weight, bias), 0)
    assert np.allclose(raw[0][0].numpy(), x, atol=1e-4)


def test_vgg_file_by_path_by_environment_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VGG_VARIABLE, raising=False)
    with pytest.raises(WeightsMissing, match=r"features\.0\.weight.*LDCT_VGG_WEIGHTS.*ct-ae is shipped"):
        FeatureLoss("vgg16")
    one, two = tmp_path / "one.pth", tmp_path / "two.pth"
    torch.save(vgg_state("vgg16", 2), one)
    torch.save(vgg_state("vgg19", 2), two)
    monkeypatch.setenv(VGG_VARIABLE, str(one))
    assert FeatureLoss("vgg16", layers=(1,)).sha256 == hashlib.sha256(one.read_bytes()).hexdigest()
    assert FeatureLoss("vgg19", two, (1,)).sha256 == hashlib.sha256(two.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=r"one\.pth has not the layers of vgg19"):
        FeatureLoss("vgg19", layers=(1,))
    monkeypatch.setenv(VGG_VARIABLE, str(tmp_path / "none.pth"))
    with pytest.raises(WeightsMissing, match=r"none\.pth"):
        FeatureLoss("vgg16")


class Harmful:
    """What a hostile file would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


@pytest.mark.parametrize("content", [Harmful(), {"features.0.weight": Harmful()}, [1, 2], {"a": 1}])
def test_files_that_are_no_state_dict(content: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"bad\.pth .*save the state_dict\(\) alone"):
        FeatureLoss("vgg16", path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad\.pth is no PyTorch state dict"):
        FeatureLoss("vgg16", path)
    assert capsys.readouterr().out == ""


def encoder_levels(image: Float64, state: dict[str, torch.Tensor]) -> list[Float64]:
    x, found = image[None], []
    for index, stride in ((0, 1), (2, 2), (4, 2)):
        weight, bias = (state[f"{index}.{name}"].numpy() for name in ("weight", "bias"))
        x = convolve(x, weight, bias, stride, mode="reflect")
        x = np.where(x > 0, x, 0.1 * x)
        found.append(x)
    return found


@pytest.mark.parametrize("backbone", ["ct-ae", "random"])
@pytest.mark.parametrize("layers", [None, (1, 3)])
def test_encoder_loss_is_the_sum_over_its_levels(backbone: Any, layers: tuple[int, ...] | None) -> None:
    loss = FeatureLoss(backbone, layers=layers)
    state = loss.stack.state_dict()
    if backbone == "ct-ae":
        shipped = load_file(CT_AE_WEIGHTS)
        state = {name: shipped[f"encoder.{name}"].float() for name in state}
    output, target = images(2, 1, 3, 16, 20)  # volumes: every plane is an image
    planes = [v.double().numpy().reshape(6, 16, 20) for v in (output, target)]
    chosen = [layer - 1 for layer in layers or (1, 2, 3)]
    one, two = ([[encoder_levels(p, state)[i] for i in chosen] for p in v] for v in planes)
    expected = np.mean([level_distance(a, b) for a, b in zip(one, two, strict=True)])
    assert loss(output, target).item() == pytest.approx(expected, rel=1e-4)


def test_random_backbone_keeps_the_mean_square_and_comes_from_its_seed() -> None:
    levels = FeatureLoss("random", seed=3).features(
        torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    )
    assert [float(level.square().mean()) for level in levels] == pytest.approx([1, 1, 1], rel=0.25)
    one, two, other = (FeatureLoss("random", seed=seed).stack.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["0.weight"], other["0.weight"])


def test_shipped_encoder_is_the_one_of_its_card_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    card = json.loads(CT_AE_WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    assert FeatureLoss().sha256 == card["weights_sha256"] == hashlib.sha256(CT_AE_WEIGHTS.read_bytes()).hexdigest()
    assert card["parameters"] == 185_217 == sum(p.numel() for p in CtAutoEncoder().parameters())
    assert all(source["attribution"] and source["licence"] for source in card["training"]["series"])
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes(CT_AE_WEIGHTS.read_bytes())
    copy.with_suffix(".json").write_text(json.dumps(card), encoding="utf-8")
    assert FeatureLoss(weights=copy).sha256 == card["weights_sha256"]
    copy.write_bytes(copy.read_bytes()[:-2] + b"\x00\x00")
    with pytest.raises(ValueError, match="its card says"):
        FeatureLoss(weights=copy)
    with pytest.raises(WeightsMissing, match=r"python -m training\.autoencoder"):
        FeatureLoss(weights=tmp_path / "none.safetensors")


def test_shipped_auto_encoder_reproduces_a_phantom_no_training_saw() -> None:
    network = CtAutoEncoder()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(CT_AE_WEIGHTS).items()})
    truth = chest_abdomen(2, 256, 0.8, 2.5, seed=910_002).astype(np.float16)
    # its structure has a standard deviation of hundreds of HU; the card has the error on whole volumes
    assert reconstruction_rmse_hu(network, truth) < 25 < truth.astype(np.float32).std() / 10


def test_frozen_and_differentiable_in_the_output_alone() -> None:
    loss = FeatureLoss()
    output, target = (v.requires_grad_() for v in images(1, 1, 16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(output, target)
    assert value.dtype == torch.float32
    assert value.item() == loss(output, target).item()
    value.backward()
    assert target.grad is None
    assert not any(p.requires_grad or p.grad is not None for p in loss.parameters())
    assert output.grad is not None
    direction, h = output.grad / output.grad.norm(), 0.01
    with torch.no_grad():
        rise = (loss(output + h * direction, target) - loss(output - h * direction, target)).item() / (2 * h)
    assert rise == pytest.approx(output.grad.norm().item(), rel=0.02)


def test_choices_that_do_not_exist() -> None:
    wrong: Any = "resnet"
    with pytest.raises(ValueError, match="choose one of ct-ae"):
        FeatureLoss(wrong)
    with pytest.raises(ValueError, match="choose from 1 to 3"):
        FeatureLoss("random", layers=(1, 4))
    with pytest.raises(ValueError, match="leave weights out"):
        FeatureLoss("random", Path("x"))
    with pytest.raises(ValueError, match="below 1"):
        ShareWeight(1.0)


def test_perceptual_loss_with_a_printed_weight() -> None:
    features = FeatureLoss("random")
    output, target = images(2, 1, 16, 16)
    expected = mse(output, target).item() + 0.016 * features(output, target).item()
    assert PerceptualLoss(features, 0.016)(output, target).item() == pytest.approx(expected, rel=1e-6)


def test_weight_by_share_is_measured_and_then_fixed() -> None:
    features = FeatureLoss("random")
    loss = PerceptualLoss(features, weight := ShareWeight(0.95, batches=3))
    sums = np.zeros(2)
    for seed in range(3):
        output, target = images(2, 1, 16, 16, seed=seed)
        output = target + (seed + 1) * (output - target)
        parts = np.array([mse(output, target).item(), features(output, target).item()])
        sums += parts
        factor = 0.95 / 0.05 * sums[0] / sums[1]
        assert loss(output.requires_grad_(), target).item() == pytest.approx(parts[0] + factor * parts[1], rel=1e-5)
    assert factor * sums[1] / (sums[0] + factor * sums[1]) == pytest.approx(0.95)
    output, target = images(2, 1, 16, 16, seed=9)
    parts = np.array([mse(output, target).item(), features(output, target).item()])
    assert loss(output.requires_grad_(), target).item() == pytest.approx(parts[0] + factor * parts[1], rel=1e-5)
    # a resumed training goes on with it
    resumed = ShareWeight(0.95, batches=3)
    resumed.load_state_dict(weight.state_dict())
    again = PerceptualLoss(features, resumed)(output.detach(), target)
    assert again.item() == pytest.approx(parts[0] + factor * parts[1], rel=1e-5)


def test_validation_is_not_measured() -> None:
    weight = ShareWeight(0.5, batches=2)
    one, two = torch.tensor(1.0), torch.tensor(4.0)
    assert weight(one, two).item() == 0.25
    with torch.no_grad():
        assert weight(100 * one, two).item() == 0.25
    assert weight.eval()(100 * one, two).item() == 0.25
    assert weight.seen.item() == 1


def test_auto_encoder_learns_and_sees_the_same_patches_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "BATCH", 4)
    rng = np.random.default_rng(0)
    volumes = [[rng.normal(40, 60, (3, 80, 80)).astype(np.float16)], [np.full((2, 64, 70), -200, np.float16)]]
    batch = patches(volumes, 3, 1)
    assert torch.equal(batch, patches(volumes, 3, 1))
    assert batch.shape == (4, 1, 64, 64)
    flat = [bool((patch == -0.2).all()) for step in range(80) for patch in patches(volumes, step, 1)]
    assert 0.4 < np.mean(flat) < 0.6
    water = volumes[1][0][:, :64, :64]
    before, after = (reconstruction_rmse_hu(train_autoencoder(volumes, steps), water) for steps in (1, 12))
    assert after < 0.6 * before < 0.6 * 250


def test_training_the_auto_encoder_writes_weights_with_their_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = np.random.default_rng(0).normal(40, 60, (2, 64, 64)).astype(np.float16)
    monkeypatch.setattr(autoencoder, "_phantom", lambda seed: small)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for name in ("teaches", "held out"):
        write_series(tmp_path / "secret" / name, np.full((2, 64, 64), 30), name=name)
        (tmp_path / "secret" / name / "notes.txt").write_text("no image", encoding="utf-8")
    series, held_out = (str(tmp_path / "secret" / name) for name in ("teaches", "held out"))
    autoencoder.main(["--out", f"{tmp_path}/ae/", "--series", f"{series}/", "--held-out", held_out, "--steps", "1"])
    text = (tmp_path / "ae" / "ct-ae.json").read_text(encoding="utf-8")
    assert "secret" not in text
    card = json.loads(text)
    assert "--out ae --series teaches --held-out 'held out' --steps 1" in card["training"]["command"]
    assert [source["licence"] for source in card["training"]["series"]] == ["not stated"]
    assert card["measured"]["reconstruction_rmse_hu"]["held out"] > 0
    FeatureLoss(weights=tmp_path / "ae" / "ct-ae.safetensors")  # what the card says of the file holds
    with pytest.raises(SystemExit, match="2 CT series in"):
        autoencoder.main(["--out", str(tmp_path / "two"), "--series", str(tmp_path / "secret")])


def test_window_reaches_vgg(tmp_path: Path) -> None:
    path = tmp_path / "vgg.pth"
    torch.save(vgg_state("vgg16", 2), path)
    loss = FeatureLoss("vgg16", path, (1,), window=SOFT_TISSUE)
    low, lower = torch.full((1, 1, 8, 8), -0.16), torch.full((1, 1, 8, 8), -0.9)
    assert loss(lower, low).item() == 0
    assert loss(low + 0.1, low).item() > 0
