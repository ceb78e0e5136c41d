"""Picture of how trainings went, from their logs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def draw(logs: Mapping[str, Path], out: Path) -> None:
    """Loss and validated PSNR over samples seen, one line per training.

    Parameters
    ----------
    logs
        Name and ``log.jsonl`` of each training.
    out
        The picture, PNG.
    """
    from matplotlib.figure import Figure  # only who trains has it

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, path in logs.items():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        steps = {row["step"]: row["samples"] for row in rows if "samples" in row}
        losses = [(row["samples"], row["loss"]) for row in rows if "loss" in row]
        checks = [(steps[row["step"]], row["validation_psnr_db"]) for row in rows if row["step"] in steps]
        left.plot(*zip(*losses, strict=True), label=name, linewidth=0.8)
        right.plot(*zip(*checks, strict=True), label=name, marker=".")
    left.set(xlabel="samples", ylabel="loss", yscale="log")
    right.set(xlabel="samples", ylabel="validation PSNR, −160 to 240 HU (dB)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out, dpi=100)
