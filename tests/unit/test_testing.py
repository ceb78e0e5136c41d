"""The contract finds each way to break it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.base import Envelope, ModelCard, Options, Progress
from pipelines.identity import Identity
from pipelines.testing import ContractBroken, check_pipeline, water_volume
from pipelines.volume import Volume

Act = Callable[[Volume, Options, Progress], Any]


class Plugin:
    card: ModelCard = Identity.card

    def __init__(self, act: Act) -> None:
        self.act = act

    def denoise(self, volume: Volume, options: Options, progress: Progress) -> NDArray[np.float32]:
        return self.act(volume, options, progress)  # type: ignore[no-any-return]


def good(volume: Volume, options: Options, progress: Progress) -> Any:
    """A three-slice mean that keeps the contract."""
    progress(0.5)
    hu = np.where(volume.padding, np.float32(-1000), volume.hu)
    padded = np.concatenate([hu[:1], hu, hu[-1:]])
    mean = (padded[:-2] + padded[1:-1] + padded[2:]) / np.float32(3)
    part = options.strength * options.blend
    out = volume.hu if part == 0 else volume.hu + np.float32(part) * (mean - volume.hu)
    progress(1.0)
    return np.where(volume.padding, volume.hu, out)


def with_output(change: Callable[[Any, Volume], Any]) -> Act:
    return lambda volume, options, progress: change(good(volume, options, progress), volume)


def spoil(out: Any, value: float) -> Any:
    out[0, 0, 0] = value
    return out


def changes_input(volume: Volume, options: Options, progress: Progress) -> Any:
    out = good(volume, options, progress)
    volume.hu[0] = 0
    return out


class Dice:
    def __init__(self) -> None:
        self.thrown = 0

    def __call__(self, volume: Volume, options: Options, progress: Progress) -> Any:
        self.thrown += 1
        return np.where(volume.padding, volume.hu, good(volume, options, progress) + np.float32(1e-3 * self.thrown))


def leaky(volume: Volume, options: Options, progress: Progress) -> Any:
    out = good(replace(volume, padding=np.zeros_like(volume.padding)), options, progress)
    mean = np.float32(1e-3) * volume.hu.mean(dtype=np.float64)
    return np.where(volume.padding | (options.strength * options.blend == 0), volume.hu, out + np.float32(mean))


def silent(volume: Volume, options: Options, progress: Progress) -> Any:
    return good(volume, options, lambda _: None)


def shares(volume: Volume, options: Options, progress: Progress) -> Any:
    progress(1.0)
    return volume.hu


def backwards(volume: Volume, options: Options, progress: Progress) -> Any:
    progress(0.7)
    return good(volume, options, progress)


BROKEN: list[tuple[Act, str]] = [
    (with_output(lambda out, v: out.astype(np.float64)), "float64, not float32"),
    (with_output(lambda out, v: out[:, :-1]), "returned shape"),
    (with_output(lambda out, v: out.tolist()), "returned list"),
    (with_output(lambda out, v: spoil(out, np.nan)), "not finite"),
    (with_output(lambda out, v: spoil(out, 5)), "voxels without measurement were changed"),
    (with_output(lambda out, v: np.where(v.padding, v.hu, out + np.float32(2))), "the mean of water moved by +2.0"),
    (changes_input, "the input was changed"),
    (Dice(), "the same input gave two outputs"),
    (leaky, "the padding value moved tissue"),
    (lambda volume, options, progress: good(volume, Options(), progress), "blend 0 is not the input"),
    (
        lambda volume, options, progress: good(volume, Options(blend=options.blend), progress),
        "strength 0 is not the input",
    ),
    (
        lambda volume, options, progress: good(volume, replace(options, blend=float(options.blend > 0)), progress),
        "blend 0.5 is up to",
    ),
    (
        lambda volume, options, progress: good(
            volume, replace(options, strength=float(options.strength > 0)), progress
        ),
        "strength 0.5 is up to",
    ),
    (silent, "progress ended at nothing"),
    (backwards, "progress went backwards"),
    (shares, "the output is the memory of the input"),
]


def test_a_good_plugin_passes() -> None:
    check_pipeline(Plugin(good))


def test_an_installed_one_is_found_by_name() -> None:
    check_pipeline("identity")


@pytest.mark.parametrize(("act", "complaint"), BROKEN, ids=[complaint for _, complaint in BROKEN])
def test_a_broken_clause_is_named(act: Act, complaint: str) -> None:
    with pytest.raises(ContractBroken) as caught:
        check_pipeline(Plugin(act))
    assert complaint in str(caught.value)


def test_all_broken_clauses_are_named_at_once() -> None:
    with pytest.raises(ContractBroken, match=r"progress ended .*mean of water"):
        check_pipeline(Plugin(lambda volume, options, progress: volume.hu + np.float32(2)))


def test_a_pipeline_for_many_slices_is_not_asked_for_one() -> None:
    def needs_seven(volume: Volume, options: Options, progress: Progress) -> Any:
        assert volume.hu.shape[0] >= 7
        return good(volume, options, progress)

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
