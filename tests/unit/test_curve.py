"""The picture of a training shows every loss that its log holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from training.curve import draw


@pytest.mark.parametrize(("losses", "scale"), [([0.3, 0.02], "log"), ([0.3, -0.2], "linear"), ([0.3, 0.0], "linear")])
def test_losses_below_zero_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], scale: str
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, out, dpi: drawn.append(figure))
    logs = {}
    for name, shift in (("a", 1.0), ("b", 0.0)):
        rows = [
            *({"samples": 4 * k, "loss": loss + shift} for k, loss in enumerate(losses)),
            {"samples": 9, "validation_psnr_db": 31.0},
        ]
        logs[name] = tmp_path / f"{name}.jsonl"
        logs[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    draw(logs, tmp_path / "curve.png", "4 phantoms that did not teach")
    left, right = drawn[0].axes
    assert right.get_title() == "validated on 4 phantoms that did not teach"
    assert left.get_yscale() == scale
    assert [np.asarray(line.get_ydata()).tolist() for line in left.lines] == [[loss + 1 for loss in losses], losses]
    assert [np.asarray(line.get_ydata()).tolist() for line in right.lines] == [[31.0], [31.0]]
    low, high = left.get_ylim()
    assert low < min(losses)
    assert max(losses) + 1 < high
