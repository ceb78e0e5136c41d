"""What the identity of a pipeline depends on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipelines import base
from pipelines.base import OptionRefused, Options, check_options, pipeline_hash
from pipelines.identity import Identity


def test_the_revision_of_our_own_code_is_in_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    before = pipeline_hash(Identity.card, Options())
    monkeypatch.setattr(base, "VOXEL_REVISION", base.VOXEL_REVISION + 1)
    assert pipeline_hash(Identity.card, Options()) != before
    monkeypatch.undo()
    assert pipeline_hash(Identity.card, Options()) == before


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_every_strength_up_to_that_of_training_is_taken(strength: float) -> None:
    for noise_map in (False, True):
        check_options(replace(Identity.card, noise_map=noise_map), Options(strength=strength))


def test_only_a_noise_map_can_be_told_more_than_the_truth() -> None:
    check_options(replace(Identity.card, noise_map=True), Options(strength=1.5))
    with pytest.raises(OptionRefused, match=r"strength 1\.5 .* identity takes 0 to 1, because it takes no noise map"):
        check_options(Identity.card, Options(strength=1.5))


@pytest.mark.parametrize("value", [-0.1, 1.6, float("nan")])
def test_values_out_of_range_are_refused(value: float) -> None:
    card = replace(Identity.card, noise_map=True)
    with pytest.raises(OptionRefused, match=r"strength .* is out of range; identity takes 0 to 1\.5$"):
        check_options(card, Options(strength=value))
    with pytest.raises(OptionRefused, match=r"blend .* is out of range"):
        check_options(card, Options(blend=value))
