"""What a training writes: weights that are numbers, and a card that any JSON reader takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from training.card import Plateau, TrainingRecord, write_network

RECORD = TrainingRecord("python -m training train x", "", 1, 0.0, 1, 4, "CPU", 1, (), 0, Plateau(None, False))


def test_a_card_before_the_plateau_is_strict_json(tmp_path: Path) -> None:
    write_network(tmp_path, {"name": "x"}, nn.Linear(2, 1), RECORD)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON (RFC 8259)")

    card = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert card["training"]["plateau"] == {"gain_db": None, "reached": False}


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 70_000.0])
def test_weights_that_half_precision_cannot_hold_are_not_written(tmp_path: Path, weight: float) -> None:
    network = nn.Linear(2, 1)
    with torch.no_grad():
        network.weight[0, 1] = weight
    with pytest.raises(ValueError, match="not finite in half precision, the first is weight"):
        write_network(tmp_path, {"name": "x"}, network, RECORD)
    assert not list(tmp_path.iterdir())
