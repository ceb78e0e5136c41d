"""Measure pipelines and classical filters on phantoms, on real series with simulated low dose, and on real pairs.

Writes one report: report.md with pictures, and numbers.csv. Without --series and --pairs it measures on the phantom.
The truth of a real image is its full-dose image, which has noise of its own; only the phantom's truth has none.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from pipelines.base import Options, Pipeline, load, names
from training import bar, classical, model_page, rods
from training.cases import PHANTOM_PIXEL_MM, Trial, pair_trials, phantom_trials, simulated_trials
from training.lpips import lpips
from training.metrics import LUNG
from training.report import Measurement, markdown, write_csv
from training.scores import INPUT, rod_rows, score

HELP = "measure pipelines on phantoms, series and pairs, and write a report with tables and pictures"


def _dose(text: str) -> float:
    dose = float(text)
    if not 0 < dose < 1:
        raise argparse.ArgumentTypeError(f"{text} is no part of the full dose: give a number between 0 and 1")
    return dose


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
    add("--phantom", action="store_true", help="measure on the phantom too (always without --series and --pairs)")
    add("--doses", type=_dose, nargs="+", default=[0.25, 0.1], help="parts of the full dose (default: 0.25 0.1)")
    add("--classical", nargs="*", default=[], choices=sorted(classical.METHODS), help="filters to compare with")
    add("--blend", type=float, default=1.0, help="part of the denoised image in the output, 0 to 1 (default: 1)")
    add("--strength", type=float, default=1.0, help="scale of the noise level that a pipeline is told (default: 1)")
    add("--slices", type=int, default=12, help="slices of each series, from its middle (default: %(default)s)")
    add("--out", type=Path, default=Path("evaluation"), help="folder of the report (default: %(default)s)")
    add("--title", default="Measured image quality", help="heading of the report (default: %(default)s)")
    add("--lpips", type=Path, metavar="WEIGHTS", help="weights of LPIPS; without them it is left out")
    add("--bar", action="store_true", help="judge each demand on a pipeline by pass or fail; needs --series or --pairs")
    add("--card", action="store_true", help="only write the phantom's table into each pipeline's card and page")
    parser.set_defaults(run=run)


def _trials(args: argparse.Namespace) -> Iterator[Trial]:
    if args.phantom or args.bar or not (args.series or args.pairs):
        yield from phantom_trials(args.doses, args.slices)
    yield from chain.from_iterable(simulated_trials(folder, args.doses, args.slices) for folder in args.series)
    if args.pairs:
        yield from pair_trials(args.pairs, args.slices)


def command_line(args: argparse.Namespace) -> str:
    """The command, with the last part of each path only: where the folders lay is nobody's business."""
    paths = (args.out, args.pairs, args.lpips, *args.series)
    short = {str(path): path.name for path in paths if path is not None}
    return "python -m training " + shlex.join(short.get(word, word) for word in args.words)


def _entrants(
    args: argparse.Namespace, networks: dict[str, Pipeline], trial: Trial, measured: Measurement
) -> Iterator[tuple[str, Pipeline | None, Options]]:
    """What runs on a trial: nothing, the networks, the filters with the parameter that suits it best."""
    yield INPUT, None, Options()
    for name, pipeline in networks.items():
        # a blind network takes no strength
        yield name, pipeline, Options(args.strength if pipeline.card.noise_map else 1.0, args.blend)
    for name in args.classical:
        chosen = classical.tuned(name, trial)
        method = classical.METHODS[name]
        measured.parameters.append(
            f"| {method.label} | {trial.case} | {trial.dose:g} | {method.parameter} | {chosen.parameter:.3g} |"
        )
        yield name, chosen, Options()


def _rods(measured: Measurement, networks: dict[str, Pipeline], args: argparse.Namespace) -> None:
    for dose in args.doses:
        scan = rods.phantom(dose, args.slices)
        before = rods.measured(None, Options(), scan)
        measured.rows += rod_rows(before, before, dose, INPUT)
        measured.spectra.setdefault(dose, {})["rods"] = {INPUT: before.nps}
        for name, pipeline in networks.items():
            options = Options(args.strength if pipeline.card.noise_map else 1.0, args.blend)
            after = rods.measured(pipeline, options, scan)
            measured.rows += rod_rows(after, before, dose, name)
            measured.spectra[dose]["rods"][name] = after.nps


def measure(args: argparse.Namespace) -> Measurement:
    """Run everything that `args` names."""
    networks = {name: load(name) for name in args.pipelines}
    measured = Measurement(command_line(args), args.title)
    perceptual = None if args.lpips is None else partial(lpips, window=LUNG, weights=args.lpips)
    if args.bar and bar.OPPONENT not in args.classical:
        args.classical = [*args.classical, bar.OPPONENT]
    for trial in _trials(args):
        measured.begin(trial)
        for name, pipeline, options in _entrants(args, networks, trial, measured):
            result = score(trial, name, pipeline, options, perceptual)
            measured.add(trial, name, result)
            print(f"{trial.case} at {trial.dose:g}: {name}", flush=True)
        if args.bar and trial.kind == "phantom" and not measured.steady:
            judged = partial(bar.steadiness, clean=trial.truth, noisy=trial.low.hu, pixel_mm=PHANTOM_PIXEL_MM)
            measured.steady = {
                name: judged(pipeline, Options(args.strength if pipeline.card.noise_map else 1.0, args.blend))
                for name, pipeline in networks.items()
            }
    _rods(measured, networks, args)
    return measured


def run(args: argparse.Namespace) -> None:
    """Measure, write the report, print the bar."""
    if args.card:
        for name in args.pipelines:
            print(model_page.write(name, command_line(args)))
        return
    measured = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.md").write_text(markdown(measured, args.out), encoding="utf-8")
    write_csv(measured.rows, args.out / "numbers.csv")
    if measured.steady:
        print(bar.table(bar.judge(measured.rows, measured.steady)))
