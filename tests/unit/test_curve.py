"""The picture of trainings shows every loss that their logs hold; the table says what each has seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from pipelines.runtime import WEIGHTS
from training.__main__ import main
from training.card import LOGS
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
    assert drawn[0].get_suptitle() == "validated on 4 phantoms that did not teach"
    assert left.get_yscale() == scale
    assert [np.asarray(line.get_ydata()).tolist() for line in left.lines] == [[loss + 1 for loss in losses], losses]
    assert [np.asarray(line.get_ydata()).tolist() for line in right.lines] == [[31.0], [31.0]]
    low, high = left.get_ylim()
    assert low < min(losses)
    assert max(losses) + 1 < high


def _trained(folder: Path, network_input: str, patch_zyx: list[int], values: list[float]) -> str:
    """A training of 10 samples each step that validated at each; its last line is being written."""
    folder.mkdir()
    rows = [
        {"step": k, "samples": 10 * k, **({"validation_psnr_db": value} if value else {"loss": 0.1})}
        for k, value in enumerate(values, 1)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "log.jsonl").write_text(text + '{"step": 99, "sam', encoding="utf-8")
    training = {"plateau": {"gain_db": 0.01, "reached": True}, "validated_on": f"validation of {folder.name}"}
    card = {"name": "red-cnn", "input": network_input, "patch_zyx": patch_zyx, "training": training}
    (folder / "red-cnn.json").write_text(json.dumps(card), encoding="utf-8")
    return str(folder)


def test_several_trainings_are_compared_by_what_they_have_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, out, dpi: drawn.append(figure))
    flat = _trained(tmp_path / "a", "slab3", [3, 96, 96], [30.0, 33.0, 32.0])
    deep = _trained(tmp_path / "b", "volume", [12, 56, 56], [31.0, 0])
    main(["curve", flat, deep, "--out", str(tmp_path / "curve.png")])
    _, right = drawn[0].axes
    assert [line.get_label() for line in right.lines] == ["a", "b"]
    assert drawn[0].get_suptitle() == "validated on validation of a / validation of b"
    words = (
        "The plateau was reached: the validated PSNR rose by 0.01 dB in the last third before the learning rate fell."
    )
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"| a | 3 | 30 | 96 × 96 | {30 * 96 * 96:.3g} | 33.00 at 20 | 32.00 | {words} |",
        f"| b | 2 | 20 | 12 × 56 × 56 | {20 * 12 * 56 * 56:.3g} | 31.00 at 10 | 31.00 | {words} |",
    ]


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nobody is neither a folder that"):
        main(["curve", "nobody", "--out", "x.png"])
    (tmp_path / "other").mkdir()
    one, other = (_trained(tmp_path / place, "slice", [1, 64, 64], [30.0]) for place in ("a", "other/a"))
    with pytest.raises(SystemExit, match="the same name: rename the folder of one"):
        main(["curve", one, other, "--out", "x.png"])


def test_the_logs_are_those_of_the_weights() -> None:
    cards = sorted(WEIGHTS.glob("*.json"))
    assert cards
    for path in cards:
        training = json.loads(path.read_text(encoding="utf-8"))["training"]
        rows = [json.loads(line) for line in (LOGS / f"{path.stem}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert (rows[-1]["step"], rows[-1]["samples"]) == (training["steps"], training["samples"]), path.stem
