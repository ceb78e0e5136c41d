"""Which CT series lie below a folder, and which low-dose series belongs to which full-dose one: headers only.

Three layouts are recognised folder by folder, so that one root may hold them all:

- *LDCT-and-Projection-data* of The Cancer Imaging Archive (Moen et al., Medical Physics 2021;48:902-911),
  ``C001/<study>/1.000000-Full Dose Images-12345/*.dcm``. C is chest at 10 % of the dose, L abdomen and N head at 25 %.
- *Low Dose CT Grand Challenge* of the AAPM (McCollough et al., Medical Physics 2017;44:e339-e352),
  ``L067/quarter_3mm/L067_QD_3_1.CT.0004.0001….IMA``, at 25 % of the dose.
- any other folders of DICOM files: one case for each series, without a low-dose partner.

What is left out is logged, with the reason. Log and `Case` hold UIDs and research numbers, no patient's ID or name.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Literal

from pydicom import dcmread
from pydicom.uid import UID

from pipelines.ct_slice import CTSlice, SeriesRefused, read_slice
from pipelines.elements import text
from pipelines.volume import pydicom_silent

_log = logging.getLogger(__name__)

SUBJECT = re.compile(r"[CLN]\d{3}")
"""Folder of a subject of the Mayo Clinic's data: chest, liver (abdomen), neuro (head)."""
TCIA_DOSE = {"C": 0.10, "L": 0.25, "N": 0.25}
"""Part of the full dose in the low-dose series, by the first letter of the subject."""
CHALLENGE_DOSE = 0.25
_CHALLENGE_FOLDER = re.compile(r"(full|quarter)_\d+mm", re.IGNORECASE)
_CHALLENGE_FILE = re.compile(r"([CLN]\d{3})_(FD|QD)_([^.]*)", re.IGNORECASE)
"""Subject, dose, and what else names the reconstruction (``1_1``, ``1_SHARP_1``)."""
_TCIA_IMAGES = re.compile(r"(full|low)[ _]dose[ _]images", re.IGNORECASE)
_PROJECTIONS = re.compile(r"projections|DICOM-CT-PD", re.IGNORECASE)

_TAGS = ["SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "SeriesDescription"]
_NAMED = 3
"""How many objects a log line names."""

Role = Literal["full", "low"]


@dataclass(frozen=True, slots=True)
class Case:
    """One full-dose series, with the low-dose series of the same scan where there is one."""

    subject: str
    """Whose it is; all cases of a subject belong to the same part of a split.

    Number of the Mayo Clinic's data (``L067``), else a digest of the PatientID.
    """
    name: str
    """Subject, kernel and thickness; of a generic series its SeriesInstanceUID."""
    full: tuple[Path, ...]
    """Files of the full-dose series, by path; their order says nothing of the slices' order."""
    low: tuple[Path, ...] | None
    dose: float | None
    """Dose of `low` as a part of that of `full`; None without `low`."""
    kernel: str
    """ConvolutionKernel of `full`, empty if unknown."""
    thickness_mm: float
    """SliceThickness of `full`, 0 if unknown."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose a series is, as far as its header tells; never to be written where it outlives the run."""

    series_uid: str
    study_uid: str
    patient: str
    """A digest of the PatientID, as `Case.subject` of a generic series."""


@dataclass(frozen=True, slots=True)
class _Series:
    """One series of the Mayo Clinic's data."""

    layout: str
    subject: str
    role: Role
    dose: float
    files: tuple[Path, ...]
    first: CTSlice
    """Header of one of its files; speaks for all."""

    def case(self, low: _Series | None) -> Case:
        kernel, thickness = self.first.reconstruction[0], self.first.thickness_mm
        return Case(
            subject=self.subject,
            name=f"{self.subject} {kernel} {thickness:g} mm",
            full=self.files,
            low=low.files if low else None,
            dose=low.dose if low else None,
            kernel=kernel,
            thickness_mm=thickness,
        )


@dataclass(frozen=True, slots=True)
class _Header:
    path: Path
    sop_instance_uid: str
    series_uid: str
    study_uid: str
    patient_id: str
    description: str


class _LeftOut:
    """What no case holds, by reason, for the log."""

    def __init__(self) -> None:
        self._why: defaultdict[str, dict[Path, str]] = defaultdict(dict)

    def add(self, reason: str, paths: Iterable[Path]) -> None:
        """Files, named by the last part of their path: folders of an export may be called like the patient."""
        self._why[reason].update({path: path.name for path in paths})

    def add_uid(self, reason: str, path: Path, uid: str) -> None:
        """An object or series that has a UID to be named by."""
        self._why[reason][path] = uid

    def log(self) -> None:
        for reason, named in self._why.items():
            if not named:
                continue
            more = ", …" if len(named) > _NAMED else ""
            _log.warning("left out, %d %s: %s%s", len(named), reason, ", ".join(sorted(named.values())[:_NAMED]), more)


@dataclass(slots=True)
class _Found:
    mayo: list[_Series] = field(default_factory=list)
    generic: list[_Header] = field(default_factory=list)
    left_out: _LeftOut = field(default_factory=_LeftOut)

    def add(self, layout: str, subject: str, role: Role, dose: float, files: Iterable[Path]) -> None:
        """Keep `files` as one series, or say why not."""
        images = list(self.dicom(files))
        if not images:
            return
        try:
            first = read_slice(images[0])
        except SeriesRefused as refused:
            self.left_out.add_uid(
                f"series of {subject} that are no CT images ({refused.code})", images[0], str(refused)
            )
            return
        self.mayo.append(_Series(layout, subject, role, dose, tuple(images), first))

    def dicom(self, files: Iterable[Path]) -> Iterator[Path]:
        """Those that are DICOM."""
        for path in files:
            if is_dicom(path):
                yield path
            else:
                self.left_out.add("files that are not DICOM", [path])

    def headers(self, files: Iterable[Path]) -> Iterator[_Header]:
        """What identifies each object, of those that are DICOM and belong to a series."""
        for path in self.dicom(files):
            try:
                ds = dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
                header = _Header(path, *(text(ds, keyword) for keyword in _TAGS))
            except OSError:
                raise
            except Exception:  # a parser may raise whatever it likes on damaged bytes
                self.left_out.add("files with a header that cannot be read", [path])
                continue
            if header.series_uid:
                yield header
            else:
                self.left_out.add("DICOM files that belong to no series", [path])


def find(root: Path) -> list[Case]:
    """All cases below `root`, whatever its layout, by subject and name.

    Only headers are read: one a series where names tell which files make one, else one a file. Whether a series is a CT
    volume is decided when it is read, by `pipelines.volume.read_volume`.

    Parameters
    ----------
    root
        Folder that holds data sets, subjects or series at any depth. Links to folders are not followed, hidden files
        and folders not looked at.

    Returns
    -------
    list of Case
        Empty if there is no CT series.

    Raises
    ------
    NotADirectoryError
        If there is no such folder.
    OSError
        If a folder or a file in it cannot be read.
    """
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is no folder")
    found = _Found()
    with pydicom_silent():
        for folder, files in _folders(root):
            places = (root.resolve().name, *folder.relative_to(root).parts)
            subject = next((place for place in reversed(places) if SUBJECT.fullmatch(place)), None)
            if _challenge(found, subject, folder, files) or (subject and _tcia(found, subject, folder, files)):
                continue
            found.generic += found.headers(files)
        cases = [*_paired(found), *_unpaired(found)]
    found.left_out.log()
    return sorted(cases, key=lambda case: (case.subject, case.name, case.full))


def is_dicom(path: Path) -> bool:
    """Does the file begin as one of DICOM does (PS3.10 7.1)?"""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def origin(path: Path) -> Origin:
    """Whose the series of the DICOM file `path` is."""
    with pydicom_silent():
        ds = dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
    study_uid = text(ds, "StudyInstanceUID")
    return Origin(text(ds, "SeriesInstanceUID"), study_uid, _digest(text(ds, "PatientID") or study_uid))


def _folders(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Folders that hold files, with their files, both sorted."""

    def stop(error: OSError) -> None:
        raise error

    for folder, below, names in os.walk(root, onerror=stop):
        below[:] = sorted(name for name in below if not name.startswith("."))
        files = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        if files:
            yield Path(folder), files


def _challenge(found: _Found, subject: str | None, folder: Path, files: Sequence[Path]) -> bool:
    """Take `folder` if it belongs to the Grand Challenge; names of files tell more than the name of the folder."""
    says = _CHALLENGE_FOLDER.match(folder.name)
    place: Role | None = None if says is None else "full" if says[1].lower() == "full" else "low"
    groups: defaultdict[tuple[str, Role, str], list[Path]] = defaultdict(list)
    others = []
    for path in files:
        if named := _CHALLENGE_FILE.match(path.name):
            groups[named[1].upper(), "full" if named[2].upper() == "FD" else "low", named[3]].append(path)
        else:
            others.append(path)
    if not groups and place and subject:  # renamed files
        groups[subject, place, ""], others = others, []
    if not groups:
        return False
    found.left_out.add("files beside images of the Grand Challenge", others)
    for (owner, role, _), group in groups.items():
        if place and role != place:
            found.left_out.add(f"files named as {role} dose in a folder {folder.name}", group)
        else:
            found.add("challenge", owner, role, CHALLENGE_DOSE, group)
    return True


def _tcia(found: _Found, subject: str, folder: Path, files: Sequence[Path]) -> bool:
    """Take `folder` if all it holds are series of LDCT-and-Projection-data."""
    if _PROJECTIONS.search(folder.name):
        _log.info("%d files of projections of %s are passed over", len(files), subject)
        return True
    described = _described(found, folder, files)
    roles = [_TCIA_IMAGES.search(description) for description, _ in described]
    if not described or not all(
        role or _PROJECTIONS.search(description) for role, (description, _) in zip(roles, described, strict=True)
    ):
        return False
    for images, (_, group) in zip(roles, described, strict=True):
        if images:
            role: Role = "full" if images[1].lower() == "full" else "low"
            found.add("tcia", subject, role, TCIA_DOSE[subject[0]], group)
        else:
            _log.info("%d files of projections of %s are passed over", len(group), subject)
    return True


def _described(found: _Found, folder: Path, files: Sequence[Path]) -> list[tuple[str, list[Path]]]:
    """What each series in a folder is said to be, and its files.

    The folder's name says it, or is the SeriesInstanceUID (the archive's classic folder names): then the header of one
    file says it for all. In any other folder every file is asked.
    """
    if _TCIA_IMAGES.search(folder.name):
        return [(folder.name, list(files))]
    headers = found.headers(files)
    if UID(folder.name).is_valid:
        return [(header.description, list(files)) for header in islice(headers, 1)]
    series: defaultdict[tuple[str, str], list[Path]] = defaultdict(list)
    for header in headers:
        series[header.series_uid, header.description].append(header.path)
    return [(description, group) for (_, description), group in series.items()]


_PAIR_KEYS: tuple[Callable[[CTSlice], Hashable], ...] = (
    lambda one: (one.reconstruction, one.thickness_mm, one.study_uid),
    lambda one: (one.reconstruction, one.thickness_mm),
    lambda one: (one.reconstruction, one.study_uid),
    lambda one: one.reconstruction,
)
"""In what the two series of a pair agree: kernel and kVp always, thickness and study where there is such a partner.

De-identification gave some pairs two study UIDs. Thick low-dose slices go with thin full-dose ones where nothing fits
better: that is how to learn thin slices from thick ones."""


def _paired(found: _Found) -> Iterator[Case]:
    """Cases of the Mayo Clinic's data; a pair is made only where there is no choice."""
    owners: defaultdict[tuple[str, str], list[_Series]] = defaultdict(list)
    for one in found.mayo:
        owners[one.layout, one.subject].append(one)
    for series in owners.values():
        left = list(series)
        for key in _PAIR_KEYS:
            groups: defaultdict[Hashable, list[_Series]] = defaultdict(list)
            for one in left:
                groups[key(one.first)].append(one)
            for group in groups.values():
                if sorted(one.role for one in group) == ["full", "low"]:
                    full, low = sorted(group, key=lambda one: one.role)
                    yield full.case(low)
                    left = [one for one in left if one not in group]
        for one in left:
            if one.role == "full":
                yield one.case(None)
            else:
                reason = f"low-dose series of {one.subject} without a full-dose one that fits"
                found.left_out.add_uid(reason, one.files[0], one.first.series_uid)


def _unpaired(found: _Found) -> Iterator[Case]:
    """One case for each series of any other data."""
    series: defaultdict[str, list[_Header]] = defaultdict(list)
    known: set[tuple[str, str]] = set()
    for header in found.generic:
        if (header.series_uid, header.sop_instance_uid) in known:
            found.left_out.add("second copies of an object", [header.path])
            continue
        known.add((header.series_uid, header.sop_instance_uid))
        series[header.series_uid].append(header)
    for uid, headers in series.items():
        files = tuple(sorted(header.path for header in headers))
        try:
            first = read_slice(files[0])
        except SeriesRefused as refused:
            found.left_out.add_uid("series that are no CT images", files[0], f"{uid} ({refused.code})")
            continue
        owner = headers[0].patient_id
        if not owner:
            _log.warning("series %s has no PatientID: its study counts as a subject of its own", uid)
        subject = _digest(owner or headers[0].study_uid)
        yield Case(subject, uid, files, None, None, first.reconstruction[0], first.thickness_mm)


@cache
def _digest(identity: str) -> str:
    """A name for a patient that does not tell the PatientID.

    Slow on purpose (10 ms): a plain digest of a number of seven digits is undone in seconds by trying all. It is a
    pseudonym all the same, not anonymous.
    """
    return hashlib.scrypt(identity.encode(), salt=b"training.sources.layouts", n=2**12, r=8, p=1, dklen=8).hex()
