"""Install the result of a training, or of several: weights and card to where pipelines are loaded from, and the log.

A network that makes one slice at a time also gets its graph, with which a node runs it on a CPU without PyTorch.

A pipeline that is announced in pyproject.toml under the name of the network can then be named in config.yaml. Measure
it first: python -m training evaluate NAME --weights FOLDER measures what is not installed yet. Once it is installed,
python -m training evaluate NAME --card writes what it is worth on the phantom into its card and its page.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from importlib.metadata import entry_points
from pathlib import Path

from pipelines.base import ENTRY_POINT_GROUP, WeightsDamaged
from pipelines.runtime import WEIGHTS, read_card
from pipelines.shipped import Factory
from training.card import LOGS, card_in, write_card
from training.ir import graph

HELP = "install the result of a training for the node"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("training", nargs="*", type=Path, help="folder that `train --out` wrote")
    add("--graph", nargs="+", default=(), metavar="NAME", help="make only the graph again, of weights that are there")
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
    card = card_in(training)
    name = card.stem
    found = hashlib.sha256((training / f"{name}.safetensors").read_bytes()).hexdigest()
    if found != read_card(name, training).weights_sha256:
        raise WeightsDamaged(f"weights in {training} are not those of their card: start the training again")
    for folder in (weights, logs):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(training / f"{name}.safetensors", weights)
    shutil.copy(card, weights)
    shutil.copy(training / "log.jsonl", logs / f"{name}.jsonl")
    _remove_int8(name, weights)
    write_graph(name, weights)
    return name


def _remove_int8(name: str, weights: Path) -> None:
    """Remove what was made of other weights or of another graph."""
    for old in weights.glob(f"{name}.int8.*"):
        old.unlink()


def write_graph(name: str, weights: Path) -> bool:
    """Write ``NAME.xml`` beside the weights and its digest into the card; False if the network is run without one.

    What was quantised before belongs to another graph, and goes.

    Raises
    ------
    training.ir.NotConvertible, pipelines.base.WeightsMissing, pipelines.base.WeightsDamaged
        As `training.ir.graph`.
    """
    card = read_card(name, weights)
    factory = next((point.load() for point in entry_points(group=ENTRY_POINT_GROUP, name=name)), None)
    if card.input == "volume" or not isinstance(factory, Factory):
        return False
    content = graph(factory.network(), card, weights, noise_map_stride=factory.noise_map_stride)
    _remove_int8(name, weights)
    (weights / f"{name}.xml").write_bytes(content)
    path = weights / f"{name}.json"
    full = json.loads(path.read_text(encoding="utf-8"))
    for key in ("int8_loss_db", "int8_bound_hu", "int8"):
        full.pop(key, None)
    full["files_sha256"] = {"xml": hashlib.sha256(content).hexdigest()}
    write_card(path, full)
    return True


def run(args: argparse.Namespace) -> None:
    """The command."""
    if not args.training and not args.graph:
        raise SystemExit("nothing to install: name the folder that `train --out` wrote")
    for training in args.training:
        name = export(training, args.weights, args.logs)
        print(f"installed {name} in {args.weights}")
    for name in args.graph:
        wrote = write_graph(name, args.weights)
        print(f"wrote {name}.xml in {args.weights}" if wrote else f"{name} is run without a graph")
