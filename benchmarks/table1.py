"""Table 1 of the STResNet paper in its own form: SRResNet3D and STResNet in eager PyTorch and in OpenVINO, in tiles.

    python benchmarks/table1.py [NAME...] [--series FOLDER FOLDER FOLDER]

Wei L., Hsu W., "Efficient and Accurate Spatial-Temporal Denoising Network for Low-dose CT Scans", MIDL 2021. Each
network is measured in fp32, bf16 and INT8: as one graph of the whole tile, and streamed through it plane by plane, as a
node runs it. For one of the paper's two that has no weights, random ones stand in: the time is the same, the images say
nothing. INT8 weights come from `python -m training quantize`; without them, the ranges are those of the tile.
"""

from __future__ import annotations

import json
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import ENOUGH_SERIES, Quality, both, described, loss, scored, trials
from machine import Machine, arguments, command, interleaved, median, number, own_cores, seconds, table
from numpy.typing import NDArray
from operations import products
from safetensors.numpy import load
from torch import nn

from pipelines.base import Execution, ModelCard, WeightsMissing
from pipelines.network import NetworkPipeline
from pipelines.openvino_core import Precision, compile_model, convolution_precisions, cpu_supports, ov
from pipelines.openvino_segments import Reach
from pipelines.openvino_stream import StreamEngine
from pipelines.runtime import WEIGHTS, read_card, read_file, read_weights
from pipelines.scaling import to_hu
from pipelines.stresnet import SRResNet3D, STResNet
from training.data import Batch
from training.float_layers import one_channel
from training.quantization import Range, calibrate, quantisable, quantise
from training.recipes import volume

TILE = (16, 128, 128)
FEATURES, BLOCKS = 64, 8
PAPER = ("srresnet3d-wide", "st3d-wide")
BASELINE_GMACS = 75.0
"""Of an eager SRResNet3D on an undisturbed machine of ours. How fast eager PyTorch is depends on tile, memory and
version by more than a factor of two; a ratio to a slow one flatters."""
BAR_LOSS_DB, BAR_PEAK, BAR_RATIO = 0.1, 0.8, 11.0
"""Of one INT8 artefact: most loss in either window, least part of the peak, least ratio to `BASELINE_GMACS`."""
MAX_OFF_HU = 0.1
"""Of fp32 from eager PyTorch, on the tile: rounding."""
SEED = 1
NOISE = 0.1
"""Standard deviation of the tile, network units: any values take the same time."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
EAGER, WHOLE, STREAMED = "eager PyTorch", "OpenVINO", "OpenVINO, streamed"

Array = NDArray[np.float32]
Weights = Mapping[str, NDArray[Any]]
Network = SRResNet3D | STResNet


@dataclass(frozen=True)
class Contestant:
    """A network of the table."""

    label: str
    kind: type[Network]
    weights: Weights
    int8_weights: Weights
    """Those that INT8 begins with: trained on in INT8, where that was needed."""
    ranges: Mapping[str, Reach]
    card: ModelCard | None
    """None: random weights."""

    @property
    def size(self) -> tuple[int, int]:
        """Features and blocks."""
        return size(self.weights)

    @property
    def products(self) -> int:
        """For the tile."""
        return products(self.kind(*self.size), (1, 1, *TILE))

    @property
    def quantised(self) -> bool:
        """Whether somebody made INT8 weights of it."""
        return self.card is not None and "int8.ranges" in self.card.files_sha256

    def network(self, weights: Weights) -> Network:
        """The definition with `weights`."""
        return filled(self.kind, weights)


def filled(kind: type[Network], weights: Weights) -> Network:
    """The definition with `weights`."""
    made = kind(*size(weights))
    made.load_state_dict({name: torch.from_numpy(np.asarray(one, np.float32)) for name, one in weights.items()})
    return made.eval().requires_grad_(False)


def size(weights: Weights) -> tuple[int, int]:
    """Features and blocks of a network."""
    bias = weights["body.bias" if "body.bias" in weights else "body.1.bias"]
    return len(bias), len({name.split(".")[1] for name in weights if name.startswith("blocks.")})


def random_weights(kind: type[Network]) -> Weights:
    """Of the paper's size; the last convolution too, which an untrained network has at zero."""
    torch.manual_seed(SEED)
    network = kind(FEATURES, BLOCKS)
    for parameter in network.tail.parameters():
        nn.init.normal_(parameter, std=0.01)
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def ranges_of(network: Network, tile: Array) -> dict[str, Reach]:
    """Those of the tile."""
    values = torch.from_numpy(tile)[None]
    one = Batch(values, values, torch.zeros(1))
    made = quantisable(network, volume, one)
    in_float = one_channel(made)
    return {name: found.reach for name, found in calibrate(made, volume, [one]).items() if name not in in_float}


def trained(name: str, folder: Path, tile: Array) -> Contestant:
    """The network `name` with weights and card of `folder`.

    Raises
    ------
    pipelines.base.WeightsMissing
        If there are none.
    SystemExit
        If it is another kind of network.
    """
    card = read_card(name, folder)
    weights = load(read_weights(card, folder))
    kind = STResNet if "head.0.weight" in weights else SRResNet3D
    if kind is SRResNet3D and "head.weight" not in weights:
        raise SystemExit(f"{name} is neither an SRResNet3D nor an STResNet: name one that is")
    tuned, ranges = weights, None
    if "int8.ranges" in card.files_sha256:
        ranges = json.loads(read_file(card, "int8.ranges", folder))
        if "int8.safetensors" in card.files_sha256:
            tuned = load(read_file(card, "int8.safetensors", folder))
    features, blocks = size(weights)
    ranges = ranges or ranges_of(filled(kind, weights), tile)
    return Contestant(f"{kind.__name__} {features} × {blocks}, {name}", kind, weights, tuned, ranges, card)


def found(names: Sequence[str], folder: Path, tile: Array) -> list[Contestant]:
    """Those of `names` that are trained, and those of the paper that none of them is; SRResNet3D before STResNet."""
    made = []
    for name in names:
        try:
            made.append(trained(name, folder, tile))
        except WeightsMissing as error:
            print(f"left out: {error}", file=sys.stderr)
    for kind in (SRResNet3D, STResNet):
        if not any(one.kind is kind and one.size == (FEATURES, BLOCKS) for one in made):
            weights = random_weights(kind)
            ranges = ranges_of(filled(kind, weights), tile)
            label = f"{kind.__name__} {FEATURES} × {BLOCKS}, random weights"
            made.append(Contestant(label, kind, weights, weights, ranges, None))
    return sorted(made, key=lambda one: (one.kind is STResNet, -one.products))


def eager(one: Contestant, tile: Array) -> Callable[[], Array]:
    """The network as its definition says, in PyTorch's own order of memory."""
    given, network = torch.from_numpy(tile)[None, None], one.network(one.weights)

    def run() -> Array:
        with torch.inference_mode():
            return np.asarray(network(given)[0, 0].numpy())

    return run


def graph(one: Contestant, precision: Precision) -> Any:
    """The network for the tile at once, an `openvino.Model`; in INT8 with the grids that a node has."""
    tile = torch.zeros(1, *TILE)
    network: nn.Module = one.network(one.int8_weights if precision == "int8" else one.weights)
    if precision == "int8":
        corner = tile[:, :3, :8, :8]
        network = quantisable(network, volume, Batch(corner, corner, torch.zeros(1)))
        # the input of a block's second half comes from a ReLU
        signs = {name: not name.endswith(("second", "second.0")) for name in one.ranges}
        quantise(network, {name: Range.of(reach, signed=signs[name]) for name, reach in one.ranges.items()})
    with warnings.catch_warnings():
        # PyTorch wants its exporter in place of the tracer; OpenVINO's way in is the tracer
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        return ov.convert_model(network, example_input=tile[:, None], input=[[1, 1, *TILE]])


def whole(one: Contestant, precision: Precision, tile: Array, cores: int) -> Callable[[], Array]:
    """The whole tile at once by OpenVINO."""
    compiled = compile_model(graph(one, precision), precision, cores)
    check(one, WHOLE, precision, convolution_precisions(compiled))
    request = compiled.create_infer_request()

    def run() -> Array:
        request.get_input_tensor(0).data[0, 0] = tile
        request.infer()
        return np.array(request.get_output_tensor(0).data[0, 0])

    return run


def streamed(one: Contestant, precision: Precision, tile: Array, cores: int) -> Callable[[], Array]:
    """Plane by plane, as a node runs it."""
    ranges, weights = (one.ranges, one.int8_weights) if precision == "int8" else (None, one.weights)
    shape = (tile.shape[1], tile.shape[2])
    engine = StreamEngine(weights, shape, precision=precision, ranges=ranges, threads=cores)
    check(one, STREAMED, precision, engine.precisions)
    return lambda: np.stack(list(engine.stream(iter(tile))))


def check(one: Contestant, how: str, precision: Precision, runs_in: Mapping[str, str]) -> None:
    """Exit, if fewer convolutions run in 8 bits than have ranges: OpenVINO says so nowhere else."""
    in_8_bits = sum(kind in ("i8", "u8") for kind in runs_in.values())
    if precision == "int8" and in_8_bits < len(one.ranges):
        raise SystemExit(f"{one.label}, {how}: {in_8_bits} of {len(one.ranges)} quantised convolutions run in 8 bits")


Turn = tuple[int, str, Precision]
"""Place of the network, how it runs, and in what."""


def prepare(contestants: Sequence[Contestant], tile: Array, cores: int) -> dict[Turn, Callable[[], Array]]:
    """Everything that is timed, ready to run.

    Raises
    ------
    SystemExit
        If OpenVINO computes something else than PyTorch.
    """
    turns: dict[Turn, Callable[[], Array]] = {}
    for k, one in enumerate(contestants):
        turns[k, EAGER, "fp32"] = eager(one, tile)
        exact = turns[k, EAGER, "fp32"]()
        for how, make in ((WHOLE, whole), (STREAMED, streamed)):
            for precision in filter(cpu_supports, PRECISIONS):
                turn = make(one, precision, tile, cores)
                off_hu = float(np.abs(to_hu(turn()) - to_hu(exact)).max())
                if precision == "fp32" and off_hu > MAX_OFF_HU:
                    raise SystemExit(f"{one.label}, {how}, is up to {off_hu:.2f} HU from eager PyTorch")
                turns[k, how, precision] = turn
    return turns


def qualities(
    one: Contestant, folders: Sequence[Path], slices: int, weights: Path, perceptual: Path | None
) -> dict[Precision, Quality]:
    """Mean quality of what leaves a node, by precision; empty of a network that is not trained."""
    measured: dict[Precision, list[Quality]] = {}
    if one.card is None:
        return {}
    for trial in trials(folders, slices, [(one.card.name, weights)]):
        for precision in filter(cpu_supports, PRECISIONS):
            if precision == "int8" and not one.quantised:
                continue
            execution = Execution(device="cpu", precision=precision)
            pipeline = NetworkPipeline(
                one.card.name, lambda: one.network(one.weights), execution=execution, folder=weights
            )
            quality = Quality.of(scored(pipeline, trial), trial.truth[trial.scored], perceptual)
            measured.setdefault(precision, []).append(quality)
    return {precision: Quality.mean(several) for precision, several in measured.items()}


HEAD = (
    *("network", "runs as", "type", "seconds", "× eager SRResNet3D", f"× the same at {BASELINE_GMACS:g} GMAC/s"),
    *("GMAC/s", "% of peak", "PSNR (dB)", "loss (dB)", "SSIM", "LPIPS"),
)


def row(
    one: Contestant,
    turn: tuple[str, Precision],
    times: Sequence[float],
    baseline: tuple[float, int],
    peak: float,
    quality: Mapping[Precision, Quality],
) -> list[str]:
    """One line of the table.

    Parameters
    ----------
    turn
        How it runs, and in what.
    times
        Of the rounds, s.
    baseline
        Of the eager SRResNet3D: seconds here, and products.
    peak
        Of the type, GMAC/s; 0 where it is not known.
    quality
        By precision.
    """
    how, precision = turn
    taken = statistics.median(times)
    gmacs = one.products / taken / 1e9
    cells = [
        *(one.label, how, precision, median(times, 3)),
        *(f"{baseline[0] / taken:.2f}", f"{baseline[1] / (BASELINE_GMACS * 1e9) / taken:.2f}", f"{gmacs:.0f}"),
        number(100 * gmacs / peak if peak else None, 0),
    ]
    here = quality.get(precision)
    if here is None:
        return [*cells, *["-"] * (len(HEAD) - len(cells))]
    lost = loss(quality["fp32"], here)
    return [*cells, both(here.psnr_db, 2), both(lost, 3), both(here.ssim, 4), number(here.lpips, 4)]


def bar(rows: Sequence[Sequence[str]], series: int) -> str:
    """Whether one line of the table in INT8 is good enough in everything, and which, in a sentence."""
    met = []
    for cells in rows:
        one = dict(zip(HEAD, cells, strict=True))
        if one["type"] != "int8" or one["loss (dB)"] == "-" or series < ENOUGH_SERIES or one["% of peak"] == "-":
            continue
        lost = max(map(float, one["loss (dB)"].split(" / ")))
        part, ratio = float(one["% of peak"]) / 100, float(one[HEAD[5]])
        if lost <= BAR_LOSS_DB and part >= BAR_PEAK and ratio >= BAR_RATIO:
            met.append(f"{one['network']}, {one['runs as']}")
    asked = (
        f"at most {BAR_LOSS_DB:g} dB of loss over {ENOUGH_SERIES} series or more, {BAR_PEAK:.0%} of the INT8 peak, "
        f"{BAR_RATIO:g} × SRResNet3D at {BASELINE_GMACS:g} GMAC/s"
    )
    return f"One artefact with {asked}: {'met by ' + '; '.join(met) if met else 'missed'}."


def main() -> None:
    """Print the table."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument(
        "networks",
        nargs="*",
        metavar="NAME",
        default=list(PAPER),
        help=f"networks of one of the two kinds (default: {' '.join(PAPER)})",
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of weights and cards")
    parser.add_argument(
        "--series", type=Path, nargs="*", default=[], help="CT series that taught nobody: image quality"
    )
    parser.add_argument("--slices", type=int, default=12, help="of each series (default %(default)s)")
    parser.add_argument(
        "--lpips", type=Path, help="folder with the weights of LPIPS, see `python -m training evaluate`"
    )
    options = parser.parse_args()
    cores = own_cores()
    torch.set_num_threads(cores)
    tile = np.random.default_rng(SEED).normal(0, NOISE, TILE).astype(np.float32)
    contestants = found(options.networks, options.weights, tile)
    turns = prepare(contestants, tile, cores)
    with Machine(cores) as machine:
        rounds = interleaved(
            machine, {turn: seconds(run) for turn, run in turns.items()}, options.rounds, options.quiet
        )
        description, peak = machine.describe(), machine.peak
    judged = [qualities(one, options.series, options.slices, options.weights, options.lpips) for one in contestants]
    (first,) = (k for k, one in enumerate(contestants) if (one.kind, one.size) == (SRResNet3D, (FEATURES, BLOCKS)))
    baseline = statistics.median(rounds.of((first, EAGER, "fp32"))), contestants[first].products
    rows = [
        row(contestants[k], (how, precision), rounds.of((k, how, precision)), baseline, peak[precision], judged[k])
        for k, how, precision in turns
    ]
    print(command([options.weights, options.lpips, *options.series]))
    print(f"{description}\nTile of {' × '.join(map(str, TILE))}. {rounds.describe()}")
    if options.series:
        print(described([folder.name for folder in options.series], options.slices))
    print(f"\n{table(HEAD, rows)}\n\n{bar(rows, len(options.series))}")


if __name__ == "__main__":
    main()
