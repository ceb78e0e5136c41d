"""Trials: their noise is that of their dose, their truth is the image without it, lesions lie in soft tissue."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ct_builder import uid, write_series
from numpy.typing import NDArray
from scipy.ndimage import label

from pipelines.noise import noise_level
from training.measuring import cases
from training.measuring.cases import (
    Trial,
    lesions,
    pair_trials,
    phantom_trials,
    simulated_trials,
    volume_of,
    with_inserted,
)
from training.simulate import low_dose
from training.sources.phantom import chest_abdomen

MATRIX = 192


@pytest.fixture(scope="module")
def phantoms() -> list[Trial]:
    return list(phantom_trials([0.25, 0.1], 2, matrix=MATRIX))


def test_noise_of_the_phantom_is_that_of_its_dose(phantoms: list[Trial]) -> None:
    quarter, tenth = phantoms
    assert [t.dose for t in phantoms] == [0.25, 0.1]
    noises = [t.low.hu - t.truth for t in phantoms]
    assert np.allclose(noises[1], noises[0] * math.sqrt(2.5), atol=1e-2)
    assert quarter.again is not None
    again = quarter.again.hu - quarter.truth
    assert again.std() == pytest.approx(noises[0].std(), rel=0.05)
    assert abs(np.corrcoef(noises[0].ravel(), again.ravel())[0, 1]) < 0.02
    assert quarter.truth_noise_hu == 0
    # no noise in the truth: it is the phantom that the seed makes
    clean = chest_abdomen(
        2 + 2 * cases.CONTEXT, MATRIX, cases.PHANTOM_PIXEL_MM, cases.PHANTOM_SPACING_MM, cases.PHANTOM_SEED
    )
    assert np.array_equal(quarter.truth, clean)
    assert np.array_equal(tenth.truth, clean)


@pytest.mark.parametrize(
    ("count", "wanted", "read", "scored"),
    [
        (80, 12, slice(15, 65), slice(19, 31)),
        (13, 12, slice(0, 13), slice(0, 12)),
        (5, 12, slice(0, 5), slice(0, 5)),
        (1, 1, slice(0, 1), slice(0, 1)),
    ],
)
def test_block_is_the_middle_with_its_context(count: int, wanted: int, read: slice, scored: slice) -> None:
    assert cases._block(count, wanted) == (read, scored)


def test_a_series_gets_the_noise_of_its_dose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = low_dose(chest_abdomen(5, 192, 2.0, 5.0, seed=4), 2.0, 0.5, seed=4)
    padding = np.zeros(full.shape, np.bool_)
    padding[:, :4] = True
    paths = tuple(write_series(tmp_path, np.zeros((1, 8, 8)), name="full"))
    volume = replace(volume_of(full, 2.0, 5.0, padding), slice_paths=paths)
    monkeypatch.setattr(cases, "read_series", lambda folder: volume)
    quarter, tenth = simulated_trials(tmp_path / "series", [0.25, 0.1], 2)
    assert quarter.case == "series"
    assert (quarter.origin.series_uid, quarter.origin.study_uid) == (uid("full"), uid("study"))
    assert quarter.scored == slice(1, 3)
    own = noise_level(full, padding, 2.0)
    assert quarter.truth_noise_hu == pytest.approx(own, rel=0.15)
    for trial, ratio in ((quarter, 2.0), (tenth, math.sqrt(10))):
        assert trial.again is not None
        assert noise_level(trial.low.hu, padding, 2.0) / own == pytest.approx(ratio, rel=0.1)
        assert not np.array_equal(trial.low.hu, trial.again.hu)


def _uniform(soft: NDArray[np.bool_]) -> Trial:
    truth = np.where(soft, 50.0, -1000.0).astype(np.float32)
    return Trial("disc", "phantom", 0.25, volume_of(truth, 0.8, 2.0), None, truth, slice(1, 4), 0.0, 0.5)


def test_lesions_lie_in_soft_tissue_apart_from_each_other() -> None:
    y, x = np.mgrid[:160, :160] - 79.5
    trial = _uniform(np.repeat((np.hypot(y, x) < 60)[None], 5, axis=0))
    inserted = lesions(trial)
    assert inserted is not None
    parts, count = label(inserted > 15)
    assert count == 4
    assert inserted.max() == pytest.approx(30, abs=0.5)
    centres = np.array([np.argwhere(parts == k + 1).mean(axis=0) for k in range(count)])
    assert np.allclose(centres[:, 0], 2)  # middle of the measured slices
    radii = np.hypot(centres[:, 1] - 79.5, centres[:, 2] - 79.5) * 0.8
    assert radii.max() < 48 - 6
    apart = [np.hypot(*(a - b)[1:]) * 0.8 for i, a in enumerate(centres) for b in centres[:i]]
    assert min(apart) > 24
    # what is inserted is 30 HU times the volume of the ball, whatever the blur
    assert inserted.sum() * 0.8 * 0.8 * 2.0 == pytest.approx(4 * 30 * 4 / 3 * math.pi * 27, rel=0.02)
    assert np.array_equal(with_inserted(trial.low, inserted).hu, trial.low.hu + inserted)


def test_no_lesion_where_there_is_no_room() -> None:
    soft = np.zeros((5, 64, 64), np.bool_)
    soft[:, 30:38] = True
    assert lesions(_uniform(soft)) is None


def test_pairs_are_measured_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    full, low = (rng.normal(0, s, (9, 64, 64)).astype(np.float32) for s in (10, 20))
    alone = SimpleNamespace(name="alone", low=None, dose=None)
    files = tuple(write_series(tmp_path, np.zeros((1, 8, 8)), name="full"))
    both = SimpleNamespace(name="both", low=(Path("x"),), full=files, dose=0.1)
    monkeypatch.setattr(cases, "find", lambda root: [alone, both])
    pair = SimpleNamespace(full=full, low=low, pixel_mm=0.7, spacing_mm=1.0)
    monkeypatch.setattr(cases, "load_pair", lambda case: pair)
    (trial,) = pair_trials(tmp_path, 1)
    assert (trial.case, trial.kind, trial.dose, trial.again) == ("both", "pair", 0.1, None)
    assert (trial.origin.series_uid, trial.origin.study_uid) == (uid("full"), uid("study"))
    assert np.array_equal(trial.truth, full)
    assert np.array_equal(trial.low.hu, low)
    assert trial.scored == slice(4, 5)
