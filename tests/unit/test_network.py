"""A network as a pipeline: what it is given, what strength and blend do, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from untrained import install

from pipelines.base import OptionRefused, Options, WeightsDamaged, WeightsMissing
from pipelines.network import NetworkPipeline
from pipelines.noise import noise_level
from pipelines.safety import network_input
from pipelines.stresnet import STResNet, st3d
from pipelines.testing import water_volume


class Blind(nn.Module):
    """The mean of 3 × 3 pixels of the slice in the middle; keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        nn.init.constant_(self.mean.weight, 1 / 9)
        self.given: list[torch.Tensor] = []

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        self.given.append(slices)
        middle = slices.shape[1] // 2
        result: torch.Tensor = self.mean(slices[:, middle : middle + 1])
        return result


class Told(Blind):
    """The same, as far as there is noise: all of it from 20 HU on."""

    def forward(self, slices: torch.Tensor, noise_map: torch.Tensor | None = None) -> torch.Tensor:
        assert noise_map is not None
        smooth = super().forward(slices)
        self.given.append(noise_map)
        middle = slices.shape[1] // 2
        part = (noise_map.mean() / 0.02).clamp_max(1)
        return slices[:, middle : middle + 1] * (1 - part) + smooth * part


def _quiet(part: float) -> None:
    assert 0 <= part <= 1


@pytest.fixture
def blind(tmp_path: Path) -> NetworkPipeline:
    install(tmp_path, "blind", Blind(), "slice")
    return NetworkPipeline("blind", Blind(), halo=1, folder=tmp_path)


def test_each_input_is_what_the_card_says(tmp_path: Path) -> None:
    volume = water_volume((4, 30, 22))
    for name, given in (("one", "slice"), ("three", "slab3")):
        install(tmp_path, name, Blind(), given)  # type: ignore[arg-type]  # torch and keyword dicts carry no such types
        network = Blind()
        NetworkPipeline(name, network, stride=4, folder=tmp_path).denoise(volume, Options(), _quiet)
        assert [tuple(x.shape) for x in network.given] == [(1, 1 if given == "slice" else 3, 32, 24)] * 4
        middle = torch.cat(network.given)[:, -1 if given == "slice" else 1, :30, :22]
        assert np.allclose(middle.numpy() * 1000, network_input(volume), atol=1e-3)
        if given == "slab3":
            assert torch.equal(network.given[0][0, 0], network.given[0][0, 1])
            assert torch.equal(network.given[1][0, 2], network.given[2][0, 1])


@pytest.mark.parametrize("given", ["slice", "slab3"])
def test_the_noise_map_is_the_measured_noise_times_strength(tmp_path: Path, given: str) -> None:
    install(tmp_path, "told", Told(), given, noise_map=True)  # type: ignore[arg-type]  # torch and keyword dicts carry no such types
    network = Told()
    pipeline = NetworkPipeline("told", network, stride=2, noise_map_stride=2, folder=tmp_path)
    volume = water_volume((2, 95, 63))
    level = noise_level(volume.hu, volume.padding, volume.geometry.spacing_mm[1])
    assert level == pytest.approx(20, rel=0.15)
    changes = []
    for strength in (0.5, 1.0, 1.5):
        network.given.clear()
        changes.append(float(np.abs(pipeline.denoise(volume, Options(strength=strength), _quiet) - volume.hu).mean()))
        assert [tuple(x.shape) for x in network.given[1::2]] == [(1, 1, 48, 32)] * 2
        assert np.allclose(network.given[1].numpy(), strength * level / 1000)
    assert changes[0] == pytest.approx(changes[1] * 10 / level, rel=0.2)


def test_strength_of_a_blind_network_is_the_part_of_its_change(blind: NetworkPipeline) -> None:
    volume = water_volume((2, 47, 61), padding_hu=-3024.0)
    full = blind.denoise(volume, Options(), _quiet) - volume.hu
    assert float(np.abs(full).mean()) > 5
    for strength, blend in ((0.3, 1.0), (1.0, 0.3), (0.6, 0.5)):
        out = blind.denoise(volume, Options(strength, blend), _quiet)
        assert np.allclose(out - volume.hu, 0.3 * full, atol=2e-3)


@pytest.mark.parametrize("options", [Options(strength=0.0), Options(blend=0.0), Options(0.0, 0.5)])
def test_nothing_wanted_is_the_input_to_the_last_bit(tmp_path: Path, blind: NetworkPipeline, options: Options) -> None:
    install(tmp_path, "told", Told(), "slab3", noise_map=True)
    volume = water_volume((3, 41, 37), padding_hu=-3024.0)
    for pipeline in (blind, NetworkPipeline("told", Told(), folder=tmp_path), st3d()):
        done: list[float] = []
        out = pipeline.denoise(volume, options, done.append)
        assert np.array_equal(out, volume.hu)
        assert not np.shares_memory(out, volume.hu)
        assert done[-1] == 1.0


def test_a_blind_network_cannot_be_told_more_than_the_truth(blind: NetworkPipeline) -> None:
    with pytest.raises(OptionRefused, match=r"strength 1\.2 is out of range; blind takes 0 to 1, because it takes no"):
        blind.denoise(water_volume((1, 32, 32)), Options(strength=1.2), _quiet)


def test_rails_are_around_the_network(blind: NetworkPipeline) -> None:
    volume = water_volume((2, 64, 64), padding_hu=-3024.0)
    out = blind.denoise(volume, Options(), _quiet)
    assert np.array_equal(out[volume.padding], volume.hu[volume.padding])
    metal = volume.hu > 3071
    assert metal.sum() > 10
    assert np.array_equal(out[metal], volume.hu[metal])


def test_what_no_network_is_run_as_is_refused(tmp_path: Path) -> None:
    install(tmp_path, "told", Told(), "volume", noise_map=True)
    with pytest.raises(ValueError, match=r"card of 'told' says input 'volume' and noise_map true.*correct the card"):
        NetworkPipeline("told", Told(), folder=tmp_path)
    install(tmp_path, "blind", Blind(), "slice")
    with pytest.raises(ValueError, match=r"'blind' has halo 1 and stride 2.*leave the halo out"):
        NetworkPipeline("blind", Blind(), halo=1, stride=2, folder=tmp_path)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    install(tmp_path, "st3d", STResNet(features=8, blocks=2), "volume")
    with pytest.raises(WeightsDamaged, match=r"'st3d' are those of another network: install"):
        st3d(tmp_path)
    (tmp_path / "st3d.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsDamaged, match=r"st3d\.safetensors has SHA-256"):
        st3d(tmp_path)


@pytest.mark.parametrize("missing", ["json", "safetensors"])
def test_missing_weights_are_no_missing_file_of_a_series(tmp_path: Path, missing: str) -> None:
    """A `FileNotFoundError` would read as: restore the series from a backup."""
    install(tmp_path, "blind", Blind(), "slice")
    (tmp_path / f"blind.{missing}").unlink()
    told = rf"no weights of 'blind' in {tmp_path.name} \(blind\.{missing} is missing\): train them .* training export"
    with pytest.raises(WeightsMissing, match=told) as caught:
        NetworkPipeline("blind", Blind(), folder=tmp_path)
    assert not isinstance(caught.value, OSError)
    assert str(tmp_path.parent) not in str(caught.value)
