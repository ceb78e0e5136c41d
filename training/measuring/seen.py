"""Who has seen what is measured: a network looks better on patients that it was trained on."""

from __future__ import annotations

import json

from pipelines.runtime import WEIGHTS
from training.measuring.cases import Trial
from training.sources.layouts import SUBJECT
from training.sources.splits import entry_of


def role(trial: Trial) -> str:
    """What the split table of our own networks says of the series of `trial`."""
    if trial.kind == "phantom":
        return "no training has it"
    entry = entry_of(trial.series_uid) or entry_of(trial.case)
    if entry is None:
        return "unknown"
    if entry.role == "train":
        return "trained on" if entry.target else "patient trained on"
    return entry.role


def warning(pipeline: str, trial: Trial) -> str | None:
    """A sentence if the card of `pipeline` lists a series of the patient of `trial` among those of its training.

    Parameters
    ----------
    pipeline
        Name on its card; one that is not installed beside our own is not known to have been trained on anything.
    trial
        A phantom is never one of a training.
    """
    path = WEIGHTS / f"{pipeline}.json"
    if trial.kind == "phantom" or not path.exists():
        return None
    training = json.loads(path.read_text(encoding="utf-8")).get("training", {})
    taught = {_subject(source["name"]) for source in training.get("series", ())}
    if taught.isdisjoint({_subject(trial.case), _subject(trial.series_uid)}):
        return None
    return f"{pipeline} was trained on the patient of {trial.case}: what is measured there flatters it."


def _subject(series: str) -> str:
    """Whose a series is, as far as its name or UID tells; else the series stands for its patient."""
    if entry := entry_of(series):
        return entry.subject
    mayo = SUBJECT.match(series)
    return mayo[0] if mayo else series
