"""No subject on both sides: of the table, of a split."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import DATA
from pydicom import dcmread

from training.sources.layouts import find
from training.sources.splits import Entry, Role, entry_of, kept_for_tests, of_patient, split, subjects_of, table

Fractions = dict[Role, float]

ROLES = {
    "philips-brilliance16-lungdxA0001-B-5mm": "train",
    "philips-brilliance16-lungdxA0001-L-5mm": "train",
    "siemens-sensation10-lungdxA0002-B40f-8mm": "train",
    "siemens-sensation10-lungdxA0002-B70f-8mm": "train",
    "siemens-sensation16-acrinflt013-petct-B10f": "train",
    "philips-ingenuity-headphantom-1mm-UB": "train",
    "philips-ingenuity-headphantom-1mm-YA": "train",
    "philips-ingenuity-headphantom-5mm-UB": "train",
    "philips-ingenuity-headphantom-tilt-neg18": "train",
    "philips-brilliance16p-lidc0314-chest-1mm": "test",
    "ge-lightspeed16-rider-chestpe-1p25mm": "test",
    "ge-vct-cmbcrc-chest-LUNG-2p5mm": "test",
    "ge-revolution-cptacpda-LUNG-5mm": "test",
    "ge-hispeed-head-tilt-varspacing": "robustness",
}
TEN = ["L067", "L096", "L109", "L143", "L192", "L286", "L291", "L310", "L333", "L506"]


def test_every_series_has_its_role_and_a_reason() -> None:
    assert {entry.series: entry.role for entry in table()} == ROLES
    assert len(table()) == len(ROLES)
    assert all(entry.reason.endswith(".") for entry in table())


@pytest.mark.data
def test_the_table_knows_every_series_there_is() -> None:
    if not DATA.exists():
        pytest.skip("the CT series are not here")
    assert {path.name.removesuffix(".tar.xz") for path in (DATA / "series").glob("*.tar.xz")} == set(ROLES)


def test_no_subject_has_two_roles() -> None:
    roles = defaultdict(set)
    for entry in table():
        roles[entry.subject].add(entry.role)
        assert entry.subject in entry.series
    assert {subject: len(its) for subject, its in roles.items()} == dict.fromkeys(roles, 1)
    assert {subject for subject, its in roles.items() if its == {"test"}} == {
        "lidc0314",
        "rider-chestpe",
        "vct-cmbcrc",
        "revolution-cptacpda",
    }


def test_a_series_is_known_by_name_and_by_uid() -> None:
    assert len({entry.series_uid for entry in table()}) == len(ROLES)
    for entry in table():
        assert entry_of(entry.series) == entry_of(entry.series_uid) == entry
        assert entry.role == ROLES[entry.series]
    assert entry_of("1.2.3") is None
    assert entry_of("L067 B30f 1 mm") is None


@pytest.mark.data
@pytest.mark.parametrize("entry", table(), ids=lambda entry: entry.series)
def test_study_and_patient_are_those_of_the_headers(
    entry: Entry, ct_series: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    one = ct_series(entry.series)[0]
    header = dcmread(one, stop_before_pixels=True)
    assert (entry.series_uid, entry.study_uid) == (header.SeriesInstanceUID, header.StudyInstanceUID)
    (tmp_path / one.name).symlink_to(one)
    assert entry.patient == find(tmp_path)[0].subject
    assert header.PatientID not in json.dumps(asdict(entry))


def test_one_patient_is_one_subject() -> None:
    assert len({(entry.subject, entry.patient) for entry in table()}) == len({entry.subject for entry in table()})
    assert len({entry.patient for entry in table()}) == len({entry.subject for entry in table()})


def test_who_is_kept_for_tests_is_known_by_patient_and_by_study() -> None:
    for entry in table():
        kept = entry.role != "train"
        for patient, study_uid in ((entry.patient, "1.2"), ("another", entry.study_uid)):
            found = kept_for_tests(patient, study_uid)
            assert (found is not None) == kept
            assert found is None or found.subject == entry.subject
            assert {one.subject for one in of_patient(patient, study_uid)} == {entry.subject}
    assert kept_for_tests("another", "1.2") is None


def test_targets_teach_and_are_no_sharp_twins() -> None:
    targets = [entry for entry in table() if entry.target]
    assert {entry.role for entry in targets} == {"train"}
    assert not [entry.series for entry in targets if "Sharp kernel" in entry.reason]
    assert len({entry.subject for entry in targets}) == len(targets) == 4


@pytest.mark.parametrize(
    ("subjects", "fractions", "counts"),
    [
        (10, {"train": 0.8, "validation": 0.1, "test": 0.1}, (8, 1, 1)),
        (150, {"train": 0.7, "validation": 0.2, "test": 0.1}, (105, 30, 15)),
        (184, {"train": 0.435, "validation": 0.109, "test": 0.456}, (80, 20, 84)),
        (10, {"train": 0.9, "validation": 0.1}, (9, 1, 0)),
        (2, {"train": 0.9, "validation": 0.1}, (1, 1, 0)),
        (1, {"train": 0.9, "validation": 0.1}, (1, 0, 0)),
        (0, {"train": 1.0}, (0, 0, 0)),
    ],
)
def test_split_gives_each_role_its_part(subjects: int, fractions: Fractions, counts: tuple[int, int, int]) -> None:
    names = [f"C{k:03d}" for k in range(subjects)]
    divided = split(names, 7, fractions)
    assert tuple(len(divided[part]) for part in ("train", "validation", "test")) == counts
    assert Counter(name for part in divided.values() for name in part) == Counter(names)


def test_split_is_the_same_whatever_the_order_and_another_for_another_seed() -> None:
    assert split(TEN, 1) == split(reversed([*TEN, *TEN]), 1)
    assert len({split(TEN, seed)["validation"] for seed in range(30)}) > 5


def test_split_stays_what_it_was() -> None:
    """Who trained with it can tell today who was in the validation; worked out with sha256sum."""
    # for s in L067 …; do echo "$(printf 1/$s | sha256sum) $s"; done | sort: the last one validates
    assert split(TEN)["validation"] == ("L506",)


def test_split_by_chance() -> None:
    """Over many seeds each subject validates about as often as any other."""
    counts = Counter(name for seed in range(1000) for name in split(TEN, seed)["validation"])
    assert all(60 < counts[name] < 140 for name in TEN)  # 100 expected, standard deviation 9.5


@pytest.mark.parametrize("fractions", [{"train": 0.9}, {"train": 1.2, "test": -0.2}])
def test_fractions_that_are_none_are_refused(fractions: Fractions) -> None:
    with pytest.raises(ValueError, match="add up to 1"):
        split(TEN, 1, fractions)


def test_each_patient_is_left_out_once() -> None:
    assert list(subjects_of([*reversed(TEN), "L067"])) == TEN
    with pytest.raises(ValueError, match="needs two"):
        subjects_of(["L067", "L067"])
