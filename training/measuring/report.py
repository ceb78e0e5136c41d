"""The report of a measurement: Markdown with pictures, and every number as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.measuring import bar, figures, papers, seen
from training.measuring.cases import Trial
from training.measuring.scores import IMAGE_METRICS, WINDOWS, Result, Row, case_means, values
from training.metrics import SOFT_TISSUE
from training.physics import Curve

Array = NDArray[np.float32]

_DIGITS = {"PSNR (dB)": 2, "MI (nat)": 3, "L1": 4, "RMSE": 4, "NMSE": 5, "SSIM": 3, "LPIPS": 3}
_PICTURES = "pictures"
METHODS = """\
PSNR, SSIM, L1, RMSE, NMSE and MI are taken on [0, 1] of the stated HU window, slice by slice; a table gives the mean
over slices, then over cases. SSIM is Wang's (11 × 11 Gaussian, σ 1.5, K 0.01 and 0.03), MI has 256 bins.

- The truth of *phantom* has no noise. The truth of *simulated* and *pair* is the full-dose image, **itself noisy**:
  who removes all noise removes the truth's too, and loses PSNR.
- The noise of *simulated* comes from a virtual scan by a scanner whose kernel and photons were found from the noise of
  the series itself.
- *Our networks* says what the split table does with a series: *trained on*, *patient trained on* (another series of the
  patient), *test* (no training sees the patient), *unknown* (none of ours).
- Shift is mean(out − in), HU, under masks from the noise-free truth or from a smoothed one.
- The NPS is that of the noise left from two realisations, (out1 − out2)/√2, in squares of 32 × 32 pixels of soft
  tissue, 64 × 64 in the water of the rods. A falling mean frequency is the look of plastic.
- Contrast recovery is what comes through of balls of 6 mm and 30 HU, put into soft tissue under the same noise.
- *rods* is a water cylinder with rods: TTF of each, CNR and d' (non-prewhitening observer) of the one of 30 HU.
  Classical filters have there the parameter of the first case.
- *perfect* and *blind to lesions* know the truth and stand behind the rails of every network: what the first still
  lacks no network can win, and what the second gives back of a lesion, the rails did.
- Classical filters have their one parameter chosen by the truth of each case and dose: the best they can do.
- Seconds per slice are of the machine that wrote this."""


@dataclass(slots=True)
class Measurement:
    """Everything that was measured, in the order in which it was."""

    command: str
    title: str
    pipelines: list[str] = field(default_factory=list)
    networks: list[str] = field(default_factory=list)
    """Rows of the table of what ran."""
    rows: list[Row] = field(default_factory=list)
    cases: list[str] = field(default_factory=list)
    """Rows of the table of cases."""
    warnings: list[str] = field(default_factory=list)
    """Of networks that have seen what they are measured on."""
    parameters: list[str] = field(default_factory=list)
    """Rows of the table of what was chosen for the classical filters."""
    pictures: dict[float, dict[str, dict[str, Array]]] = field(default_factory=dict)
    """Middle slices by dose, case and pipeline; the first is the truth."""
    spectra: dict[float, dict[str, dict[str, Curve]]] = field(default_factory=dict)
    steady: dict[str, bar.Steadiness] = field(default_factory=dict)
    """Filled where the bar was asked for."""
    lpips_weights: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file, where LPIPS was measured."""

    def begin(self, trial: Trial) -> None:
        """Note a trial whose results follow."""
        geometry = trial.low.geometry.spacing_mm
        self.cases.append(
            f"| {trial.case} | {trial.kind} | {seen.role(trial)} | {trial.dose:g} | "
            f"{trial.scored.stop - trial.scored.start} | {geometry[0]:.2f} | {trial.pixel_mm:.2f} | "
            f"{trial.truth_noise_hu:.1f} | {trial.f50:.2f} |"
        )
        truth = trial.truth[trial.scored]
        self.pictures.setdefault(trial.dose, {})[trial.case] = {"truth": truth[len(truth) // 2].copy()}

    def add(self, trial: Trial, name: str, result: Result) -> None:
        """Note the result of a pipeline on it."""
        if name not in self.pipelines:
            self.pipelines.append(name)
        self.rows += result.rows
        self.pictures[trial.dose][trial.case][name] = result.middle
        if result.nps is not None:
            self.spectra.setdefault(trial.dose, {}).setdefault(trial.case, {})[name] = result.nps

    @property
    def doses(self) -> list[float]:
        """From high to low."""
        return sorted({row.dose for row in self.rows}, reverse=True)


def _mean_of_cases(rows: Sequence[Row], metric: str) -> str:
    """Mean over slices, then over cases."""
    means = case_means(rows, metric)
    return f"{np.mean(means):.{_DIGITS.get(metric, 3)}f}" if means else "–"


def _grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---|" + "---|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in body)])


def _image_table(measured: Measurement, dose: float, kinds: tuple[str, ...], window: str) -> str | None:
    rows = [r for r in measured.rows if r.dose == dose and r.kind in kinds and r.window == window]
    if not rows:
        return None
    metrics = [m for m in (*IMAGE_METRICS, "LPIPS") if any(r.metric == m for r in rows)]
    body = [
        [name, *(_mean_of_cases([r for r in rows if r.pipeline == name], metric) for metric in metrics)]
        for name in measured.pipelines
    ]
    return _grid([window, *metrics], body)


def _case_table(measured: Measurement, dose: float) -> str:
    """PSNR of each case in the soft-tissue window, mean ± standard deviation over slices."""
    rows = [r for r in measured.rows if r.dose == dose and r.metric == "PSNR (dB)" and r.window == str(SOFT_TISSUE)]
    cases = list(dict.fromkeys(row.case for row in rows))
    body = []
    for name in measured.pipelines:
        cells = [name]
        for case in cases:
            found = values(rows, pipeline=name, case=case)
            cells.append(f"{np.mean(found):.2f} ± {np.std(found):.2f}" if found else "–")
        body.append(cells)
    return _grid([f"PSNR (dB), {SOFT_TISSUE}", *cases], body)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _physics_table(measured: Measurement, case: str, dose: float) -> str:
    """Every number that knows no window, of one case."""
    rows = [r for r in measured.rows if r.dose == dose and r.case == case and not r.window]
    metrics = list(dict.fromkeys(row.metric for row in rows))
    present = [name for name in measured.pipelines if any(row.pipeline == name for row in rows)]
    by = {(row.metric, row.pipeline): _number(row.value) for row in rows}
    return _grid([case, *present], [[metric, *(by.get((metric, name), "–") for name in present)] for metric in metrics])


def _image(path: Path, folder: Path, text: str) -> str:
    return f"![{text}]({path.relative_to(folder).as_posix()})"


def _dose_part(measured: Measurement, dose: float, out: Path) -> list[str]:
    """Everything of one dose."""
    pictures = out / _PICTURES
    parts = [f"## {dose:g} of full dose", "### Likeness to the truth"]
    for text, kinds in (
        ("Phantom, truth without noise:", ("phantom",)),
        ("Real images, truth at full dose and noisy:", ("simulated", "pair")),
    ):
        tables = [t for window in WINDOWS if (t := _image_table(measured, dose, kinds, str(window)))]
        if tables:
            parts += [text, *tables]
    parts += ["By case, mean ± standard deviation over slices:", _case_table(measured, dose)]
    by_case: dict[str, dict[str, list[float]]] = {}
    psnr = [r for r in measured.rows if r.dose == dose and r.metric == "PSNR (dB)" and r.window == str(SOFT_TISSUE)]
    for row in psnr:
        by_case.setdefault(row.case, {}).setdefault(row.pipeline, []).append(row.value)
    parts.append(_image(figures.boxes(pictures, dose, by_case, SOFT_TISSUE), out, "PSNR of each slice, as box plots"))
    parts.append("### Noise, resolution, contrast")
    cases = dict.fromkeys(row.case for row in measured.rows if row.dose == dose)
    parts += [_physics_table(measured, case, dose) for case in cases]
    if dose in measured.spectra:
        parts.append(
            _image(
                figures.spectra(pictures, dose, measured.spectra[dose]), out, "noise power spectra, before and after"
            )
        )
    parts.append("### Pictures")
    parts.append(
        f"Middle slice in {SOFT_TISSUE}; below, the difference from the truth from "
        f"−{figures.DIFFERENCE_HU:g} to {figures.DIFFERENCE_HU:g} HU."
    )
    for case, images in measured.pictures.get(dose, {}).items():
        truth, results = images["truth"], {name: image for name, image in images.items() if name != "truth"}
        parts.append(_image(figures.images(pictures, case, dose, truth, results), out, f"{case} at {dose:g}"))
    parts.append("### Beside the papers")
    for printed in papers.TABLES:
        parts += [
            f"{printed.title} ({printed.source}):",
            papers.beside(printed, measured.rows, measured.pipelines, dose),
            printed.difference + " Ours are the cases above, not the paper's.",
        ]
    return parts


def markdown(measured: Measurement, out: Path) -> str:
    """The report; draws its pictures into ``out/pictures``."""
    (out / _PICTURES).mkdir(parents=True, exist_ok=True)
    head = ["case", "truth", "our networks", "dose", "slices", "spacing (mm)", "pixel (mm)"]
    head += ["noise of truth (HU)", "kernel f50 (1/mm)"]
    parts = [f"# {measured.title}", f"    {measured.command}"]
    if measured.steady:
        lines = bar.judge(measured.rows, measured.steady)
        passed = sum(line.passed for line in lines)
        parts += ["## The bar", f"{passed} of {len(lines)} lines passed.", bar.table(lines)]
    parts += [f"**Warning:** {sentence}" for sentence in measured.warnings]
    parts += ["## What was measured", METHODS, _grid(head, []) + "\n" + "\n".join(measured.cases)]
    if measured.networks:
        parts.append(
            _grid(["network", "version", "weights SHA-256", "runs in"], []) + "\n" + "\n".join(measured.networks)
        )
    if measured.lpips_weights:
        weights = ", ".join(f"{name} `{digest}`" for name, digest in measured.lpips_weights.items())
        parts.append(f"LPIPS is that of AlexNet, version 0.1, by weights of SHA-256: {weights}.")
    if measured.parameters:
        parts.append(
            _grid(["filter", "case", "dose", "parameter", "value"], []) + "\n" + "\n".join(measured.parameters)
        )
    for dose in measured.doses:
        parts += _dose_part(measured, dose, out)
    parts.append(papers.CASCADE)
    return "\n\n".join(parts) + "\n"


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Every number, one a line; `slice` is its number from the first measured one, empty for the whole case."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([one.name for one in fields(Row)])
        for row in rows:
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in asdict(row).values()])
