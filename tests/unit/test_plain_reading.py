"""Plain files are read in a way of our own: it says what pydicom says, the same slice, HU or refusal, or nothing."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ct_builder import edit, phantom, uid, write_series
from hypothesis import HealthCheck, example, given, reject, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from pipelines import ct_slice as module
from pipelines.ct_slice import CTSlice, SeriesRefused, plain_slice, read_slice
from pipelines.element_index import HandedOver, index_head
from pipelines.volume import pydicom_silent

Outcome = str | tuple[CTSlice, bytes, bytes]


def outcome(read: Callable[[Path], CTSlice], path: Path) -> Outcome:
    """What a way of reading makes of a file: the refusal in words, or slice, HU and padding."""
    with pydicom_silent():
        try:
            one = read(path)
            hu, padding = np.empty(one.matrix, np.float32), np.zeros(one.matrix, np.bool_)
            one.read_hu(hu, padding)
            return one, hu.tobytes(), padding.tobytes()
        except SeriesRefused as refused:
            return str(refused)


def by_pydicom(path: Path) -> CTSlice:
    return module._read(module._read_header(path), path)


def plainly(path: Path) -> CTSlice:
    return plain_slice(index_head(path), path)


def agree(path: Path, *, forget: bool = True) -> bool:
    """Whether the file was plain; fails if the two ways differ."""
    if forget:
        module._accepted = ()
    try:
        plain = outcome(plainly, path)
    except HandedOver:
        return False
    assert plain == outcome(by_pydicom, path)
    return True


SERIES = (
    *("ge-hispeed-head-tilt-varspacing", "ge-lightspeed16-rider-chestpe-1p25mm", "ge-revolution-cptacpda-LUNG-5mm"),
    *("ge-vct-cmbcrc-chest-LUNG-2p5mm", "philips-brilliance16-lungdxA0001-B-5mm"),
    *("philips-brilliance16-lungdxA0001-L-5mm", "philips-brilliance16p-lidc0314-chest-1mm"),
    *("philips-ingenuity-headphantom-1mm-UB", "philips-ingenuity-headphantom-1mm-YA"),
    *("philips-ingenuity-headphantom-5mm-UB", "philips-ingenuity-headphantom-tilt-neg18"),
    *("siemens-sensation10-lungdxA0002-B40f-8mm", "siemens-sensation10-lungdxA0002-B70f-8mm"),
    "siemens-sensation16-acrinflt013-petct-B10f",
)


@pytest.mark.data
@pytest.mark.parametrize("name", SERIES)
def test_every_slice_of_the_real_series(ct_series: Callable[[str], list[Path]], name: str) -> None:
    handed_over = [path for path in ct_series(name) if not agree(path, forget=False)]
    assert not handed_over


PLAIN_ODD = {
    *("ct-16x16-axial", "ct-localizer-16x16", "ct-small-128", "d2n-gantrytilt-1", "d2n-gantrytilt-2"),
    *("d2n-gantrytilt-3", "d2n-gantrytilt-4", "d2n-notavolume-mon-1", "d2n-notavolume-mon-2"),
    *("d2n-sliceincrement-ge-1", "d2n-sliceincrement-ge-2", "d2n-sliceincrement-siemens-0003"),
    *("d2n-sliceincrement-siemens-0005", "dcmqi-liver-01", "dcmqi-liver-03", "philips-surview-256x512"),
    *("ts-explicit-le", "ts-implicit-le"),
}


@pytest.mark.data
def test_every_odd_file(odd_dir: Path) -> None:
    plain = {path.stem for path in sorted(odd_dir.glob("*.dcm")) if agree(path)}
    assert plain >= PLAIN_ODD
    assert not {name for name in plain if name.startswith("ts-")} - PLAIN_ODD


# --- made to differ ------------------------------------------------------------------------------------------------


def _rich(ds: Dataset) -> None:
    """Sequences of every form, private elements, padding, a name outside ASCII."""
    inner, outer = Dataset(), Dataset()
    inner.CodeValue, inner.CodingSchemeDesignator, inner.CodeMeaning = "1", "DCM", "meaning"
    outer.ReferencedSOPInstanceUID = "1.2.3"
    outer.PurposeOfReferenceCodeSequence = Sequence([inner])
    ds.ReferencedImageSequence = Sequence([outer, outer])
    ds.SourceImageSequence = Sequence([outer])
    ds["SourceImageSequence"].is_undefined_length = True
    ds.SourceImageSequence[0].is_undefined_length_sequence_item = True
    ds.SourceImageSequence[0]["PurposeOfReferenceCodeSequence"].is_undefined_length = True
    ds.private_block(0x0029, "VENDOR", create=True).add_new(0x01, "OB", bytes(range(64)))
    ds.add_new(0x00280120, "SS", -2000)
    ds.SpecificCharacterSet, ds.PatientName = "ISO_IR 100", "Müller^Jörg"
    ds.AcquisitionNumber, ds.SliceLocation = 3, "-17.25"


@pytest.fixture(params=[ExplicitVRLittleEndian, ImplicitVRLittleEndian], ids=["explicit", "implicit"])
def rich(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (path,) = write_series(tmp_path, phantom(1, 16))

    def change(ds: Dataset) -> None:
        _rich(ds)
        ds.file_meta.TransferSyntaxUID = UID(request.param)

    edit(path, change)
    assert dcmread(path).PatientName == "Müller^Jörg"
    assert agree(path)
    return path


_TELLING = (
    *(b"\x08\0", b"\x10\0", b"\x18\0", b"\x20\0", b"\x28\0", b"\xfe\xff", b"\xff\xff", b"\xe0\x7f"),
    *(b"SQ", b"UI", b"US"),
)
_SPLICES = (b"\0\0", b"\xff\xff\xff\xff", b"\xfe\xff\x0d\xe0\0\0\0\0", b"  ")


def test_damaged_headers(rich: Path) -> None:
    """Bytes changed, cut out and put in anywhere, most often into something that the scanner looks at."""
    whole = rich.read_bytes()
    dice = random.Random(20261121)
    marks = [position for position in range(132, len(whole) - 512) if whole.startswith(_TELLING, position)]
    plain = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 3)):
            at = dice.choice(marks) + dice.randrange(8)
            if dice.random() < 0.3:
                at = dice.randrange(132, len(whole) - 512)
            change = dice.randrange(4)
            if change == 0:
                del damaged[at : at + dice.choice((1, 2, 4, 8))]
            elif change == 1:
                damaged[at:at] = dice.choice((*_SPLICES, damaged[at : at + 12]))
            else:
                damaged[at] = dice.choice((0, 1, 2, 0x20, 0x2E, 0x30, 0x5C, 0x80, 0xFF, dice.randrange(256)))
        rich.write_bytes(damaged)
        plain += agree(rich, forget=False)
        agree(rich)
    assert plain > 20  # else nothing was compared


def test_headers_cut_short(rich: Path) -> None:
    whole = rich.read_bytes()
    for size in (*range(0, len(whole) - 512, 7), *range(len(whole) - 20, len(whole))):
        rich.write_bytes(whole[:size])
        agree(rich)


def test_more_behind_the_pixels(rich: Path) -> None:
    whole = rich.read_bytes()
    padding = b"\xfc\xff\xfc\xffOB\0\0\4\0\0\0"
    if dcmread(rich).original_encoding[0]:
        padding = struct.pack("<HHL", 0xFFFC, 0xFFFC, 4)
    for behind in (padding + bytes(4), padding, b"\0\0", bytes(8), whole[-600:], _SPLICES[2], b"\xe0\x7f\x10\0"):
        rich.write_bytes(whole + behind)
        agree(rich)


def test_pixels_of_another_file_are_not_taken(rich: Path) -> None:
    """Between its header and its pixels a file was replaced by one of another object, as long as it was."""
    one = read_slice(rich)
    assert one.plain is not None
    size = rich.stat().st_size

    def other(ds: Dataset) -> None:
        ds.SOPInstanceUID = ds.SOPInstanceUID[:-1] + str(9 - int(ds.SOPInstanceUID[-1]))

    edit(rich, other)
    assert rich.stat().st_size == size
    with pytest.raises(SeriesRefused, match="undecodable"), pydicom_silent():
        one.stored()


_TEXT = st.text(st.sampled_from("0123456789.-+eE \\^=AZaz_\0äß\n"), max_size=24)
_ELEMENTS = st.dictionaries(
    st.sampled_from(
        [
            *("ImageType", "Modality", "PatientName", "PatientID", "SliceThickness", "KVP", "ConvolutionKernel"),
            *("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "AcquisitionNumber"),
            *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"),
            *("RescaleType", "NumberOfFrames", "PhotometricInterpretation", "SpecificCharacterSet"),
        ]
    ),
    st.one_of(_TEXT, st.lists(st.floats(-1e4, 1e4).map(lambda v: f"{v:.6g}"), max_size=6).map("\\".join)),
    max_size=3,
)
_WORDS = st.dictionaries(
    st.sampled_from(
        [
            *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"),
            *("PixelPaddingValue", "PixelPaddingRangeLimit"),
        ]
    ),
    st.one_of(st.integers(0, 17), st.integers(0, 65535)),
    max_size=3,
)


@given(elements=_ELEMENTS, words=_WORDS, signed=st.booleans())
@example(elements={"SpecificCharacterSet": "ISO_IR 192", "PatientName": "Ä"}, words={}, signed=True)
@example(elements={"ImagePositionPatient": "1e2\\ 2.5\\+3"}, words={}, signed=True)
@example(elements={"KVP": "120.0", "AcquisitionNumber": " 7"}, words={"PixelPaddingValue": 63536}, signed=True)
@example(elements={}, words={"BitsStored": 12, "HighBit": 11}, signed=False)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_element(rich: Path, elements: dict[str, str], words: dict[str, int], signed: bool) -> None:
    ds = dcmread(rich)
    encoded = {keyword: value.encode("utf-8") for keyword, value in elements.items()}
    encoded |= {keyword: struct.pack("<H", value) for keyword, value in words.items()}
    for keyword, raw in encoded.items():
        tag = Tag(keyword)
        vr = ("SS" if signed else "US") if keyword.startswith("PixelPadding") else dictionary_VR(tag)
        value = raw + b" " * (len(raw) % 2)  # as bytes: no encoder would write them
        ds[tag] = RawDataElement(tag, vr, len(value), value, 0, ds.original_encoding[0], True)
    path = rich.with_name("any.dcm")
    with pydicom_silent():
        try:
            ds.save_as(path, enforce_file_format=True)
        except ValueError:  # a character set that the writer stumbles over
            reject()
    agree(path)
    agree(path, forget=False)


def test_a_slice_like_the_last_one_is_not_taken_for_it(tmp_path: Path) -> None:
    """What an earlier slice of the series said is not said of one that differs in a single element."""
    paths = write_series(tmp_path, phantom(3, 16), KVP=lambda k: ("120", "120", "100")[k])
    edit(paths[1], lambda ds: setattr(ds, "RescaleIntercept", "-1023"))
    read = [read_slice(path) for path in paths]
    assert [one.intercept for one in read] == [-1024, -1023, -1024]
    assert [one.reconstruction[1] for one in read] == ["120", "120", "100"]
    assert [one.sop_instance_uid for one in read] == [uid("series", "instance", k) for k in range(3)]
    assert [one.position_mm[2] for one in read] == [-100, -98, -96]
    assert all(agree(path, forget=False) for path in paths)
