"""What the papers print, beside what we measure: the same form, other data.

The numbers do not compare one to one. No paper's images are here, so each table says where the data differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from training.measuring.scores import Row, case_means
from training.metrics import LUNG, SOFT_TISSUE, Window


@dataclass(frozen=True, slots=True)
class Printed:
    """A table of a paper."""

    title: str
    source: str
    metrics: tuple[str, ...]
    window: Window
    """Where ours is measured."""
    rows: dict[str, tuple[str, ...]]
    spread: bool
    """Does the paper give a standard deviation?"""
    difference: str
    """Of the data and of what the paper leaves open."""


HQINET = Printed(
    title="HQINet",
    source="Lu et al., High-quality Low-dose CT Reconstruction Using CNNs with Spatial and Channel Squeeze and "
    "Excitation, Table 1",
    metrics=("L1", "NMSE", "PSNR (dB)", "MI (nat)"),
    window=SOFT_TISSUE,
    rows={
        "low dose": ("0.043 ± 0.020", "0.062 ± 0.039", "25.81 ± 5.86", "1.01 ± 0.44"),
        "HQINet": ("0.021 ± 0.006", "0.012 ± 0.006", "31.30 ± 2.69", "1.30 ± 0.38"),
    },
    spread=True,
    difference="The paper's 18 test patients are real pairs of LDCT-and-Projection-data (chest at 10 %, abdomen and "
    "head at 25 % of the dose). It states neither window nor, for MI, bins and logarithm: ours are [-160, 240] HU, "
    "which its numbers fit best (the argument stands at `training.losses.l1_ssim`), 256 bins, nats. Its equation 5 of "
    "the PSNR has a root too much; its table fits the usual formula, which is ours.",
)
DCSCN = Printed(
    title="DCSCN and DCSWGAN",
    source="You et al., Low-dose CT via Deep CNN with Skip Connection and Network in Network, Table 1",
    metrics=("PSNR (dB)", "SSIM", "RMSE"),
    window=SOFT_TISSUE,
    rows={
        "LDCT": ("22.818", "0.761", "0.0723"),
        "CNN-L1": ("27.791", "0.822", "0.0408"),
        "WGAN": ("25.727", "0.801", "0.0517"),
        "DCSCN": ("28.016", "0.883", "0.0397"),
        "DCSWGAN": ("26.928", "0.828", "0.0449"),
    },
    spread=False,
    difference="The paper gives two slices of the AAPM Grand Challenge, real pairs at a quarter of the dose; all its "
    "rows obey PSNR = -20 log10 RMSE, so they are taken on [0, 1] of a window, by the size of the RMSE that of 400 HU. "
    "Its SSIM parameters are open: ours are Wang's.",
)
STRESNET = Printed(
    title="SRResNet3D and STResNet",
    source="Wei and Hsu, Efficient and Accurate Spatial-Temporal Denoising Network for Low-dose CT Scans, MIDL 2021, "
    "Table 1",
    metrics=("PSNR (dB)", "SSIM", "LPIPS"),
    window=LUNG,
    rows={
        "SRResNet, FP32": ("31.31", "0.7216", "0.3635"),
        "STResNet, FP32": ("31.91", "0.7265", "0.3715"),
        "SRResNet, INT8": ("31.15", "0.7064", "0.3501"),
        "STResNet, INT8": ("31.11", "0.7135", "0.3555"),
    },
    spread=False,
    difference="The paper's 84 test scans are chest screening CT of about 2 mGy, 2 mm at a simulated 10 % of the dose "
    "against 1 mm at full dose. It states neither window nor the network of LPIPS: ours are [-1000, 400] HU and "
    "AlexNet, and the slices are not made thinner.",
)
CASCADE = (
    "Ataei et al., Cascaded Convolutional Neural Networks with Perceptual Loss for Low Dose CT Denoising, print no "
    "numbers: they judge by eye, and show 0.3 of the low-dose image blended with 0.7 of the result (`--blend 0.7`)."
)
TABLES = (HQINET, DCSCN, STRESNET)


def _cell(rows: Iterable[Row], metric: str, spread: bool) -> str:
    means = case_means(rows, metric)
    if not means:
        return "not measured"
    digits = {"PSNR (dB)": 2, "MI (nat)": 2, "RMSE": 4}.get(metric, 3)
    mean = f"{np.mean(means):.{digits}f}"
    return f"{mean} ± {np.std(means):.{digits}f}" if spread and len(means) > 1 else mean


def beside(printed: Printed, rows: list[Row], pipelines: list[str], dose: float) -> str:
    """The table of the paper and ours at `dose` in one, as Markdown.

    Ours is the mean over slices, then over cases, with the standard deviation of the cases if there are several.
    """
    measured = [r for r in rows if r.dose == dose and r.window == str(printed.window) and r.slice]
    lines = [
        f"| at {dose:g} of full dose, {printed.window} | {' | '.join(printed.metrics)} |",
        "|---|" + "---|" * len(printed.metrics),
        *(f"| printed: {name} | {' | '.join(cells)} |" for name, cells in printed.rows.items()),
    ]
    for name in pipelines:
        mine = [r for r in measured if r.pipeline == name]
        cells = [_cell(mine, metric, printed.spread) for metric in printed.metrics]
        lines.append(f"| ours: {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
