"""The phantom's table, the card that holds it and the page that shows it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines import runtime
from pipelines.runtime import read_card
from training.card import write_card
from training.measuring import model_page
from training.measuring.model_page import measure, page, write
from training.sources.phantom import chest_abdomen

SHIPPED = sorted(path.stem for path in runtime.WEIGHTS.glob("*.json"))


def test_card_and_page_hold_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = tmp_path / "fast-2.5d.json"
    full = json.loads((runtime.WEIGHTS / card.name).read_text(encoding="utf-8"))
    write_card(card, {**full, "limits": "−5 °C"})
    monkeypatch.setattr(model_page, "WEIGHTS", tmp_path)
    monkeypatch.setattr(model_page, "PAGES", tmp_path / "docs")
    shown = write("fast-2.5d", "python -m training evaluate fast-2.5d --card", slices=1, seed=900_002)
    written = card.read_text(encoding="utf-8")
    write_card(card, {**full, "limits": "−5 °C", "measured": (measured := json.loads(written)["measured"])})
    assert card.read_text(encoding="utf-8") == written  # nothing else was touched
    assert measured["command"] == "python -m training evaluate fast-2.5d --card"
    before, after = measured["psnr_db"]["-160 to 240 HU"]
    assert after > before
    row = f"| PSNR, -160 to 240 HU (dB) | {before:.2f} | {after:.2f} |"
    assert row in shown
    assert row in (tmp_path / "docs" / "fast-2.5d.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_page_is_that_of_the_shipped_card(name: str) -> None:
    card = json.loads((runtime.WEIGHTS / f"{name}.json").read_text(encoding="utf-8"))
    assert (model_page.PAGES / f"{name}.md").read_text(encoding="utf-8") == page(card)


@pytest.mark.parametrize(
    ("gain_db", "reached", "says"),
    [
        (0.02, True, "The plateau was reached: the validated PSNR rose by 0.02 dB"),
        (0.31, False, "The plateau was **not** reached: the validated PSNR rose by 0.31 dB"),
        (-0.31, False, "The plateau was **not** reached: the validated PSNR fell by 0.31 dB"),
        (None, False, "The plateau was **not** reached: there were too few validations of one state"),
    ],
)
def test_page_says_whether_the_plateau_was_reached(gain_db: float | None, reached: bool, says: str) -> None:
    card = json.loads((runtime.WEIGHTS / "st3d.json").read_text(encoding="utf-8"))
    card["training"] |= {"plateau": {"gain_db": gain_db, "reached": reached}, "samples": 320, "commit": "abc"}
    text = page(card)
    assert says in text
    card["training"]["validated_on"] = "4 phantoms: no patients"
    assert "\nThe plateau was " in page(card)
    assert " It was validated on 4 phantoms: no patients.\n" in page(card)
    assert f"{card['training']['steps']} steps (320 patches) in " in text
    assert ", commit abc:" in text


def test_page_says_what_a_network_began_with_and_was_compared_by() -> None:
    card = json.loads((runtime.WEIGHTS / "st3d.json").read_text(encoding="utf-8"))
    card["training"] |= {"began_with": "drl 336233b6", "features": "ct-ae 476a"}
    text = page(card)
    assert "\nIt began with the weights of drl (version 336233b6).\n" in text
    assert "\nCompared by the features of ct-ae, weights SHA-256 `476a`, beside its values.\n" in text
    card["training"] |= {"began_with": "", "features": "random"}
    text = page(card)
    assert "It began with" not in text
    assert "\nCompared by the features of random, beside its values.\n" in text


def test_page_says_what_int8_loses() -> None:
    card = json.loads((runtime.WEIGHTS / "fast-2.5d.json").read_text(encoding="utf-8"))
    card["int8_loss_db"] = 0.0412
    card["int8"] = {
        "command": "python -m training quantize fast-2.5d",
        "commit": "abc",
        "calibrated_on": {"phantoms": 100, "series": ["1.2", "1.3"]},
        "validated_on": ["phantom 1", "phantom 2"],
        "float_layers": ["convs.0"],
        "float_part": 0.0249,
        "tuning_steps": 0,
        "psnr_db": {"-160 to 240 HU": [32.501, 32.46]},
        "loss_db": {"-160 to 240 HU": 0.0412},
        "rms_hu": 2.449,
    }
    text = page(card)
    assert "\n| -160 to 240 HU | 32.50 | 32.46 | 0.041 |\n" in text
    assert "differ by 2.45 HU (root mean square). A node takes INT8 by itself, on a CPU" in text
    assert "100 phantoms and 2 series of its training, no fine-tuning; in float stay `convs.0`, 2.5 % of the" in text
    assert "Commit abc:\n\n    python -m training quantize fast-2.5d\n" in text
    card["int8_loss_db"], card["int8"]["tuning_steps"] = 0.14, 300
    assert "**only where it is told to**, on a CPU" in page(card)
    assert "300 steps of fine-tuning" in page(card)
    del card["int8"]
    assert "INT8" not in page(card)


def test_page_says_what_spacing_was_taught() -> None:
    card = json.loads((runtime.WEIGHTS / "st3d.json").read_text(encoding="utf-8"))
    card["training"] |= {"slice_spacing_mm": [1.0, 8.0], "pixel_spacing_mm": [0.451, 1.367]}
    assert " Trained on slices 1 to 8 mm apart and pixels of 0.451 to 1.367 mm.\n" in page(card)


def test_every_page_has_its_card() -> None:
    assert sorted(path.stem for path in model_page.PAGES.glob("*.md")) == SHIPPED


@pytest.mark.parametrize("name", ["st3d", "fast-2.5d"])
def test_shipped_card_is_good_enough(name: str) -> None:
    measured = read_card(name).measured
    for before, after in measured["psnr_db"].values():
        assert after - before > 3
    assert {t: abs(v["mean_shift_hu"]) < 1 for t, v in measured["tissues"].items()} == dict.fromkeys(
        ("air", "lung", "fat", "soft", "bone"), True
    )


def test_measure_finds_a_shift_and_a_noise() -> None:
    truth = chest_abdomen(2, 256, 1.5, 2.5, seed=2)
    rng = np.random.default_rng(0)
    before = truth + rng.normal(0, 20, truth.shape).astype(np.float32)
    after = truth + np.float32(0.7) + rng.normal(0, 5, truth.shape).astype(np.float32)
    for tissue in measure(before, after, truth)["tissues"].values():
        assert tissue["mean_shift_hu"] == pytest.approx(0.7, abs=0.4)
        assert tissue["error_sd_before_hu"] == pytest.approx(20, rel=0.1)
        assert tissue["error_sd_after_hu"] == pytest.approx(5, rel=0.1)
