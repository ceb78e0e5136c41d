"""What a training writes: weights that are numbers, and a card that any JSON reader takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from training.card import Plateau, Source, TrainingRecord, write_network

RECORD = TrainingRecord(
    command="python -m training train x",
    commit="",
    began_with="",
    features="",
    seed=1,
    hours=0.0,
    steps=1,
    samples=4,
    hardware="CPU",
    phantoms=1,
    series=(),
    pairs=0,
    plateau=Plateau(None, False),
)


def test_a_card_before_the_plateau_is_strict_json(tmp_path: Path) -> None:
    write_network(tmp_path, {"name": "x"}, nn.Linear(2, 1), RECORD)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON (RFC 8259)")

    card = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert card["training"]["plateau"] == {"gain_db": None, "reached": False}


OURS = Source("siemens-sensation16-acrinflt013-petct-B10f", "", "", "", "")
"""A soft kernel that teaches."""


@pytest.mark.parametrize(
    ("phantoms", "series", "says", "never_says"),
    [
        (1, (), ["Head", "children", "photon starvation"], ["kernels", "named above"]),  # phantoms have sharp ones
        (1, (OURS,), ["Head", "children"], ["kernels", "named above"]),
        (0, (OURS,), ["Head", "children", "sharp (lung, bone) kernels"], ["named above"]),
        (0, (OURS, Source("L067 B30f 1 mm", "", "", "", "")), ["Whatever the series named above do not"], ["Head"]),
        (1, (Source("1.2.3", "", "", "", ""),), ["the series named above and the phantoms"], ["Head", "children"]),
    ],
)
def test_what_was_never_tried_is_what_the_training_did_not_show(
    tmp_path: Path, phantoms: int, series: tuple[Source, ...], says: list[str], never_says: list[str]
) -> None:
    record = replace(RECORD, phantoms=phantoms, series=series)
    write_network(tmp_path, {"name": "x"}, nn.Linear(2, 1), record)
    card = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    text = card["never_tried_on"]
    assert all(words in text for words in says)
    assert not any(words in text for words in never_says)
    assert text.endswith("reading by a radiologist.")
    assert all(source.name in card["trained_on"] for source in series)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 70_000.0])
def test_weights_that_half_precision_cannot_hold_are_not_written(tmp_path: Path, weight: float) -> None:
    network = nn.Linear(2, 1)
    with torch.no_grad():
        network.weight[0, 1] = weight
    with pytest.raises(ValueError, match="not finite in half precision, the first is weight"):
        write_network(tmp_path, {"name": "x"}, network, RECORD)
    assert not list(tmp_path.iterdir())
