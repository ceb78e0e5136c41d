"""RED-CNN: its size, its layers, and that strips change nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from untrained import FP32, install, reach, through_rails

from pipelines import network as running
from pipelines.base import denoise_volume
from pipelines.redcnn import HALO, REDCNN
from pipelines.safety import network_input
from pipelines.shipped import red_cnn
from pipelines.testing import water_volume
from training.measuring.cases import volume_of


def _loud(features: int) -> REDCNN:
    """With a last layer that counts."""
    torch.manual_seed(0)
    network = REDCNN(features).eval().requires_grad_(False)
    last = network.deconvs[-1]
    assert isinstance(last, nn.ConvTranspose2d)
    last.weight *= 30
    return network


def test_number_of_parameters() -> None:
    """Eight layers of 96 to 96, one from 1 and one to 1, 5 × 5, with biases: as published."""
    expected = 8 * (25 * 96 * 96 + 96) + (25 * 96 + 96) + (25 * 96 + 1)
    assert sum(p.numel() for p in REDCNN().parameters()) == expected == 1_848_865


def test_receptive_field() -> None:
    assert reach(REDCNN(2), 61) == (2 * HALO + 1, 2 * HALO + 1) == (41, 41)


def test_forward_is_the_published_order_of_layers() -> None:
    """A transposed convolution is a convolution of the padded image by the mirrored kernel."""
    network = _loud(6).double()
    x = torch.randn(1, 1, 31, 28, dtype=torch.double)
    w = network.state_dict()

    def down(k: int, y: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(y, w[f"convs.{k}.weight"], w[f"convs.{k}.bias"]).relu()

    def up(k: int, y: torch.Tensor) -> torch.Tensor:
        mirrored = w[f"deconvs.{k}.weight"].flip(2, 3).transpose(0, 1)
        return functional.conv2d(functional.pad(y, (4, 4, 4, 4)), mirrored, w[f"deconvs.{k}.bias"])

    two = down(1, down(0, x))
    four = down(3, down(2, two))
    y = (up(0, down(4, four)) + four).relu()
    y = (up(2, up(1, y).relu()) + two).relu()
    y = up(4, up(3, y).relu()) + x
    assert float((y - x).std()) > 0.1
    assert torch.allclose(network(x), y, atol=1e-12)


def test_the_result_may_be_negative() -> None:
    """Air is −1: the published last ReLU would make it water."""
    torch.manual_seed(0)
    air = torch.full((1, 1, 32, 32), -1.0)
    assert float((REDCNN()(air) + 1).detach().abs().max()) < 0.2


def test_strips_are_the_whole_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within rounding: 0.01 HU; with a row less around a strip they are not."""
    hu = np.random.default_rng(0).normal(0, 100, (2, 101, 77)).astype(np.float32)
    volume = volume_of(hu, 0.7, 2.0)
    made = {}
    for halo in (HALO, HALO - 1):
        install(tmp_path, "red-cnn", _loud(96), "slice", halo=halo)
        pipeline = red_cnn(FP32, tmp_path)
        whole = denoise_volume(pipeline, volume)
        with monkeypatch.context() as patched:
            patched.setattr(running, "PIXELS_AT_ONCE", 30 * 77)
            made[halo] = float(np.abs(denoise_volume(pipeline, volume) - whole).max())
        assert float(np.abs(whole - hu).mean()) > 3
    assert made[HALO] < 0.01 < made[HALO - 1]


def test_pipeline_runs_it(tmp_path: Path) -> None:
    network = _loud(96).half().float()  # as the weights on disk
    install(tmp_path, "red-cnn", network, "slice")
    volume = water_volume((1, 45, 37))
    given = torch.from_numpy(network_input(volume)[:, None] / 1000)
    expected = through_rails(volume, network(given)[:, 0].numpy() * 1000)
    out = denoise_volume(red_cnn(FP32, tmp_path), volume)
    assert float(np.abs(out - volume.hu).mean()) > 1
    assert np.allclose(out, expected, atol=0.05)
