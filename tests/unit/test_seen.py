"""Who has seen a series: by its name, its UID, its study, and by its patient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from training.measuring import seen
from training.measuring.cases import Trial, volume_of
from training.sources.layouts import Origin
from training.sources.splits import table

HU = np.zeros((1, 8, 8), np.float32)
TAUGHT = next(entry for entry in table() if entry.role == "train")
TEST = "philips-brilliance16p-lidc0314-chest-1mm"
KEPT = next(entry for entry in table() if entry.series == TEST)


def _trial(
    case: str,
    uid: str = "",
    kind: Literal["phantom", "simulated", "pair"] = "simulated",
    *,
    study: str = "",
    patient: str = "",
) -> Trial:
    origin = Origin(uid, study, patient)
    return Trial(case, kind, 0.25, volume_of(HU, 1.0, 1.0), None, HU, slice(0, 1), 10.0, 0.5, origin)


@pytest.mark.parametrize(
    ("trial", "role"),
    [
        (_trial("philips-brilliance16-lungdxA0001-B-5mm"), "trained on"),
        (_trial("philips-brilliance16-lungdxA0001-L-5mm"), "patient trained on"),
        (_trial("export", "1.3.6.1.4.1.14519.5.2.1.6655.2359.213534032021332276911485641315"), "trained on"),
        (_trial(TEST), "test"),
        (_trial("export", "1.3.6.1.4.1.9328.50.1.61373"), "test"),
        (_trial("ge-hispeed-head-tilt-varspacing"), "robustness"),
        (_trial("further", "1.2.3", study=TAUGHT.study_uid), "patient trained on"),
        (_trial("years later", "1.2.3", study="1.2", patient=TAUGHT.patient), "patient trained on"),
        (_trial("another kernel", "1.2.3", study="1.2", patient=KEPT.patient), "test"),
        (_trial("somebody", "1.2.3", study="1.2", patient="0123456789abcdef"), "unknown"),
        (_trial("phantom", kind="phantom"), "no training has it"),
    ],
)
def test_role_is_that_of_the_split_table(trial: Trial, role: str) -> None:
    assert seen.role(trial) == role


@pytest.mark.parametrize(
    ("trial", "warned"),
    [
        (_trial("philips-brilliance16-lungdxA0001-B-5mm"), True),
        (_trial("philips-brilliance16-lungdxA0001-L-5mm"), True),  # another series of the patient
        (_trial("renamed", "1.2.3"), True),
        (_trial("years later", "9.9", patient=TAUGHT.patient), True),
        (_trial("another patient", "9.9", patient=KEPT.patient), False),
        (_trial("soft", "9.9", study="1.2.4"), True),  # another series of an examination in the card
        (_trial("another examination", "9.9", study="1.2.5"), False),
        (_trial("L067 B45f 3 mm", "9.9", "pair"), True),
        (_trial("L068 B30f 1 mm", "9.8", "pair"), False),
        (_trial(TEST), False),
        (_trial("L067", kind="phantom"), False),
    ],
)
def test_a_patient_of_the_training_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trial: Trial, warned: bool
) -> None:
    monkeypatch.setattr(seen, "WEIGHTS", tmp_path)
    names = ["philips-brilliance16-lungdxA0001-B-5mm", "1.2.3", "L067 B30f 1 mm"]
    series = [*({"name": name} for name in names), {"name": "sharp", "study_uid": "1.2.4"}]
    card = {"training": {"series": series}}
    (tmp_path / "net.json").write_text(json.dumps(card), encoding="utf-8")
    expected = f"net was trained on the patient of {trial.case}: what is measured there flatters it."
    assert seen.warning("net", trial) == (expected if warned else None)
    assert seen.warning("of another package", trial) is None


@pytest.mark.parametrize(("version", "warned"), [("0a1b2c3d", True), ("another", False)])
def test_what_the_first_weights_were_trained_on_was_seen_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, warned: bool
) -> None:
    monkeypatch.setattr(seen, "WEIGHTS", tmp_path)
    first = {"version": version, "training": {"began_with": "", "series": [{"name": "theirs"}]}}
    (tmp_path / "first.json").write_text(json.dumps(first), encoding="utf-8")
    then = {"version": "4e5f", "training": {"began_with": "first 0a1b2c3d", "series": [{"name": "ours"}]}}
    (tmp_path / "then.json").write_text(json.dumps(then), encoding="utf-8")
    assert (seen.warning("then", _trial("theirs")) is not None) == warned
    assert seen.warning("then", _trial("ours")) is not None


def test_a_card_in_a_folder_comes_before_the_installed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, taught in (("installed", "theirs"), ("run", "ours")):
        (tmp_path / folder).mkdir()
        card = {"training": {"series": [{"name": taught}]}}
        (tmp_path / folder / "net.json").write_text(json.dumps(card), encoding="utf-8")
    monkeypatch.setattr(seen, "WEIGHTS", tmp_path / "installed")
    assert seen.warning("net", _trial("ours"), tmp_path / "run") is not None
    assert seen.warning("net", _trial("theirs"), tmp_path / "run") is None
    assert seen.warning("net", _trial("theirs"), tmp_path) is not None  # no such card there
    assert seen.warning("net", _trial("theirs")) is not None


def test_our_own_networks_have_not_seen_the_series_kept_for_tests() -> None:
    for card in seen.WEIGHTS.glob("*.json"):
        assert seen.warning(card.stem, _trial(TEST)) is None
