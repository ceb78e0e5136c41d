"""Train a network from phantoms, from DICOM series with simulated noise, or from real pairs of low and full dose.

Without --data it learns from phantoms alone. With --data it finds series by itself: the LDCT-and-Projection-data
collection, the AAPM Grand Challenge, or any folders of CT images; where a low-dose image lies beside the full-dose one,
the two are a pair, elsewhere noise is simulated. Subjects are never divided between training and validation. OUT gets
the weights, their card, the log and its curve; started again, the training goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from pipelines.ct_slice import read_slice
from pipelines.runtime import WEIGHTS, read_card
from pipelines.scaling import to_hu
from training.card import Plateau, TrainingRecord, commit, source_of, write_network
from training.command_line import without_folders
from training.cross_validation import Fold, first_stages, measured, table
from training.curve import draw
from training.data import Batch, Sampler
from training.features import Backbone
from training.loop import Loss, Run
from training.measuring.seen import marks
from training.measuring.uninstalled import load_from
from training.metrics import SOFT_TISSUE, psnr
from training.recipes import MODULES, Faithful, Recipe, recipe
from training.recipes.cascade import Perceptual
from training.simulation.simulated_series import is_simulated
from training.sources.layouts import Case, find
from training.sources.prepare import Preparation, make, scans_of
from training.sources.scans import Scan, phantom_spacing
from training.sources.splits import entry_of, kept_for_tests, split, subjects_of

HELP = "train a network; started again, it goes on where it was stopped"
VALIDATION_BATCHES = 6
VALIDATION_PHANTOMS = 4
SEEDS_EACH, HIGHEST_SEED = 1000, 700
"""Phantoms of a training have the thousandfold of its seed and the following ones."""
VALIDATION_SEED = 800_000
"""Phantoms of the validation have this seed and the following ones; those of a measurement lie higher still."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("recipe", choices=sorted(MODULES), help="name of the network and its training")
    add("--out", type=Path, required=True, help="folder of the training: checkpoint, log, curve, weights, card")
    add("--data", type=Path, nargs="*", default=[], help="folders with CT: a collection, or series of your own")
    add(
        "--phantoms",
        type=_limited(SEEDS_EACH),
        default=40,
        help="number of phantoms to learn from as well (default %(default)s)",
    )
    add(
        "--steps",
        type=_limited(math.inf, 1),
        help="steps in all (default: the recipe's); more than before makes a training longer",
    )
    add("--leave-out", nargs="*", default=[], metavar="SUBJECT", help="subjects that validate instead of teaching")
    add("--leave-one-out", action="store_true", help="one training for each subject, which it never sees (folder each)")
    add("--z-target-mm", type=_distance_mm, help="learn thin slices from thick ones; pairs get this slice distance")
    add(
        "--start",
        type=Path,
        default=WEIGHTS,
        metavar="FOLDER",
        help="of a network that begins with another one (cascade with drl, dcswgan with dcscn): folder that holds that "
        "one, such as runs/drl after `train drl --out runs/drl` (default: as it is installed)",
    )
    add(
        "--features",
        choices=get_args(Backbone),
        help="network whose features a perceptual loss compares (drl alone): ct-ae, our auto-encoder of CT images (the "
        "default); vgg16 or vgg19, trained on photographs, as in the papers; random, an untrained one",
    )
    add(
        "--feature-weights",
        type=Path,
        metavar="FILE",
        help="weights of that network, needed for VGG alone and never downloaded: torchvision's state dict, such as "
        "`--features vgg16 --feature-weights vgg16-397923af.pth`",
    )
    add("--store", type=Path, help="folder that keeps prepared data for the next training (default: OUT/store)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all)")
    add("--workers", type=int, default=0, help="processes that prepare scans and batches; use some beside a GPU")
    add("--seed", type=_limited(HIGHEST_SEED), default=1, help="of everything random (default %(default)s)")
    parser.set_defaults(run=run)


def _limited(limit: float, least: int = 0) -> Callable[[str], int]:
    """A number from `least` to below `limit`: beyond it, phantoms of a training would be those that measure."""

    def number(word: str) -> int:
        if not least <= int(word) < limit:
            raise ValueError(word)
        return int(word)

    return number


def _distance_mm(word: str) -> float:
    value = float(word)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"slices lie more than 0 mm apart, not {word}")
    return value


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} thread(s), bfloat16"


def taught(cases: Sequence[Case]) -> list[Case]:
    """Cases to learn from.

    What the split table keeps for tests, or from being a target, is not among them, nor is another series of a patient
    whom it keeps for tests, nor one whose full dose is a simulated low one.
    """
    teach = []
    for case in cases:
        entry = entry_of(case.name)
        if entry is not None and not entry.target:
            print(f"{entry.series}: left out, {entry.role}. {entry.reason}")
        elif kept := kept_for_tests(case.subject, read_slice(case.full[0]).study_uid):
            print(f"{case.name}: left out, of the patient of {kept.series}: {kept.role}. {kept.reason}")
        elif is_simulated(case.full[0]):
            print(f"{case.name}: left out, a low dose that `simulate` made: give the series that it was made of")
        else:
            teach.append(case)
    return teach


def divided(cases: Sequence[Case], left_out: Sequence[str]) -> tuple[list[Case], list[Case]]:
    """Cases that teach and cases that validate: those of the subjects `left_out`, or of one subject in ten.

    What the split table teaches is not drawn.
    """
    if unknown := set(left_out) - {case.subject for case in cases}:
        known = ", ".join(sorted({case.subject for case in cases}))
        raise SystemExit(f"no subject {', '.join(sorted(unknown))} among the data; there are: {known}")
    drawn = {case.subject for case in cases if entry_of(case.name) is None}
    validating = set(left_out or split(drawn)["validation"])
    return (
        [case for case in cases if case.subject not in validating],
        [case for case in cases if case.subject in validating],
    )


def validation(
    predict: Callable[[nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]], batches: Sequence[Batch]
) -> Callable[[nn.Module], dict[str, float]]:
    """Measure of a network on fixed batches: PSNR in the soft-tissue window, before and after (dB)."""

    def measure(network: nn.Module) -> dict[str, float]:
        device = next(network.parameters()).device
        before, after = [], []
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            for batch in batches:
                denoised, target = predict(network, Batch(*(tensor.to(device) for tensor in batch)))
                middle = batch.noisy.shape[1] // 2
                noisy = batch.noisy[:, None] if target.ndim == 5 else batch.noisy[:, middle : middle + 1]
                truth = to_hu(target.float()).cpu().numpy()
                before.append(psnr(to_hu(noisy).numpy(), truth, SOFT_TISSUE))
                after.append(psnr(to_hu(denoised.float()).cpu().numpy(), truth, SOFT_TISSUE))
        return {
            "validation_psnr_db": sum(after) / len(after),
            "validation_gain_db": (sum(after) - sum(before)) / len(after),
        }

    return measure


def _preparation(args: argparse.Namespace) -> Preparation:
    return Preparation(args.store or args.out / "store", args.seed, args.z_target_mm)


def _loss(how: Recipe, args: argparse.Namespace) -> Loss:
    if args.features is None and args.feature_weights is None:
        return how.loss()
    if how.perceptual is None:
        raise SystemExit(f"{args.recipe} compares no features: leave --features and --feature-weights out")
    return how.perceptual(args.features or "ct-ae", args.feature_weights)


def sources(
    shown: Sequence[Scan], held: Sequence[Scan], loss: Loss, how: Recipe, start: Path, z_target_mm: float | None
) -> dict[str, str]:
    """What a training learns from, by name: it may be resumed with the same only."""
    found = {"scans": _digest(shown), "validation scans": _digest(held)}
    if z_target_mm is not None:
        found["slice distance"] = f"{z_target_mm:g} mm"
    if isinstance(loss, Perceptual):
        found["features"] = loss.features
    if how.start:
        found["first weights"] = f"{how.begins_with} {read_card(how.begins_with, start).weights_sha256}"
    return found


def _digest(scans: Sequence[Scan]) -> str:
    return hashlib.sha256("".join(scan.digest() for scan in scans).encode()).hexdigest()


def same_since(stretches: Sequence[tuple[int, str]], loss: Loss, decay_from: int) -> int:
    """Step after which, up to the decay, neither code (`training.loop.Run.stretches`) nor loss changed."""
    settled = loss.steady_after if isinstance(loss, Faithful | Perceptual) else 0
    return max([settled, *(step for step, _ in stretches if step < decay_from)])


def plateau(log: Path, decay_from: int, same_since: int, how: Recipe, start: Path) -> Plateau:
    """As the log has it; a network is no further than the one that it began with."""
    if how.adversary:
        return Plateau(None, None, "the network learns against a critic, and its PSNR is not what it learns")
    obstacle = ""
    if how.start:
        first = json.loads((start / f"{how.begins_with}.json").read_text(encoding="utf-8"))
        if not first["training"].get("plateau", {}).get("reached"):
            obstacle = f"{how.begins_with}, which it began with, had not reached its own"
    return Plateau.of(log, decay_from, same_since, obstacle)


def begun_without(name: str, start: Path, held: Sequence[Case]) -> None:
    """Refuse to begin with weights of `name` in `start` that were trained on a patient of `held`.

    Raises
    ------
    SystemExit
        With the series.
    """
    card = json.loads((start / f"{name}.json").read_text(encoding="utf-8"))
    taught = {
        source["name"]: marks(source["name"], source.get("study_uid", "")) for source in card["training"]["series"]
    }
    for case in held:
        own = source_of(case)
        known = marks(case.name) | marks(own.name, own.study_uid, case.subject)
        if seen := [series for series, theirs in taught.items() if known & theirs]:
            raise SystemExit(
                f"{name} in {start} was trained on {', '.join(seen)}, of {case.subject}, who is to be left out: give "
                "--start a folder of weights that were trained without"
            )


def validated_on(phantoms: int, series: int) -> str:
    """What a validation is of: phantoms, or `series` of subjects that do not teach."""
    if series:
        return f"{series} series of subjects that did not teach"
    return f"{phantoms} phantoms that did not teach: it says nothing of images of patients"


def _ends(values: Iterable[float]) -> tuple[float, float]:
    found = sorted(values)
    return round(found[0], 3), round(found[-1], 3)


def _train(
    args: argparse.Namespace, how: Recipe, start: Path, teach: Sequence[Case], check: Sequence[Case], out: Path
) -> None:
    """Train into `out`, begun with the weights in `start` if the recipe does."""
    if how.start:
        begun_without(how.begins_with, start, check)
    torch.manual_seed(args.seed)
    preparation = _preparation(args)
    seeds = [args.seed * SEEDS_EACH + k for k in range(args.phantoms)]
    held_seeds = [VALIDATION_SEED + k for k in range(VALIDATION_PHANTOMS)]
    make(preparation, [*seeds, *([] if check else held_seeds), *teach, *check], args.workers)
    shown = scans_of(preparation, teach)
    scans = [*map(preparation.phantom, seeds), *shown.values()]
    own = list(scans_of(preparation, check).values())
    held = own or [*map(preparation.phantom, held_seeds)]
    checked = validated_on(len(held), len(own))
    if not scans:
        raise SystemExit("nothing to learn from: give --data with CT series, or --phantoms")
    spacings = [*map(phantom_spacing, seeds), *map(preparation.spacing, shown)]
    if not any(spacing.slices for spacing in spacings):
        raise SystemExit("nothing tells how far slices lie apart: give series of more than one slice")
    print(f"{len(scans)} scans to learn from, {len(held)} to validate on: {checked}")

    schedule = how.schedule if args.steps is None else how.schedule.until(args.steps)
    network, loss = how.network(), _loss(how, args)
    if how.start:
        how.start(network, start)
    checks = Sampler(held, how.patch_zyx, how.batch, how.real_part, VALIDATION_SEED)
    training = Run(
        network,
        how.predict,
        loss,
        Sampler(scans, how.patch_zyx, how.batch, how.real_part, args.seed, how.twins),
        schedule,
        validation(how.predict, [checks[k] for k in range(VALIDATION_BATCHES)]),
        out,
        f"{args.recipe}, seed {args.seed}, {how.batch} patches of {how.patch_zyx}, {len(scans)} scans",
        commit(),
        how.adversary,
        _device(),
        args.workers,
        sources(scans, held, loss, how, start, args.z_target_mm),
    )
    paths = (args.out, args.start, args.store, args.feature_weights, *args.data)

    def write(average: nn.Module) -> None:
        record = TrainingRecord(
            command=f"python -m training {without_folders(args.words, paths)}",
            commit=", ".join(f"{by} from step {step}" if step else by for step, by in training.stretches),
            began_with=f"{how.begins_with} {read_card(how.begins_with, start).version}" if how.start else "",
            features=loss.features if isinstance(loss, Perceptual) else "",
            seed=args.seed,
            hours=round(training.seconds / 3600, 2),
            steps=training.step,
            samples=training.step * how.batch,
            hardware=_hardware(),
            phantoms=args.phantoms,
            series=tuple(source_of(case) for case in shown),
            pairs=sum(not scan.noises for scan in shown.values()),
            plateau=plateau(
                out / "log.jsonl",
                schedule.decay_from,
                same_since(training.stretches, loss, schedule.decay_from),
                how,
                start,
            ),
            slice_spacing_mm=_ends(spacing.slices for spacing in spacings if spacing.slices > 0),
            pixel_spacing_mm=_ends(spacing.pixels for spacing in spacings),
            validated_on=checked,
        )
        write_network(out, {**how.card, "patch_zyx": how.patch_zyx}, average, record)

    if training.step < schedule.steps:
        write(training.train(partial(write, training.average)))
    draw({args.recipe: out / "log.jsonl"}, out / "curve.png", checked)


def run(args: argparse.Namespace) -> None:
    """The command."""
    how = recipe(args.recipe)
    torch.set_num_threads(args.threads)
    cases = taught([case for root in args.data for case in find(root)])
    if not args.leave_one_out:
        _train(args, how, args.start, *divided(cases, args.leave_out), args.out)
        return
    left_out = subjects_of(case.subject for case in cases)
    starts = first_stages(how.begins_with, args.start, left_out) if how.start else dict.fromkeys(left_out, args.start)
    preparation = _preparation(args)
    rows: list[Fold] = []
    for subject in left_out:
        out = args.out / subject
        teach, check = divided(cases, [subject])
        held = scans_of(preparation, check)
        if not held:
            print(f"{subject}: not left out, as none of its series can be measured")
            continue
        _train(args, how, starts[subject], teach, check, out)
        pipeline = load_from(out, args.recipe)
        rows += [measured(pipeline, scan, preparation.spacing(case)) for case, scan in held.items()]
    if not rows:
        raise SystemExit("no series could be read of any subject, so none was measured")
    text = table(rows)
    (args.out / "folds.md").write_text(text, encoding="utf-8")
    print(text)
