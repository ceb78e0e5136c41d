"""Compare radiomic features of lung nodules between denoising pipelines.

Nodules of 4 to 20 mm, solid and part-solid, are put into the lungs of real series or of phantoms (or give masks of your
own), low dose is simulated, every pipeline denoises it, and the features of each nodule are compared with those that it
has after the reference pipeline, which runs in fp32. Writes features.csv, comparison.csv, radiomics.md and
radiomics.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from pipelines.base import Execution, Options, Pipeline, Precision, check_options, load
from training.command_line import positive, without_folders
from training.radiomics.equivalence import Agreement, agree
from training.radiomics.extraction import FEATURES, PRESET_57
from training.radiomics.report import Setting, draw, markdown, write_comparison, write_features
from training.radiomics.study import FULL_DOSE, LOW_DOSE, Case, Row, masked_case, measure, phantom_case, series_case

HELP = "compare radiomic features of nodules between pipelines"
PRESETS = {57: PRESET_57, 74: FEATURES}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument(
        "--pipelines", nargs="+", required=True, metavar="NAME", help="pipelines to compare with the reference"
    )
    parser.add_argument(
        "--reference",
        default="srresnet3d",
        metavar="NAME",
        help=f"pipeline, or {FULL_DOSE} or {LOW_DOSE} for the images before any (default: %(default)s, as the paper)",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("auto", "int8", "bf16", "fp32"),
        default=["fp32"],
        help="number formats, in each of which every pipeline is compared (default: fp32; a node takes the fastest of "
        "its machine, auto)",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--series", type=Path, nargs="+", metavar="FOLDER", help="folders of full-dose chest CT, one DICOM series each"
    )
    source.add_argument("--phantoms", type=positive, metavar="N", help="this number of phantoms instead")
    parser.add_argument(
        "--masks",
        type=Path,
        metavar="FOLDER",
        help="real nodules instead of synthetic ones: for each series FOLDER/<name of its folder>.npz of "
        "numpy.savez_compressed, one boolean array (slices, rows, columns) for each nodule",
    )
    parser.add_argument(
        "--dose", type=_dose, default=0.1, help="fraction of full dose that is denoised (default: %(default)s)"
    )
    parser.add_argument(
        "--blend",
        type=float,
        default=1.0,
        help="part of the denoised image in the output, 0 to 1; the cascade's paper has 0.7 (default: 1)",
    )
    parser.add_argument("--strength", type=float, default=1.0, help="how much is denoised, 1 as trained (default: 1)")
    parser.add_argument(
        "--nodules",
        type=positive,
        default=42,
        metavar="N",
        help="number of synthetic nodules in all, spread evenly over series or phantoms (default: %(default)s)",
    )
    parser.add_argument(
        "--preset", type=int, choices=sorted(PRESETS), default=57, help="how many features (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of nodules and noise (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("radiomics"), metavar="DIR", help="folder of results (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def _dose(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a fraction of full dose is more than 0 and at most 1, not {text}")
    return value


def run(args: argparse.Namespace) -> None:
    """Do it, and print the tables.

    Raises
    ------
    pipelines.base.UnknownPipeline
        If there is no such pipeline.
    pipelines.base.OptionRefused
        If one cannot take the options.
    pipelines.volume.SeriesRefused
        If a series may not be denoised, or not by one of the pipelines.
    ValueError
        If there are masks without series, series of one name, fewer than two nodules, or no room or masks for them.
    """
    _check(args)
    pipelines = _pipelines(args)
    options = Options(args.strength, args.blend)
    for pipeline in pipelines.values():
        check_options(pipeline.card, options)
    rows = list(measure(_cases(args), pipelines, options, lambda line: print(line, file=sys.stderr, flush=True)))
    if not rows:
        raise ValueError("no nodules: the archives of masks are empty")
    by_images: dict[str, list[Row]] = {}
    for row in rows:
        by_images.setdefault(row.images, []).append(row)
    reference = by_images[args.reference]
    agreements: dict[str, dict[str, Agreement]] = {
        images: agree([r.features for r in reference], [r.features for r in of], PRESETS[args.preset])
        for images, of in by_images.items()
        if images != args.reference
    }
    cards = {name: pipeline.card for name, pipeline in pipelines.items()}
    setting = Setting(args.reference, args.dose, options, args.preset, cards, _command(args))
    args.out.mkdir(parents=True, exist_ok=True)
    write_features(args.out / "features.csv", rows)
    write_comparison(args.out / "comparison.csv", agreements)
    text = markdown(reference, agreements, setting)
    (args.out / "radiomics.md").write_text(text, encoding="utf-8")
    draw(args.out / "radiomics.png", agreements, setting)
    print(text)


def _pipelines(args: argparse.Namespace) -> dict[str, Pipeline]:
    """The reference in fp32, and each pipeline in each precision, by the name of its images."""
    wanted: list[tuple[str, Precision]] = [(args.reference, "fp32")]
    wanted += [(name, precision) for name in args.pipelines for precision in args.precision]
    return {
        name if precision == "fp32" else f"{name}, {precision}": load(name, Execution(precision=precision))
        for name, precision in dict.fromkeys(wanted)
        if name not in (FULL_DOSE, LOW_DOSE)
    }


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot come out well before anything is computed."""
    if args.masks and not args.series:
        raise ValueError("masks are of a series: give --series with --masks")
    folders = [folder.resolve().name for folder in args.series or ()]
    if len(set(folders)) < len(folders):
        raise ValueError("two series have folders of one name, which their results are kept under: rename one")
    if not args.masks and args.nodules < max(2, len(folders) or args.phantoms):
        raise ValueError(f"{args.nodules} nodules: two are needed for a test, and one in each series or phantom")


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    sources = args.series or range(args.phantoms)
    for k, source in enumerate(sources):
        nodules = args.nodules // len(sources) + (k < args.nodules % len(sources))
        if args.masks:
            yield masked_case(source.resolve(), args.masks, args.dose, args.seed + k)
        elif args.series:
            yield series_case(source.resolve(), nodules, args.dose, args.seed + k)
        else:
            yield phantom_case(source, nodules, args.dose, args.seed)


def _command(args: argparse.Namespace) -> str:
    """The command line with the last part of each path only."""
    return "python -m training " + without_folders(args.words, (args.out, args.masks, *(args.series or ())))
