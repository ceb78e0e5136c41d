"""Picture of how trainings went, from their logs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path


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
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        lowest = min(lowest, *(row["loss"] for row in rows if "loss" in row), math.inf)
        for axes, key in ((left, "loss"), (right, "validation_psnr_db")):
            points = [(row["samples"], row[key]) for row in rows if key in row]
            axes.plot([x for x, _ in points], [y for _, y in points], label=name, linewidth=0.8, marker=".")
    # a logarithm shows no loss below 0, which that against a critic may be
    left.set(xlabel="samples", ylabel="loss", yscale="log" if lowest > 0 else "linear")
    right.set(xlabel="samples", ylabel="validation PSNR, −160 to 240 HU (dB)", title=f"validated on {validated_on}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out, dpi=100)
