"""What the header extraction makes of elements as they come, hostile ones too."""

from __future__ import annotations

from io import BytesIO

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from routes import ALL_KINDS, CT

from dicomnode.router import MAX_VALUES, header_values


def raw(keyword: str, vr: str, value: bytes) -> pydicom.Dataset:
    """A data set with one element as it is right after reading a file."""
    ds = pydicom.Dataset()
    tag = Tag(keyword)
    ds[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)
    return ds


@pytest.mark.parametrize(
    ("keyword", "vr", "value", "expected"),
    [
        ("SliceThickness", "DS", b"1.250000", 1.25),
        ("SliceThickness", "DS", b" -1.5e-1 ", -0.15),
        ("SliceThickness", "DS", b"1,25", "1,25"),
        ("SliceThickness", "DS", b"nan", "nan"),
        ("SliceThickness", "DS", b"1e999", "1e999"),
        ("SliceThickness", "DS", b"5 mm", "5 mm"),
        ("SliceThickness", "DS", b"", None),
        ("SliceThickness", "DS", b" \0", None),
        ("SliceThickness", "LO", b"1.25", "1.25"),
        ("SliceThickness", "UN", b"1.25", 1.25),
        ("PixelSpacing", "DS", b"0.7\\0.8", [0.7, 0.8]),
        ("PixelSpacing", "DS", b"0.7\\x", [0.7, "x"]),
        ("PixelSpacing", "DS", b"0.7\\", 0.7),
        ("InstanceNumber", "IS", b"+12 ", 12),
        ("InstanceNumber", "IS", b"12.5", 12.5),
        ("InstanceNumber", "IS", b"9" * 5000, "9" * 1024),
        ("InstanceNumber", "IS", "１".encode(), "ï¼\x91"),
        ("Rows", "US", b"\x00\x02", 512),
        ("Rows", "US", b"\x00\x02\x01\x00", [512, 1]),
        ("Rows", "US", b"\x00", 1),  # half a number: only its presence counts
        ("KVP", "FD", b"\x00\x00\x00\x00\x00\x00\x5e\x40", 120.0),
        ("KVP", "FD", b"\xff" * 8, "nan"),
        ("ImageType", "CS", b"ORIGINAL\\PRIMARY\\LOCALIZER ", ["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        ("ImageType", "CS", b"A\\" * 5000, ["A"] * MAX_VALUES),
        ("Modality", "CS", b"\xff\xfe", "ÿþ"),
        ("SeriesDescription", "LO", b"x" * 100_000, "x" * 1024),
        ("ImageComments", "LT", rb"a\b", r"a\b"),
        ("ReferencedImageSequence", "OB", b"abc", 3),
        ("SOPClassUID", "UI", CT.encode() + b"\0", CT),
    ],
)
def test_elements_as_they_come(keyword: str, vr: str, value: bytes, expected: object):
    found = header_values(raw(keyword, vr, value), {keyword, "Modality"})
    assert found == ({} if expected is None else {keyword: expected})
    assert type(found.get(keyword)) is type(expected)


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "Rows", "PatientName", "ContributingEquipmentSequence"])
@pytest.mark.parametrize("vr", ["U\x01", "US", "SQ", "UI"])
def test_what_is_empty_has_no_value_whatever_it_says_it_is(keyword: str, vr: str) -> None:
    """pydicom takes an element of an unknown representation and no length for one that it still has to read."""
    ds = pydicom.Dataset()
    ds[Tag(keyword)] = RawDataElement(Tag(keyword), vr, 0, None, 0, False, True)
    assert header_values(ds, {keyword}) == {}


def test_text_is_decoded_by_its_character_set():
    ds = pydicom.Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SeriesDescription = "Thorax niedrige Dosis µ"
    ds.PatientName = "Müller^Änne"
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    ds.Rows = 512
    ds.SliceThickness = "1.0"
    ds.InstanceNumber = 3
    ds.ReferencedImageSequence = [pydicom.Dataset(), pydicom.Dataset()]
    ds.AccessionNumber = None
    ds.FrameIncrementPointer = 0x00181063
    keywords = [element.keyword for element in ds] + ["Modality", "NoKeyword", "CallingAETitle"]
    expected = {
        "SpecificCharacterSet": "ISO_IR 192",
        "SeriesDescription": "Thorax niedrige Dosis µ",
        "PatientName": "Müller^Änne",
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "Rows": 512,
        "SliceThickness": 1.0,
        "InstanceNumber": 3,
        "ReferencedImageSequence": 2,
        "FrameIncrementPointer": "(0018,1063)",
    }
    assert header_values(ds, keywords) == expected
    file = BytesIO()
    pydicom.dcmwrite(file, ds, implicit_vr=True, little_endian=True)
    file.seek(0)
    again = pydicom.dcmread(file, force=True)
    assert header_values(again, keywords) == expected
    assert {type(value) for value in header_values(again, keywords).values()} == {str, int, float, list}


@pytest.mark.filterwarnings(
    "ignore:(Found unknown escape sequence|Failed to decode|Unknown encoding)"
)  # quote no value
@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(
        ["SliceThickness", "InstanceNumber", "Modality", "SeriesDescription", "Rows", "PatientName", "KVP"]
    ),
    st.sampled_from(["DS", "IS", "CS", "LO", "US", "PN", "FD", "UN", "SQ", "AT", "OB", "UI", "DA", "SV", "UT"]),
    st.binary(max_size=40),
    st.sampled_from([["iso8859"], ["utf8"], ["iso8859", "iso2022_jp"], ["gb18030"], ["zlib"], ["utf_16"], ["x", "y"]]),
)
def test_header_values_never_raises(keyword: str, vr: str, value: bytes, encodings: list[str]):
    ds = raw(keyword, vr, value)
    ds.set_original_encoding(False, True, encodings)
    header = header_values(ds, {keyword})
    for one in header.values():
        for part in one if isinstance(one, list) else [one]:
            assert type(part) in {str, int, float}
            assert part != ""
            str(part).encode()
    ALL_KINDS.match(header, "A", "B")
