"""What the card of a recipe says about a network is what is measured, and its factory makes and runs that network."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest
import torch

from pipelines.base import ENTRY_POINT_GROUP
from pipelines.shipped import Factory
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


CHANNELS = {"slice": 1, "slab3": 3}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_recipe_states_what_training_does_not(name: str) -> None:
    """What is known of the training itself, such as the size of the patches, is stated once."""
    assert set(recipe(name).card) == {"name", "paper", "doi", "input", "overlap_zyx", "noise_map", "limits"}


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_the_factory_runs_the_network_of_the_recipe(name: str) -> None:
    factory: Factory = FACTORIES[name].load()
    card = recipe(name).card
    with torch.device("meta"):  # shapes alone: the full HQINet takes seconds to fill
        made, trained = factory.network(), recipe(name).network()
        assert {key: x.shape for key, x in made.state_dict().items()} == {
            key: x.shape for key, x in trained.state_dict().items()
        }
        assert factory.name == card["name"]
        if card["input"] == "volume":
            assert hasattr(made, "stream")
            return
        assert card["overlap_zyx"][0] == CHANNELS[card["input"]] // 2
        # no smaller multiple than a stride promises, and one that REDCNN does not find too small
        rows, columns = (factory.stride * (n + n % 2 + 1) for n in (32 // factory.stride, 64 // factory.stride))
        given = [torch.empty(1, CHANNELS[card["input"]], rows, columns)]
        if card["noise_map"]:
            given.append(torch.empty(1, 1, rows // factory.noise_map_stride, columns // factory.noise_map_stride))
        assert made.eval()(*given).shape == (1, 1, rows, columns)


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
