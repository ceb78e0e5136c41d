"""Install the result of a training, or of several: weights and card to where pipelines are loaded from, and the log.

A pipeline that is announced in pyproject.toml under the name of the network can then be named in config.yaml. Measure
it first: python -m training evaluate NAME writes what it is worth into its card.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path

from pipelines.base import WeightsDamaged
from pipelines.runtime import WEIGHTS, read_card

HELP = "install the result of a training for the node"
LOGS = Path(__file__).parent / "logs"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("training", nargs="+", type=Path, help="folder that `train --out` wrote")
    add("--weights", type=Path, default=WEIGHTS, help="where weights and card go (default: of the installed package)")
    add("--logs", type=Path, default=LOGS, help="where the log goes (default: training/logs)")
    parser.set_defaults(run=run)


def export(training: Path, weights: Path, logs: Path) -> str:
    """Copy weights and card of a training into `weights` and its log into `logs`; the name of the network.

    Raises
    ------
    FileNotFoundError
        If there is no card in the folder: nothing was trained there.
    pipelines.base.WeightsDamaged
        If the weights are not those of the card: the training was stopped between the two; start it again.
    """
    card = next(training.glob("*.json"), None)
    if card is None:
        raise FileNotFoundError(f"{training} holds no card: it is no folder of a training, or that has not saved yet")
    name = card.stem
    found = hashlib.sha256((training / f"{name}.safetensors").read_bytes()).hexdigest()
    if found != read_card(name, training).weights_sha256:
        raise WeightsDamaged(f"weights in {training} are not those of their card: start the training again")
    for folder in (weights, logs):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(training / f"{name}.safetensors", weights)
    shutil.copy(card, weights)
    shutil.copy(training / "log.jsonl", logs / f"{name}.jsonl")
    return name


def run(args: argparse.Namespace) -> None:
    """The command."""
    for training in args.training:
        print(f"installed {export(training, args.weights, args.logs)} in {args.weights}")
