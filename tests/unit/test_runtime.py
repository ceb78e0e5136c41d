"""Cards are read, weights that are not theirs are refused, odd sizes and progress are kept."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from untrained import damaged

from pipelines import runtime
from pipelines.base import WeightsDamaged
from pipelines.ffdnet import FFDNet
from pipelines.runtime import load_network, read_card, run_planes, run_volume
from pipelines.streaming import triples
from pipelines.stresnet import STResNet

NAMES = sorted(card.stem for card in runtime.WEIGHTS.glob("*.json"))
"""All networks whose weights ship."""


def test_defaults_ship() -> None:
    assert {"fast-2.5d", "st3d"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_card_is_read_and_knows_its_weights(name: str) -> None:
    card = read_card(name)
    assert card.name == name
    assert card.precision == "fp32"
    assert card.hu_window == (-1024.0, 4000.0)
    assert len(card.patch_zyx) == len(card.overlap_zyx) == 3
    assert card.valid_for.pixel_spacing_mm == (0.4, 1.5)
    assert card.measured


@pytest.mark.parametrize("name", NAMES)
def test_card_and_page_name_no_machine(name: str) -> None:
    text = (runtime.WEIGHTS / f"{name}.json").read_text(encoding="utf-8")
    assert not re.search(r'[ "=]/[a-z]', text)
    assert all(source["attribution"] for source in json.loads(text)["training"]["series"])


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    damaged("st3d", tmp_path)
    with pytest.raises(WeightsDamaged, match=r"'st3d' are damaged: st3d.safetensors has SHA-256 .* install"):
        load_network(STResNet(), read_card("st3d", tmp_path), tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"name": "st3d"', b"[]", b"{}", b"\xff", b'{"patch_zyx": 3}'])
def test_damaged_cards_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "st3d.json").write_bytes(content)
    with pytest.raises(WeightsDamaged, match=r"^the card of 'st3d' is damaged \(st3d.json, .*\): install"):
        read_card("st3d", tmp_path)


def test_progress_goes_through_strips_and_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "PIXELS_AT_ONCE", 41 * 24)
    network = STResNet(features=8, blocks=2).eval()
    done: list[float] = []
    run_volume(network.stream, network.halo, np.zeros((6, 67, 41), np.float32), done.append)
    assert len(done) == 3 * 6  # strips of at most 24 rows, slices
    assert done == sorted(done)
    assert done[-1] == 1.0


def test_odd_sizes_pass_through_the_stride() -> None:
    torch.manual_seed(0)
    network = FFDNet(features=8, depth=3).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    hu = np.random.default_rng(0).normal(0, 300, (3, 31, 45)).astype(np.float32)
    out = run_planes(network, triples, hu, lambda part: None, noise_hu=20.0, stride=2, noise_map_stride=2)
    even = np.concatenate([hu, hu[:, -1:]], 1)
    even = np.concatenate([even, even[:, :, -1:]], 2)
    slices = torch.from_numpy(np.stack([even[0], even[1], even[2]])[None] / 1000)
    with torch.inference_mode():
        centre = network(slices, torch.full((1, 1, 16, 23), 0.02))[0, 0].numpy() * 1000
    assert np.allclose(out[1], centre[:31, :45], atol=0.01)
