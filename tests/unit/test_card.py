"""What a training writes: weights that are numbers, and a card that any JSON reader takes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ct_builder import uid, write_series
from torch import nn

from training.card import (
    UNCHECKED,
    Plateau,
    Source,
    TrainingRecord,
    plateau_in_words,
    source_of,
    write_card,
    write_network,
)
from training.sources.layouts import Case

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
    slice_spacing_mm=(1.0, 8.0),
    pixel_spacing_mm=(0.451, 1.367),
    validated_on="4 phantoms",
)


def test_a_card_before_the_plateau_is_strict_json(tmp_path: Path) -> None:
    write_network(tmp_path, {"name": "x"}, nn.Linear(2, 1), RECORD)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON (RFC 8259)")

    card = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert card["training"]["plateau"] == {"gain_db": None, "reached": False, "obstacle": ""}


def test_a_card_reads_as_it_is_written_and_knows_numbers_alone(tmp_path: Path) -> None:
    card = {"name": "x", "limits": "−160 to 240 HU, 5×5, µ", "measured": {"psnr_db": [30.5, 1e-7]}}
    write_card(tmp_path / "x.json", card)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == card
    assert '\n  "limits": "−160 to 240 HU, 5×5, µ",\n' in text
    assert text.endswith("}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_card(tmp_path / "x.json", card | {"int8_loss_db": float("nan")})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == text


def _plateau(tmp_path: Path, values: list[float], same_since: int = 0, obstacle: str = "") -> Plateau:
    """Of a training that validated each 100 steps, and whose learning rate fell from the last of them on."""
    rows = [{"step": 100 * (k + 1), "validation_psnr_db": value} for k, value in enumerate(values)]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Plateau.of(log, 100 * len(values), same_since, obstacle)


@pytest.mark.parametrize("step_db", [0.02, -0.02])
def test_a_psnr_that_still_moves_in_the_last_third_is_on_no_plateau(tmp_path: Path, step_db: float) -> None:
    moving = _plateau(tmp_path, [30 + step_db * k for k in range(12)])
    assert moving.gain_db == pytest.approx(step_db * 4, abs=0.002)
    assert moving.reached is False
    words = plateau_in_words({"gain_db": moving.gain_db, "reached": moving.reached})
    assert words == (
        f"The plateau was **not** reached: the validated PSNR {'rose' if step_db > 0 else 'fell'} by 0.08 dB in the "
        "last third before the learning rate fell."
    )


def test_a_psnr_at_rest_is_on_its_plateau(tmp_path: Path) -> None:
    assert _plateau(tmp_path, [30.0, 33.0, 34.0, 34.5, 34.8, *[35.0, 35.01] * 4]).reached is True
    assert _plateau(tmp_path, [30.0, 30.0]) == Plateau(None, False)  # too few to say


def test_only_what_one_code_and_one_loss_trained_tells_of_a_plateau(tmp_path: Path) -> None:
    """A change at step 1300 sets the PSNR down: a line through both would call the rise since then a fall."""
    values = [35.0] * 13 + [34.0, 34.1, 34.2, 34.3, 34.4]
    assert (_plateau(tmp_path, values).gain_db or 0) < 0
    assert _plateau(tmp_path, values, 1300).gain_db == pytest.approx(0.1 * 6, abs=0.002)
    assert _plateau(tmp_path, values, 1500).gain_db is None  # three are too few


def test_a_network_is_no_further_than_the_one_it_began_with(tmp_path: Path) -> None:
    plateau = _plateau(tmp_path, [35.0] * 12, 0, "drl, which it began with, had not reached its own")
    assert plateau.reached is False
    assert plateau_in_words(asdict(plateau)) == (
        "The plateau was **not** reached: the validated PSNR rose by 0.00 dB in the last third before the learning "
        "rate fell; drl, which it began with, had not reached its own."
    )


def test_against_a_critic_there_is_no_plateau() -> None:
    words = plateau_in_words(asdict(Plateau(None, None, "the network learns against a critic")))
    assert words == "There is no plateau to reach: the network learns against a critic."


def test_a_card_is_valid_for_what_was_shown_and_a_little_beyond(tmp_path: Path) -> None:
    write_network(tmp_path, {"name": "x"}, nn.Linear(2, 1), RECORD)
    card = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    low, high = card["valid_for"]["slice_spacing_mm"]
    assert (low, high) == pytest.approx((1 / 2, 8 * 1.25), abs=0.02)
    assert low < 0.5 < 10 < high  # positions are rounded
    assert card["valid_for"]["pixel_spacing_mm"] == pytest.approx([0.451 / 1.25, 1.367 * 1.25], abs=0.02)
    assert (card["training"]["slice_spacing_mm"], card["training"]["pixel_spacing_mm"]) == ([1.0, 8.0], [0.451, 1.367])


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


def test_licence_and_attribution_come_from_beside_the_images(tmp_path: Path) -> None:
    files = tuple(write_series(tmp_path, np.zeros((1, 8, 8))))
    case = Case("somebody", "a series", files, None, None, "", 1.0)
    assert source_of(case).licence == "not stated"
    assert source_of(case).study_uid == uid("study")
    path = tmp_path / "SOURCE.txt"
    path.write_text("licence: CC BY 4.0\nlicence status: read\nattribution:\n", encoding="utf-8")
    with pytest.raises(ValueError, match="does not name attribution"):
        source_of(case)
    path.write_text("licence: CC BY 4.0\nlicence status: read\nattribution: A: b\n", encoding="utf-8")
    assert source_of(case) == Source(tmp_path.name, "CC BY 4.0", "read", "A: b", uid("study"))
    path.write_text("licence: CC BY 4.0\nlicence status: UNVERIFIED: said\nattribution: A: b\n", encoding="utf-8")
    assert source_of(case) == Source(tmp_path.name, "CC BY 4.0", UNCHECKED, "A: b", uid("study"))
