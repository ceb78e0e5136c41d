"""A network as a pipeline: what it is given and when, what strength and blend do, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn
from untrained import FP32, install

from pipelines.base import OptionRefused, Options, WeightsDamaged, WeightsMissing, denoise_volume
from pipelines.network import NetworkPipeline, strips, triples
from pipelines.noise import noise_level
from pipelines.resunet import ResUNet
from pipelines.runtime import read_card
from pipelines.safety import network_input
from pipelines.shipped import quality_2p5d, st3d
from pipelines.stresnet import STResNet
from pipelines.testing import water_volume
from pipelines.torch_engine import load_network
from pipelines.volume import Plane, Volume


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


@dataclass(frozen=True, kw_only=True)
class Watched(Volume):
    """A volume that keeps which slices were asked for."""

    asked: list[int] = field(default_factory=list)

    def plane(self, k: int) -> Plane:
        self.asked.append(k)
        return super().plane(k)


def _same(network: nn.Module) -> nn.Module:
    return network


def watched(slices: int) -> Watched:
    volume = water_volume((slices, 64, 60))
    return Watched(geometry=volume.geometry, slice_uids=(), slice_paths=(), hu=volume.hu, padding=volume.padding)


@pytest.fixture
def blind(tmp_path: Path) -> NetworkPipeline:
    install(tmp_path, "blind", Blind(), "slice", halo=1)
    return NetworkPipeline("blind", Blind, execution=FP32, folder=tmp_path)


def test_each_input_is_what_the_card_says(tmp_path: Path) -> None:
    volume = water_volume((4, 62, 46))
    for name, given in (("one", "slice"), ("three", "slab3")):
        install(tmp_path, name, Blind(), given, halo=60)  # type: ignore[arg-type]  # one of the inputs' names
        network = Blind()
        pipeline = NetworkPipeline(name, partial(_same, network), stride=4, execution=FP32, folder=tmp_path)
        denoise_volume(pipeline, volume)
        assert [tuple(x.shape) for x in network.given] == [(1, 1 if given == "slice" else 3, 64, 48)] * 4
        middle = torch.cat(network.given)[:, -1 if given == "slice" else 1, :62, :46]
        assert np.allclose(middle.numpy() * 1000, network_input(volume), atol=1e-3)
        if given == "slab3":
            assert torch.equal(network.given[0][0, 0], network.given[0][0, 1])
            assert torch.equal(network.given[1][0, 2], network.given[2][0, 1])


@pytest.mark.parametrize("given", ["slice", "slab3"])
def test_the_noise_map_is_the_measured_noise_times_strength(tmp_path: Path, given: str) -> None:
    install(tmp_path, "told", Told(), given, noise_map=True)  # type: ignore[arg-type]  # one of the inputs' names
    network = Told()
    pipeline = NetworkPipeline("told", lambda: network, stride=2, noise_map_stride=2, execution=FP32, folder=tmp_path)
    volume = water_volume((2, 95, 63))
    level = noise_level(volume.hu, volume.padding, volume.geometry.spacing_mm[1])
    assert level == pytest.approx(20, rel=0.15)
    changes = []
    for strength in (0.5, 1.0, 1.5):
        network.given.clear()
        changes.append(float(np.abs(denoise_volume(pipeline, volume, Options(strength=strength)) - volume.hu).mean()))
        assert [tuple(x.shape) for x in network.given[1::2]] == [(1, 1, 48, 32)] * 2
        assert np.allclose(network.given[1].numpy(), strength * level / 1000)
    assert changes[0] == pytest.approx(changes[1] * 10 / level, rel=0.2)


def test_strength_of_a_blind_network_is_the_part_of_its_change(blind: NetworkPipeline) -> None:
    volume = water_volume((2, 47, 61), padding_hu=-3024.0)
    full = denoise_volume(blind, volume) - volume.hu
    assert float(np.abs(full).mean()) > 5
    for strength, blend in ((0.3, 1.0), (1.0, 0.3), (0.6, 0.5)):
        out = denoise_volume(blind, volume, Options(strength, blend))
        assert np.allclose(out - volume.hu, 0.3 * full, atol=2e-3)


@pytest.mark.parametrize("options", [Options(strength=0.0), Options(blend=0.0), Options(0.0, 0.5)])
def test_nothing_wanted_is_the_input_to_the_last_bit(tmp_path: Path, blind: NetworkPipeline, options: Options) -> None:
    install(tmp_path, "told", Told(), "slab3", noise_map=True)
    volume = water_volume((3, 41, 37), padding_hu=-3024.0)
    told = NetworkPipeline("told", Told, execution=FP32, folder=tmp_path)
    for pipeline in (blind, told, st3d(FP32)):
        out = list(pipeline.denoise(volume, options))
        assert np.array_equal(out, volume.hu)
        assert not any(np.shares_memory(plane, volume.hu) for plane in out)


def test_a_blind_network_cannot_be_told_more_than_the_truth(blind: NetworkPipeline) -> None:
    with pytest.raises(OptionRefused, match=r"strength 1\.2 is out of range; blind takes 0 to 1, because it takes no"):
        blind.denoise(water_volume((1, 32, 32)), Options(strength=1.2))


def test_rails_are_around_the_network(blind: NetworkPipeline) -> None:
    volume = water_volume((2, 64, 64), padding_hu=-3024.0)
    out = denoise_volume(blind, volume)
    assert np.array_equal(out[volume.padding], volume.hu[volume.padding])
    metal = volume.hu > 3071
    assert metal.sum() > 10
    assert np.array_equal(out[metal], volume.hu[metal])


def test_what_no_network_is_run_as_is_refused(tmp_path: Path) -> None:
    install(tmp_path, "told", Told(), "volume", noise_map=True)
    with pytest.raises(ValueError, match=r"card of 'told' says input 'volume' and noise_map true.*correct the card"):
        NetworkPipeline("told", Told, execution=FP32, folder=tmp_path)


@pytest.mark.parametrize(("given", "reach"), [("slice", 0), ("slab3", 1), ("volume", 7)])
def test_after_a_look_at_all_a_slice_is_due_when_those_it_depends_on_were_asked_for(
    tmp_path: Path, given: Literal["slice", "slab3", "volume"], reach: int
) -> None:
    def network() -> nn.Module:
        return STResNet(features=4, blocks=2) if given == "volume" else Blind()

    install(tmp_path, "any", network(), given)
    series = watched(20)
    results = NetworkPipeline("any", network, execution=FP32, folder=tmp_path).denoise(series, Options())
    for k, _ in enumerate(results):
        assert series.asked[:20] == list(range(20))  # where the body is, of all
        assert max(series.asked[20:]) == min(k + reach, 19)
    assert sorted(series.asked[20:]) == sorted([*range(20)] * 2)  # for the network, and for the rail


def test_the_noise_is_measured_in_eight_slices_and_not_at_strength_0(tmp_path: Path) -> None:
    install(tmp_path, "told", Told(), "slice", noise_map=True)
    pipeline = NetworkPipeline("told", Told, execution=FP32, folder=tmp_path)
    series = watched(60)
    next(pipeline.denoise(series, Options()))
    spread = np.linspace(0, 59, 10)[1:-1].round().astype(int).tolist()
    # besides, all for where the body is, and the first for the network and for the rail
    assert sorted(series.asked) == sorted([*spread, *range(60), 0, 0])
    series = watched(60)
    next(pipeline.denoise(series, Options(strength=0.0)))
    assert series.asked == [0]


def test_a_slice_larger_than_is_run_at_once_is_run_in_strips(
    blind: NetworkPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = water_volume((2, 64, 48))
    whole = denoise_volume(blind, volume)
    monkeypatch.setattr("pipelines.network.PIXELS_AT_ONCE", 20 * 48)
    engine, seen = blind._planes, []

    def spy(slices: np.ndarray, noise_map: np.ndarray | None) -> np.ndarray:
        seen.append(slices.shape)
        return engine(slices, noise_map)

    monkeypatch.setattr(blind, "_planes", spy)
    assert np.allclose(denoise_volume(blind, volume), whole, atol=1e-3)
    assert seen == [(1, 17, 48), (1, 18, 48), (1, 18, 48), (1, 17, 48)] * 2


def test_triples_replicate_the_ends() -> None:
    def planes(count: int) -> Iterator[np.ndarray]:
        return (np.full((2, 2), k, np.float32) for k in range(count))

    assert [triple[:, 0, 0].tolist() for triple in triples(planes(5))] == [
        [0, 0, 1],
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 4],
        [3, 4, 4],
    ]
    (one,) = triples(planes(1))
    assert one[:, 0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("rows", "height", "halo"), [(1, 4, 3), (10, 4, 3), (16, 4, 1), (7, 100, 19)])
def test_strips_give_each_row_once_with_its_halo(rows: int, height: int, halo: int) -> None:
    seen = []
    for read, keep, place in strips(rows, height, halo):
        source = list(range(rows))[read]
        assert source[keep] == list(range(rows))[place]
        assert source[0] == max(place.start - halo, 0)
        assert source[-1] == min(place.stop + halo, rows) - 1
        seen += source[keep]
    assert seen == list(range(rows))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    install(tmp_path, "quality-2.5d", ResUNet((8, 12, 16)), "slab3", noise_map=True)
    with pytest.raises(WeightsDamaged, match=r"'quality-2\.5d' are those of another network: install"):
        quality_2p5d(FP32, tmp_path)
    install(tmp_path, "st3d", STResNet(features=8, blocks=2), "volume")
    with pytest.raises(WeightsDamaged, match=r"'st3d' are those of another network: install"):
        load_network(STResNet(), read_card("st3d", tmp_path), tmp_path)
    install(tmp_path, "st3d", Blind(), "volume")
    with pytest.raises(WeightsDamaged, match=r"no weights of STResNet .* install weights and card again"):
        denoise_volume(st3d(FP32, tmp_path), water_volume((1, 64, 64)))
    (tmp_path / "st3d.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsDamaged, match=r"st3d\.safetensors has SHA-256"):
        st3d(FP32, tmp_path)


@pytest.mark.parametrize("missing", ["json", "safetensors"])
def test_missing_weights_are_no_missing_file_of_a_series(tmp_path: Path, missing: str) -> None:
    """A `FileNotFoundError` would read as: restore the series from a backup."""
    install(tmp_path, "blind", Blind(), "slice")
    (tmp_path / f"blind.{missing}").unlink()
    told = rf"no weights of 'blind' in {tmp_path.name} \(blind\.{missing} is missing\): train them .* training export"
    with pytest.raises(WeightsMissing, match=told) as caught:
        NetworkPipeline("blind", Blind, execution=FP32, folder=tmp_path)
    assert not isinstance(caught.value, OSError)
    assert str(tmp_path.parent) not in str(caught.value)
