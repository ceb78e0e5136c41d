"""The training loop: schedule, resuming, learning, and a critic that learns beside the network."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import training
from training import loop
from training.card import Plateau
from training.data import Batch, Sampler
from training.loop import AVERAGE_DECAY, GRADIENT_LIMIT, Adversary, Loss, OtherTraining, Run, Schedule
from training.losses import CriticLoss, charbonnier
from training.recipes import MODULES
from training.sources.scans import Scan


class _Network(nn.Module):
    """Normalisation included: its running statistics are a part of what is averaged and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 1:2] - self.layers(x)


def _sampler() -> Sampler:
    rng = np.random.default_rng(1)
    shape = (6, 40, 40)
    flat = np.full(shape, 50, np.float16)
    noises = tuple(rng.normal(0, sd, shape).astype(np.float16) for sd in (8.0, 16.0))
    return Sampler([Scan("phantom", "phantom", flat, flat, noises, 0.0, 0.0, (8.0, 16.0))], (3, 16, 16), 4, 0.3, 3)


def _predict(network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return network(batch.noisy), batch.target[:, 1:2]


def _loss(denoised: torch.Tensor, target: torch.Tensor, batch: Batch) -> torch.Tensor:
    return charbonnier(denoised, target)


class _Tiring(nn.Module):
    """A loss that depends on what it has seen before."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, denoised: torch.Tensor, target: torch.Tensor, batch: Batch) -> torch.Tensor:
        self.seen += 1
        return charbonnier(denoised, target) + charbonnier(denoised, batch.noisy[:, 1:2]) / self.seen


CRITIC = Adversary(
    critic=lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 1)),
    critic_loss=lambda critic, denoised, target, number: CriticLoss(
        (critic(target) - critic(denoised)).mean(), torch.tensor(float(number))
    ),
    generator_loss=lambda critic, denoised: -critic(denoised).mean(),
    critic_steps=2,
    learning_rate=1e-2,
    betas=(0.5, 0.9),
)
STEADY = Schedule(9, 1e-3, warm_up=2, decay_part=0)


def _validate(network: nn.Module) -> dict[str, float]:
    return {"validation_psnr_db": 30.0}  # of no interest here


def _run(
    out: Path,
    schedule: Schedule,
    adversary: Adversary | None = None,
    what: str = "",
    commit: str = "a",
    loss: Loss = _loss,
    sources: dict[str, str] | None = None,
) -> Run:
    torch.manual_seed(1)
    network = _Network()
    return Run(network, _predict, loss, _sampler(), schedule, _validate, out, what, commit, adversary, sources=sources)


def _weights(run: Run) -> dict[str, torch.Tensor]:
    parts = {"average": run.average, "network": run.network}
    if run.critic is not None:
        parts["critic"] = run.critic
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


@pytest.mark.parametrize(
    ("adversary", "loss"),
    [(None, lambda: _loss), (CRITIC, lambda: _loss), (None, _Tiring)],
    ids=["plain", "critic", "loss with state"],
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    tmp_path: Path, adversary: Adversary | None, loss: Callable[[], Loss]
) -> None:
    whole = _run(tmp_path / "whole", STEADY, adversary, loss=loss())
    whole.train(lambda: None)

    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    parts = _run(tmp_path / "parts", STEADY, adversary, loss=loss())
    with pytest.raises(Stopped):
        parts.train(stop, checkpoint_minutes=0)
    assert 0 < parts.step < STEADY.steps
    parts = _run(tmp_path / "parts", STEADY, adversary, loss=loss())
    assert parts.step > 0
    parts.train(lambda: None)
    ours, theirs = _weights(whole), _weights(parts)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    untrained = _weights(_run(tmp_path / "none", STEADY, adversary))
    assert not any(torch.equal(ours[name], untrained[name]) for name in ours if name.endswith("weight"))


def test_a_longer_run_forgets_the_decay_of_the_shorter_one(tmp_path: Path) -> None:
    short = Schedule(10, 1e-3, warm_up=0, decay_part=0.4)
    _run(tmp_path / "parts", short).train(lambda: None)
    again = _run(tmp_path / "parts", replace(short, steps=20))
    assert again.step == 6
    again.train(lambda: None)
    whole = _run(tmp_path / "whole", replace(short, steps=20))
    whole.train(lambda: None)
    ours, theirs = _weights(whole), _weights(again)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))  # the validations in the decay of the short run are gone with it


def test_a_run_made_longer_before_its_decay_goes_on_where_it_is(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop() -> None:
        if run.step == 12:
            raise Stopped

    short = Schedule(10, 1e-3, warm_up=0, decay_part=0.4)
    _run(tmp_path, short).train(lambda: None)  # leaves the state of step 6, before its decay
    run = _run(tmp_path, replace(short, steps=40))
    with pytest.raises(Stopped):
        run.train(stop, checkpoint_minutes=0)
    assert _run(tmp_path, replace(short, steps=50)).step == 12


def test_another_training_in_the_folder_is_refused(tmp_path: Path) -> None:
    _run(tmp_path, STEADY, what="a, seed 1").train(lambda: None)
    with pytest.raises(OtherTraining, match="holds the training of a, seed 1, this is a, seed 2"):
        _run(tmp_path, STEADY, what="a, seed 2")
    with pytest.raises(OtherTraining, match="at step 9 already"):
        _run(tmp_path, replace(STEADY, steps=5), what="a, seed 1")


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({"scans": "c"}, r"other scans \(a\) than these \(c\)"),
        ({"features": "ct-ae 2"}, r"other features \(ct-ae 1\) than these \(ct-ae 2\)"),
        ({"first weights": "drl 2"}, r"other first weights \(none\) than these \(drl 2\)"),
        ({"slice distance": "1 mm"}, r"other slice distance \(none\) than these \(1 mm\)"),
    ],
)
def test_a_training_that_learnt_from_something_else_is_not_resumed(
    tmp_path: Path, now: dict[str, str], told: str
) -> None:
    before = {"scans": "a", "features": "ct-ae 1"}
    _run(tmp_path, STEADY, sources=before).train(lambda: None)
    _run(tmp_path, STEADY, sources=before)
    with pytest.raises(OtherTraining, match=told):
        _run(tmp_path, STEADY, sources=before | now)


def test_a_checkpoint_that_does_not_tell_what_it_learnt_from_is_taken(tmp_path: Path) -> None:
    _run(tmp_path, STEADY).train(lambda: None)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["sources"]
    torch.save(state, path)
    assert _run(tmp_path, STEADY, sources={"scans": "a"}).step == STEADY.steps


class _Comparing(_Tiring):
    """A loss with frozen weights, as one that compares features has."""

    def __init__(self, weight: float = 2.0) -> None:
        super().__init__()
        self.features = nn.Parameter(torch.tensor(weight), requires_grad=False)


def test_frozen_features_are_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    _run(tmp_path, STEADY, loss=_Comparing()).train(lambda: None)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    assert set(state["loss"]) == {"seen"}
    again = _Comparing()
    _run(tmp_path, STEADY, loss=again)
    assert (float(again.seen), float(again.features)) == (STEADY.steps, 2.0)
    torch.save({**state, "loss": {**state["loss"], "features": torch.tensor(2.0)}}, path)  # one that holds them
    _run(tmp_path, STEADY, loss=_Comparing())
    torch.save({**state, "loss": {}}, path)
    with pytest.raises(RuntimeError, match="seen"):
        _run(tmp_path, STEADY, loss=_Comparing())


def test_who_trained_which_steps_is_kept(tmp_path: Path) -> None:
    short = Schedule(5, 1e-3, decay_part=0)
    _run(tmp_path, short, commit="a").train(lambda: None)
    _run(tmp_path, replace(short, steps=8), commit="a").train(lambda: None)
    last = _run(tmp_path, replace(short, steps=12), commit="b")
    last.train(lambda: None)
    assert last.stretches == [(0, "a"), (8, "b")]


def test_a_log_that_a_kill_has_cut_is_mended(tmp_path: Path) -> None:
    run = _run(tmp_path, replace(STEADY, steps=60))
    run.train(lambda: None)
    whole = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(whole + '{"step": 60, "los')
    _run(tmp_path, replace(STEADY, steps=60))
    assert (tmp_path / "log.jsonl").read_text() == whole


def test_what_is_no_number_ends_the_training_and_spoils_no_checkpoint(tmp_path: Path) -> None:
    _run(tmp_path, STEADY).train(lambda: None)
    run = _run(tmp_path, replace(STEADY, steps=20))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    run.loss = lambda denoised, target, batch: denoised.sum() * float("nan")
    with pytest.raises(RuntimeError, match="non-finite"):
        run.train(lambda: None, checkpoint_minutes=0)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_rates_warm_up_stay_and_fall() -> None:
    schedule = Schedule(100, 1.0, warm_up=10, decay_part=0.2)
    assert [schedule.rate(step) for step in (0, 4, 9, 50, 80, 90, 99)] == pytest.approx(
        [0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.05]
    )
    assert {Schedule(100, 0.01, warm_up=0, decay_part=0).rate(step) for step in range(100)} == {0.01}


@pytest.mark.parametrize("decay_part", [0.0, 0.2])
@pytest.mark.parametrize("steps", [20, 50, 250, 1000, 4000, 4300, 7000, 10_000, 60_000])
def test_validations_are_enough_to_tell_a_plateau(tmp_path: Path, steps: int, decay_part: float) -> None:
    schedule = Schedule(steps, 1.0, decay_part=decay_part)
    assert schedule.check_every <= 500
    checks = range(schedule.check_every, steps + 1, schedule.check_every)
    assert len(checks) <= max(40, steps // 500)
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f'{{"step": {k}, "validation_psnr_db": 30.0}}\n' for k in checks), encoding="utf-8")
    assert Plateau.of(log, schedule.decay_from).gain_db == pytest.approx(0, abs=1e-6)


def test_what_is_ours_in_every_training_is_said() -> None:
    said = Path(training.__file__).parents[1].joinpath("docs", "training.md").read_text(encoding="utf-8")
    assert f"running average over the steps (decay {AVERAGE_DECAY})" in said
    assert f"gradients are clipped to length {GRADIENT_LIMIT}" in said
    for module in {f"training.recipes.{name}" for name in MODULES.values()}:
        words = " ".join((importlib.import_module(module).__doc__ or "").split())
        assert "averaged weights, clipped gradients and bfloat16" in words.lower(), module
        assert "ours" in words, module


def test_it_learns_and_logs(tmp_path: Path) -> None:
    _run(tmp_path, Schedule(200, 3e-3, warm_up=10)).train(lambda: None)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert [(line["step"], line["samples"]) for line in logged] == [(50, 200), (100, 400), (150, 600), (200, 800)]
    assert logged[-1]["loss"] < 0.7 * logged[0]["loss"]
    assert logged[-1]["rate"] < logged[1]["rate"]
    assert [line["step"] for line in lines if "validation_psnr_db" in line] == list(range(10, 201, 10))


def test_progress_tells_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the pace since it was taken up: of 25 steps 10 were made before, then each takes two minutes."""
    monkeypatch.setattr(loop, "LOG_EVERY", 5)
    schedule = Schedule(25, 1e-3, decay_part=0)
    _run(tmp_path, replace(schedule, steps=10)).train(lambda: None)
    run = _run(tmp_path, schedule)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 120.0 * run.step))
    capsys.readouterr()
    run.train(lambda: None)
    said = [line for line in capsys.readouterr().out.replace("\r", "\n").splitlines() if "ETA" in line]
    assert [line.split("  ")[0] for line in said] == ["step 15/25", "step 20/25", "step 25/25"]
    assert [line.split("  ")[-1] for line in said] == ["ETA 20 min", "ETA 10 min", "ETA 0 min"]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [f"loss {row['loss']:.5f}" for row in rows if "loss" in row]
    assert [line.split("  ")[1] for line in said] == losses[2:]


def test_what_the_critic_learns_is_logged(tmp_path: Path) -> None:
    """The mean over the steps of the critic since the line before: of the numbers 0, 1, 3, 4, … of its batches."""
    run = _run(tmp_path, Schedule(100, 1e-3, warm_up=0), CRITIC)
    run.train(lambda: None)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    own = [[number for number in range(first, first + 150) if number % 3 < 2] for first in (0, 150)]
    assert [line["gradient_penalty"] for line in logged] == pytest.approx([np.mean(numbers) for numbers in own])
    assert logged[1]["wasserstein_distance"] > logged[0]["wasserstein_distance"] > 0  # nothing bounds this critic


def test_frozen_weights_stay(tmp_path: Path) -> None:
    run = _run(tmp_path, STEADY)
    run.network.layers[0].requires_grad_(False)  # type: ignore[index]  # it is a Sequential
    before = run.network.state_dict()["layers.0.weight"].clone()
    run.train(lambda: None)
    assert torch.equal(run.network.state_dict()["layers.0.weight"], before)
