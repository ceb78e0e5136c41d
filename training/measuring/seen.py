"""Who has seen what is measured: a network looks better on patients that it was trained on.

A patient is known by the split table (series, study, or a digest of the PatientID), by the Mayo Clinic's number, and by
the studies in the card of a network. Two studies of a patient who is in neither of the first two are not known as one:
for that the card would have to keep who was taught.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.runtime import WEIGHTS
from training.measuring.cases import Trial
from training.sources.layouts import SUBJECT
from training.sources.splits import entry_of, of_patient


def role(trial: Trial) -> str:
    """What the split table of our own networks says of the series of `trial`, or of its patient."""
    if trial.kind == "phantom":
        return "no training has it"
    own = entry_of(trial.origin.series_uid) or entry_of(trial.case)
    entry = own or next(iter(of_patient(trial.origin.patient, trial.origin.study_uid)), None)
    if entry is None:
        return "unknown"
    if entry.role == "train":
        return "trained on" if own and own.target else "patient trained on"
    return entry.role


def warning(pipeline: str, trial: Trial, folder: Path | None = None) -> str | None:
    """A sentence if the card of `pipeline` lists a series of the patient of `trial` among those of its training.

    Parameters
    ----------
    pipeline
        Name on its card; one that is not installed beside our own is not known to have been trained on anything.
    trial
        A phantom is never one of a training.
    folder
        Of cards that come before the installed ones.
    """
    if trial.kind == "phantom":
        return None
    own = marks(trial.case, trial.origin.study_uid, trial.origin.patient) | marks(trial.origin.series_uid)
    if not any(own & marks(source["name"], source.get("study_uid", "")) for source in _taught(pipeline, folder)):
        return None
    return f"{pipeline} was trained on the patient of {trial.case}: what is measured there flatters it."


def _taught(pipeline: str, folder: Path | None, version: str | None = None) -> list[dict[str, Any]]:
    """Series of the training of `pipeline` and of the network whose weights it began with, if that is installed."""
    cards = (place / f"{pipeline}.json" for place in (folder, WEIGHTS) if place)
    path = next((card for card in cards if card.exists()), None)
    if path is None:
        return []
    card = json.loads(path.read_text(encoding="utf-8"))
    if version is not None and card["version"] != version:
        return []
    training = card.get("training", {})
    began_with = training.get("began_with", "").split()
    return [*training.get("series", ()), *(_taught(began_with[0], None, began_with[1]) if began_with else ())]


def marks(series: str, study_uid: str = "", patient: str = "") -> set[str]:
    """What tells whose a series is: itself, its study, its subject in the split table or in the Mayo Clinic's data."""
    entries = [entry for entry in (entry_of(series), *of_patient(patient, study_uid)) if entry is not None]
    mayo = SUBJECT.match(series)
    return ({series, study_uid} | {entry.subject for entry in entries} | {mayo[0] if mayo else ""}) - {""}
