"""The training loop: loss, schedule, resuming, learning; and the patches it is fed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from training.data import Sampler, Scan
from training.loop import CHARBONNIER_EPSILON, Batch, Schedule, charbonnier, train


def _scan(name: str, own_noise: float, base: float) -> Scan:
    rng = np.random.default_rng(len(name))
    shape = (6, 40, 40)
    noises = tuple(rng.normal(0, sd, shape).astype(np.float16) for sd in (8.0, 16.0))
    return Scan(name, np.full(shape, base, np.float16), (noises[0], noises[1]), own_noise, (8.0, 16.0))


def _sampler(seed: int = 3, real_part: float = 0.3) -> Sampler:
    return Sampler([_scan("phantom", 0.0, 50.0), _scan("real one", 5.0, -80.0)], (3, 16, 16), 4, real_part, seed)


def _network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))


def _loss(network: nn.Module, batch: Batch) -> torch.Tensor:
    noisy, target, _ = batch
    return charbonnier(noisy - network(noisy), target)


def _run(out: Path, steps: int) -> dict[str, torch.Tensor]:
    average = train(
        _network(), _loss, _sampler().batch, Schedule(steps), 1e-3, out, lambda network, step, seconds: None
    )
    return {name: tensor.clone() for name, tensor in average.state_dict().items()}


def test_charbonnier_is_quadratic_then_linear() -> None:
    e = CHARBONNIER_EPSILON
    zero = torch.zeros(1)
    assert charbonnier(zero, zero).item() == 0
    assert charbonnier(zero + e / 10, zero).item() == pytest.approx(e / 200, rel=0.01)
    assert charbonnier(zero + 100 * e, zero).item() == pytest.approx(99.005 * e, rel=1e-4)


def test_schedule_ends_by_steps_or_minutes() -> None:
    assert Schedule(100).progress(50, 1e9) == 0.5
    assert Schedule(100, minutes=2).progress(10, 60) == 0.5
    assert Schedule(100, minutes=2).progress(100, 60) == 1


def test_resumed_run_is_the_uninterrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.loop._rate", lambda peak, step, progress: peak)  # both runs have the same end
    whole = _run(tmp_path / "whole", 9)
    _run(tmp_path / "parts", 4)
    parts = _run(tmp_path / "parts", 9)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not torch.equal(whole["0.weight"], _network().state_dict()["0.weight"])


def test_it_learns_and_logs(tmp_path: Path) -> None:
    _run(tmp_path, 160)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(20, 161, 20))
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["rate"] < lines[4]["rate"]


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    one, again = _sampler().batch(5), _sampler().batch(5)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], _sampler().batch(6)[0])
    assert not torch.equal(one[0], _sampler(seed=4).batch(5)[0])


def test_noise_level_is_that_of_the_noise() -> None:
    """Ratio of what was added to what the network is told; the jitter of 10 % averages out."""
    sampler = _sampler(real_part=0.0)
    ratios = []
    for step in range(60):
        noisy, target, level = sampler.batch(step)
        added = (noisy - target).std((1, 2, 3))
        ratios += [math.log(a / b) for a, b in zip(added.tolist(), level.tolist(), strict=True) if a > 0]
    assert float(np.mean(ratios)) == pytest.approx(0, abs=0.03)
    assert float(np.std(ratios)) == pytest.approx(0.1, abs=0.04)


def test_real_targets_come_as_often_as_told() -> None:
    targets = torch.cat([_sampler().batch(step)[1] for step in range(100)])
    assert float((targets.mean((1, 2, 3)) < 0).float().mean()) == pytest.approx(0.3, abs=0.07)
