"""Pictures of a report: images and differences, noise power spectra, box plots. Names depend on the data alone."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from training.metrics import SOFT_TISSUE, Window, psnr
from training.physics import Curve

Array = NDArray[np.float32]

MAX_BYTES = 300_000
"""Of one picture: a report is read over the network."""
DIFFERENCE_HU = 100.0
"""Differences are shown from minus to plus this."""
_SHOWN_PART = 0.6
"""Part of a slice, around its middle, that is shown: the body without the air around it."""
_COLUMNS = 4
_PLOTS_IN_A_ROW = 3
_INCH = 2.6
_DPI = 110


def slug(name: str) -> str:
    """`name` as a part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _save(figure: Figure, path: Path) -> Path:
    """Write a drawing as PNG."""
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    return path


def _save_photograph(figure: Figure, path: Path) -> Path:
    """Write images as grey JPEG of the best quality, and then the best size, that stay below `MAX_BYTES`."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=_DPI, format="png")
    picture: Image.Image = Image.open(drawn).convert("L")
    while True:
        for quality in range(90, 40, -10):
            memory = io.BytesIO()
            picture.save(memory, "JPEG", quality=quality, optimize=True)
            if memory.tell() < MAX_BYTES:
                path.write_bytes(memory.getvalue())
                return path
        picture = picture.resize((picture.width * 4 // 5, picture.height * 4 // 5), Image.Resampling.LANCZOS)


def _middle(image: Array) -> Array:
    """The shown part of a slice."""
    rows, columns = (int(n * (1 - _SHOWN_PART) / 2) for n in image.shape)
    return image[rows : image.shape[0] - rows, columns : image.shape[1] - columns]


def images(folder: Path, case: str, dose: float, truth: Array, results: Mapping[str, Array]) -> Path:
    """The truth and each result in the soft-tissue window, and below each its difference from the truth.

    Parameters
    ----------
    folder
        Where the picture goes.
    truth, results
        (y, x) HU.
    """
    shown = {"truth": truth, **results}
    columns = min(len(shown), _COLUMNS)
    bands = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(_INCH * columns, (2 * _INCH + 0.35) * bands), layout="constrained")
    axes = figure.subplots(2 * bands, columns, squeeze=False)
    for place in axes.flat:
        place.set_axis_off()
    for k, (name, image) in enumerate(shown.items()):
        above, below = axes[k // columns * 2, k % columns], axes[k // columns * 2 + 1, k % columns]
        title = name if image is truth else f"{name}, {psnr(image, truth, SOFT_TISSUE):.2f} dB"
        above.set_title(title, fontsize=8)
        low, high = SOFT_TISSUE.low_hu, SOFT_TISSUE.high_hu
        above.imshow(_middle(image), "gray", vmin=low, vmax=high, interpolation="nearest")
        if image is not truth:
            below.imshow(
                _middle(image - truth), "gray", vmin=-DIFFERENCE_HU, vmax=DIFFERENCE_HU, interpolation="nearest"
            )
    return _save_photograph(figure, folder / f"images-{slug(case)}-{dose:g}.jpg")


def _plots(count: int, height_inch: float) -> tuple[Figure, list[Axes]]:
    """A figure with `count` plots, three in a row."""
    columns = min(count, _PLOTS_IN_A_ROW)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4.2 * columns, height_inch * rows), layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place in places[count:]:
        place.set_axis_off()
    return figure, places[:count]


def spectra(folder: Path, dose: float, curves: Mapping[str, Mapping[str, Curve]]) -> Path:
    """Radial NPS of each pipeline, one plot for each case, each curve over its own area: the shape is what counts.

    Parameters
    ----------
    curves
        By case, then by pipeline.
    """
    figure, places = _plots(len(curves), 3.4)
    for place, (case, by_pipeline) in zip(places, curves.items(), strict=True):
        for name, curve in by_pipeline.items():
            area = float(np.trapezoid(curve.value, curve.frequency))
            place.plot(curve.frequency, curve.value / area if area else curve.value, label=name, linewidth=1.2)
        place.set_title(case, fontsize=8)
        place.set_xlabel("spatial frequency (1/mm)", fontsize=8)
        place.set_ylabel("NPS / its area (mm)", fontsize=8)
        place.tick_params(labelsize=7)
        place.legend(fontsize=6)
    return _save(figure, folder / f"nps-{dose:g}.png")


def boxes(folder: Path, dose: float, by_case: Mapping[str, Mapping[str, list[float]]], window: Window) -> Path:
    """PSNR of each slice: median, quartiles, and whiskers to the last slice within 1.5 interquartile ranges."""
    figure, places = _plots(len(by_case), 3.6)
    for place, (case, by_pipeline) in zip(places, by_case.items(), strict=True):
        place.boxplot(list(by_pipeline.values()), tick_labels=list(by_pipeline))
        place.set_title(case, fontsize=8)
        place.set_ylabel(f"PSNR of a slice (dB), {window}", fontsize=8)
        place.tick_params(labelsize=7)
        place.tick_params(axis="x", rotation=60)
    return _save(figure, folder / f"psnr-{dose:g}.png")
