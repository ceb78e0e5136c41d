"""What the card of a recipe says about a network is what the factory of its pipeline knows."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import cast

import pytest
import torch

from pipelines import network
from pipelines.base import ENTRY_POINT_GROUP
from pipelines.network import NetworkPipeline, Streamed
from training.recipes import MODULES, recipe

FACTORIES = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name in MODULES}


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_overlap_is_the_halo(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card tells people what the factory tells `pipelines.runtime`, which cuts strips by it."""
    learnt = {"version": "1", "hu_window": [-1024, 4000], "precision": "fp32", "weights_sha256": ""}
    (tmp_path / f"{name}.json").write_text(json.dumps(recipe(name).card | learnt), encoding="utf-8")
    monkeypatch.setattr(network, "load_network", lambda untrained, card, folder: untrained)
    with torch.device("meta"):  # the full HQINet takes seconds to fill
        pipeline: NetworkPipeline = FACTORIES[name].load()(tmp_path)
    slices, *plane = pipeline.card.overlap_zyx
    if pipeline.card.input == "volume":
        halo = cast(Streamed, pipeline._network).halo
        assert [slices, *plane] == [halo] * 3
        return
    assert slices == {"slice": 0, "slab3": 1}[pipeline.card.input]
    if pipeline._halo is None:  # run on whole slices, because of its stride
        assert pipeline._stride > 1
        assert min(plane) > 0
    else:
        assert plane == [pipeline._halo] * 2
