"""What a pipeline may give, which options it takes, and what its identity depends on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipelines import base
from pipelines.base import (
    Execution,
    OptionRefused,
    Options,
    PipelineFault,
    UnknownPipeline,
    check_options,
    denoise,
    denoise_volume,
    load,
    pipeline_hash,
)
from pipelines.identity import Identity
from pipelines.testing import water_volume
from pipelines.volume import Series


class Gives(Identity):
    """Gives what it is told to, whatever the series."""

    def __init__(self, slices: Iterable[Any]) -> None:
        super().__init__()
        self.slices = iter(slices)

    def denoise(self, series: Series, options: Options) -> Iterator[Any]:
        return self.slices


def right(number: int) -> list[Any]:
    return [np.full((8, 6), k, np.float32) for k in range(number)]


@pytest.mark.parametrize(
    ("slices", "good", "told"),
    [
        ([], 0, "gave 0 slices for a series of 3"),
        (right(2), 2, "gave 2 slices for a series of 3"),
        (right(4), 3, "gave more than the 3 slices of the series"),
        ([*right(1), np.zeros((8, 6))], 1, "gave float64 (8, 6) for slice 1, not float32 (8, 6)"),
        ([*right(2), np.zeros((6, 8), np.float32)], 2, "gave float32 (6, 8) for slice 2, not float32 (8, 6)"),
        ([np.zeros((3, 8, 6), np.float32)], 0, "gave float32 (3, 8, 6) for slice 0, not float32 (8, 6)"),
        ([np.zeros((8, 6), np.float32).tolist()], 0, "gave list for slice 0, not float32 (8, 6)"),
        ([*right(1), None], 1, "gave NoneType for slice 1, not float32 (8, 6)"),
    ],
)
def test_what_is_no_slice_of_the_series_is_a_fault_of_the_pipeline(slices: list[Any], good: int, told: str) -> None:
    """What was given before it was given."""
    results = denoise(Gives(slices), water_volume((3, 8, 6)), Options())
    for expected in slices[:good]:
        assert next(results) is expected
    with pytest.raises(PipelineFault, match=f"^identity {re.escape(told)}$"):
        next(results)


def test_slices_are_asked_of_the_pipeline_one_by_one() -> None:
    made = []

    def slices() -> Iterator[Any]:
        for k, hu in enumerate(right(3)):
            made.append(k)
            yield hu

    for k, hu in enumerate(denoise(Gives(slices()), water_volume((3, 8, 6)), Options())):
        assert made == list(range(k + 1))
        assert (hu == k).all()
    assert made == [0, 1, 2]


def test_a_volume_is_all_slices_under_one_another() -> None:
    out = denoise_volume(Gives(right(3)), water_volume((3, 8, 6)))
    assert out.dtype == np.float32
    assert out.shape == (3, 8, 6)
    assert [float(plane.mean()) for plane in out] == [0, 1, 2]


def test_a_factory_is_told_on_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "theirs"

        def load(self) -> Any:
            return lambda execution: execution

    def points(*, group: str, name: str = "theirs") -> list[Point]:
        assert group == "dicomnode.pipelines"
        return [Point()] if name == "theirs" else []

    monkeypatch.setattr(base, "entry_points", points)
    wanted = Execution(device="cpu", precision="bf16", threads=3)
    made: list[Any] = [load("theirs"), load("theirs", wanted)]
    assert made == [Execution(device="auto", precision="auto", threads=0), wanted]
    with pytest.raises(UnknownPipeline, match="no pipeline 'others'; there are: theirs"):
        load("others")


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
