"""LPIPS with random weights: against the definition in float64 numpy, and against the lpips package where it is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from plain_convolution import convolve, max_pool

from training.features import WeightsMissing
from training.measuring.lpips import BACKBONE_FILE, HEADS_FILE, Lpips, digests, lpips
from training.metrics import LUNG, SOFT_TISSUE, Window

Float64 = NDArray[np.float64]

# index in torchvision's features, inputs, outputs, kernel, stride, padding; pooling of 3 by 2 before the next two
CONVOLUTIONS = [
    (0, 3, 64, 11, 4, 2),
    (3, 64, 192, 5, 1, 2),
    (6, 192, 384, 3, 1, 1),
    (8, 384, 256, 3, 1, 1),
    (10, 256, 256, 3, 1, 1),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of random weights under the published names and keys."""
    folder = tmp_path_factory.mktemp("lpips")
    generator = torch.Generator().manual_seed(6)
    backbone = {"classifier.1.weight": torch.zeros(1)}
    heads = {}
    for level, (index, inputs, outputs, k, _, _) in enumerate(CONVOLUTIONS):
        scale = (2 / (k * k * inputs)) ** 0.5
        backbone[f"features.{index}.weight"] = torch.randn(outputs, inputs, k, k, generator=generator) * scale
        backbone[f"features.{index}.bias"] = torch.randn(outputs, generator=generator) * 0.1
        heads[f"lin{level}.model.1.weight"] = torch.rand(1, outputs, 1, 1, generator=generator)
    torch.save(backbone, folder / BACKBONE_FILE)
    torch.save(heads, folder / HEADS_FILE)
    return folder


@pytest.fixture(scope="module")
def pair() -> tuple[Float64, Float64]:
    """Image and truth, (2, 64, 72) HU."""
    rng = np.random.default_rng(8)
    truth = rng.normal(-300, 400, (2, 64, 72))
    return truth + rng.normal(0, 100, truth.shape), truth


def levels(plane: Float64, window: Window, state: dict[str, torch.Tensor]) -> list[Float64]:
    unit = (plane.clip(window.low_hu, window.high_hu) - window.low_hu) / (window.high_hu - window.low_hu)
    shift, scale = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
    x = np.stack([(2 * unit - 1 - a) / b for a, b in zip(shift, scale, strict=True)])
    found = []
    for level, (index, _, _, _, stride, padding) in enumerate(CONVOLUTIONS):
        if level in (1, 2):
            x = max_pool(x, 3, 2)
        kernel, bias = (state[f"features.{index}.{name}"].numpy() for name in ("weight", "bias"))
        x = np.maximum(convolve(x, kernel, bias, stride, padding), 0)
        found.append(x)
    return found


def definition(image: Float64, truth: Float64, window: Window, folder: Path) -> float:
    """Equation 1 of the paper, place by place, for one slice."""
    state, heads = (torch.load(folder / name, weights_only=True) for name in (BACKBONE_FILE, HEADS_FILE))
    total = 0.0
    for level, (a, b) in enumerate(zip(levels(image, window, state), levels(truth, window, state), strict=True)):
        w = heads[f"lin{level}.model.1.weight"].numpy().ravel().astype(np.float64)
        places = [(i, j) for i in range(a.shape[1]) for j in range(a.shape[2])]
        for i, j in places:
            u, v = a[:, i, j] / np.linalg.norm(a[:, i, j]), b[:, i, j] / np.linalg.norm(b[:, i, j])
            total += float(w @ (u - v) ** 2) / len(places)
    return total


@pytest.mark.parametrize("window", [LUNG, SOFT_TISSUE], ids=str)
def test_lpips_is_its_definition(weights: Path, pair: tuple[Float64, Float64], window: Window) -> None:
    slices = [definition(a, b, window, weights) for a, b in zip(*pair, strict=True)]
    assert lpips(*pair, window, weights) == pytest.approx(np.mean(slices), rel=1e-4)
    assert lpips(pair[0][0], pair[1][0], window, weights) == pytest.approx(slices[0], rel=1e-4)
    assert slices[0] > 0.01


@pytest.mark.filterwarnings("ignore::UserWarning")  # torchvision, on the way the package calls it
def test_lpips_is_that_of_the_package(weights: Path, pair: tuple[Float64, Float64]) -> None:
    reference = pytest.importorskip("lpips").LPIPS(pretrained=False, pnet_rand=True, verbose=False)
    state, heads = (torch.load(weights / name, weights_only=True) for name in (BACKBONE_FILE, HEADS_FILE))
    # the package spreads torchvision's layers, under their old numbers, over five slices
    slices = {f"net.slice{level + 1}.{c[0]}": c[0] for level, c in enumerate(CONVOLUTIONS)}
    known = {
        f"{name}.{part}": state[f"features.{i}.{part}"] for name, i in slices.items() for part in ("weight", "bias")
    }
    missing, unexpected = reference.load_state_dict(known | heads, strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith("net.") or name in heads]
    planes = [torch.from_numpy(2 * LUNG.normalise(v) - 1).float()[:, None].expand(-1, 3, -1, -1) for v in pair]
    with torch.no_grad():
        expected = reference(*planes).mean().item()
    assert lpips(*pair, LUNG, weights) == pytest.approx(expected, rel=1e-4)


def test_weights_are_told_apart_by_their_digests(weights: Path) -> None:
    expected = {name: hashlib.sha256((weights / name).read_bytes()).hexdigest() for name in (BACKBONE_FILE, HEADS_FILE)}
    assert digests(weights) == expected


def test_equal_images_and_what_is_clipped(weights: Path, pair: tuple[Float64, Float64]) -> None:
    assert lpips(pair[1], pair[1], LUNG, weights) == 0
    metal = pair[1].copy()
    metal[:, 30:34, 30:34] = 400
    assert lpips(np.where(metal == 400, 9000, metal), metal, LUNG, weights) == 0


def test_without_weights_it_says_what_is_needed(tmp_path: Path, weights: Path) -> None:
    image = np.zeros((40, 40))
    with pytest.raises(WeightsMissing, match=r"alexnet-owt-7be5be79\.pth.*v0\.1/alex\.pth.*nothing is downloaded"):
        lpips(image, image, LUNG, tmp_path)
    (tmp_path / BACKBONE_FILE).write_bytes((weights / BACKBONE_FILE).read_bytes())
    with pytest.raises(WeightsMissing, match=r"no alex\.pth"):
        lpips(image, image, LUNG, tmp_path)
    torch.save({"lin0.weight": torch.zeros(1)}, tmp_path / HEADS_FILE)
    with pytest.raises(ValueError, match="not what its name says"):
        Lpips(tmp_path)


def test_images_that_do_not_fit(weights: Path) -> None:
    image = np.zeros((40, 40))
    with pytest.raises(ValueError, match="two equal images"):
        lpips(image, image[:, :39], LUNG, weights)
    with pytest.raises(ValueError, match="at least 31 × 31"):
        lpips(image[:30], image[:30], LUNG, weights)
    assert lpips(image[:31, :31], image[:31, :31] - 100, LUNG, weights) > 0
