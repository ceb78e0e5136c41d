"""Which subjects teach, which validate and which test; never two of it.

A network knows the anatomy that it was trained on: slices or series of one patient on both sides of a split flatter it.
So everything here divides subjects, never series. What our own networks were trained on, and what they are measured on
and never see, stands in ``splits.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

Role = Literal["train", "validation", "test"]

FRACTIONS: Mapping[Role, float] = MappingProxyType({"train": 0.9, "validation": 0.1, "test": 0.0})
"""Who brings data wants to learn from them; subjects for a test are named, not drawn."""
_TABLE = Path(__file__).with_name("splits.json")


@dataclass(frozen=True, slots=True)
class Entry:
    """One series of the table."""

    series: str
    """Its folder among the CT series."""
    series_uid: str
    """SeriesInstanceUID, by which it is known wherever it lies."""
    study_uid: str
    """StudyInstanceUID; a study shows one patient."""
    subject: str
    patient: str
    """`training.sources.layouts.Case.subject` of its patient, a digest of the PatientID: known in any other series."""
    role: Role | Literal["robustness"]
    """``robustness``: for behaviour on odd series, neither to learn from nor to measure quality on."""
    target: bool
    """Is the series learned from? Of one acquisition in two kernels the soft one is, and one series of a phantom."""
    reason: str


@cache
def table() -> tuple[Entry, ...]:
    """The split table."""
    return tuple(Entry(**row) for row in json.loads(_TABLE.read_text(encoding="utf-8"))["series"])


def entry_of(series: str) -> Entry | None:
    """The entry of a series, by its SeriesInstanceUID or its name; None if the table does not know it."""
    return next((entry for entry in table() if series in (entry.series_uid, entry.series)), None)


def of_patient(patient: str, study_uid: str) -> list[Entry]:
    """Entries with the same patient or study.

    Parameters
    ----------
    patient
        As `Entry.patient`.
    study_uid
        For series whose PatientID was changed.
    """
    return [entry for entry in table() if entry.patient == patient or entry.study_uid == study_uid]


def kept_for_tests(patient: str, study_uid: str) -> Entry | None:
    """An entry of `of_patient` that is not taught; None if there is none."""
    return next((entry for entry in of_patient(patient, study_uid) if entry.role != "train"), None)


def split(
    subjects: Iterable[str], seed: int = 1, fractions: Mapping[Role, float] = FRACTIONS
) -> dict[Role, tuple[str, ...]]:
    """Divide subjects by chance, the same way each time.

    Subjects are ranked by a digest of seed and name, so that the order in which they come does not matter. Each role
    whose fraction is above 0 gets one, training first, and each further one goes where most are missing.

    Parameters
    ----------
    subjects
        Names of patients, not of series; one that comes twice counts once.
    seed
        Another seed is another division.
    fractions
        Part of each role; a role that is not named gets none.

    Returns
    -------
    dict
        Subjects of each role, sorted; together they are all subjects, and each is in one role.

    Raises
    ------
    ValueError
        If a fraction is negative or they do not add up to 1.
    """
    if min(fractions.values()) < 0 or abs(sum(fractions.values()) - 1) > 1e-9:
        raise ValueError(f"fractions {dict(fractions)} must be 0 or more and add up to 1")
    ranked = sorted(set(subjects), key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    counts = _counts(len(ranked), fractions)
    divided: dict[Role, tuple[str, ...]] = {"train": (), "validation": (), "test": ()}
    first = 0
    for part, count in counts.items():
        divided[part] = tuple(sorted(ranked[first : first + count]))
        first += count
    return divided


def _counts(subjects: int, fractions: Mapping[Role, float]) -> dict[Role, int]:
    """How many subjects each role gets; the roles in the order train, validation, test."""
    order: tuple[Role, ...] = ("train", "validation", "test")
    wanted = [part for part in order if fractions.get(part, 0) > 0]
    counts = {part: int(k < subjects) for k, part in enumerate(wanted)}
    while sum(counts.values()) < subjects:
        short = max(wanted, key=lambda part: fractions[part] * subjects - counts[part])
        counts[short] += 1
    return counts


def subjects_of(subjects: Iterable[str]) -> tuple[str, ...]:
    """Each subject once, sorted: those that a leave-one-patient-out cross-validation leaves out in turn.

    Raises
    ------
    ValueError
        If there are fewer than two.
    """
    names = tuple(sorted(set(subjects)))
    if len(names) < 2:
        raise ValueError(f"{len(names)} subject(s): cross-validation needs two at least")
    return names
