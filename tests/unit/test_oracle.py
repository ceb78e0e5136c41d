"""What the rails leave to be won and lost, worked out for sines: a Gaussian passes a known part of each."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.base import Options, denoise_volume
from pipelines.safety import LOW_FREQUENCY_MM
from training.measuring.cases import Trial, volume_of, with_inserted
from training.measuring.oracle import Oracle
from training.measuring.scores import score
from training.metrics import SOFT_TISSUE

SIZE, PIXEL_MM, SLICES = 192, 0.75, 3
INNER = slice(32, -32)


def sine(per_mm: float, hu: float) -> NDArray[np.float32]:
    """The same in every slice, along the rows; (z, y, x)."""
    wave = hu * np.sin(2 * math.pi * per_mm * PIXEL_MM * np.arange(SIZE))
    return np.broadcast_to(wave.astype(np.float32), (SLICES, SIZE, SIZE)).copy()


def passed(per_mm: float) -> float:
    """By the Gaussian of the rails."""
    return math.exp(-2 * (math.pi * LOW_FREQUENCY_MM * per_mm) ** 2)


def trial_of(noise: NDArray[np.float32], other: NDArray[np.float32]) -> Trial:
    truth = np.full((SLICES, SIZE, SIZE), 40, np.float32)
    low, again = (volume_of(truth + one, PIXEL_MM, 2.5) for one in (noise, other))
    return Trial("body", "simulated", 0.25, low, again, truth, slice(1, 2), 0.0, 0.4)


@pytest.mark.parametrize("blend", [1.0, 0.6])
@pytest.mark.parametrize("per_mm", [0.0625, 0.125, 0.3])
def test_of_noise_there_stays_what_rails_and_blend_keep(per_mm: float, blend: float) -> None:
    trial = trial_of(sine(per_mm, 30), sine(per_mm, -20))
    for volume, amplitude in ((trial.low, 30), (trial.again, -20)):
        assert volume is not None
        part = volume_of(volume.hu[1:2], PIXEL_MM, 2.5)
        out = denoise_volume(Oracle(trial, sees_lesions=True), part, Options(blend=blend))
        expected = 1 - blend * (1 - passed(per_mm))
        left = (out[0] - 40)[INNER, INNER] @ sine(per_mm, 1)[0, 0, INNER]
        whole = amplitude * (sine(per_mm, 1)[0, 0, INNER] ** 2).sum()
        assert left.mean() / whole == pytest.approx(expected, abs=0.01)


def test_a_strength_above_one_takes_no_more_than_the_noise() -> None:
    trial = trial_of(sine(0.3, 30), sine(0.3, -20))
    part = volume_of(trial.low.hu[1:2], PIXEL_MM, 2.5)
    whole, more, half = (
        denoise_volume(Oracle(trial, sees_lesions=True), part, Options(strength=strength)) for strength in (1, 1.5, 0.5)
    )
    assert np.array_equal(whole, more)
    assert not np.array_equal(whole, half)


@pytest.mark.parametrize(("sees", "blend"), [(True, 1.0), (True, 0.6), (False, 1.0), (False, 0.6)])
def test_a_lesion_comes_back_whole_or_as_far_as_the_rails_pass_it(sees: bool, blend: float) -> None:
    per_mm = 0.1
    trial, inserted = trial_of(sine(0.3, 30), sine(0.3, -20)), sine(per_mm, 10)
    oracle, options = Oracle(trial, sees_lesions=sees), Options(blend=blend)
    measured = slice(1, 2)
    images = [volume_of(one.hu[measured], PIXEL_MM, 2.5) for one in (with_inserted(trial.low, inserted), trial.low)]
    change = np.subtract(*(denoise_volume(oracle, image, options)[0] for image in images))[INNER, INNER]
    back = (change @ inserted[0, 0, INNER]).mean() / (inserted[0, 0, INNER] ** 2).sum()
    assert back == pytest.approx(1 if sees else 1 - blend * (1 - passed(per_mm)), abs=0.01)


def test_its_rows_are_those_of_any_pipeline() -> None:
    trial = trial_of(sine(0.3, 30), sine(0.3, -20))
    rows = score(trial, "perfect", Oracle(trial, sees_lesions=True), Options()).rows
    (rmse,) = (row.value for row in rows if row.metric == "RMSE" and row.window == str(SOFT_TISSUE))
    noise = 30 / math.sqrt(2) / (SOFT_TISSUE.high_hu - SOFT_TISSUE.low_hu)
    assert rmse < noise / 10  # what is left is at the border, where the mean is taken over half as much
