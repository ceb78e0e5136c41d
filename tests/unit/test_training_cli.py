"""Training and evaluation from the command line, as small as they go."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipelines import runtime
from pipelines.ffdnet import FFDNet
from pipelines.runtime import load_network, read_card
from training import data, evaluate
from training.__main__ import main
from training.card import UNCHECKED, Source, source_of
from training.evaluate import measure, page
from training.phantom import chest_abdomen


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PHANTOM_SLICES", 3)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)


def test_train_writes_weights_and_a_card_that_load(tmp_path: Path) -> None:
    out = tmp_path / "secret folder" / "run"
    main(["train", "fast-2.5d", "--out", str(out), "--steps", "2", "--phantoms", "1", "--seed", "7"])
    card = read_card("fast-2.5d", out)
    load_network(FFDNet(), card, out)
    assert all(t.dtype == torch.float16 for t in load_file(out / "fast-2.5d.safetensors").values())
    written = json.loads((out / "fast-2.5d.json").read_text(encoding="utf-8"))
    assert written["training"]["steps"] == 2
    assert written["training"]["seed"] == 7
    assert "--out run --steps 2" in written["training"]["command"]
    assert "secret" not in json.dumps(written)
    assert card.version == card.weights_sha256[:8]


def test_evaluate_writes_card_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "fast-2.5d.json"
    card.write_bytes((runtime.WEIGHTS / card.name).read_bytes())
    monkeypatch.setattr(evaluate, "WEIGHTS", tmp_path)
    monkeypatch.setattr(evaluate, "PAGES", tmp_path / "docs")
    main(["evaluate", "fast-2.5d", "--slices", "1", "--seed", "900002"])
    measured = json.loads(card.read_text(encoding="utf-8"))["measured"]
    assert measured["command"] == "python -m training evaluate fast-2.5d --slices 1 --seed 900002"
    before, after = measured["psnr_db"]["-160 to 240 HU"]
    assert after > before
    row = f"| PSNR, -160 to 240 HU (dB) | {before:.2f} | {after:.2f} |"
    assert row in capsys.readouterr().out
    assert row in (tmp_path / "docs" / "fast-2.5d.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["st3d", "fast-2.5d"])
def test_shipped_page_is_that_of_the_shipped_card(name: str) -> None:
    card = json.loads((runtime.WEIGHTS / f"{name}.json").read_text(encoding="utf-8"))
    assert (evaluate.PAGES / f"{name}.md").read_text(encoding="utf-8") == page(card)


@pytest.mark.parametrize("name", ["st3d", "fast-2.5d"])
def test_shipped_card_keeps_the_bar(name: str) -> None:
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


def test_series_without_attribution_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no SOURCE.txt"):
        source_of(tmp_path)
    (tmp_path / "SOURCE.txt").write_text("licence: CC BY 4.0\nlicence status: read\nattribution:\n", encoding="utf-8")
    with pytest.raises(ValueError, match="does not name attribution"):
        source_of(tmp_path)
    (tmp_path / "SOURCE.txt").write_text(
        "licence: CC BY 4.0\nlicence status: read\nattribution: A: b\n", encoding="utf-8"
    )
    assert source_of(tmp_path) == Source(tmp_path.name, "CC BY 4.0", "read", "A: b")
    (tmp_path / "SOURCE.txt").write_text(
        "licence: CC BY 4.0\nlicence status: UNVERIFIED: said so\nattribution: A: b\n", encoding="utf-8"
    )
    assert source_of(tmp_path) == Source(tmp_path.name, "CC BY 4.0", UNCHECKED, "A: b")
