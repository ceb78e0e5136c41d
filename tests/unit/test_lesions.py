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


def test_lesions_of_a_noisy_image_have_no_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of 100 HU takes one voxel in ten out of the range of soft tissue; the lesions are those without noise."""
    monkeypatch.setattr(lesions, "PER_LITRE", 20.0)
    flat = np.full((40, 120, 120), 40, np.float32)
    noise = np.random.default_rng(2).normal(0, 100, flat.shape).astype(np.float32)
    clean = add_lesions(flat, VOXEL_MM, np.random.default_rng(4)) - flat
    noisy = add_lesions(flat + noise, VOXEL_MM, np.random.default_rng(4), noisy=True) - flat - noise
    assert np.count_nonzero(np.abs(clean) > 8) > 1000
    assert np.allclose(noisy, clean, atol=1e-3)
    assert not np.allclose(add_lesions(flat + noise, VOXEL_MM, np.random.default_rng(4)) - flat - noise, clean, atol=1)


def test_nothing_to_put_lesions_into() -> None:
    air = np.full((4, 8, 8), -1000, np.float32)
    assert np.array_equal(add_lesions(air, VOXEL_MM, np.random.default_rng(1)), air)
