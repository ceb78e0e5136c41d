"""Headers from a template: the same bytes as in the long way, through pydicom, or none."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ct_builder import edit, phantom, write_series
from derivation import CARD, HU, derive, making, write_all
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicomnode import derive as module
from dicomnode.config import Derivation
from dicomnode.errors import DerivationError
from dicomnode.header_template import HeaderTemplate
from pipelines.element_index import ElementIndex, HandedOver
from pipelines.volume import SeriesRefused, Volume, pydicom_silent, read_volume


class NoTemplate:
    """In place of `HeaderTemplate`: every header in the long way."""

    def __init__(self, *_: object) -> None:
        raise HandedOver("not wanted")


def both_ways(monkeypatch: pytest.MonkeyPatch, paths: Iterable[Path], out: Path, **how: Any) -> int:
    """Derive with templates and without; the number of headers that came from a template. The bytes must be equal."""
    from_template = 0
    header = HeaderTemplate.header

    def counted(self: HeaderTemplate, *arguments: Any) -> bytes:
        nonlocal from_template
        made = header(self, *arguments)
        from_template += 1
        return made

    paths = list(paths)
    with monkeypatch.context() as patched:
        patched.setattr(HeaderTemplate, "header", counted)
        fast = derive(paths, out / "fast", brighten, **how)
    with monkeypatch.context() as patched:
        patched.setattr(module, "HeaderTemplate", NoTemplate)
        slow = derive(paths, out / "slow", brighten, **how)
    assert [one.path.name for one in fast] == [one.path.name for one in slow]
    different = [one.path.name for one in fast if one.path.read_bytes() != (out / "slow" / one.path.name).read_bytes()]
    assert different == []
    assert [replace(one, path=one.path.parent.parent) for one in fast] == [
        replace(one, path=one.path.parent.parent) for one in slow
    ]
    return from_template


def brighten(hu: HU) -> HU:
    return hu + np.float32(3)


SERIES = {
    "ge-hispeed-head-tilt-varspacing": 2,
    "ge-lightspeed16-rider-chestpe-1p25mm": 1,
    "ge-revolution-cptacpda-LUNG-5mm": 1,
    "ge-vct-cmbcrc-chest-LUNG-2p5mm": 1,
    "philips-brilliance16-lungdxA0001-B-5mm": 1,
    "philips-brilliance16-lungdxA0001-L-5mm": 1,
    "philips-brilliance16p-lidc0314-chest-1mm": 1,
    "philips-ingenuity-headphantom-1mm-UB": 1,
    "philips-ingenuity-headphantom-1mm-YA": 1,
    "philips-ingenuity-headphantom-5mm-UB": 1,
    "philips-ingenuity-headphantom-tilt-neg18": 1,
    "siemens-sensation10-lungdxA0002-B40f-8mm": 1,
    "siemens-sensation10-lungdxA0002-B70f-8mm": 1,
    "siemens-sensation16-acrinflt013-petct-B10f": 1,
}
"""Real series → headers that a template is learnt from."""


@pytest.mark.data
@pytest.mark.parametrize("name", SERIES)
@pytest.mark.parametrize("keep_private", [True, False])
def test_real_series(
    ct_series: Callable[[str], list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    keep_private: bool,
) -> None:
    paths = ct_series(name) if keep_private else ct_series(name)[:8]
    made = both_ways(
        monkeypatch,
        paths,
        tmp_path,
        card=replace(CARD, input="slab3"),
        settings=Derivation(keep_private_attributes=keep_private),
    )
    # the template gives its own header once more when it is learnt
    assert made >= len(paths)
    if keep_private:
        assert made == len(paths)


def _rich(k: int) -> Callable[[Dataset], None]:
    """Another value in every kind of element that comes over, in each slice of another length."""

    def change(ds: Dataset) -> None:
        word = "x" * k
        inner, outer = Dataset(), Dataset()
        inner.CodeValue, inner.CodingSchemeDesignator, inner.CodeMeaning = "1", "DCM", f"meaning {word}"
        outer.ReferencedSOPInstanceUID = f"1.2.{10**k}"
        outer.PurposeOfReferenceCodeSequence = Sequence([inner])
        outer.private_block(0x0029, "VENDOR", create=True).add_new(0x01, "LO", word)
        ds.ReferencedImageSequence = Sequence([outer])
        ds.ReferencedStudySequence = Sequence([outer])
        ds["ReferencedStudySequence"].is_undefined_length = True
        ds.ReferencedStudySequence[0].is_undefined_length_sequence_item = k % 2 == 0
        block = ds.private_block(0x0029, "VENDOR", create=True)
        block.add_new(0x01, "OB", bytes(range(2 * k)))
        block.add_new(0x02, "SQ", Sequence([outer]))
        ds.add_new(0x00280120, "SS", -2000 - k)
        ds.SpecificCharacterSet, ds.PatientComments = "ISO_IR 100", f"Müller {word}"
        ds.SliceLocation, ds.ContentTime = f"{10**k}", "120001" if k else "100405.678901"

    return change


@pytest.mark.parametrize("keep_private", [True, False])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_all_kinds_of_elements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syntax: str, keep_private: bool
) -> None:
    paths = write_series(tmp_path, phantom(5, 16))
    for k, path in enumerate(paths):
        edit(path, _rich(k))
        edit(path, lambda ds: setattr(ds.file_meta, "TransferSyntaxUID", UID(syntax)))
    settings = Derivation(keep_private_attributes=keep_private)
    assert both_ways(monkeypatch, paths, tmp_path, settings=settings) == 5


def _icon(ds: Dataset) -> None:
    icon = Dataset()
    icon.PixelData = b"\0\0"
    icon["PixelData"].VR = "OW"
    ds[0x00291002].value = Sequence([icon])


DECIDES: dict[str, Callable[[Dataset], None]] = {
    "another creator": lambda ds: setattr(ds[0x00290010], "value", "GEMS_IMPS_01"),
    "an icon": _icon,
    "a picture": lambda ds: setattr(ds[0x00291001], "value", bytes(16 * 16)),
    "series description": lambda ds: setattr(ds, "SeriesDescription", "other"),
    "image type": lambda ds: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "AXIAL", "OTHER"]),
    "comments": lambda ds: setattr(ds, "ImageComments", "breath held"),
    "character set": lambda ds: setattr(ds, "SpecificCharacterSet", "ISO_IR 192"),
    "offset": lambda ds: setattr(ds, "TimezoneOffsetFromUTC", "+0900"),
    "one element more": lambda ds: setattr(ds, "WindowCenterWidthExplanation", "soft"),
    "one element less": lambda ds: ds.__delitem__("PatientComments"),
    "an overlay in the pixels": lambda ds: ds.add_new(0x60000100, "US", 16),
    "a curve": lambda ds: ds.add_new(0x50000020, "CS", "HIST"),
    "derivation": lambda ds: setattr(ds, "DerivationCodeSequence", ds.ReferencedImageSequence),
    "equipment": lambda ds: setattr(ds, "ContributingEquipmentSequence", Sequence([Dataset()])),
}


@pytest.mark.parametrize("what", DECIDES)
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_what_decides_is_looked_at_in_each_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, syntax: str
) -> None:
    paths = write_series(tmp_path, phantom(4, 16))
    for k, path in enumerate(paths):
        edit(path, _rich(2))
        if k == 2:
            edit(path, DECIDES[what])
        edit(path, lambda ds: setattr(ds.file_meta, "TransferSyntaxUID", UID(syntax)))
    both_ways(monkeypatch, paths, tmp_path)


_KEYWORDS = [
    *("ImageType", "SeriesDescription", "SeriesNumber", "ImageComments", "StudyDescription"),
    *("TimezoneOffsetFromUTC", "ContentDate", "ContentTime", "InstanceCreationDate", "SeriesDate", "PatientName"),
    *("LossyImageCompression", "LossyImageCompressionRatio", "DerivationDescription", "SmallestImagePixelValue"),
    *("SliceLocation", "RetrieveAETitle", "WindowCenter", "PatientComments", "AccessionNumber"),
]
_VALUES = st.dictionaries(
    st.sampled_from(_KEYWORDS),
    st.sampled_from(
        [b"", b"01", b"ORIGINAL\\PRIMARY\\AXIAL", b"ISO_IR 192", b"+0100", b"-7", b"20261120", b"x" * 64, "ä".encode()]
    ),
    max_size=4,
)


@given(values=st.tuples(_VALUES, _VALUES, _VALUES), implicit=st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slices_that_differ_in_anything(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    values: tuple[dict[str, bytes], ...],
    implicit: bool,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    paths = write_series(folder, phantom(3, 16))
    for path, changes in zip(paths, values, strict=True):

        def change(ds: Dataset, changes: dict[str, bytes] = changes) -> None:
            for keyword, value in changes.items():
                tag = Tag(keyword)
                vr = dictionary_VR(tag)
                raw = struct.pack("<H", len(value)) if vr == "US or SS" else value + b" " * (len(value) % 2)
                ds[tag] = RawDataElement(tag, vr.split(" ")[0], len(raw), raw, 0, False, True)

        try:
            with pydicom_silent():
                edit(path, change)
                if implicit:
                    edit(path, lambda ds: setattr(ds.file_meta, "TransferSyntaxUID", ImplicitVRLittleEndian))
        except (TypeError, ValueError):  # from one encoding to the other pydicom decodes the values
            reject()
    with pydicom_silent(), suppress(SeriesRefused):  # by the reader
        both_ways(monkeypatch, paths, folder)


# --- the proof of what a template made -----------------------------------------------------------------------------

FAULTS: dict[str, tuple[bytes, bytes]] = {
    "PatientID": (b"PHANTOM-1", b"PHANTOM-2"),
    "ImagePositionPatient": (b"-22\\-22\\-98", b"-22\\-22\\-99"),
    "RescaleIntercept": (b"-1024", b"-1025"),
    "KVP": (b"\x60\0DS\4\x00120 ", b"\x60\0LO\4\x00120 "),
    "Rows": (b"\x28\0\x10\0US\2\0\x10\0", b"\x28\0\x10\0US\2\0\x11\0"),
    "AccessionNumber": (b"\x08\0\x50\0SH\0\0", b""),
    "SeriesInstanceUID": (b"\x20\0\x0e\0UI", b"\x20\0\x0e\0UI"),
    "ImageType": (b"DERIVED\\", b"DERIVEE\\"),
    "ContributingEquipmentSequence": (b"dicomnode ", b"dicomnodf "),
    "SpecificCharacterSet": (b"\x08\0\x08\0CS", b"\x08\0\5\0CS\x0a\0ISO_IR 100\x08\0\x08\0CS"),
}


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return read_volume(write_series(tmp_path / "in", phantom(3, 16)))


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_of_the_template_does_not_pass(
    tmp_path: Path, volume: Volume, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """In a slice in the middle, which pydicom does not look at."""
    header = HeaderTemplate.header
    old, new = FAULTS[what]

    def faulty(self: HeaderTemplate, *arguments: Any) -> bytes:
        right = header(self, *arguments)
        if volume.slice_uids[1] not in arguments[2][0]:
            return right
        assert old in right
        wrong = right.replace(old, new, 1)
        if what == "SeriesInstanceUID":
            at = right.index(old) + 16
            wrong = right[:at] + bytes([right[at] ^ 1]) + right[at + 1 :]
        return wrong

    monkeypatch.setattr(HeaderTemplate, "header", faulty)
    with pytest.raises(DerivationError, match=rf" in ([A-Za-z, ]*, )?{what}\b"):
        write_all(volume, volume.hu, making(), tmp_path)


def test_another_source_does_not_pass(tmp_path: Path, volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    header = HeaderTemplate.header

    def faulty(self: HeaderTemplate, source: ElementIndex, uid: str, named: tuple[str, ...]) -> bytes:
        exchanged = {volume.slice_uids[1]: volume.slice_uids[2]}  # in the middle: there nobody else looks
        return header(self, source, uid, [exchanged.get(one, one) for one in named])

    monkeypatch.setattr(HeaderTemplate, "header", faulty)
    with pytest.raises(DerivationError, match="in SourceImageSequence"):
        write_all(volume, volume.hu, making(), tmp_path)


def test_pixels_of_another_slice_do_not_pass(tmp_path: Path, volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    write = module.write_durably

    def exchanged(path: Path, parts: tuple[bytes, ...]) -> None:
        write(path, parts if len(parts) == 1 else (parts[0], parts[1][::-1]))  # of what a template made alone

    monkeypatch.setattr(module, "write_durably", exchanged)
    monkeypatch.setattr(module, "_holds", lambda content, parts: True)
    with pytest.raises(DerivationError, match="in PixelData"):
        write_all(volume, volume.hu, making(), tmp_path)


def test_pydicom_looks_at_the_first_and_the_last_file(
    tmp_path: Path, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a template made it and our own reader is content: that one read the source, too."""
    looked_at: list[str] = []
    prove = module.prove_by_pydicom

    def watch(path: Path, *what: Any) -> Any:
        looked_at.append(str(dcmread(path).InstanceNumber))
        return prove(path, *what)

    monkeypatch.setattr(module, "prove_by_pydicom", watch)
    write_all(volume, volume.hu, making(), tmp_path)
    assert looked_at == ["1", "3"]
