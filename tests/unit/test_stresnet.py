"""STResNet: its size, its reach, and that the shipped weights denoise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipelines.base import Options, Pipeline, load
from pipelines.stresnet import STResNet
from training.evaluate import measure, phantom_volume
from training.phantom import chest_abdomen
from training.simulate import low_dose

Array = NDArray[np.float32]
PIXEL_MM = 0.75


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load("st3d")


@pytest.fixture(scope="module")
def pair() -> tuple[Array, Array]:
    """Truth and quarter dose of a slab that no training saw; the body is wider than the image."""
    truth = chest_abdomen(6, 256, PIXEL_MM, 2.5, seed=910_001)
    return truth, low_dose(truth, PIXEL_MM, 0.25, seed=910_001)


def _quiet(part: float) -> None:
    assert 0 <= part <= 1


def test_number_of_parameters() -> None:
    """Counted by hand: 9 weights per pair of channels across, 3 along, and a bias for each output."""

    def pair(inputs: int, outputs: int) -> int:
        return inputs * outputs * 9 + outputs + outputs * outputs * 3 + outputs

    expected = pair(1, 32) + 17 * pair(32, 32) + pair(32, 1)
    assert sum(p.numel() for p in STResNet().parameters()) == expected == 213_701


def test_untrained_it_is_the_identity() -> None:
    x = torch.randn(1, 1, 4, 9, 9)
    assert torch.equal(STResNet()(x), x)


def test_halo_is_the_reach_of_one_voxel() -> None:
    torch.manual_seed(0)
    network = STResNet(features=4, blocks=2).double()
    for parameter in network.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 1)  # all positive: nothing cancels, no ReLU closes
    x = torch.zeros(1, 1, 1, 41, 41, dtype=torch.double)
    pulse = x.clone()
    pulse[..., 20, 20] = 1
    reached = (network(pulse) - network(x)).abs()[0, 0, 0].amax(1) > 1e-12
    assert network.halo == 7
    assert reached.nonzero().flatten().tolist() == list(range(20 - 7, 20 + 8))


def test_shipped_weights_denoise(pipeline: Pipeline, pair: tuple[Array, Array]) -> None:
    truth, noisy = pair
    measured = measure(noisy, pipeline.denoise(phantom_volume(noisy), Options(), _quiet), truth)
    for before, after in measured["psnr_db"].values():
        assert after - before > 3
    for name, tissue in measured["tissues"].items():
        if tissue["voxels"] > 1000:
            assert abs(tissue["mean_shift_hu"]) < 1, name
            assert tissue["error_sd_after_hu"] < tissue["error_sd_before_hu"], name


def test_same_input_same_output_and_blend(pipeline: Pipeline, pair: tuple[Array, Array]) -> None:
    volume = phantom_volume(np.ascontiguousarray(pair[1][:3, 60:151, 40:123]))
    one, two, none, half = (pipeline.denoise(volume, Options(blend=blend), _quiet) for blend in (1.0, 1.0, 0.0, 0.5))
    assert np.array_equal(one, two)
    assert np.array_equal(none, volume.hu)
    assert np.allclose(half, (one + volume.hu) / 2, atol=1e-3)


def test_one_slice(pipeline: Pipeline, pair: tuple[Array, Array]) -> None:
    truth, noisy = (np.ascontiguousarray(hu[:1]) for hu in pair)
    out = pipeline.denoise(phantom_volume(noisy), Options(), _quiet)
    assert float(np.std(out - truth)) < 0.9 * float(np.std(noisy - truth))
