"""Faint lesions: as faint, as large and as many as they should be, in soft tissue only."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from training.sources import lesions
from training.sources.lesions import add_lesions

VOXEL_MM = (1.0, 1.0, 1.0)


def test_lesions_are_ellipsoids_of_the_size_number_and_contrast_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lesions, "DIAMETER_MM", (12.0, 12.0))
    monkeypatch.setattr(lesions, "CONTRAST_HU", (30.0, 30.0))
    monkeypatch.setattr(lesions, "PER_LITRE", 5.0)
    hu = np.full((150, 200, 200), 40, np.float32)  # six litres
    added = add_lesions(hu, VOXEL_MM, np.random.default_rng(3)) - hu
    found, count = ndimage.label(np.abs(added) > 15)
    assert 15 < count < 45  # 30 on average, a few overlap or lie at the border
    volumes = ndimage.sum_labels(np.ones_like(added), found, range(1, count + 1))
    ball = 4 / 3 * np.pi * 6**3  # axes between 0.75 and 1.3 of it
    assert np.all(volumes < 2 * ball * 1.3**3)
    assert np.median(volumes) == pytest.approx(ball, rel=0.3)
    peaks = ndimage.maximum(np.abs(added), found, range(1, count + 1))
    assert np.median(peaks) == pytest.approx(30, abs=0.5)
    assert {1.0, -1.0} == set(np.sign(added[np.abs(added) > 15]))


def test_air_lung_and_bone_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lesions, "PER_LITRE", 3000.0)
    hu = np.full((20, 60, 60), 40, np.float32)
    hu[:, :20], hu[:, 40:] = -850, 700
    changed = add_lesions(hu, VOXEL_MM, np.random.default_rng(1)) != hu
    assert not changed[:, :20].any()
    assert not changed[:, 40:].any()
    assert changed[:, 20:40].mean() > 0.3


def test_nothing_to_put_lesions_into() -> None:
    air = np.full((4, 8, 8), -1000, np.float32)
    assert np.array_equal(add_lesions(air, VOXEL_MM, np.random.default_rng(1)), air)
