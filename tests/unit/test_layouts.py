"""Series on disk: each layout in small, with what really lies between the images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ct_builder import edit, uid, write_series
from pydicom.uid import DeflatedExplicitVRLittleEndian

from pipelines.ct_slice import CTSlice, read_slice
from training.sources import layouts
from training.sources.layouts import Case, Origin, find, origin

HU = np.zeros((3, 8, 8))


def series(folder: Path, name: str, rename: Callable[[int], str] = "1-{:03d}.dcm".format, **elements: Any) -> set[Path]:
    """Write three slices as one series, under the names that the layout gives them."""
    paths = write_series(folder, HU, name=name, **elements)
    return {path.rename(folder / rename(k + 1)) for k, path in enumerate(paths)}


def projections(folder: Path, description: str = "Full Dose Projections") -> None:
    series(folder, uid("projections", folder), SeriesDescription=description, ImagePositionPatient=None)


def challenge(folder: Path, start: str, **elements: Any) -> set[Path]:
    name = f"{folder.parent.name} {start}"
    return series(folder, name, lambda k: f"{start}.CT.0001.{k:04d}.2015.12.22.IMA", **elements)


def as_sets(case: Case) -> tuple[set[Path], set[Path] | None]:
    return set(case.full), None if case.low is None else set(case.low)


def test_tcia(tmp_path: Path) -> None:
    """As the archive names it: images and projections in studies of their own, capitals as they come."""
    root = tmp_path / "LDCT-and-Projection-data"
    study = root / "C001" / "12-23-2021-NA-NA-62464"
    full = series(study / "1.000000-Full Dose Images-71581", "C1F", ConvolutionKernel="B50f", StudyInstanceUID=uid("a"))
    low = series(study / "1.000000-Low Dose Images-39882", "C1L", ConvolutionKernel="B50f", StudyInstanceUID=uid("b"))
    (study / "1.000000-Low Dose Images-39882" / "0-notes.txt").write_text("not an image")
    projections(study / "1.000000-Full Dose Projections-1234")
    liver = root / "L004" / "08-21-2018-84608"
    liver_full = series(liver / "1.000000-Full dose images-59704", "L4F")
    liver_low = series(liver / "1.000000-Low dose images-6587", "L4L")
    projections(root / "L004" / "08-21-2018-10971" / "1.000000-Full dose projections-24362")
    ge = series(root / "N012" / "study" / "1.000000-Full Dose Images-1", "N12F")
    head_full = series(root / "N030" / "study" / "1.000000-Full Dose Images-1", "N30F")
    head_low = series(root / "N030" / "study" / "1.000000-Low Dose Images-2", "N30L")
    (root / "LICENSE").write_text("a licence")

    chest_case, liver_case, ge_case, head_case = find(tmp_path)
    assert (chest_case.subject, chest_case.name) == ("C001", "C001 B50f 2 mm")
    assert (chest_case.dose, chest_case.kernel, chest_case.thickness_mm) == (0.10, "B50f", 2.0)
    assert as_sets(chest_case) == (full, low)
    assert (liver_case.subject, liver_case.dose, *as_sets(liver_case)) == ("L004", 0.25, liver_full, liver_low)
    assert (ge_case.subject, ge_case.dose, *as_sets(ge_case)) == ("N012", None, ge, None)
    assert (head_case.subject, head_case.dose, *as_sets(head_case)) == ("N030", 0.25, head_full, head_low)


@pytest.mark.parametrize("flat", [False, True])
def test_tcia_by_description_where_folders_do_not_tell(tmp_path: Path, flat: bool) -> None:
    """Classic names of the archive are UIDs; some keep all files of a subject in one folder."""

    def folder(name: str) -> Path:
        return tmp_path / "L014" if flat else tmp_path / "L014" / uid("study") / uid(name)

    names = {name: (lambda k, name=name: f"{name}{k}.dcm") for name in ("x", "y", "z")}
    full = series(folder("x"), "x", names["x"], SeriesDescription="Full Dose Images")
    low = series(folder("y"), "y", names["y"], SeriesDescription="Low Dose Images")
    series(folder("z"), "z", names["z"], SeriesDescription="Full Dose Projections", ImagePositionPatient=None)
    (case,) = find(tmp_path)
    assert (case.subject, case.dose, *as_sets(case)) == ("L014", 0.25, full, low)


def test_low_dose_alone_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    series(tmp_path / "C009" / "s" / "1.0-Low Dose Images-1", "alone")
    assert find(tmp_path) == []
    assert "1 low-dose series of C009 without a full-dose one that fits" in caplog.text
    assert uid("alone") in caplog.text


def test_nothing_pairs_where_there_is_a_choice_or_the_kernel_differs(tmp_path: Path) -> None:
    study = tmp_path / "C002" / "s"
    series(study / "1.0-Full Dose Images-1", "f", ConvolutionKernel="B30f")
    series(study / "1.0-Low Dose Images-2", "l", ConvolutionKernel="B50f")
    other = tmp_path / "C003" / "s"
    series(other / "1.0-Full Dose Images-1", "F")
    series(other / "1.0-Low Dose Images-2", "L")
    series(other / "1.0-Low Dose Images-3", "L again")
    assert [(case.subject, case.low) for case in find(tmp_path)] == [("C002", None), ("C003", None)]


def test_pairs_stay_within_a_study_and_a_thickness(tmp_path: Path) -> None:
    expected = set()
    for study in "12":
        for mm in (1, 3):
            elements = {"StudyInstanceUID": uid(study), "SliceThickness": mm}
            folder = tmp_path / "L004" / study
            full, low = (
                series(folder / f"{mm}.0-{dose} Dose Images-{mm}", f"{dose} {study} {mm}", **elements)
                for dose in ("Full", "Low")
            )
            expected.add((frozenset(full), frozenset(low)))
    assert {tuple(frozenset(files or ()) for files in as_sets(case)) for case in find(tmp_path)} == expected


def test_challenge(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two thicknesses and two kernels of each dose; the second subject has no sharp ones."""
    expected = {}
    for kernel, sharp in (("B30f", ""), ("D45f", "SHARP_")):
        for mm in (1, 3):
            for subject in ("L067", "L506") if kernel == "B30f" else ("L067",):
                pair = []
                for dose, letters in (("full", "FD"), ("quarter", "QD")):
                    folder = tmp_path / f"{mm}mm {kernel[:3]}" / subject / f"{dose}_{mm}mm{'_sharp' if sharp else ''}"
                    elements = {"ConvolutionKernel": kernel, "SliceThickness": mm, "StudyInstanceUID": uid(dose)}
                    pair.append(challenge(folder, f"{subject}_{letters}_{mm}_{sharp}1", **elements))
                expected[f"{subject} {kernel} {mm} mm"] = pair
    projections(tmp_path / "L067" / "full_DICOM-CT-PD")
    (tmp_path / "1mm B30" / "L506" / "full_1mm" / "readme.txt").write_text("not an image")
    cases = find(tmp_path)
    assert {case.name: list(as_sets(case)) for case in cases} == expected
    assert {case.dose for case in cases} == {0.25}
    assert "1 files beside images of the Grand Challenge: readme.txt" in caplog.text


def test_challenge_by_folder_where_files_were_renamed(tmp_path: Path) -> None:
    full = series(tmp_path / "L096" / "full_3mm", "f", "{:d}.dcm".format)
    low = series(tmp_path / "L096" / "quarter_3mm", "l", "{:d}.dcm".format)
    assert [as_sets(case) for case in find(tmp_path / "L096")] == [(full, low)]


def test_challenge_thick_low_dose_goes_with_thin_full_dose_where_nothing_fits_better(tmp_path: Path) -> None:
    full = challenge(tmp_path / "L109" / "full_1mm", "L109_FD_1_1", SliceThickness=1)
    low = challenge(tmp_path / "L109" / "quarter_3mm", "L109_QD_3_1", SliceThickness=3)
    (case,) = find(tmp_path)
    assert (case.thickness_mm, *as_sets(case)) == (1.0, full, low)


def test_challenge_full_dose_files_in_a_quarter_dose_folder_are_no_pair(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    challenge(tmp_path / "L143" / "full_1mm", "L143_FD_1_1")
    challenge(tmp_path / "L143" / "quarter_1mm", "L143_FD_1_2")
    assert [case.low for case in find(tmp_path)] == [None]
    assert "3 files named as full dose in a folder quarter_1mm: L143_FD_1_2.CT.0001.0001" in caplog.text


def test_generic(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Exports of a PACS: any depth, several series in a folder or one in several, and what else lies there."""
    patient: dict[str, Any] = {"PatientID": "4711-0815", "PatientName": "Meier^Hans"}
    deep = tmp_path / "a" / "b" / "c"
    one = set(write_series(deep, HU, name="one", **patient))
    two = set(write_series(deep, HU, name="two", ConvolutionKernel="I70f", **patient))
    moved = one.pop()
    one.add(moved.rename(tmp_path / "a" / "moved"))
    other = set(write_series(tmp_path, HU, name="other", PatientID="4711-0816"))
    write_series(deep, HU[:1], name="scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], **patient)
    (deep / "two-copy.dcm").write_bytes(min(one).read_bytes())
    (deep / "report.pdf").write_bytes(b"%PDF-1.4" + bytes(300))
    (deep / "empty").touch()
    (deep / "cut.dcm").write_bytes(bytes(128) + b"DICM" + bytes(64))
    write_series(deep, HU[:1], name="deflated")
    edit(
        deep / "deflated-0000.dcm",
        lambda ds: setattr(ds.file_meta, "TransferSyntaxUID", DeflatedExplicitVRLittleEndian),
    )
    (deep / "deflated-0000.dcm").write_bytes((deep / "deflated-0000.dcm").read_bytes()[:-99])

    cases = {case.name: case for case in find(tmp_path)}
    assert {name: as_sets(case) for name, case in cases.items()} == {
        uid("one"): (one, None),
        uid("two"): (two, None),
        uid("other"): (other, None),
    }
    assert cases[uid("one")].subject == cases[uid("two")].subject != cases[uid("other")].subject
    assert cases[uid("two")].kernel == "I70f"
    assert {case.dose for case in cases.values()} == {None}
    assert "2 files that are not DICOM: empty, report.pdf" in caplog.text
    assert "1 DICOM files that belong to no series: cut.dcm" in caplog.text
    assert "1 files with a header that cannot be read: deflated-0000.dcm" in caplog.text
    assert f"{uid('scout')} (localizer)" in caplog.text
    assert "1 second copies of an object: two-copy.dcm" in caplog.text
    told = repr([(case.subject, case.name) for case in cases.values()]) + caplog.text
    assert not any(secret in told for secret in ("4711", "Meier", str(tmp_path)))


def test_a_subject_is_the_same_in_every_run_and_folder(tmp_path: Path) -> None:
    write_series(tmp_path / "x", HU, name="one", PatientID="17")
    write_series(tmp_path / "y" / "z", HU, name="two", PatientID="17")
    (one,), (two,) = find(tmp_path / "x"), find(tmp_path / "y")
    assert one.subject == two.subject


def test_without_patient_id_each_study_is_a_subject(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for k, study in enumerate((uid("s"), uid("s"), uid("t"))):
        write_series(tmp_path, HU, name=str(k), PatientID="", StudyInstanceUID=study)
    cases = {case.name: case.subject for case in find(tmp_path)}
    assert cases[uid("0")] == cases[uid("1")] != cases[uid("2")]
    assert caplog.text.count("has no PatientID") == 3


def test_a_folder_called_like_a_subject_may_hold_anything(tmp_path: Path) -> None:
    files = set(write_series(tmp_path / "C123" / "full_1mm_scans", HU, SeriesDescription="Chest"))
    (case,) = find(tmp_path)
    assert as_sets(case) == (files, None)


def test_layouts_side_by_side(tmp_path: Path) -> None:
    challenge(tmp_path / "aapm" / "L067" / "full_1mm", "L067_FD_1_1")
    series(tmp_path / "tcia" / "C001" / "s" / "1.0-Full Dose Images-1", "t")
    write_series(tmp_path / "own", HU, name="own")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.dcm").write_text("")
    (tmp_path / "own" / "._x.dcm").write_text("")
    names = [case.name for case in find(tmp_path)]
    assert sorted(names) == sorted(["L067 STANDARD 2 mm", "C001 STANDARD 2 mm", uid("own")])


def test_one_header_is_read_for_a_series_that_names_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for subject in ("C001", "C002"):
        for dose in ("Full", "Low"):
            series(tmp_path / subject / "s" / f"1.0-{dose} Dose Images-1", f"{subject} {dose}")
        projections(tmp_path / subject / "s" / "1.0-Full Dose Projections-1")
    challenge(tmp_path / "L067" / "full_1mm", "L067_FD_1_1")
    read: list[Path] = []

    def counted(path: Path) -> CTSlice:
        read.append(path)
        return read_slice(path)

    monkeypatch.setattr(layouts, "read_slice", counted)
    monkeypatch.setattr(layouts, "dcmread", None)  # to call it would be an error
    with caplog.at_level(logging.INFO):
        assert len(find(tmp_path)) == 3
    assert len(read) == 5
    assert "3 files of projections of C001 are passed over" in caplog.text


@pytest.mark.parametrize("patient_id", ["4711-0815", ""])
def test_origin_names_the_patient_as_a_case_does(tmp_path: Path, patient_id: str) -> None:
    files = write_series(tmp_path, HU, name="one", PatientID=patient_id, StudyInstanceUID="1.2.9")
    (case,) = find(tmp_path)
    assert origin(files[0]) == Origin(uid("one"), "1.2.9", case.subject)
    assert case.subject not in ("", "4711-0815")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="is no folder"):
        find(tmp_path / "nowhere")
