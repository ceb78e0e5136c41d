"""Patches that a network is trained on: what is added is what the network is told, and a batch has one number."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training.data import Sampler
from training.sources.scans import Scan

SHAPE = (6, 40, 40)


def _scan(name: str, own_noise: float, base: float) -> Scan:
    rng = np.random.default_rng(len(name))
    noises = tuple(rng.normal(0, sd, SHAPE).astype(np.float16) for sd in (8.0, 16.0))
    flat = np.full(SHAPE, base, np.float16)
    return Scan(name, name, flat, flat, noises, own_noise, own_noise, (8.0, 16.0))


def _sampler(seed: int = 3, real_part: float = 0.3) -> Sampler:
    return Sampler([_scan("phantom", 0.0, 50.0), _scan("real one", 5.0, -80.0)], (3, 16, 16), 4, real_part, seed)


def test_a_batch_depends_on_seed_and_number_alone() -> None:
    one, again = _sampler()[5], _sampler()[5]
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.noisy, _sampler()[6].noisy)
    assert not torch.equal(one.noisy, _sampler(seed=4)[5].noisy)


def test_noise_level_is_that_of_the_noise() -> None:
    """Ratio of what was added to what the network is told; the jitter of 10 % averages out."""
    sampler = _sampler(real_part=0.0)
    ratios = []
    for step in range(60):
        batch = sampler[step]
        added = (batch.noisy - batch.target).std((1, 2, 3))
        ratios += [math.log(a / b) for a, b in zip(added.tolist(), batch.level.tolist(), strict=True) if a > 0]
    assert float(np.mean(ratios)) == pytest.approx(0, abs=0.03)
    assert float(np.std(ratios)) == pytest.approx(0.1, abs=0.04)


def test_real_targets_come_as_often_as_told() -> None:
    targets = torch.cat([_sampler()[step].target for step in range(100)])
    assert float((targets.mean((1, 2, 3)) < 0).float().mean()) == pytest.approx(0.3, abs=0.07)


def test_a_real_pair_is_shown_as_it_is() -> None:
    """Low dose and full dose of one place, turned alike, nothing added; the level is that of the low dose."""
    z, y, x = np.indices(SHAPE, np.float32)
    full = (z * 300 + y * 7 + x / 4).astype(np.float16)
    pair = Scan("pair", "pair", full, full + np.float16(16), (), 5.0, 20.0, ())
    batch = Sampler([pair], (3, 16, 16), 4, 1.0, 1)[0]
    assert torch.allclose(batch.noisy - batch.target, torch.tensor(0.016), atol=5e-4)  # float16 near 1500 HU
    assert float(batch.level.log().mean()) == pytest.approx(math.log(0.020), abs=0.2)
    steps = (batch.target[:, 1:] - batch.target[:, :-1]).abs()
    assert float(steps.median()) == pytest.approx(0.3, abs=1e-3)  # slices stay slices, in order


def test_twins_differ_by_a_faint_lesion_alone() -> None:
    sampler = Sampler([_scan("phantom", 0.0, 50.0)], (3, 32, 32), 8, 0.0, 1, twins=True)
    batch = sampler[3]
    assert batch.inserted.shape == (4, 3, 32, 32)
    for values in (batch.noisy, batch.target):
        assert torch.allclose(values[4:] - values[:4], batch.inserted, atol=1e-6)
    assert torch.equal(batch.level[4:], batch.level[:4])
    peaks = torch.cat([sampler[k].inserted.abs().amax((1, 2, 3)) for k in range(30)])
    assert 0.005 < float(peaks.min()) < 0.02  # 10 HU in the middle, less where that lies outside
    assert 0.04 < float(peaks.max()) < 0.061
    assert len(Sampler([_scan("phantom", 0.0, 50.0)], (3, 16, 16), 8, 0.0, 1)[3].inserted) == 0


def test_air_has_no_lesions() -> None:
    batch = Sampler([_scan("phantom", 0.0, -900.0)], (3, 16, 16), 4, 0.0, 1, twins=True)[0]
    assert not batch.inserted.any()
