"""Before, after and difference of one slice, side by side in a PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from training.metrics import SOFT_TISSUE

Array = NDArray[np.float32]

_MARGIN_PX, _TITLE_PX, _SCALE_PX = 8, 34, 44
_BAR_PX = (180, 10)
_PAPER, _INK, _GREY = 16, 235, 150
_MIN_PANEL_PX = 380
"""Narrower images are enlarged: the titles need the room."""


def draw(path: Path, before_hu: Array, after_hu: Array, title: str) -> None:
    """Write the picture of one slice; `before_hu` and `after_hu` are (y, x).

    Both images have the soft-tissue window. The difference has a scale of its own, ±3 times its spread, written
    below it: it should hold noise and no anatomy.
    """
    difference = before_hu - after_hu
    reach = max(10.0, float(np.ceil(3 * difference.std() / 10) * 10))
    window = (SOFT_TISSUE.low_hu, SOFT_TISSUE.high_hu)
    panels = [
        ("before", before_hu, window),
        (f"after: {title}", after_hu, window),
        ("difference, before - after", difference, (-reach, reach)),
    ]
    zoom = -(-_MIN_PANEL_PX // before_hu.shape[1])
    height, width = (n * zoom for n in before_hu.shape)
    sheet = Image.new("L", (3 * width + 4 * _MARGIN_PX, _TITLE_PX + height + _SCALE_PX), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(18), ImageFont.load_default(14)
    for k, (name, image, shown) in enumerate(panels):
        left = _MARGIN_PX + k * (width + _MARGIN_PX)
        pen.text((left, 7), name, _INK, font)
        grey = Image.fromarray(_grey(image, shown)).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(grey, (left, _TITLE_PX))
        _scale(pen, small, left, _TITLE_PX + height + 8, shown)
    sheet.save(path, optimize=True)


def _grey(image: Array, window: tuple[float, float]) -> NDArray[np.uint8]:
    low, high = window
    return np.asarray(np.clip((image - low) * (255 / (high - low)), 0, 255).round(), dtype=np.uint8)


def _scale(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    left: int,
    top: int,
    window: tuple[float, float],
) -> None:
    """A bar from black to white with the HU of its ends."""
    width, height = _BAR_PX
    for x in range(width):
        pen.line([(left + x, top), (left + x, top + height)], fill=round(255 * x / (width - 1)))
    pen.rectangle([left, top, left + width, top + height], outline=_GREY)
    pen.text((left, top + height + 4), f"{window[0]:+.0f}", _INK, font)
    pen.text((left + width, top + height + 4), f"{window[1]:+.0f} HU", _INK, font, anchor="ra")
