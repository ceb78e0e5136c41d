"""A series from files to files, as a node denoises it: seconds, where they go, memory, and the least they could be.

    python benchmarks/series.py PIPELINE... [--precisions int8 fp32] [--slices 300] [--voxels all body]
    python benchmarks/series.py PIPELINE... --slices 50 100 200 400 800 1500       does it stay linear?
    python benchmarks/series.py PIPELINE... --cores 1 2                            what does a core bring?

Each turn is a process of its own, whose pipeline is loaded when the clock starts; compiling for the size of the images
counts. The series is a chest phantom, or with --series a real one, to and fro up to the number of slices. "body"
leaves the air around it out, as a node does; "all" computes every voxel. The stages work side by side; their seconds
are those at work, as a job's row has them. The floor is the network's own products over the peak of the cores in that
type. Linux only (/proc).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from ct_files import body_part, phantom, repeated
from machine import TYPES, Machine, arguments, command, interleaved, median, own_cores, table
from operations import factory, of_slice
from turn import Case, Form, Measured, run

from dicomnode.denoise import STAGES
from pipelines.base import Execution, WeightsMissing
from pipelines.openvino_core import Precision, float_of
from pipelines.runtime import WEIGHTS, ExecutionRefused, choose, read_card

BAR_S = {
    ("fast-2.5d", "all"): 25.0,
    ("quality-2.5d", "all"): 75.0,
    ("st3d", "all"): 60.0,
    ("st3d", "body"): 40.0,
}
"""Most that 300 slices of 512 × 512 may take in INT8 on two cores, by pipeline and voxels."""
BAR_BODY = 0.45
"""Least part of the series that is body, for the bar of what leaves the air out to say something."""
BAR_MB, BAR_HALF_MB = 2 * 2**30 / 1e6, 1.5 * 2**30 / 1e6
"""Most memory in INT8, of any number of slices; the less where `st3d` keeps its skips in bfloat16."""
BUSY = {stage: name for stage, name in STAGES.items() if stage != "wall"}
FITTED = 3
"""Numbers of slices from which on a line through them says something."""


def runnable(pipelines: Sequence[str], precisions: Sequence[Precision], weights: Path) -> list[Form]:
    """Those pairs that are here and run on this machine; says which do not, and why."""
    pairs, left_out = [], {}
    for name, precision in product(pipelines, precisions):
        try:
            choose(read_card(name, weights), Execution("cpu", precision))
            pairs.append(Form(name, precision))
        except (WeightsMissing, ExecutionRefused) as error:
            left_out[str(error)] = name
    for why, name in left_out.items():
        print(f"left out, {name}: {why}", file=sys.stderr)
    if not pairs:
        raise SystemExit("nothing is left to measure")
    return pairs


def floor_s(case: Case, one: Measured, machine: Machine, weights: Path) -> float:
    """The least that the network's products could take, s."""
    each = of_slice(factory(case.pipeline), read_card(case.pipeline, weights), *one.computed)
    return each * case.slices / (machine.peak[case.precision] * 1e9 * case.cores / machine.cores)


HEAD = (
    *("pipeline", "type", "voxels", "slices", "cores", "seconds", "ms a slice"),
    *(f"{name} (s)" for name in BUSY.values()),
    *("peak memory (MB)", "computed", "floor (s)", "floor of seconds"),
)


def row(case: Case, turns: Sequence[Measured], floor: float) -> list[str]:
    """One line of the table; `floor` in seconds."""
    taken, one = [turn.seconds for turn in turns], turns[0]
    middle = statistics.median(taken)
    return [
        *(case.pipeline, case.precision, case.voxels, str(case.slices), str(case.cores), median(taken, 1)),
        f"{1000 * middle / case.slices:.0f}",
        *(f"{statistics.median(turn.stages_s[stage] for turn in turns):.1f}" for stage in BUSY),
        f"{max(turn.peak_mb for turn in turns):.0f}",
        f"{one.computed[0] * one.computed[1] / (one.matrix[0] * one.matrix[1]):.0%}",
        f"{floor:.1f}",
        f"{floor / middle:.0%}",
    ]


def line(slices: Sequence[int], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Seconds at the start and for each slice, by least squares of what each is off in parts, and the largest of it."""
    n, t = np.array(slices, float), np.array(seconds, float)
    (start, each), *_ = np.linalg.lstsq(np.stack([1 / t, n / t], 1), np.ones(len(t)), rcond=None)
    return float(start), float(each), float(np.abs((start + each * n) / t - 1).max())


def bars(measured: Mapping[Case, Sequence[Measured]], body: float) -> list[str]:
    """What is asked for and whether it is met, in sentences; `body` is the part of the series that is."""
    told = []
    for case, turns in measured.items():
        most = BAR_S.get((case.pipeline, case.voxels))
        asked = (case.precision, case.slices, case.cores) == ("int8", 300, 2) and turns[0].matrix == (512, 512)
        if most is None or not asked or (case.voxels == "body" and body < BAR_BODY):
            continue
        taken = statistics.median(turn.seconds for turn in turns)
        met = "met" if taken <= most else "missed"
        told.append(f"{case.pipeline}, {case.voxels}: {taken:.1f} s of {most:g} at most: {met}.")
    for name in dict.fromkeys(case.pipeline for case in measured if case.precision == "int8"):
        peak = max(
            turn.peak_mb
            for case, turns in measured.items()
            for turn in turns
            if (case.pipeline, case.precision) == (name, "int8")
        )
        limit = BAR_HALF_MB if name == "st3d" and float_of("int8") == "bf16" else BAR_MB
        told.append(f"{name}: {peak:.0f} MB of {limit:.0f} at most: {'met' if peak <= limit else 'missed'}.")
    return told


def findings(measured: Mapping[Case, Sequence[Measured]]) -> list[str]:
    """What the table shows of linearity, memory and cores, in sentences."""
    middles = {case: statistics.median(turn.seconds for turn in turns) for case, turns in measured.items()}
    told = []
    for first in dict.fromkeys(replace(case, slices=0) for case in measured):
        cases = sorted((case for case in measured if replace(case, slices=0) == first), key=lambda case: case.slices)
        if len(cases) >= FITTED:
            start, each, off = line([case.slices for case in cases], [middles[case] for case in cases])
            peaks = [max(turn.peak_mb for turn in measured[case]) for case in cases]
            told.append(
                f"{first.pipeline} in {first.precision}, {first.voxels}, {first.cores} cores: {start:.1f} s and "
                f"{1000 * each:.1f} ms a slice; no time is farther than {off:.0%} from that. Memory "
                f"{min(peaks):.0f} to {max(peaks):.0f} MB."
            )
    for case, taken in middles.items():
        fewer = [other for other in middles if other.cores < case.cores and replace(other, cores=case.cores) == case]
        told += [
            f"{case.pipeline} in {case.precision}, {case.voxels}, {case.slices} slices: {case.cores} cores are "
            f"{middles[other] / taken:.2f} times as fast as {other.cores}."
            for other in fewer
        ]
    return told


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("pipelines", nargs="+", metavar="PIPELINE")
    parser.add_argument("--precisions", nargs="+", default=["int8"], choices=TYPES)
    parser.add_argument("--voxels", nargs="+", default=["all", "body"], choices=("all", "body"))
    parser.add_argument("--slices", type=int, nargs="+", default=[300])
    parser.add_argument("--cores", type=int, nargs="+", default=[own_cores()])
    parser.add_argument("--series", type=Path, help="folder of a real series to repeat (default: a phantom)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of weights and cards")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    options = parser.parse_args()
    cases = [
        Case(name, precision, voxels, slices, cores)
        for name, precision in runnable(options.pipelines, options.precisions, options.weights)
        for voxels, slices, cores in product(options.voxels, options.slices, options.cores)
    ]
    with Machine(max(options.cores)) as machine, tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        source, most = Path(scratch) / "source", max(options.slices)
        paths = repeated(options.series, source, most) if options.series else phantom(source, most)
        turns = {case: partial(run, case, paths, options.weights) for case in cases}
        rounds = interleaved(machine, turns, options.rounds, options.quiet)
        what = f"{options.series.name}, to and fro" if options.series else "a chest phantom at low dose"
        print(command([options.series, options.weights, options.folder]))
        print(f"{machine.describe()}\n{rounds.describe()}")
        body = body_part(paths[:300])
        print(f"Series: {what}, {body:.0%} body.\n")
        measured = {case: rounds.of(case) for case in cases}
        print(
            table(
                HEAD,
                [row(case, many, floor_s(case, many[0], machine, options.weights)) for case, many in measured.items()],
            )
        )
        for sentence in [*bars(measured, body), *findings(measured)]:
            print(f"\n{sentence}")


if __name__ == "__main__":
    main()
