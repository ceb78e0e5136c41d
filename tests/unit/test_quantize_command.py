"""The command that quantises installed weights: what it installs, what it goes on with, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file, save_file

from pipelines.base import Execution
from pipelines.network import NetworkPipeline
from pipelines.openvino_core import cpu_supports
from pipelines.runtime import WEIGHTS, choose, read_card, read_file
from pipelines.shipped import Factory, fast_2p5d
from training import quantize as command
from training.__main__ import main
from training.card import write_card
from training.float_layers import Loss
from training.loop import OtherTraining
from training.measuring import model_page
from training.recipes import Recipe, recipe
from training.sources import scans

vnni = pytest.mark.skipif(not cpu_supports("int8"), reason="needs a CPU with VNNI: others saturate")
LIMITS = "−5 °C"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights and card of fast-2.5d in a folder, and a command that takes seconds."""
    monkeypatch.setattr(scans, "PHANTOM_SLICES", 3)
    monkeypatch.setattr(command, "VALIDATION_PHANTOMS", 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for name in ("CALIBRATION_PATCHES", "CHOICE_PATCHES", "VALIDATION_PATCHES"):
        monkeypatch.setattr(command, name, 4)

    def small(name: str) -> Recipe:
        how = recipe(name)
        return replace(how, patch_zyx=(how.patch_zyx[0], 32, 32), batch=4)

    monkeypatch.setattr(command, "recipe", small)
    monkeypatch.setitem(main.__globals__["COMMANDS"], "quantize", "training.quantize")
    folder = tmp_path / "weights"
    folder.mkdir()
    for suffix in ("json", "safetensors", "xml"):
        shutil.copy(WEIGHTS / f"fast-2.5d.{suffix}", folder)
    write_card(folder / "fast-2.5d.json", {**_card(folder), "limits": LIMITS})
    return folder


def _card(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "fast-2.5d.json").read_text(encoding="utf-8"))
    return content


class Broken(Factory):
    """Its INT8 version cannot be run."""

    def __call__(self, execution: Execution | None = None, folder: Path = WEIGHTS) -> NetworkPipeline:
        assert (folder / f"{self.name}.int8.bin").read_bytes() == b"new"
        raise ValueError("no graph")


def test_what_cannot_be_compared_with_fp32_is_not_installed(tmp_path: Path) -> None:
    for suffix in ("json", "safetensors", "int8.bin"):
        (tmp_path / f"n.{suffix}").write_bytes(b'{"files_sha256": {"int8.bin": "of old"}}')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    lost = Loss({"-160 to 240 HU": (30.0, 29.9)}, 2.0)
    with pytest.raises(ValueError, match="no graph"):
        command.install(Broken("n", ""), {"int8.bin": b"new", "int8.xml": b"new"}, {}, lost, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@vnni
def test_command_installs_what_a_node_runs(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "quantize",
        "fast-2.5d",
        "--phantoms",
        "1",
        "--weights",
        str(installed),
        "--store",
        str(tmp_path / "store"),
    ]
    words += ["--out", str(tmp_path / "out"), "--threads", "1"]
    pages = tmp_path / "pages"
    for module in (command, model_page):
        monkeypatch.setattr(module, "WEIGHTS", installed)
    monkeypatch.setattr(model_page, "PAGES", pages)
    main([*words, "--max-loss-db", "99"])
    full = _card(installed)
    assert (pages / "fast-2.5d.md").read_text(encoding="utf-8") == model_page.page(full)
    assert full["limits"] == LIMITS
    assert LIMITS in (installed / "fast-2.5d.json").read_text(encoding="utf-8")  # as people read it
    entry = full["int8"]
    assert entry["tuning_steps"] == 0
    assert entry["command"].startswith("python -m training quantize fast-2.5d --phantoms 1 --weights weights")
    assert entry["calibrated_on"] == {"phantoms": 1, "series": []}
    assert full["int8_loss_db"] == max(entry["loss_db"].values())
    assert 0 < entry["golden_hu"]["rms_hu"] < full["int8_bound_hu"][1] < 20
    assert entry["golden_hu"]["max_hu"] < full["int8_bound_hu"][0]
    card = read_card("fast-2.5d", installed)
    choice = choose(card, Execution("cpu", "int8", 1))
    assert (choice.backend, choice.precision) == ("openvino", "int8")
    assert len(read_file(card, "int8.bin", installed)) < 0.7 * (installed / "fast-2.5d.safetensors").stat().st_size
    assert fast_2p5d(Execution("cpu", "int8", 1), installed).card.precision == "int8"

    main([*words, "--max-loss-db", "-1", "--steps", "2"])
    assert "fine-tuned: " in capsys.readouterr().out
    assert _card(installed)["int8"]["tuning_steps"] == 2
    assert _card(installed)["files_sha256"]["int8.bin"] != full["files_sha256"]["int8.bin"]
    assert _card(installed)["files_sha256"]["xml"] == full["files_sha256"]["xml"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    main([*words, "--max-loss-db", "-1", "--steps", "2"])  # stopped before it was installed: nothing is trained again
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2
    retrained = load_file(installed / "fast-2.5d.safetensors")
    retrained["convs.1.weight"][0, 0, 0, 0] += 2**-6
    save_file(retrained, installed / "fast-2.5d.safetensors")
    digest = hashlib.sha256((installed / "fast-2.5d.safetensors").read_bytes()).hexdigest()
    write_card(installed / "fast-2.5d.json", {**_card(installed), "weights_sha256": digest})
    with pytest.raises(OtherTraining, match=r"out was trained with other (ranges|weights)"):  # of older weights
        main([*words, "--max-loss-db", "-1", "--steps", "2"])


def test_other_cpus_are_refused(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "cpu_supports", lambda precision: False)
    with pytest.raises(SystemExit, match="no VNNI instructions"):
        main(["quantize", "fast-2.5d", "--weights", str(installed)])
