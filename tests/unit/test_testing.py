"""The contract finds each way to break it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipelines.base import Envelope, ModelCard, Options
from pipelines.identity import Identity
from pipelines.testing import ContractBroken, check_pipeline, water_volume
from pipelines.volume import Plane, Series

Act = Callable[[Series, Options], Iterator[Any]]
AIR = np.float32(-1000)


class Plugin:
    card: ModelCard = Identity.card

    def __init__(self, act: Act) -> None:
        self.act = act

    def denoise(self, series: Series, options: Options) -> Iterator[Any]:
        return self.act(series, options)


def good(series: Series, options: Options) -> Iterator[Any]:
    """A three-slice mean that keeps the contract."""
    last = series.shape[0] - 1
    part = np.float32(options.strength * options.blend)
    for k in range(last + 1):
        here = series.plane(k)
        seen = [series.plane(j) for j in (max(k - 1, 0), k, min(k + 1, last))]
        mean = sum(np.where(plane.padding, AIR, plane.hu) for plane in seen) / np.float32(3)
        out = here.hu if part == 0 else here.hu + part * (mean - here.hu)
        yield np.where(here.padding, here.hu, out)


def with_output(change: Callable[[Any, Plane], Any]) -> Act:
    """`good`, each of its slices changed."""

    def act(series: Series, options: Options) -> Iterator[Any]:
        for k, hu in enumerate(good(series, options)):
            yield change(hu, series.plane(k))

    return act


def spoil(out: Any, value: float) -> Any:
    out[0, 0] = value
    return out


def changes_input(series: Series, options: Options) -> Iterator[Any]:
    yield from good(series, options)
    series.plane(0).hu[:] = 0


class Dice:
    def __init__(self) -> None:
        self.thrown = 0

    def __call__(self, series: Series, options: Options) -> Iterator[Any]:
        self.thrown += 1
        for k, hu in enumerate(good(series, options)):
            plane = series.plane(k)
            yield np.where(plane.padding, plane.hu, hu + np.float32(1e-3 * self.thrown))


def leaky(series: Series, options: Options) -> Iterator[Any]:
    for k in range(series.shape[0]):
        plane = series.plane(k)
        mean = np.float32(1e-3) * plane.hu.mean(dtype=np.float64)
        unchanged = plane.padding | (options.strength * options.blend == 0)
        yield np.where(unchanged, plane.hu, plane.hu + np.float32(mean))


def one_too_few(series: Series, options: Options) -> Iterator[Any]:
    slices = list(good(series, options))
    return iter(slices[:-1])


def one_too_many(series: Series, options: Options) -> Iterator[Any]:
    slices = list(good(series, options))
    return iter([*slices, slices[-1].copy()])


def same_array(series: Series, options: Options) -> Iterator[Any]:
    """Overwrites what it gave before."""
    out = np.empty(series.shape[1:], np.float32)
    for hu in good(series, options):
        out[:] = hu
        yield out


def rest_at_once(series: Series, options: Options) -> Iterator[Any]:
    return iter([np.stack(list(good(series, options)))])


BROKEN: list[Any] = [
    (with_output(lambda out, plane: out.astype(np.float64)), "gave float64 (64, 64) for slice 0, not float32"),
    (with_output(lambda out, plane: out[:-1]), "gave float32 (63, 64) for slice 0"),
    (with_output(lambda out, plane: out.tolist()), "gave list for slice 0"),
    (rest_at_once, "gave float32 (5, 64, 64) for slice 0"),
    (one_too_few, "gave 4 slices for a series of 5"),
    (one_too_many, "gave more than the 5 slices of the series"),
    (with_output(lambda out, plane: spoil(out, np.nan)), "not finite"),
    (with_output(lambda out, plane: spoil(out, 5)), "voxels without measurement were changed"),
    (
        with_output(lambda out, plane: np.where(plane.padding, plane.hu, out + np.float32(2))),
        "the mean of water moved by +2.0",
    ),
    (changes_input, "the input was changed"),
    (Dice(), "the same input gave two outputs"),
    (leaky, "the padding value moved tissue"),
    (lambda series, options: good(series, Options()), "blend 0 is not the input"),
    (lambda series, options: good(series, Options(blend=options.blend)), "strength 0 is not the input"),
    (
        lambda series, options: good(series, replace(options, blend=float(options.blend > 0))),
        "blend 0.5 is up to",
    ),
    (
        lambda series, options: good(series, replace(options, strength=float(options.strength > 0))),
        "strength 0.5 is up to",
    ),
    (same_array, "blend 0 is not the input"),
    (with_output(lambda out, plane: plane.hu), "the output is the memory of the input"),
]


def test_a_good_plugin_passes() -> None:
    check_pipeline(Plugin(good))


def test_an_installed_one_is_found_by_name() -> None:
    check_pipeline("identity")


@pytest.mark.parametrize(("act", "complaint"), BROKEN)
def test_a_broken_clause_is_named(act: Act, complaint: str) -> None:
    with pytest.raises(ContractBroken) as caught:
        check_pipeline(Plugin(act))
    assert complaint in str(caught.value)


def test_all_broken_clauses_are_named_at_once() -> None:
    with pytest.raises(ContractBroken, match=r"blend 0 is not the input.*mean of water"):
        check_pipeline(Plugin(lambda series, options: (plane + np.float32(2) for plane in good(series, Options()))))


def test_a_pipeline_for_many_slices_is_not_asked_for_one() -> None:
    def needs_seven(series: Series, options: Options) -> Iterator[Any]:
        assert series.shape[0] >= 7
        return good(series, options)

    plugin = Plugin(needs_seven)
    plugin.card = replace(Identity.card, valid_for=Envelope(min_slices=7))
    check_pipeline(plugin)


def test_the_phantom_is_what_it_says() -> None:
    volume = water_volume((4, 96, 96), noise_hu=20.0, padding_hu=-3024)
    centre = volume.hu[:, 30:66, 30:60]
    assert centre.mean() == pytest.approx(0, abs=2)
    assert centre.std() == pytest.approx(20, rel=0.05)
    assert (volume.hu[volume.padding] == -3024).all()
    assert volume.padding.mean() == pytest.approx(1 - np.pi / 4, abs=0.02)
    assert volume.hu.max() > 7900
