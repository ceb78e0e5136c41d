"""The columns of the STResNet paper's Table 1 that need a GPU: inference in fp32, bf16 and fp16, and what a training
iteration takes in fp32 and mixed.

    python benchmarks/table1_gpu.py

SRResNet3D and STResNet of 64 features and 8 blocks (random weights: the time is the same), as PyTorch runs them for a
node: weights and sums in fp32, products in the type. The tile is that of table1.py, as a whole and streamed through the
network plane by plane. An iteration is that of `training.loop` with the recipe's batch, patch and loss, on what lies on
the GPU already. Contestants take turns; a GPU has no peak here to hold them against.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from machine import command, description, median, own_cores, seconds, table
from numpy.typing import NDArray
from table1 import BLOCKS, FEATURES, NOISE, PAPER, SEED, TILE, Network, filled, random_weights
from torch import nn

from pipelines.stresnet import SRResNet3D, STResNet
from training.data import Batch
from training.loop import Run
from training.recipes import deep, recipe

KINDS: tuple[type[Network], ...] = (SRResNet3D, STResNet)
"""Of `PAPER`."""
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WHOLE, STREAMED, TRAINED = "whole tile", "streamed", "training iteration"
WARM = 3
"""Turns before the first that counts: cuDNN chooses its algorithms."""

Array = NDArray[np.float32]
Turn = tuple[str, str, str]
"""Network, how it runs, and in what."""


def inference(network: nn.Module, tile: Array, device: str, kind: str, *, streamed: bool) -> Callable[[], Array]:
    """The tile from the processor's memory and back, which waits for the GPU."""
    network = network.to(device)

    def run() -> Array:
        with torch.inference_mode(), torch.autocast(device, TYPES[kind], enabled=kind != "fp32"):
            given = torch.from_numpy(tile)[None, None].to(device)
            if streamed:
                planes = (given[:, :, k] for k in range(given.shape[2]))
                result = torch.cat([plane[0].float() for plane in network.stream(planes)])  # type: ignore[operator]  # a method
            else:
                result = network(given)[0, 0].float()
            return np.asarray(result.cpu().numpy())

    return run


def training(name: str, network: nn.Module, device: str, folder: Path, *, mixed: bool) -> Callable[[], float]:
    """One iteration of the recipe `name`; gives its loss, for which it waits."""
    how = recipe(name)
    values = torch.randn(2, how.batch, *how.patch_zyx, generator=torch.Generator().manual_seed(SEED)) * NOISE
    batch = Batch(*(one.to(device) for one in (values[0], values[1], torch.full((how.batch,), NOISE))))
    network.requires_grad_(True)
    loop = Run(network, how.predict, how.loss(), None, how.schedule, lambda _: {}, folder, device=device)  # type: ignore[arg-type]  # no data: the batch is there
    if not mixed:
        loop._autocast = nullcontext  # type: ignore[method-assign]  # so that it stays in fp32
    return lambda: float(loop._teach(batch))


def prepare(tile: Array, device: str, folder: Path) -> dict[Turn, Callable[[], object]]:
    """Everything that is timed, ready to run."""
    turns: dict[Turn, Callable[[], object]] = {}
    for name, kind in zip(PAPER, KINDS, strict=True):
        weights = random_weights(kind)
        for precision in TYPES:
            for how in (WHOLE, STREAMED):
                network = filled(kind, weights)
                turns[name, how, precision] = inference(network, tile, device, precision, streamed=how == STREAMED)
        for precision, mixed in (("fp32", False), ("mixed, bf16", True)):
            made = deep(filled(kind, weights))  # as recipes have it
            turns[name, TRAINED, precision] = training(name, made, device, folder / f"{name}-{mixed}", mixed=mixed)
    return turns


HEAD = ("network", "what", "type", "seconds", "× SRResNet3D in fp32", "× itself in fp32")


def rows(times: Mapping[Turn, list[float]]) -> list[list[str]]:
    """The table; `times` of the rounds, s."""
    middles = {turn: statistics.median(taken) for turn, taken in times.items()}
    return [
        [
            *(name, how, precision, median(times[name, how, precision], 4)),
            f"{middles[PAPER[0], how if how == TRAINED else WHOLE, 'fp32'] / middle:.2f}",
            f"{middles[name, how, 'fp32'] / middle:.2f}",
        ]
        for (name, how, precision), middle in middles.items()
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="(default %(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU that it can use: table1.py measures a CPU")
    torch.backends.cudnn.allow_tf32 = False  # 10 bits are no fp32
    tile = np.random.default_rng(SEED).normal(0, NOISE, TILE).astype(np.float32)
    with tempfile.TemporaryDirectory() as scratch:
        turns = {turn: seconds(run) for turn, run in prepare(tile, "cuda", Path(scratch)).items()}
        times: dict[Turn, list[float]] = {turn: [] for turn in turns}
        for number in range(WARM + options.rounds):
            for turn, timed in turns.items():
                taken = timed()
                if number >= WARM:
                    times[turn].append(taken)
    print(command([]))
    print(f"{torch.cuda.get_device_name()}; {description(own_cores())}")
    print(f"{FEATURES} features, {BLOCKS} blocks; tile of {' × '.join(map(str, TILE))}; {options.rounds} rounds.\n")
    print(table(HEAD, rows(times)))


if __name__ == "__main__":
    main()
