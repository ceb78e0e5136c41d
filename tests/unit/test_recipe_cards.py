"""What the card of a recipe says about a network is what the factory of its pipeline knows, and what is measured."""

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
from training.data import Batch
from training.recipes import MODULES, recipe

FACTORIES = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name in MODULES}
PHASES = 4
"""Neighbouring results to look from: behind a stride, each has a reach of its own."""
NARROW = 24
"""Pixels of the axes across: with zeros around, no path along the axis that is measured is lost."""
NARROW_VOLUME = 4
WHOLE_IMAGE = {"hqinet", "hqinet-lite"}
"""Every result of these depends on means over the image."""


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


def reach(name: str, axis: int, upto: int) -> int:
    """Distance along `axis` (z, y, x) of the farthest pixel with a gradient, of a network with random weights."""
    how = recipe(name)
    torch.manual_seed(0)
    network = how.network().eval().double()
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.05)  # some networks begin as the identity
    size = [NARROW_VOLUME] * 3 if how.card["input"] == "volume" else [how.patch_zyx[0], NARROW, NARROW]
    if axis > 0 or how.card["input"] == "volume":
        size[axis] = (2 * upto // NARROW + 2) * NARROW
    noisy = torch.rand(1, *size, dtype=torch.double, requires_grad=True)
    denoised, _ = how.predict(network, Batch(noisy, noisy.detach(), torch.ones(1, dtype=torch.double)))
    slices = denoised.reshape(-1, *denoised.shape[-2:])  # of a slab the middle one
    farthest = 0
    for phase in range(PHASES if slices.shape[axis] > 1 else 1):
        at = [n // 2 for n in slices.shape]
        at[axis] += phase if slices.shape[axis] > 1 else 0
        (gradient,) = torch.autograd.grad(slices[tuple(at)], noisy, retain_graph=True)
        assert gradient.isfinite().all()
        seen = gradient[0].abs().sum([k for k in range(3) if k != axis]).nonzero().flatten()
        middle = at[axis] if slices.shape[axis] == size[axis] else size[axis] // 2
        farthest = max(farthest, middle - int(seen[0]), int(seen[-1]) - middle)
    return farthest


@pytest.mark.parametrize("name", sorted(set(MODULES) - WHOLE_IMAGE))
def test_overlap_is_what_a_result_depends_on(name: str) -> None:
    overlap = recipe(name).card["overlap_zyx"]
    assert [reach(name, axis, upto) for axis, upto in enumerate(overlap)] == overlap
