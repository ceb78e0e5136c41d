"""The training loop: one function, AdamW on a Charbonnier loss, cosine schedule, moving average of the weights."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

CHARBONNIER_EPSILON = 1e-3
"""1 HU: quadratic below, linear above."""
WARM_UP_STEPS = 100
GRADIENT_LIMIT = 1.0
AVERAGE_DECAY = 0.998
FINAL_RATE = 0.01
"""Learning rate at the end, as a part of the highest."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When a training ends: after so many steps, or after so many minutes of training, whichever comes first."""

    steps: int
    minutes: float = math.inf

    def progress(self, step: int, seconds: float) -> float:
        """Part done, 0 to 1."""
        return min(max(step / self.steps, seconds / 60 / self.minutes), 1.0)


def charbonnier(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``mean(sqrt((output − target)² + ε²)) − ε``."""
    error = (output - target).float()
    return (error * error + CHARBONNIER_EPSILON**2).sqrt().mean() - CHARBONNIER_EPSILON


def _rate(peak: float, step: int, progress: float) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def train(
    network: nn.Module,
    loss: Callable[[nn.Module, Batch], torch.Tensor],
    batch: Callable[[int], Batch],
    schedule: Schedule,
    learning_rate: float,
    out: Path,
    save: Callable[[nn.Module, int, float], None],
    checkpoint_minutes: float = 3.0,
    device: str = "cpu",
) -> nn.Module:
    """Train `network`; resume from ``out/checkpoint.pt`` if it is there.

    Parameters
    ----------
    network
        Trained in place, on `device`.
    loss
        Makes the loss of one batch.
    batch
        Batch number `step`; it must depend on the number alone, so that a resumed run sees the same batches.
    schedule, learning_rate
        When to end, and the highest learning rate.
    out
        Folder of ``checkpoint.pt`` and of the log, ``log.jsonl`` (one object per line: step, loss, rate, seconds).
    save
        Called with the averaged network, the steps and the seconds at every checkpoint and at the end.
    checkpoint_minutes
        Minutes between checkpoints.
    device
        Where to train; the autocast format is bfloat16 everywhere.

    Returns
    -------
    torch.nn.Module
        The network with averaged weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    network.to(device).train()
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    step, before, checkpoint = 0, 0.0, out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, before = state["step"], state["seconds"]

    start = saved = time.monotonic()

    def checkpoint_now() -> None:
        seconds = before + time.monotonic() - start
        state = {
            "network": network.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": seconds,
        }
        partial = checkpoint.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(checkpoint)
        save(average, step, seconds)

    total, since = 0.0, 0
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        while (progress := schedule.progress(step, before + time.monotonic() - start)) < 1:
            rate = _rate(learning_rate, step, progress)
            for group in optimizer.param_groups:
                group["lr"] = rate
            noisy, target, level = (t.to(device) for t in batch(step))
            with torch.autocast(device, torch.bfloat16):
                value = loss(network, (noisy, target, level))
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_LIMIT)
            optimizer.step()
            decay = min(AVERAGE_DECAY, (1 + step) / (10 + step))
            with torch.no_grad():
                for mean, now in zip(average.parameters(), network.parameters(), strict=True):
                    mean.lerp_(now, 1 - decay)
            step, total, since = step + 1, total + value.item(), since + 1
            if step % 20 == 0:
                seconds = round(before + time.monotonic() - start, 1)
                log.write(json.dumps({"step": step, "loss": total / since, "rate": rate, "seconds": seconds}) + "\n")
                log.flush()
                total, since = 0.0, 0
            if time.monotonic() - saved > 60 * checkpoint_minutes:
                checkpoint_now()
                saved = time.monotonic()
    checkpoint_now()
    return average
