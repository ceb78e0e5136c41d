"""Make the INT8 version of an installed network, which a CPU runs up to four times as fast, and measure what it loses.

Give the data that taught the network: the ranges of its activations are found on scans that teach, the loss is measured
on scans that validate, and series kept for tests are never looked at. Layers that cost the image much and the processor
little stay in float. If the loss is larger than allowed all the same, the network is fine-tuned with its own loss while
it is rounded to 8 bits; stopped and started again, that goes on where it was. The files go beside the weights, what was
measured into the card, and of the installed weights onto their page in docs/models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pipelines import golden
from pipelines.base import Execution, ModelCard
from pipelines.openvino_core import cpu_supports
from pipelines.runtime import WEIGHTS, read_card, read_weights
from pipelines.shipped import Factory
from pipelines.torch_engine import load_network
from training.card import commit, write_card
from training.command_line import without_folders
from training.data import Sampler
from training.float_layers import Comparison, Loss, choose
from training.int8_files import Deployed, plane_files, stream_files
from training.loop import Run
from training.measuring.model_page import write_page
from training.measuring.uninstalled import factory_of
from training.quantization import calibrate, convolutions, multiplications, quantisable
from training.recipes import MODULES, Faithful, Recipe, recipe
from training.sources.layouts import find
from training.sources.prepare import Preparation, make, scans_of
from training.train import SEEDS_EACH, VALIDATION_PHANTOMS, VALIDATION_SEED, divided, taught

HELP = "make the INT8 version of a network, for CPUs, and measure what it loses"
MAX_LOSS_DB = 0.1
CALIBRATION_PATCHES, CHOICE_PATCHES, VALIDATION_PATCHES = 512, 32, 128
"""To find ranges, to choose what stays in float, to measure the loss. Ranges that a patch of much noise or bone exceeds
are cut off there, at tens of HU: a quarter of these patches is too few."""
SLICES_AT_ONCE = 4
"""Patches that one of a volume stands for: it holds a dozen slices."""
TUNING_STEPS = 2000
TUNING_RATE = 0.02
"""Learning rate of the fine-tuning in parts of the recipe's: the network has learnt all but to be rounded."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("network", choices=sorted(MODULES), metavar="NAME", help="an installed network")
    add("--data", type=Path, nargs="*", default=[], help="folders with CT, those of its training")
    add("--phantoms", type=int, help="number of its phantoms to use (default: all that its card tells)")
    add("--leave-out", nargs="*", default=[], metavar="SUBJECT", help="subjects that validate, those of its training")
    add("--store", type=Path, help="folder that keeps prepared data (default: OUT/store)")
    add("--max-loss-db", type=float, default=MAX_LOSS_DB, help="PSNR that it may lose, dB (default %(default)s)")
    add(
        "--steps",
        type=int,
        default=TUNING_STEPS,
        help="steps of fine-tuning where the loss is larger; 0 for none (default %(default)s)",
    )
    add("--out", type=Path, help="folder of the fine-tuning: checkpoint and log (default: NAME-int8)")
    add("--weights", type=Path, default=WEIGHTS, help="where weights and card lie (default: of the installed package)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all)")
    add("--workers", type=int, default=0, help="processes that prepare scans and batches")
    parser.set_defaults(run=run)


class _Data(NamedTuple):
    """What a network is quantised with."""

    teach: Sampler
    seen: Sampler
    """The same scans, each patch once: more of them."""
    check: Sampler
    names: tuple[str, ...]
    """Of the real series that teach."""
    checked: tuple[str, ...]
    """Of the scans that validate."""


def _data(args: argparse.Namespace, how: Recipe, seed: int, phantoms: int) -> _Data:
    """As for the training, whose seed and number of phantoms these are."""
    cases = taught([case for root in args.data for case in find(root)])
    teach, check = divided(cases, args.leave_out)
    preparation = Preparation(args.store or args.out / "store", seed, None)
    seeds = [seed * SEEDS_EACH + k for k in range(phantoms)]
    held_seeds = [VALIDATION_SEED + k for k in range(VALIDATION_PHANTOMS)]
    make(preparation, [*seeds, *([] if check else held_seeds), *teach, *check], args.workers)
    real = scans_of(preparation, teach).values()
    held = [*scans_of(preparation, check).values()] or [*map(preparation.phantom, held_seeds)]
    scans = [*map(preparation.phantom, seeds), *real]
    if not scans:
        raise SystemExit("nothing to calibrate with: give --data with the CT series of the training")
    return _Data(
        Sampler(scans, how.patch_zyx, how.batch, how.real_part, seed, how.twins),
        Sampler(scans, how.patch_zyx, how.batch, how.real_part, seed),
        Sampler(held, how.patch_zyx, how.batch, how.real_part, VALIDATION_SEED),
        tuple(scan.name for scan in real),
        tuple(scan.name for scan in held),
    )


def _trained(how: Recipe, card: ModelCard, folder: Path) -> nn.Module:
    """The network with its weights; what its recipe trains can learn."""
    network = how.network()
    learning = [parameter.requires_grad for parameter in network.parameters()]
    load_network(network, card, folder)
    for parameter, learns in zip(network.parameters(), learning, strict=True):
        parameter.requires_grad_(learns)
    return network


def _tuned(
    network: nn.Module, weights: str, how: Recipe, data: _Data, checks: Comparison, args: argparse.Namespace
) -> nn.Module:
    """`network`, made of weights with this digest, after quantisation-aware fine-tuning."""
    loss = how.loss()
    if isinstance(loss, Faithful):  # at its full weight at once: the network is trained
        loss.steps.fill_(loss.steady_after)

    def validate(average: nn.Module) -> dict[str, float]:
        measured = checks.of(average)
        return {"int8_loss_db": measured.worst_db, "int8_rms_hu": measured.rms_hu}

    rate = TUNING_RATE * how.schedule.learning_rate
    ranges = {name: one.range for name, one in convolutions(network).items() if one.range is not None}
    average = Run(
        network,
        how.predict,
        loss,
        data.teach,
        replace(how.schedule, steps=args.steps, learning_rate=rate),
        validate,
        args.out,
        f"{args.network} in 8 bits, rate {rate:g}, {', '.join(sorted(ranges))}",
        commit(),
        device="cuda" if torch.cuda.is_available() else "cpu",
        workers=args.workers,
        sources={"weights": weights, "ranges": hashlib.sha256(repr(sorted(ranges.items())).encode()).hexdigest()},
    ).train(lambda: None)
    return average.cpu()


def run(args: argparse.Namespace) -> None:
    """The command."""
    if not cpu_supports("int8"):
        raise SystemExit(
            "this CPU has no VNNI instructions (avx512_vnni or avx_vnni), so INT8 rounds otherwise here than where it "
            "is to run, and nothing measured here would hold: quantise on one that has"
        )
    how = recipe(args.network)
    name = how.card["name"]
    args.out = args.out or Path(f"{args.network}-int8")
    torch.set_num_threads(args.threads)
    card = read_card(name, args.weights)
    factory = factory_of(name)
    training = json.loads((args.weights / f"{name}.json").read_text(encoding="utf-8"))["training"]
    phantoms = training["phantoms"] if args.phantoms is None else min(args.phantoms, training["phantoms"])
    data = _data(args, how, training["seed"], phantoms)
    network = _trained(how, card, args.weights).eval()
    calibrating, choosing, checking = (
        -(-patches // how.batch // (SLICES_AT_ONCE if card.input == "volume" else 1))
        for patches in (CALIBRATION_PATCHES, CHOICE_PATCHES, VALIDATION_PATCHES)
    )
    batches = [data.seen[k] for k in range(calibrating + choosing)]
    quantised = quantisable(network, how.predict, batches[0])
    ranges = calibrate(quantised, how.predict, batches[:calibrating])
    parts = multiplications(quantised, how.predict, batches[0])
    print(f"{name}: {len(ranges)} convolutions, ranges from {calibrating * how.batch} patches", flush=True)
    on_training = Comparison(network, how.predict, batches[calibrating:])
    chosen = choose(quantised, ranges, parts, on_training, args.max_loss_db)
    checks = Comparison(network, how.predict, [data.check[k] for k in range(checking)])

    def deployed(*, tuned: bool) -> tuple[dict[str, bytes], Loss]:
        """What a node runs, and what that loses: not what PyTorch computes with it, as the rest is in bfloat16."""
        if card.input == "volume":
            files = stream_files(quantised, tuned=tuned)
        else:
            files = plane_files(quantised, how.predict, batches[0], name)
        return files, checks.of(Deployed(files, read_weights(card, args.weights), args.threads))

    files, measured = deployed(tuned=False)
    print(f"post-training: {measured}", flush=True)
    tune = measured.worst_db > args.max_loss_db and args.steps > 0
    if tune and how.adversary:
        print("not fine-tuned: the network learnt against a critic, which is not kept")
        tune = False
    if tune:
        quantised = _tuned(quantised, card.weights_sha256, how, data, checks, args)
        files, measured = deployed(tuned=True)
        print(f"fine-tuned: {measured}")
    if measured.worst_db > args.max_loss_db:
        print(f"more than {args.max_loss_db:g} dB: more --steps may help; a node takes it only where it is told to")
    paths = (args.out, args.store, args.weights, *args.data)
    entry = {
        "command": f"python -m training {without_folders(args.words, paths)}",
        "commit": commit(),
        "calibrated_on": {"phantoms": phantoms, "series": list(data.names)},
        "validated_on": list(data.checked),
        "float_layers": sorted(set(ranges) - set(chosen)),
        "float_part": round(sum(part for layer, part in parts.items() if layer not in chosen), 4),
        "tuning_steps": args.steps if tune else 0,
    }
    install(factory, files, entry, measured, args.weights)
    print(f"wrote {', '.join(f'{name}.{suffix}' for suffix in files)} and the card in {args.weights}")
    if args.weights == WEIGHTS:
        write_page(name)


def install(
    factory: Factory, files: Mapping[str, bytes], entry: Mapping[str, Any], measured: Loss, weights: Path
) -> None:
    """Write the files, and into the card their digests and ``int8``: how they were made, the loss, the golden volume.

    Parameters
    ----------
    factory
        Of the pipeline.
    files
        By suffix.
    entry
        How they were made.
    measured
        What they lose.
    weights
        Folder of weights and card.
    """
    full = json.loads((weights / f"{factory.name}.json").read_text(encoding="utf-8"))
    digests = {suffix: digest for suffix, digest in full.get("files_sha256", {}).items() if suffix[:5] != "int8."}
    digests |= {suffix: hashlib.sha256(content).hexdigest() for suffix, content in files.items()}
    full["files_sha256"] = digests
    full["int8_loss_db"] = round(measured.worst_db, 4)
    full.pop("int8_bound_hu", None)  # of other files: nothing is to be held to it while it is measured anew
    full["int8"] = {
        **entry,
        "psnr_db": {window: [round(value, 3) for value in pair] for window, pair in measured.psnr_db.items()},
        "loss_db": {window: round(value, 4) for window, value in measured.loss_db.items()},
        "rms_hu": round(measured.rms_hu, 3),
    }
    with tempfile.TemporaryDirectory() as scratch:  # a card without bound is not to be seen by a node
        trial = Path(scratch)
        for path in weights.glob(f"{factory.name}.*"):
            if ".int8." not in path.name:
                shutil.copy(path, trial)
        _write(trial, factory.name, files, full)
        found = golden.deviation(
            factory(Execution("cpu", "int8"), trial),
            factory(Execution("cpu", "fp32"), trial),
        )
    full["int8"]["golden_hu"] = found._asdict()
    full["int8_bound_hu"] = list(found.bound)
    for old in weights.glob(f"{factory.name}.int8.*"):
        old.unlink()
    _write(weights, factory.name, files, full)


def _write(folder: Path, name: str, files: Mapping[str, bytes], card: Mapping[str, Any]) -> None:
    for suffix, content in files.items():
        (folder / f"{name}.{suffix}").write_bytes(content)
    write_card(folder / f"{name}.json", card)
