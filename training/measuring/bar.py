"""The bar that a pipeline must clear before it is shipped: one line for each demand, passed or failed.

What was not measured is failed, the rivals (`RIVALS`) included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.base import Options, Pipeline
from training.measuring.cases import Trial, denoised
from training.measuring.scores import Row
from training.metrics import SOFT_TISSUE
from training.physics import LESION_HU, LESION_MM

OPPONENT = "nlm"
GAIN_DB = {0.25: 0.3, 0.1: 1.0}
"""What the mean PSNR must be above the opponent's, by dose."""
RIVALS: dict[str, tuple[str | None, float]] = {"red-cnn": (None, 0.3), "srresnet3d": ("st3d", 0.2)}
"""How many dB better a rival may be, and than which network; None: than any."""
SHIFT_HU = {"soft": 1.0, "lung": 5.0, "bone": 5.0}
NPS_FALL_PERCENT = 25.0
CONTRAST = 0.95
CLEAN_MEAN_HU, CLEAN_WITHIN_HU, CLEAN_PERCENT = 1.0, 5.0, 99.9
"""Of a noise-free image: mean change, and how many voxels may change by how much."""


@dataclass(frozen=True, slots=True)
class Line:
    """A demand, and how it was met."""

    pipeline: str
    demand: str
    measured: str
    passed: bool


@dataclass(frozen=True, slots=True)
class Steadiness:
    """What a pipeline does to an image without noise, and to any image at strength 0."""

    mean_change_hu: float
    within_percent: float
    """Voxels that change by no more than `CLEAN_WITHIN_HU`."""
    off_change_hu: float
    """Largest change at strength 0."""


def steadiness(pipeline: Pipeline, options: Options, trial: Trial) -> Steadiness:
    """Run `pipeline` on the noise-free phantom of `trial`, and on the noisy one at strength 0."""
    change = np.abs(denoised(pipeline, options, trial.low.with_hu(trial.truth), trial) - trial.truth[trial.scored])
    unchanged = denoised(pipeline, Options(strength=0.0), trial.low, trial)
    return Steadiness(
        float(change.mean(dtype=np.float64)),
        100 * float((change <= CLEAN_WITHIN_HU).mean()),
        float(np.abs(unchanged - trial.low.hu[trial.scored]).max()),
    )


def psnr_of(rows: Sequence[Row], pipeline: str, dose: float) -> dict[str, float]:
    """PSNR in the soft-tissue window by real case: the mean over its slices."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if (
            row.pipeline == pipeline
            and row.dose == dose
            and row.metric == "PSNR (dB)"
            and row.window == str(SOFT_TISSUE)
            and row.kind in ("simulated", "pair")
        ):
            found.setdefault(row.case, []).append(row.value)
    return {case: float(np.mean(numbers)) for case, numbers in found.items()}


def _against_opponent(rows: Sequence[Row], name: str, dose: float) -> list[Line]:
    mine, other = psnr_of(rows, name, dose), psnr_of(rows, OPPONENT, dose)
    gains = {case: mine[case] - other[case] for case in mine if case in other}
    if not gains:
        return [_not_measured(name, f"above {OPPONENT} at {dose:g} of full dose, on real images")]
    worst = min(gains, key=lambda case: gains[case])
    lines = [
        Line(
            name,
            f"never below {OPPONENT} at {dose:g} of full dose, {SOFT_TISSUE}",
            f"{gains[worst]:+.2f} dB in {worst}",
            gains[worst] >= 0,
        )
    ]
    if dose in GAIN_DB:
        mean = float(np.mean(list(gains.values())))
        lines.append(
            Line(
                name,
                f"mean at least {GAIN_DB[dose]:+g} dB above {OPPONENT} at {dose:g} of full dose",
                f"{mean:+.2f} dB over {len(gains)}",
                mean >= GAIN_DB[dose],
            )
        )
    return lines


def _not_behind(rows: Sequence[Row], name: str, dose: float) -> list[Line]:
    """Against the networks of `RIVALS`."""
    lines = []
    for rival, (of, limit) in RIVALS.items():
        if name == rival or of not in (name, None):
            continue
        demand = f"{rival} at most {limit:g} dB better at {dose:g} of full dose"
        mine, other = psnr_of(rows, name, dose), psnr_of(rows, rival, dose)
        if both := [other[case] - mine[case] for case in mine if case in other]:
            ahead = float(np.mean(both))
            lines.append(Line(name, demand, f"{ahead:+.2f} dB", ahead <= limit))
        else:
            lines.append(_not_measured(name, demand))
    return lines


def _not_measured(name: str, demand: str) -> Line:
    return Line(name, demand, "not measured", False)


@dataclass(frozen=True, slots=True)
class _Limit:
    """A demand on one metric of every case."""

    metric: str
    demand: str
    written: str
    """Format of a value."""
    margin: Callable[[float], float]
    """How much better than demanded a value is; below 0 it fails."""


def _moves(tissue: str, most: float) -> _Limit:
    demand = f"mean of {tissue} moves by at most {most:g} HU"
    return _Limit(f"shift of {tissue} (HU)", demand, "{:+.2f} HU", lambda shift: most - abs(shift))


_LIMITS = (
    *(_moves(tissue, most) for tissue, most in SHIFT_HU.items()),
    _Limit(
        "NPS mean shift (%)",
        f"mean frequency of the NPS falls by at most {NPS_FALL_PERCENT:g} %",
        "{:+.1f} %",
        lambda shift: shift + NPS_FALL_PERCENT,
    ),
    _Limit(
        "contrast recovery",
        f"contrast recovery of {LESION_MM:g} mm, {LESION_HU:g} HU at least {CONTRAST:g}",
        "{:.3f}",
        lambda recovery: recovery - CONTRAST,
    ),
)


def _within_limits(rows: Sequence[Row], name: str, dose: float) -> list[Line]:
    """The worst case of all series, phantom and rods counts, at each dose for itself."""
    lines = []
    for limit in _LIMITS:
        demand = f"{limit.demand} at {dose:g} of full dose"
        found = [row for row in rows if (row.pipeline, row.dose, row.metric) == (name, dose, limit.metric)]
        if not found:
            lines.append(_not_measured(name, demand))
            continue
        margins = [limit.margin(row.value) for row in found]
        worst = found[int(np.argmin(margins))]
        lines.append(Line(name, demand, f"{limit.written.format(worst.value)} in {worst.case}", min(margins) >= 0))
    return lines


def judge(rows: Sequence[Row], steady: dict[str, Steadiness]) -> list[Line]:
    """Every line of the bar for every pipeline of `steady`.

    Parameters
    ----------
    rows
        Of all pipelines, the opponent's with them.
    steady
        By pipeline.
    """
    doses = sorted({*GAIN_DB, *(row.dose for row in rows)}, reverse=True)
    lines = []
    for name, one in steady.items():
        for dose in doses:
            lines += _against_opponent(rows, name, dose)
            lines += _not_behind(rows, name, dose)
            lines += _within_limits(rows, name, dose)
        lines += [
            Line(
                name,
                f"noise-free phantom: mean change at most {CLEAN_MEAN_HU:g} HU",
                f"{one.mean_change_hu:.2f} HU",
                one.mean_change_hu <= CLEAN_MEAN_HU,
            ),
            Line(
                name,
                f"noise-free phantom: {CLEAN_PERCENT:g} % of voxels within {CLEAN_WITHIN_HU:g} HU",
                f"{one.within_percent:.2f} %",
                one.within_percent >= CLEAN_PERCENT,
            ),
            Line(name, "identical at strength 0", f"{one.off_change_hu:g} HU", one.off_change_hu == 0),
        ]
    return lines


def table(lines: Sequence[Line]) -> str:
    """The bar as Markdown."""
    return "\n".join(
        [
            "| pipeline | demand | measured | |",
            "|---|---|---|---|",
            *(f"| {x.pipeline} | {x.demand} | {x.measured} | {'pass' if x.passed else '**fail**'} |" for x in lines),
        ]
    )
