"""All networks of this project: seconds for a slice, memory, and what each number format costs the image.

    python benchmarks/papers.py [PIPELINE...] [--series FOLDER FOLDER FOLDER]

Slices of 512 × 512 of which every voxel is computed, from memory to memory; reading and writing files are in series.py.
Each turn is a process of its own, which has denoised two slices before the clock starts. Networks without weights, or
without INT8 weights, are left out and named.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from images import Quality, both, described, loss, scored, trials
from machine import TYPES, Machine, arguments, command, interleaved, median, number, own_cores, table
from operations import factory, of_slice
from series import runnable
from turn import SIZE, Form, MeasuredSlices, run_slices

from pipelines import shipped
from pipelines.base import Execution
from pipelines.runtime import WEIGHTS, read_card
from training.measuring.uninstalled import load_from


def ours() -> list[str]:
    """Names of the networks of `pipelines.shipped`, in its order."""
    return [one.name for one in vars(shipped).values() if isinstance(one, shipped.Factory)]


def qualities(forms: Sequence[Form], folders: Sequence[Path], slices: int, weights: Path) -> dict[Form, Quality]:
    """Mean quality of each over the series of `folders`."""
    found: dict[Form, list[Quality]] = {form: [] for form in forms}
    for trial in trials(folders, slices, [(name, weights) for name in {form.pipeline for form in forms}]):
        for form in forms:
            pipeline = load_from(weights, form.pipeline, Execution("cpu", form.precision))
            found[form].append(Quality.of(scored(pipeline, trial), trial.truth[trial.scored]))
            print(f"{trial.case}: {form.pipeline} in {form.precision}", file=sys.stderr, flush=True)
    return {form: Quality.mean(several) for form, several in found.items() if several}


HEAD = (
    *("pipeline", "GMAC a slice", "type", "seconds a slice", "× fp32", "% of peak", "peak memory (MB)"),
    *("PSNR (dB)", "loss (dB)"),
)


def row(
    form: Form,
    each: int,
    measured: Mapping[Form, Sequence[MeasuredSlices]],
    peak: float,
    quality: Mapping[Form, Quality],
) -> list[str]:
    """One line of the table.

    Parameters
    ----------
    each
        Products of a slice.
    measured
        Of all, the rounds that count.
    peak
        Of the type, GMAC/s.
    quality
        Of all that were judged.
    """
    taken = [one.seconds for one in measured[form]]
    exact = form._replace(precision="fp32")
    faster = None
    if exact in measured:
        faster = statistics.median(one.seconds for one in measured[exact]) / statistics.median(taken)
    cells = [
        *(form.pipeline, f"{each / 1e9:.1f}", form.precision, median(taken, 3), number(faster, 2)),
        number(100 * each / statistics.median(taken) / 1e9 / peak if peak else None, 0),
        f"{max(one.peak_mb for one in measured[form]):.0f}",
    ]
    if form not in quality:
        return [*cells, *["-"] * (len(HEAD) - len(cells))]
    lost = both(loss(quality[exact], quality[form]), 3) if exact in quality else "-"
    return [*cells, both(quality[form].psnr_db, 2), lost]


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("pipelines", nargs="*", metavar="PIPELINE", help="default: all of this project")
    parser.add_argument("--precisions", nargs="+", default=list(TYPES), choices=TYPES)
    parser.add_argument("--slices", type=int, default=8, help="that are timed in a turn (default %(default)s)")
    parser.add_argument(
        "--series", type=Path, nargs="*", default=[], help="CT series that taught nobody: image quality"
    )
    parser.add_argument("--scored", type=int, default=4, help="slices of each of them (default %(default)s)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of weights and cards")
    options = parser.parse_args()
    names, weights = options.pipelines or ours(), options.weights
    forms = runnable(names, options.precisions, weights)
    with Machine(own_cores()) as machine:
        measuring = {form: partial(run_slices, form, options.slices, weights) for form in forms}
        rounds = interleaved(machine, measuring, options.rounds, options.quiet)
        description, peak = machine.describe(), machine.peak
    quality = qualities(forms, options.series, options.scored, weights)
    products = {
        name: of_slice(factory(name), read_card(name, weights), SIZE, SIZE)
        for name in {form.pipeline for form in forms}
    }
    measured = {form: rounds.of(form) for form in forms}
    print(command([weights, *options.series]))
    print(f"{description}\n{rounds.describe()}")
    if options.series:
        print(described([folder.name for folder in options.series], options.scored))
    rows = [row(form, products[form.pipeline], measured, peak[form.precision], quality) for form in forms]
    print(f"\n{table(HEAD, rows)}")


if __name__ == "__main__":
    main()
