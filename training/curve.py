"""How trainings went: loss and validated PSNR of one or several in one picture, and what each has seen.

Each network is validated on patches of its own size: where its PSNR came to rest can be compared, how high it lies
cannot. For that, measure both on the same images: python -m training evaluate NAME NAME.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.runtime import WEIGHTS
from training.card import LOGS, card_in, plateau_in_words

_PSNR = "validation_psnr_db"

HELP = "draw how trainings went, several in one picture, and print what each has seen"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add(
        "training",
        nargs="+",
        help="name of an installed network, such as red-cnn, or a folder that `train --out` wrote or still writes",
    )
    add("--out", type=Path, required=True, metavar="PNG", help="the picture")
    parser.set_defaults(run=run)


def draw(logs: Mapping[str, Path], out: Path, validated_on: str) -> None:
    """Loss and validated PSNR over samples seen, one line per training.

    Parameters
    ----------
    logs
        Name and ``log.jsonl`` of each training.
    out
        The picture, PNG.
    validated_on
        What the PSNR is of.
    """
    from matplotlib.figure import Figure  # only who trains has it

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lowest = math.inf
    for name, path in logs.items():
        rows = _rows(path)
        lowest = min(lowest, *(row["loss"] for row in rows if "loss" in row), math.inf)
        for axes, key in ((left, "loss"), (right, _PSNR)):
            points = [(row["samples"], row[key]) for row in rows if key in row]
            axes.plot([x for x, _ in points], [y for _, y in points], label=name, linewidth=0.8, marker=".")
    # a logarithm shows no loss below 0, which that against a critic may be
    left.set(xlabel="samples", ylabel="loss", yscale="log" if lowest > 0 else "linear")
    right.set(xlabel="samples", ylabel="validation PSNR, −160 to 240 HU (dB)")
    figure.suptitle(f"validated on {validated_on}", fontsize="medium")  # both plots wide: it is a long sentence
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out, dpi=100)


def _rows(log: Path) -> list[dict[str, Any]]:
    """Lines of a log; the last one, which is just being written, counts once it is whole."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


@dataclass(frozen=True, slots=True)
class _Training:
    """A training as its card and its log tell of it."""

    label: str
    card: dict[str, Any]
    rows: list[dict[str, Any]]
    log: Path

    @classmethod
    def of(cls, word: str) -> _Training:
        """The one in the folder `word`, or that of the installed network `word`."""
        folder = Path(word)
        if folder.is_dir():
            card, log = card_in(folder), folder / "log.jsonl"
        else:
            card, log = WEIGHTS / f"{word}.json", LOGS / f"{word}.jsonl"
        if not (card.exists() and log.exists()):
            raise SystemExit(
                f"{word} is neither a folder that `train --out` wrote nor an installed network whose log is in {LOGS}"
            )
        rows = _rows(log)
        if not any(_PSNR in row for row in rows):
            raise SystemExit(f"{word} was not validated yet: wait for the first line with {_PSNR} in {log}")
        return cls(folder.resolve().name, json.loads(card.read_text(encoding="utf-8")), rows, log)

    @property
    def validated_on(self) -> str:
        words: str = self.card["training"].get("validated_on", "what the card does not tell")
        return words

    def row(self) -> str:
        """What it has seen, as a row of a table."""
        last = self.rows[-1]
        z, y, x = self.card["patch_zyx"]
        target = (z, y, x) if self.card["input"] == "volume" else (y, x)  # of a slab its middle slice
        checks = [(row[_PSNR], row["samples"]) for row in self.rows if _PSNR in row]
        best, place = max(checks)
        return (
            f"| {self.label} | {last['step']:,} | {last['samples']:,} | {' × '.join(map(str, target))} | "
            f"{last['samples'] * math.prod(target):.3g} | {best:.2f} at {place:,} | {checks[-1][0]:.2f} | "
            f"{plateau_in_words(self.card['training']['plateau'])} |"
        )


def run(args: argparse.Namespace) -> None:
    """The command."""
    trainings = [_Training.of(word) for word in args.training]
    logs = {one.label: one.log for one in trainings}
    if len(logs) < len(trainings):
        raise SystemExit("two of these have the same name: rename the folder of one")
    draw(logs, args.out, " / ".join(dict.fromkeys(one.validated_on for one in trainings)))
    print("| training | steps | samples | patch | pixels seen | best validated PSNR (dB) at samples | last | plateau |")
    print("|---" * 8 + "|")
    for one in trainings:
        print(one.row())
