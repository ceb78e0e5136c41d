"""``python -m training train RECIPE --out DIR`` and ``python -m training evaluate NAME``."""

from __future__ import annotations

import argparse
import importlib
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from training.card import TrainingRecord, source_of, write_network
from training.data import Sampler, phantom_scan, real_scan
from training.evaluate import evaluate
from training.loop import Schedule, train
from training.recipes import Recipe

RECIPES = {"st3d": "training.recipes.st3d", "fast-2.5d": "training.recipes.fast_2p5d"}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} thread(s), bfloat16"


def _train(args: argparse.Namespace) -> None:
    recipe: Recipe = importlib.import_module(RECIPES[args.recipe]).RECIPE
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    scans = [phantom_scan(args.seed * 1000 + k) for k in range(args.phantoms)]
    scans += [real_scan(folder, args.seed + k) for k, folder in enumerate(args.series)]
    for scan in scans:
        levels = ", ".join(f"{level:.1f}" for level in scan.noise_hu)
        print(f"{scan.name}: {len(scan.target)} slices, target noise {scan.target_noise_hu:.1f} HU, to add {levels} HU")
    # last part of each path only: where the folders lay on this machine is nobody's business
    folders = {str(path): path.name for path in (args.out, *args.series)}
    command = shlex.join(folders.get(word, word) for word in args.argv)

    def save(network: torch.nn.Module, steps: int, seconds: float) -> None:
        record = TrainingRecord(
            command=f"python -m training {command}",
            seed=args.seed,
            hours=round(seconds / 3600, 2),
            steps=steps,
            hardware=_hardware(),
            phantoms=args.phantoms,
            series=tuple(source_of(folder) for folder in args.series),
        )
        write_network(args.out, recipe.card, network, record)

    train(
        recipe.network(),
        recipe.loss,
        Sampler(scans, recipe.patch_zyx, recipe.batch, recipe.real_part, args.seed).batch,
        Schedule(args.steps or recipe.steps, args.minutes),
        recipe.learning_rate,
        args.out,
        save,
        device=_device(),
    )


def _evaluate(args: argparse.Namespace) -> None:
    print(evaluate(args.name, args.seed, args.slices, "python -m training " + shlex.join(args.argv)))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and do it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True)

    one = commands.add_parser("train", help="train a network; resumes if OUT holds a checkpoint")
    one.add_argument("recipe", choices=sorted(RECIPES))
    one.add_argument("--out", type=Path, required=True, help="folder of checkpoint, log, weights and card")
    one.add_argument("--minutes", type=float, default=float("inf"), help="end after so many minutes of training")
    one.add_argument("--steps", type=int, help="end after so many steps (default: the recipe's)")
    one.add_argument("--phantoms", type=int, default=20, help="number of phantoms")
    one.add_argument("--threads", type=int, default=1, help="CPU threads")
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--series", type=Path, nargs="*", default=[], help="folders of real series of soft kernels (last)")
    one.set_defaults(run=_train)

    two = commands.add_parser("evaluate", help="measure an installed pipeline on a phantom and write it into its card")
    two.add_argument("name")
    two.add_argument("--seed", type=int, default=900_001, help="of the phantom; trainings use seeds far below")
    two.add_argument("--slices", type=int, default=32)
    two.set_defaults(run=_evaluate)

    args = parser.parse_args(arguments)
    args.argv = arguments
    args.run(args)


if __name__ == "__main__":
    main()
