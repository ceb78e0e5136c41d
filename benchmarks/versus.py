"""What a user would take instead: seconds for the same job from files to files, and PSNR, beside ours.

    python benchmarks/versus.py [PIPELINE...] [--series FOLDER FOLDER FOLDER]

The others are scripts as one writes them: pydicom reads the files, scikit-image's non-local means or a network in eager
PyTorch (fp32) computes, pydicom saves. They read some slices, are timed without starting Python, and scaled to the
series; ours is measured on all of it, and does what they do not: checks of the series, of the image and of each file.
Their images are those of the networks themselves; ours are what leaves a node, whose safety rails take some of the
change back. Non-local means has the parameter that suits each series best *by the truth*, which no user has.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from alone import answer, ask
from ct_files import body_part, phantom, repeated
from images import Quality, both, described, part, scored, trials
from machine import Machine, arguments, command, interleaved, median, own_cores, table
from numpy.typing import NDArray
from operations import CHANNELS, factory
from pydicom import dcmread
from torch import nn
from turn import Case
from turn import run as run_ours

from pipelines.base import Execution, ModelCard, WeightsMissing
from pipelines.noise import noise_level
from pipelines.runtime import WEIGHTS, choose, read_card
from pipelines.safety import LOWEST_HU, network_input
from pipelines.scaling import to_hu, to_network
from pipelines.torch_engine import load_network
from training.measuring import classical
from training.measuring.cases import Trial
from training.measuring.uninstalled import load_from

Array = NDArray[np.float32]

NLM, YARDSTICK = "nlm", "red-cnn"
NLM_H = 0.8
"""In noise levels: what scikit-image's documentation takes. The time does not depend on it."""


def by_nlm(hu: Array, pixel_mm: float) -> Array:
    """(z, y, x) HU, slice by slice."""
    level = np.float32(noise_level(hu, np.zeros(hu.shape, np.bool_), pixel_mm))
    return np.stack([classical.METHODS[NLM].filter(plane / level, NLM_H) * level for plane in hu])


def by_eager(name: str, network: nn.Module, card: ModelCard) -> Callable[[Array, float], Array]:
    """The network as it stands in its paper, a function of (z, y, x) HU and the pixel size."""
    made = factory(name)

    def planes(hu: Array, pixel_mm: float) -> Array:
        rows, columns = hu.shape[1:]
        x = np.pad(to_network(hu), ((0, 0), (0, -rows % made.stride), (0, -columns % made.stride)), mode="symmetric")
        noise = to_network(noise_level(hu, np.zeros(hu.shape, np.bool_), pixel_mm)) if card.noise_map else None
        around = CHANNELS[card.input] // 2
        results = []
        for k in range(len(x)):
            near = [min(max(j, 0), len(x) - 1) for j in range(k - around, k + around + 1)]
            given = [torch.from_numpy(x[near])[None]]
            if noise is not None:
                size = [length // made.noise_map_stride for length in x.shape[1:]]
                given.append(torch.full((1, 1, *size), float(noise)))
            results.append(network(*given)[0, 0].numpy()[:rows, :columns])
        return to_hu(np.stack(results))

    def whole(hu: Array, pixel_mm: float) -> Array:
        x = torch.from_numpy(to_network(hu))[None, None]
        return np.asarray(to_hu(network(x)[0, 0].numpy()))

    return whole if card.input == "volume" else planes


def opponent(name: str, weights: Path) -> Callable[[Array, float], Array]:
    """Non-local means, or a network by its name."""
    if name == NLM:
        return by_nlm
    card = read_card(name, weights)
    return by_eager(name, load_network(factory(name).network(), card, weights), card)


def script(told: Any) -> float:
    """Denoise files as a user would, in a process of its own; seconds."""
    paths, out = [Path(path) for path in told["paths"]], Path(told["out"])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    denoise = opponent(told["name"], Path(told["weights"]))
    begun = time.perf_counter()
    headers = [dcmread(path) for path in paths]
    stored = [ds.pixel_array.astype(np.float32) for ds in headers]
    scales = [(np.float32(ds.RescaleSlope), np.float32(ds.RescaleIntercept)) for ds in headers]
    hu = np.stack([one * slope + intercept for one, (slope, intercept) in zip(stored, scales, strict=True)])
    hu = np.maximum(hu, np.float32(LOWEST_HU))
    with torch.inference_mode():
        denoised = denoise(hu, float(headers[0].PixelSpacing[0]))
    for k in range(told["first"], told["end"]):
        ds, (slope, intercept) = headers[k], scales[k]
        kind = ds.pixel_array.dtype
        limits = np.iinfo(kind)
        ds.PixelData = (
            np.clip(np.rint((denoised[k] - intercept) / slope), limits.min, limits.max).astype(kind).tobytes()
        )
        ds.save_as(out / paths[k].name)
    return time.perf_counter() - begun


def around(name: str, paths: Sequence[Path], slices: int, weights: Path) -> tuple[Sequence[Path], int]:
    """What `script` is given for the middle `slices`, and how many of it come before them.

    A network for volumes is given as many more on both sides as it looks at.
    """
    reach = 0 if name == NLM else read_card(name, weights).overlap_zyx[0]
    middle = (len(paths) - slices) // 2
    first = max(middle - reach, 0)
    return paths[first : middle + slices + reach], middle - first


def run_opponent(name: str, paths: Sequence[Path], slices: int, weights: Path) -> float:
    """Seconds of `script` for `slices`."""
    given, before = around(name, paths, slices, weights)
    files = [str(path) for path in given]
    with tempfile.TemporaryDirectory(dir=paths[0].parent.parent) as out:
        told = {"name": name, "paths": files, "out": out, "weights": str(weights)}
        return float(ask(__file__, {**told, "first": before, "end": before + slices}))


def raw(name: str, trial: Trial, weights: Path) -> Array:
    """What an opponent makes of the measured slices, HU."""
    if name == NLM:
        return scored(classical.tuned(NLM, trial), trial)
    volume, where = part(trial, read_card(name, weights).overlap_zyx[0])
    with torch.inference_mode():
        return opponent(name, weights)(network_input(volume), trial.pixel_mm)[where]


class Way(NamedTuple):
    """How the job is done."""

    name: str
    ours: bool
    precision: Any = "fp32"

    @property
    def label(self) -> str:
        """For people."""
        if self.ours:
            return f"ours, {self.name}, {self.precision}"
        return "non-local means, scikit-image" if self.name == NLM else f"{self.name}, eager PyTorch and pydicom"


def ways(pipelines: Sequence[str], weights: Path) -> list[Way]:
    """Ours in the number format that a node would take, then the others, but for those that have no weights."""
    found = [Way(name, True, choose(read_card(name, weights), Execution("cpu")).precision) for name in pipelines]
    found += [Way(name, False) for name in (*pipelines, NLM)]
    try:
        read_card(YARDSTICK, weights)
        found.append(Way(YARDSTICK, False))
    except WeightsMissing as error:
        print(f"left out: {error}", file=sys.stderr)
    return found


def qualities(
    entrants: Sequence[Way], folders: Sequence[Path], slices: int, weights: Path
) -> dict[Way, tuple[float, ...]]:
    """Mean PSNR of each over the series of `folders`, in each window."""
    found: dict[Way, list[Quality]] = {way: [] for way in entrants}
    for trial in trials(folders, slices, [(way.name, weights) for way in entrants if way.name != NLM]):
        for way in entrants:
            if way.ours:
                images = scored(load_from(weights, way.name, Execution("cpu", way.precision)), trial)
            else:
                images = raw(way.name, trial, weights)
            found[way].append(Quality.of(images, trial.truth[trial.scored]))
            print(f"{trial.case}: {way.label}", file=sys.stderr, flush=True)
    return {way: Quality.mean(several).psnr_db for way, several in found.items() if several}


HEAD = ("what", "seconds", "measured on", "× ours", "PSNR (dB)")


def rows(
    times: Mapping[Way, Sequence[float]],
    slices: int,
    timed: int,
    computed: Mapping[Way, int],
    quality: Mapping[Way, Sequence[float]],
) -> list[list[str]]:
    """The table.

    Parameters
    ----------
    times
        Of each way, as measured in the rounds: ours on `slices`, the others on `timed`.
    computed
        Slices that one of the others had to compute for those.
    quality
        PSNR of each that was judged.
    """
    fastest = min(statistics.median(taken) for way, taken in times.items() if way.ours)
    lines = []
    for way, taken in times.items():
        scale = 1.0 if way.ours else slices / timed
        scaled = [scale * one for one in taken]
        own = [statistics.median(times[one]) for one in times if one.ours and one.name == way.name]
        base = own[0] if own else fastest
        on = f"{slices} slices" if way.ours else f"{timed} slices, scaled to {slices}"
        if not way.ours and computed[way] > timed:
            on += f" ({computed[way]} computed for them)"
        ratio = f"{statistics.median(scaled) / base:.1f}" + ("" if own else " (the quickest)")
        lines.append([way.label, median(scaled, 1), on, ratio, both(quality[way], 2) if way in quality else "-"])
    return lines


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("pipelines", nargs="*", metavar="PIPELINE", default=["fast-2.5d", "quality-2.5d", "st3d"])
    parser.add_argument("--slices", type=int, default=300, help="of the series (default %(default)s)")
    parser.add_argument("--timed", type=int, default=16, help="of these, for the others (default %(default)s)")
    parser.add_argument(
        "--series", type=Path, nargs="*", default=[], help="CT series that taught nobody: image quality"
    )
    parser.add_argument("--scored", type=int, default=4, help="slices of each of them (default %(default)s)")
    parser.add_argument("--repeat", type=Path, help="folder of a real series to denoise (default: a phantom)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of weights and cards")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    options = parser.parse_args()
    options.timed = min(options.timed, options.slices)
    cores, weights = own_cores(), options.weights
    entrants = ways(options.pipelines, weights)
    with Machine(cores) as machine, tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        source = Path(scratch) / "source"
        paths = repeated(options.repeat, source, options.slices) if options.repeat else phantom(source, options.slices)

        def ran(way: Way) -> float:
            if way.ours:
                return run_ours(Case(way.name, way.precision, "body", options.slices, cores), paths, weights).seconds
            return run_opponent(way.name, paths, options.timed, weights)

        turns = {way: partial(ran, way) for way in entrants}
        rounds = interleaved(machine, turns, options.rounds, options.quiet)
        description, body = machine.describe(), body_part(paths)
    quality = qualities(entrants, options.series, options.scored, weights)
    what = f"{options.repeat.name}, to and fro" if options.repeat else "a chest phantom at low dose"
    print(command([options.repeat, weights, options.folder, *options.series]))
    print(f"{description}\n{rounds.describe()}")
    print(f"Series: {what}, {options.slices} slices, {body:.0%} body.")
    if options.series:
        print(described([folder.name for folder in options.series], options.scored))
    times = {way: rounds.of(way) for way in entrants}
    computed = {way: len(around(way.name, paths, options.timed, weights)[0]) for way in entrants}
    print(f"\n{table(HEAD, rows(times, options.slices, options.timed, computed, quality))}")


if __name__ == "__main__":
    answer(script, main)
