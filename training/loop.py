"""The training loop: one function, from batches to averaged weights; resumes exactly where it was stopped."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.data import Batch, Sampler
from training.losses import CriticLoss

GRADIENT_LIMIT = 1.0
"""Longest gradient of the network; of no paper here, every recipe has it."""
AVERAGE_DECAY = 0.998
"""Of the running average of the weights, which is what is validated and shipped; of no paper here either."""
LOG_EVERY = 50
"""Steps between two lines of the log."""
_CHECKS, _CHECK_EVERY = 20, 500
"""Validations of a training, at least; and steps between two of them, at most."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps and rates of a training: warm-up, constant, and at the end a linear decay to nothing.

    During the constant part the loss shows whether the network still learns (the plateau), and the part can be made
    longer later: a run that ended is taken up where its decay began.
    """

    steps: int
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.99)
    warm_up: int = 100
    decay_part: float = 0.2
    """Last part of the steps, in which the rate falls; 0 for a fixed rate."""

    @property
    def decay_from(self) -> int:
        """Step at which the decay begins."""
        return round(self.steps * (1 - self.decay_part))

    @property
    def check_every(self) -> int:
        """Steps between two validations; so few that `training.card.Plateau` finds enough of them."""
        return max(min(_CHECK_EVERY, self.steps // _CHECKS), 1)

    def until(self, steps: int) -> Schedule:
        """The same with another number of steps."""
        return replace(self, steps=steps)

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        left = (self.steps - step) / max(self.steps - self.decay_from, 1)
        return self.learning_rate * min(1.0, (step + 1) / max(self.warm_up, 1), left)


@dataclass(frozen=True, slots=True)
class Adversary:
    """The critic of a Wasserstein training.

    critic
        Makes it.
    critic_loss
        Of critic, denoised and target patches; the step seeds what it draws. Both terms are logged.
    generator_loss
        Of critic and denoised patches; added to the loss of the recipe.
    critic_steps
        Steps of the critic for each of the network.
    """

    critic: Callable[[], nn.Module]
    critic_loss: Callable[[nn.Module, torch.Tensor, torch.Tensor, int], CriticLoss]
    generator_loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    critic_steps: int
    learning_rate: float
    betas: tuple[float, float]


Predict = Callable[[nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]
"""Denoised patches and what they should be."""
Loss = Callable[[torch.Tensor, torch.Tensor, Batch], torch.Tensor]


class OtherTraining(RuntimeError):
    """The folder holds another training, or a longer one."""


class Run:
    """A training in a folder: ``checkpoint.pt``, ``before-decay.pt`` and ``log.jsonl``.

    Parameters
    ----------
    network
        Trained in place; parameters that need no gradient stay as they are.
    predict, loss
        Of the recipe.
    batches
        Batch number `step`.
    schedule, adversary
        Of the recipe.
    validate
        Measures the averaged network: names and values for the log.
    out
        The folder.
    what
        What is trained on what; a checkpoint of something else is refused.
    sources
        What it learns from, by name, each with a digest; a checkpoint that learnt from something else is refused. One
        that does not tell is taken.
    commit
        Of the code, for the record of who trained which steps.
    device
        ``cpu`` or ``cuda``; computes in bfloat16 where that is safe (autocast) and float32 elsewhere.
    """

    def __init__(
        self,
        network: nn.Module,
        predict: Predict,
        loss: Loss,
        batches: Sampler,
        schedule: Schedule,
        validate: Callable[[nn.Module], dict[str, float]],
        out: Path,
        what: str = "",
        commit: str = "",
        adversary: Adversary | None = None,
        device: str = "cpu",
        workers: int = 0,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        self.predict, self.loss, self.batches, self.schedule = predict, loss, batches, schedule
        self.validate, self.out, self.adversary, self.device, self.workers = validate, out, adversary, device, workers
        if isinstance(loss, nn.Module):
            loss.to(device)
        self.network = network.to(device).train()
        self.average = copy.deepcopy(network).requires_grad_(False).eval()
        learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(learning, lr=schedule.learning_rate, betas=schedule.betas)
        self.critic: nn.Module | None = None
        if adversary:
            self.critic = adversary.critic().to(device).train()
            self.critic_optimizer = torch.optim.Adam(
                self.critic.parameters(), lr=adversary.learning_rate, betas=adversary.betas
            )
        self.step, self.seconds, self.what, self.commit = 0, 0.0, what, commit
        self.sources = dict(sources or {})
        self.stretches: list[tuple[int, str]] = []
        """Step from which on a commit of the code trained."""
        out.mkdir(parents=True, exist_ok=True)
        self._resume()

    def _resume(self) -> None:
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = self.out / "before-decay.pt"
        decaying = state["step"] > self.schedule.until(state["steps"]).decay_from
        if decaying and state["steps"] != self.schedule.steps and before.exists():  # longer now: forget that decay
            state = torch.load(before, map_location="cpu", weights_only=True)
        if state["what"] != self.what:
            raise OtherTraining(
                f"{self.out} holds the training of {state['what']}, this is {self.what}: choose another"
            )
        self._compare(state.get("sources", self.sources))
        if state["step"] > self.schedule.steps:
            raise OtherTraining(
                f"{self.out} is at step {state['step']} already: ask for more than {self.schedule.steps}"
            )
        for name, part in self._parts().items():
            part.load_state_dict({**_frozen(self.loss), **state[name]} if name == "loss" else state[name])
        self.step, self.seconds, self.stretches = state["step"], state["seconds"], state["stretches"]
        log = self.out / "log.jsonl"
        kept = []
        for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
            # what came after the checkpoint comes again; a line that a kill has cut comes after it
            if not line.endswith("\n") or json.loads(line)["step"] > self.step:
                break
            kept.append(line)
        partial = log.with_suffix(".part")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(log)

    def _compare(self, theirs: Mapping[str, str]) -> None:
        for name in sorted({*theirs, *self.sources}):
            one, other = theirs.get(name, "none"), self.sources.get(name, "none")
            if one != other:
                raise OtherTraining(
                    f"{self.out} was trained with other {name} ({one}) than these ({other}): give those, or choose "
                    "another folder"
                )

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"network": self.network, "average": self.average, "optimizer": self.optimizer}
        if isinstance(self.loss, nn.Module):
            parts["loss"] = self.loss
        if self.critic is not None:
            parts |= {"critic": self.critic, "critic_optimizer": self.critic_optimizer}
        return parts

    def save(self, name: str = "checkpoint.pt") -> None:
        """Write everything that the next step depends on."""
        state = {key: part.state_dict() for key, part in self._parts().items()}
        if "loss" in state:  # of frozen weights the digest in the sources is enough
            state["loss"] = {key: value for key, value in state["loss"].items() if key not in _frozen(self.loss)}
        partial = self.out / f"{name}.part"
        where = {"step": self.step, "seconds": self.seconds, "steps": self.schedule.steps}
        about = {"what": self.what, "sources": self.sources, "stretches": self.stretches}
        torch.save({**state, **where, **about}, partial)
        partial.replace(self.out / name)

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device, torch.bfloat16)

    def _teach_critic(self, batch: Batch, number: int) -> torch.Tensor:
        """One step of the critic; both terms of its loss."""
        assert self.critic is not None
        assert self.adversary is not None
        with torch.no_grad(), self._autocast():
            denoised, target = self.predict(self.network, batch)
        terms = self.adversary.critic_loss(self.critic, denoised.float(), target.float(), number)
        self.critic_optimizer.zero_grad(set_to_none=True)
        terms.value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(self.critic.parameters(), math.inf, error_if_nonfinite=True)
        self.critic_optimizer.step()
        return torch.stack(terms).detach()

    def _teach(self, batch: Batch) -> torch.Tensor:
        with self._autocast():
            denoised, target = self.predict(self.network, batch)
            value = self.loss(denoised, target, batch)
            if self.critic is not None and self.adversary is not None:
                value = value + self.adversary.generator_loss(self.critic, denoised)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_LIMIT, error_if_nonfinite=True)
        self.optimizer.step()
        decay = min(AVERAGE_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, now in zip(_values(self.average), _values(self.network), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(now, 1 - decay)
                else:
                    mean.copy_(now)
        return value.detach()

    def train(self, saved_too: Callable[[], None], checkpoint_minutes: float = 3.0) -> nn.Module:
        """Go on to the last step.

        Parameters
        ----------
        saved_too
            Called after every checkpoint.
        checkpoint_minutes
            Minutes between checkpoints.

        Returns
        -------
        torch.nn.Module
            The network with averaged weights.
        """
        begun = start = saved = time.monotonic()
        first = self.step
        if first < self.schedule.steps and (not self.stretches or self.stretches[-1][1] != self.commit):
            self.stretches.append((first, self.commit))
        each = self.adversary.critic_steps if self.adversary else 0  # batches of the critic per step of the network
        numbers = range(self.step * (1 + each), self.schedule.steps * (1 + each))
        loader = torch.utils.data.DataLoader(self.batches, batch_size=None, sampler=numbers, num_workers=self.workers)
        losses: list[torch.Tensor] = []
        of_critic: list[torch.Tensor] = []
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:

            def write(**values: float) -> None:
                where = {"step": self.step, "samples": self.step * self.batches.size, "seconds": round(self.seconds, 1)}
                log.write(json.dumps({**where, **values}) + "\n")
                log.flush()

            for number, cpu in zip(numbers, loader, strict=True):
                batch = Batch(*(tensor.to(self.device, non_blocking=True) for tensor in cpu))
                if number % (1 + each) < each:
                    of_critic.append(self._teach_critic(batch, number))
                    continue
                losses.append(self._teach(batch))
                self.step += 1
                now = time.monotonic()
                self.seconds, start = self.seconds + now - start, now
                if self.step % LOG_EVERY == 0:
                    mean = float(torch.stack(losses).mean())
                    terms = torch.stack(of_critic).mean(0).tolist() if of_critic else ()
                    losses.clear()
                    of_critic.clear()
                    critic = dict(zip(("wasserstein_distance", "gradient_penalty"), terms, strict=False))
                    write(loss=mean, rate=self.schedule.rate(self.step - 1), **critic)
                    left = (now - begun) / (self.step - first) * (self.schedule.steps - self.step)
                    print(f"step {self.step}/{self.schedule.steps}  loss {mean:.5f}  ETA {left / 60:.0f} min", end="\r")
                    sys.stdout.flush()
                if self.step % self.schedule.check_every == 0 or self.step == self.schedule.steps:
                    measured = self.validate(self.average)
                    write(**measured)
                    words = "  ".join(f"{name} {value:.3f}" for name, value in measured.items())
                    print(f"step {self.step}/{self.schedule.steps}  {words}{' ' * 20}")
                if self.step == self.schedule.decay_from:
                    self.save("before-decay.pt")
                if time.monotonic() - saved > 60 * checkpoint_minutes:
                    self.save()
                    saved_too()
                    saved = time.monotonic()
        if self.step > first:
            self.save()
        return self.average


def _frozen(loss: Loss) -> dict[str, torch.Tensor]:
    """Weights of a loss that nothing changes: those of the features that it compares."""
    if not isinstance(loss, nn.Module):
        return {}
    return {name: weight for name, weight in loss.named_parameters() if not weight.requires_grad}


def _values(network: nn.Module) -> Sequence[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]
