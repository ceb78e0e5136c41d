"""Measure pipelines and classical filters on phantoms, on real series with simulated low dose, and on real pairs.

Writes one report: report.md with pictures, and numbers.csv. Without --series and --pairs it measures on the phantom.
The truth of a real image is its full-dose image, which has noise of its own; only the phantom's truth has none.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipelines.base import Execution, Options, Pipeline, check_options, load, names
from training.command_line import dose_fraction, positive, without_folders
from training.measuring import bar, classical, model_page, rods, seen
from training.measuring.cases import Trial, pair_trials, phantom_trials, simulated_trials
from training.measuring.lpips import BACKBONE_FILE, HEADS_FILE, digests, lpips
from training.measuring.oracle import Oracle
from training.measuring.report import Measurement, markdown, write_csv
from training.measuring.scores import INPUT, rod_rows, score
from training.measuring.uninstalled import load_from
from training.metrics import LUNG

HELP = "measure pipelines on phantoms, series and pairs, and write a report with tables and pictures"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("pipelines", nargs="+", metavar="PIPELINE", help=f"what to measure, of: {', '.join(names())}")
    add(
        "--series",
        type=Path,
        nargs="*",
        default=[],
        metavar="FOLDER",
        help="full-dose CT series; low dose is simulated",
    )
    add("--pairs", type=Path, metavar="ROOT", help="folder with real pairs of full and low dose")
    add(
        "--weights",
        type=Path,
        metavar="FOLDER",
        help="folder that `train --out` wrote: its network is measured as it is there, before it is installed",
    )
    add("--phantom", action="store_true", help="measure on the phantom too (always without --series and --pairs)")
    add(
        "--doses",
        type=dose_fraction,
        nargs="+",
        default=[0.25, 0.1],
        metavar="PART",
        help="doses to simulate, as parts of the full one: 0.25 is a quarter of the mAs (default: 0.25 0.1); real "
        "pairs have their own",
    )
    add("--classical", nargs="*", default=[], choices=sorted(classical.METHODS), help="filters to compare with")
    add("--blend", type=float, default=1.0, help="part of the denoised image in the output, 0 to 1 (default: 1)")
    add("--strength", type=float, default=1.0, help="how much is denoised, 1 as trained (default: 1)")
    add(
        "--precision",
        nargs="+",
        choices=("auto", "int8", "bf16", "fp32"),
        default=["fp32"],
        help="number formats, in each of which every network is measured (default: fp32; a node takes the fastest of "
        "its machine, auto)",
    )
    add("--slices", type=positive, default=12, help="slices of each series, from its middle (default: %(default)s)")
    add("--out", type=Path, default=Path("evaluation"), help="folder of the report (default: %(default)s)")
    add("--title", default="Measured image quality", help="heading of the report (default: %(default)s)")
    add(
        "--lpips",
        type=Path,
        metavar="FOLDER",
        help="also measure LPIPS, the distance of what a network trained on photographs sees; FOLDER has its weights, "
        f"which are never downloaded: torchvision's {BACKBONE_FILE} and the lpips package's v0.1/{HEADS_FILE}",
    )
    add("--bar", action="store_true", help="judge each demand on a pipeline by pass or fail; needs --series or --pairs")
    add("--card", action="store_true", help="only write the phantom's table into card and page of installed pipelines")
    parser.set_defaults(run=run)


def _trials(args: argparse.Namespace) -> Iterator[Trial]:
    if args.phantom or args.bar or not (args.series or args.pairs):
        yield from phantom_trials(args.doses, args.slices)
    for folder in args.series:
        yield from simulated_trials(folder.resolve(), args.doses, args.slices)
    if args.pairs:
        yield from pair_trials(args.pairs, args.slices)


def command_line(args: argparse.Namespace) -> str:
    """The command, with the last part of each path only."""
    return "python -m training " + without_folders(
        args.words, (args.out, args.weights, args.pairs, args.lpips, *args.series)
    )


class _Entrant(NamedTuple):
    """What runs; nothing is done without a pipeline."""

    name: str
    pipeline: Pipeline | None
    options: Options


def _pipeline(name: str, weights: Path | None, execution: Execution) -> Pipeline:
    """The pipeline `name`, with weights and card from `weights` if they are there, else as it is installed."""
    if weights is None or not (weights / f"{name}.json").exists():
        return load(name, execution)
    return load_from(weights, name, execution)


def _networks(args: argparse.Namespace) -> list[_Entrant]:
    """The low-dose image itself, and the networks; one that cannot take the options is refused at once."""
    options = Options(args.strength, args.blend)
    if args.weights and not any((args.weights / f"{name}.json").exists() for name in args.pipelines):
        raise SystemExit(
            f"{args.weights} holds no network {' or '.join(args.pipelines)}: give a folder of `train --out`"
        )
    loaded = [
        (
            name if precision == args.precision[0] else f"{name}, {precision}",
            _pipeline(name, args.weights, Execution(precision=precision)),
        )
        for name in args.pipelines
        for precision in args.precision
    ]
    for _, pipeline in loaded:
        check_options(pipeline.card, options)
    return [_Entrant(INPUT, None, Options()), *(_Entrant(name, pipeline, options) for name, pipeline in loaded)]


def _filters(args: argparse.Namespace, trial: Trial, measured: Measurement) -> Iterator[_Entrant]:
    """The classical filters, each with the parameter that suits the trial best."""
    for name in args.classical:
        chosen = classical.tuned(name, trial)
        method = classical.METHODS[name]
        measured.parameters.append(
            f"| {method.label} | {trial.case} | {trial.dose:g} | {method.parameter} | {chosen.parameter:.3g} |"
        )
        yield _Entrant(name, chosen, Options())


def _rods(measured: Measurement, entrants: Sequence[_Entrant], dose: float, slices: int) -> None:
    """Measure the phantom with rods at `dose`; the first of `entrants` leaves it as it is."""
    scan = rods.phantom(dose, slices)
    results = {one.name: rods.measured(one.pipeline, one.options, scan) for one in entrants}
    before = results[entrants[0].name]
    for name, after in results.items():
        measured.rows += rod_rows(after, before, dose, name)
    measured.spectra.setdefault(dose, {})["rods"] = {name: after.nps for name, after in results.items()}


def measure(args: argparse.Namespace) -> Measurement:
    """Run everything that `args` names."""
    if args.bar and bar.OPPONENT not in args.classical:
        args.classical = [*args.classical, bar.OPPONENT]
    if len({folder.resolve().name for folder in args.series}) < len(args.series):
        raise SystemExit("two series have folders of one name, which their results are kept under: rename one")
    networks = _networks(args)
    measured = Measurement(command_line(args), args.title)
    measured.networks += [
        f"| {name} | {card.version} | `{card.weights_sha256[:16]}` | {card.precision} |"
        for name, card in ((name, pipeline.card) for name, pipeline, _ in networks if pipeline is not None)
    ]
    perceptual = None
    if args.lpips is not None:
        perceptual = partial(lpips, window=LUNG, weights=args.lpips)
        measured.lpips_weights = digests(args.lpips)
    with_rods: set[float] = set()
    for trial in _trials(args):
        measured.begin(trial)
        own = list(_filters(args, trial, measured))
        oracles = []
        if args.bar and trial.kind != "pair":
            oracles = [
                _Entrant(one.card.name, one, Options(args.strength, args.blend))
                for one in (Oracle(trial, sees_lesions=True), Oracle(trial, sees_lesions=False))
            ]
        for name, pipeline, options in (*networks, *own, *oracles):
            measured.add(trial, name, score(trial, name, pipeline, options, perceptual))
            told = None if pipeline is None else seen.warning(pipeline.card.name, trial, args.weights)
            if told and told not in measured.warnings:  # once, whatever the doses
                measured.warnings.append(told)
            print(f"{trial.case} at {trial.dose:g}: {name}", flush=True)
        if args.bar and trial.kind == "phantom" and not measured.steady:
            measured.steady = {
                name: bar.steadiness(pipeline, options, trial)
                for name, pipeline, options in networks
                if pipeline is not None
            }
        if trial.dose not in with_rods:
            _rods(measured, [*networks, *own], trial.dose, args.slices)
            with_rods.add(trial.dose)
    return measured


def run(args: argparse.Namespace) -> None:
    """Measure, write the report, print the bar."""
    if args.card:
        if args.weights:
            raise SystemExit("--card is for installed pipelines: `python -m training export FOLDER` installs one")
        for name in args.pipelines:
            print(model_page.write(name, command_line(args)))
        return
    measured = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.md").write_text(markdown(measured, args.out), encoding="utf-8")
    write_csv(measured.rows, args.out / "numbers.csv")
    for sentence in measured.warnings:
        print(f"warning: {sentence}")
    if measured.steady:
        print(bar.table(bar.judge(measured.rows, measured.steady)))
