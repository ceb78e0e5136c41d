"""All networks of this project: seconds for a slice, memory, and what each number format costs the image.

    python benchmarks/papers.py [PIPELINE...] [--series FOLDER FOLDER FOLDER]

Slices of 512 × 512 of which every voxel is computed, from memory to memory; reading and writing files are in series.py.
Each turn is a process of its own, which has denoised two slices before the clock starts. Networks without weights, or
without INT8 weights, are left out and named.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from alone import answer, ask
from images import Quality, both, described, loss, scored, trials
from machine import TYPES, Machine, arguments, command, interleaved, median, number, own_cores, table
from memory import Repeated, megabytes
from operations import factory, of_slice
from series import runnable, watched

from pipelines import shipped
from pipelines.base import Execution, Options, denoise
from pipelines.runtime import WEIGHTS, read_card
from pipelines.testing import water_volume
from training.measuring.uninstalled import load_from

SIZE = 512
WARM, DIFFERENT = 2, 8
"""Slices before the clock starts, and different ones of which the series is made."""


class Turn(NamedTuple):
    """A pipeline in a number format."""

    pipeline: str
    precision: Any


class Measured(NamedTuple):
    """What one turn was."""

    seconds: float
    """For a slice."""
    peak_mb: float


def alone(told: Any) -> Measured:
    """Measure one pipeline, in a process of its own."""
    pipeline = load_from(Path(told["weights"]), told["pipeline"], Execution("cpu", told["precision"]))
    if pipeline.card.precision != told["precision"]:
        raise SystemExit(f"{told['pipeline']} runs in {pipeline.card.precision}: {pipeline.card.reason}")
    block = water_volume((DIFFERENT, SIZE, SIZE))

    def run(slices: int) -> float:
        series = Repeated(geometry=block.geometry, slice_uids=(), slice_paths=(), block=block, slices=slices)
        begun = time.perf_counter()
        for _ in denoise(pipeline, series, Options()):
            pass
        return time.perf_counter() - begun

    with watched("all"):
        run(WARM)
        taken = run(told["slices"])
    return Measured(taken / told["slices"], megabytes("VmHWM"))


def ours() -> list[str]:
    """Names of the networks of `pipelines.shipped`, in its order."""
    return [one.name for one in vars(shipped).values() if isinstance(one, shipped.Factory)]


def qualities(turns: Sequence[Turn], folders: Sequence[Path], slices: int, weights: Path) -> dict[Turn, Quality]:
    """Mean quality of each over the series of `folders`."""
    found: dict[Turn, list[Quality]] = {turn: [] for turn in turns}
    for trial in trials(folders, slices, [(name, weights) for name in {turn.pipeline for turn in turns}]):
        for turn in turns:
            pipeline = load_from(weights, turn.pipeline, Execution("cpu", turn.precision))
            found[turn].append(Quality.of(scored(pipeline, trial), trial.truth[trial.scored]))
            print(f"{trial.case}: {turn.pipeline} in {turn.precision}", file=sys.stderr, flush=True)
    return {turn: Quality.mean(several) for turn, several in found.items() if several}


HEAD = (
    *("pipeline", "GMAC a slice", "type", "seconds a slice", "× fp32", "% of peak", "peak memory (MB)"),
    *("PSNR (dB)", "loss (dB)"),
)


def row(
    turn: Turn,
    each: int,
    measured: Mapping[Turn, Sequence[Measured]],
    peak: float,
    quality: Mapping[Turn, Quality],
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
    taken = [one.seconds for one in measured[turn]]
    exact = turn._replace(precision="fp32")
    faster = None
    if exact in measured:
        faster = statistics.median(one.seconds for one in measured[exact]) / statistics.median(taken)
    cells = [
        *(turn.pipeline, f"{each / 1e9:.1f}", turn.precision, median(taken, 3), number(faster, 2)),
        number(100 * each / statistics.median(taken) / 1e9 / peak if peak else None, 0),
        f"{max(one.peak_mb for one in measured[turn]):.0f}",
    ]
    if turn not in quality:
        return [*cells, *["-"] * (len(HEAD) - len(cells))]
    lost = both(loss(quality[exact], quality[turn]), 3) if exact in quality else "-"
    return [*cells, both(quality[turn].psnr_db, 2), lost]


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
    turns = [Turn(*pair) for pair in runnable(names, options.precisions, weights)]

    def ran(turn: Turn) -> Measured:
        told = {**turn._asdict(), "slices": options.slices, "weights": str(weights)}
        return Measured(*ask(__file__, told))

    with Machine(own_cores()) as machine:
        rounds = interleaved(machine, {turn: partial(ran, turn) for turn in turns}, options.rounds, options.quiet)
        description, peak = machine.describe(), machine.peak
    quality = qualities(turns, options.series, options.scored, weights)
    products = {
        name: of_slice(factory(name), read_card(name, weights), SIZE, SIZE)
        for name in {turn.pipeline for turn in turns}
    }
    measured = {turn: rounds.of(turn) for turn in turns}
    print(command([weights, *options.series]))
    print(f"{description}\n{rounds.describe()}")
    if options.series:
        print(described([folder.name for folder in options.series], options.scored))
    rows = [row(turn, products[turn.pipeline], measured, peak[turn.precision], quality) for turn in turns]
    print(f"\n{table(HEAD, rows)}")


if __name__ == "__main__":
    answer(alone, main)
