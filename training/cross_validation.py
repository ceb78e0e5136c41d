"""Leave one patient out: what each network does on the whole of the subject that it never saw, and a table of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.base import Pipeline, denoise_volume
from training.measuring.cases import volume_of
from training.metrics import SOFT_TISSUE, psnr
from training.sources.scans import HU_RANGE, Scan, Spacing

DOSE = 0.25
"""Of the noise that is added to a series without a low-dose partner."""


@dataclass(frozen=True, slots=True)
class Fold:
    """What was measured on a series of a subject that was left out: PSNR in the soft-tissue window, dB."""

    subject: str
    series: str
    slices: int
    before: float
    after: float


def first_stages(name: str, start: Path, subjects: Iterable[str]) -> dict[str, Path]:
    """Folder of the weights of `name` that each fold begins with, by the subject that it leaves out.

    Raises
    ------
    SystemExit
        If one is missing.
    """
    folders = {subject: start / subject for subject in subjects}
    if missing := [subject for subject, folder in folders.items() if not (folder / f"{name}.json").exists()]:
        raise SystemExit(
            f"this network begins with {name}, and each subject needs one that never saw it: there is none in {start} "
            f"for {', '.join(missing)}. Train {name} with --leave-one-out first, and give its --out as --start"
        )
    return folders


def _low(scan: Scan) -> NDArray[np.float32]:
    """The low-dose image of a scan: the real one, or its source with the noise that is missing at `DOSE`."""
    source = scan.source.astype(np.float32)
    if not scan.noises:
        return source
    added = scan.source_noise_hu * math.sqrt(1 / DOSE - 1) / scan.noise_hu[0]
    return np.maximum(source + np.float32(added) * scan.noises[0].astype(np.float32), np.float32(HU_RANGE[0]))


def measured(pipeline: Pipeline, scan: Scan, spacing: Spacing) -> Fold:
    """Denoise all of `scan`, as the node would."""
    low, truth = _low(scan), scan.target.astype(np.float32)
    denoised = denoise_volume(pipeline, volume_of(low, spacing.pixels, spacing.slices))
    before, after = (psnr(image, truth, SOFT_TISSUE) for image in (low, denoised))
    return Fold(scan.subject, scan.name, len(truth), before, after)


def table(folds: Sequence[Fold]) -> str:
    """Markdown: a row for each series, then mean and standard deviation over the subjects."""
    lines = [
        f"PSNR of whole series, {SOFT_TISSUE}, each by a network that never saw the subject. Without a real low-dose "
        f"image, noise is added as at {DOSE:g} of the dose.",
        "",
        "| subject | series | slices | before (dB) | after (dB) | gain (dB) |",
        "|---|---|---|---|---|---|",
        *(
            f"| {x.subject} | {x.series} | {x.slices} | {x.before:.2f} | {x.after:.2f} | {x.after - x.before:+.2f} |"
            for x in folds
        ),
    ]
    means = [
        [statistics.fmean(numbers) for numbers in zip(*rows, strict=True)]
        for rows in (
            [(x.before, x.after, x.after - x.before) for x in folds if x.subject == subject]
            for subject in dict.fromkeys(x.subject for x in folds)
        )
    ]
    columns = list(zip(*means, strict=True))
    spread = [f"{statistics.stdev(numbers):.2f}" if len(numbers) > 1 else "—" for numbers in columns]
    before, after, gain = [f"{statistics.fmean(n):.2f} ± {sd}" for n, sd in zip(columns, spread, strict=True)]
    lines.append(f"| **mean ± SD of {len(means)} subjects** | | | {before} | {after} | {gain} |")
    return "\n".join(lines) + "\n"
