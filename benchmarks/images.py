"""What images are worth: PSNR, SSIM and LPIPS on the middle of real series, whose low dose is simulated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.base import Pipeline, denoise_volume
from pipelines.volume import Volume
from training.measuring import seen
from training.measuring.cases import Trial, simulated_trials
from training.measuring.lpips import lpips
from training.metrics import LUNG, SOFT_TISSUE, psnr, ssim

Array = NDArray[np.float32]

WINDOWS = (SOFT_TISSUE, LUNG)
ENOUGH_SERIES = 3
"""For a mean that is worth its name."""
DOSE = 0.25
"""That is simulated."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Of one image volume or the mean of several; PSNR and SSIM in each of `WINDOWS`, LPIPS in the lung's."""

    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...]
    lpips: float | None = None

    @classmethod
    def of(cls, images: Array, truth: Array, perceptual: Path | None = None) -> Quality:
        """Means over the slices of `images`, (z, y, x) HU; `perceptual` is the folder of the weights of LPIPS."""
        pairs = list(zip(images, truth, strict=True))
        return cls(
            tuple(float(np.mean([psnr(*pair, window) for pair in pairs])) for window in WINDOWS),
            tuple(float(np.mean([ssim(*pair, window) for pair in pairs])) for window in WINDOWS),
            None if perceptual is None else lpips(images, truth, LUNG, perceptual),
        )

    @classmethod
    def mean(cls, several: Sequence[Quality]) -> Quality:
        """Each series counts alike."""
        distances = [one.lpips for one in several if one.lpips is not None]
        return cls(
            tuple(np.mean([one.psnr_db for one in several], 0).tolist()),
            tuple(np.mean([one.ssim for one in several], 0).tolist()),
            float(np.mean(distances)) if len(distances) == len(several) else None,
        )


def both(values: Sequence[float], digits: int) -> str:
    """A value for each of `WINDOWS`, for a table."""
    return " / ".join(f"{value:.{digits}f}" for value in values)


def loss(exact: Quality, here: Quality) -> list[float]:
    """PSNR that is lost against `exact`, dB, in each of `WINDOWS`."""
    return [before - after for before, after in zip(exact.psnr_db, here.psnr_db, strict=True)]


def trials(folders: Sequence[Path], slices: int, trained: Sequence[tuple[str, Path]]) -> Iterator[Trial]:
    """The middle `slices` of each series of `folders`, at `DOSE` of its dose.

    Parameters
    ----------
    trained
        Networks that are to be measured, by name and the folder of their card.

    Raises
    ------
    SystemExit
        If one of them was trained on the patient of a series.
    """
    for folder in folders:
        for trial in simulated_trials(folder, [DOSE], slices):
            for name, weights in trained:
                if told := seen.warning(name, trial, weights):
                    raise SystemExit(f"{told} Give series that taught nobody.")
            yield trial


def part(trial: Trial, reach: int) -> tuple[Volume, slice]:
    """The measured slices of `trial` and `reach` more on both sides, and where the measured ones lie in that."""
    first = max(trial.scored.start - reach, 0)
    read = slice(first, min(trial.scored.stop + reach, len(trial.truth)))
    volume = replace(trial.low, hu=trial.low.hu[read], padding=trial.low.padding[read])
    return volume, slice(trial.scored.start - first, trial.scored.stop - first)


def scored(pipeline: Pipeline, trial: Trial) -> Array:
    """What `pipeline` makes of the measured slices of `trial`, which it is given with all that they depend on; HU."""
    volume, where = part(trial, pipeline.card.overlap_zyx[0])
    return denoise_volume(pipeline, volume)[where]


def described(names: Sequence[str], slices: int) -> str:
    """On what was measured, in a line for above a table."""
    few = "" if len(names) >= ENOUGH_SERIES else f" Fewer than {ENOUGH_SERIES} series: no mean that says much."
    return (
        f"Images: mean over {', '.join(names)}, {slices} slices in the middle of each, at {DOSE:g} of their dose "
        f"(simulated), against the full-dose series; windows {' / '.join(map(str, WINDOWS))}.{few}"
    )
