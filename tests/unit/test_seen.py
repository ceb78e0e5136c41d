"""Who has seen a series: by its name, its UID, and by its patient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from training.measuring import seen
from training.measuring.cases import Trial, volume_of

HU = np.zeros((1, 8, 8), np.float32)
TEST = "philips-brilliance16p-lidc0314-chest-1mm"


def _trial(case: str, uid: str = "", kind: Literal["phantom", "simulated", "pair"] = "simulated") -> Trial:
    return Trial(case, kind, 0.25, volume_of(HU, 1.0, 1.0), None, HU, slice(0, 1), 10.0, 0.5, uid)


@pytest.mark.parametrize(
    ("trial", "role"),
    [
        (_trial("philips-brilliance16-lungdxA0001-B-5mm"), "trained on"),
        (_trial("philips-brilliance16-lungdxA0001-L-5mm"), "patient trained on"),
        (_trial("export", "1.3.6.1.4.1.14519.5.2.1.6655.2359.213534032021332276911485641315"), "trained on"),
        (_trial(TEST), "test"),
        (_trial("export", "1.3.6.1.4.1.9328.50.1.61373"), "test"),
        (_trial("ge-hispeed-head-tilt-varspacing"), "robustness"),
        (_trial("somebody", "1.2.3"), "unknown"),
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
    card = {"training": {"series": [{"name": name} for name in names]}}
    (tmp_path / "net.json").write_text(json.dumps(card), encoding="utf-8")
    expected = f"net was trained on the patient of {trial.case}: what is measured there flatters it."
    assert seen.warning("net", trial) == (expected if warned else None)
    assert seen.warning("of another package", trial) is None


def test_our_own_networks_have_not_seen_the_series_kept_for_tests() -> None:
    for card in seen.WEIGHTS.glob("*.json"):
        assert seen.warning(card.stem, _trial(TEST)) is None
