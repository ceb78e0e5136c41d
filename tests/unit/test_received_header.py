"""Headers off the network: the same whoever reads them, and never more memory than a header needs."""

from __future__ import annotations

import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ct_builder import phantom, write_series
from pydicom import dcmread
from pydicom.datadict import dictionary_VR, keyword_dict, keyword_for_tag, tag_for_keyword
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from scanner import header, image

from dicomnode import received_header as module
from dicomnode.received_header import (
    MAX_REPORT_BYTES,
    MAX_REPORT_INSTANCES,
    Unreadable,
    read_header,
    read_report,
    uid_of,
)
from dicomnode.router import OWN_OUTPUT, header_values
from dicomnode.series import KEYWORDS


@contextmanager
def at_most(peak_bytes: int) -> Iterator[None]:
    """The block takes no more memory than that."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < peak_bytes


def test_a_deflate_bomb_is_inflated_only_as_far_as_a_header_goes() -> None:
    bomb = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    start = struct.pack("<HH2sHL", 0x0008, 0x0005, b"UT", 0, 300_000_000)
    small = bomb.compress(start) + bomb.compress(bytes(300_000_000)) + bomb.flush()
    assert len(small) < 1_000_000
    with at_most(80_000_000), pytest.raises(Unreadable, match="cannot be parsed"):
        read_header(memoryview(small), DeflatedExplicitVRLittleEndian, frozenset({0x00080018}))


SEQUENCE = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
EMPTY_ITEM = struct.pack("<HHL", 0xFFFE, 0xE000, 0)
ITEM_END = struct.pack("<HHL", 0xFFFE, 0xE00D, 0)


@pytest.mark.parametrize(
    "data",
    [
        SEQUENCE + EMPTY_ITEM * 100_000,
        b"".join(struct.pack("<HH2sH", 9 + 2 * (k >> 16), k & 0xFFFF, b"SH", 0) for k in range(40_000)),
        (SEQUENCE + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)) * 100_000,
    ],
    ids=["items", "elements", "nested"],
)
def test_a_header_of_nothing_but_elements_takes_no_memory(data: bytes) -> None:
    with at_most(20 * 2**20), pytest.raises(Unreadable, match="cannot be parsed"):
        read_header(memoryview(data), UID(ExplicitVRLittleEndian), frozenset({0x00080018}))


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("ContributingEquipmentSequence", EMPTY_ITEM * 200_000),
        ("SpecificCharacterSet", b"\\" * 2_000_000),
        ("Rows", bytes(2_000_000)),
    ],
)
def test_a_value_that_pydicom_would_take_apart_later_takes_no_memory(keyword: str, value: bytes) -> None:
    """Its length is defined, so pydicom reads it as one, and makes objects of it when it is asked for."""
    tag = tag_for_keyword(keyword)
    assert tag is not None
    data = struct.pack("<HHL", tag >> 16, tag & 0xFFFF, len(value)) + value
    with at_most(20 * 2**20), pytest.raises(Unreadable, match="cannot be parsed"):
        header_values(read_header(memoryview(data), UID(ImplicitVRLittleEndian), frozenset({tag})), {keyword})


def test_values_that_nobody_asks_for_may_be_of_any_size() -> None:
    private = struct.pack("<HH2sHL", 0x0009, 0x1001, b"OB", 0, 3_000_000) + bytes(3_000_000)
    uid = struct.pack("<HH2sH", 0x0020, 0x000E, b"UI", 6) + b"1.2.3\0"
    read = read_header(memoryview(private + uid), UID(ExplicitVRLittleEndian), frozenset({0x0020000E}))
    assert uid_of(read, "SeriesInstanceUID") == "1.2.3"


def test_the_frames_of_an_object_of_many_are_not_read() -> None:
    """In sequences of undefined length pydicom would read 30 times for each of them."""
    uid = struct.pack("<HH2sH", 0x0020, 0x000E, b"UI", 6) + b"1.2.3\0"
    groups = struct.pack("<HH2sHL", 0x5200, 0x9230, b"SQ", 0, 0xFFFFFFFF)
    element = struct.pack("<HH2sH", 0x0020, 0x9057, b"UL", 4) + bytes(4)
    frame = struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF) + element * 14 + ITEM_END
    data = uid + groups + frame * 2000 + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    read = read_header(memoryview(data), UID(ExplicitVRLittleEndian), frozenset({0x0020000E}))
    assert uid_of(read, "SeriesInstanceUID") == "1.2.3"


def compared(data: bytes, syntax: str) -> None:
    """What is asked of a header is the same whoever reads it."""
    plain = zlib.decompress(data, -zlib.MAX_WBITS) if UID(syntax).is_deflated else data
    try:
        slow = header(plain, syntax)[:PIXELS]
    except Exception:
        with pytest.raises(Unreadable):
            read_header(memoryview(data), UID(syntax), frozenset())
        return
    keywords = {keyword_for_tag(tag) for tag in slow.keys()} | KEYWORDS | {"Modality", OWN_OUTPUT}
    without_items = {keyword for keyword in keywords if keyword not in SEQUENCES}
    for asked in (keywords, without_items, KEYWORDS | {"SOPInstanceUID", "SeriesDescription"}):
        tags = {tag_for_keyword(keyword) for keyword in {*asked, "SpecificCharacterSet"}} - {None}
        read = read_header(memoryview(data), UID(syntax), frozenset(tags))
        assert header_values(read, asked) == header_values(slow, asked)


PIXELS = 0x7FE00008
SEQUENCES = {keyword for keyword in keyword_dict if dictionary_VR(keyword) == "SQ"}


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_the_index_and_pydicom_read_the_same_header(
    tmp_path: Path, syntax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"SpecificCharacterSet": "ISO_IR 192", "SeriesDescription": "Lungenübersicht ÄÖ"}
    (path,) = write_series(tmp_path, phantom(1, 16), **texts)
    ds = dcmread(path)
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(path)
    one = image(path)
    compared(one.data, syntax)
    for cut in range(0, len(one.data) - 512, 7):
        with warnings.catch_warnings(action="ignore"):  # pydicom's, on what is cut off
            compared(one.data[:cut], syntax)
    monkeypatch.setattr("dicomnode.received_header._parse", None)
    tags = frozenset({0x00080005, 0x0008103E})
    assert header_values(read_header(memoryview(one.data), UID(syntax), tags), {"SeriesDescription"}) == {
        "SeriesDescription": "Lungenübersicht ÄÖ"
    }, "and this one was found by the index"


@pytest.mark.data
def test_the_index_and_pydicom_read_the_same_odd_header(odd_dir: Path) -> None:
    for path in sorted(odd_dir.glob("*.dcm")):
        one = image(path)
        with warnings.catch_warnings(action="ignore"):
            compared(one.data, one.syntax)


def test_a_uid_that_is_empty_is_absent_whatever_it_says_it_is() -> None:
    """Found by tests/fuzz.py: an element of no representation that there is, and of no length."""
    data = struct.pack("<HH2sHHH2sH", 0x0008, 0x0005, b"CS", 0, 0x0008, 0x0018, b"U\x01", 0)
    read = read_header(memoryview(data), UID(ExplicitVRLittleEndian), frozenset({0x00080018}))
    assert "SOPInstanceUID" in read
    assert uid_of(read, "SOPInstanceUID") == ""


# ── reports on storage commitment ──────────────────────────────────────────────────────────────────────────────────


def instance(k: int) -> str:
    """A SOP Instance UID of 64 characters."""
    return f"1.2.{10**59 + k}"


def information(count: int, *, implicit: bool, undefined: bool) -> bytes:
    """A report that so many instances are not kept, with all that an item may hold (PS3.4 table J.3-3)."""

    def element(tag: int, vr: bytes, value: bytes) -> bytes:
        if implicit:
            return struct.pack("<HHL", tag >> 16, tag & 0xFFFF, len(value)) + value
        return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, len(value)) + value

    def delimited(start: bytes, content: bytes, end: bytes) -> bytes:
        length = 0xFFFFFFFF if undefined else len(content)
        return start + struct.pack("<L", length) + content + (end if undefined else b"")

    items = b"".join(
        delimited(
            struct.pack("<HH", 0xFFFE, 0xE000),
            element(0x00080054, b"AE", b"A" * 16)
            + element(0x00081150, b"UI", b"1." * 31 + b"1\0")
            + element(0x00081155, b"UI", instance(k).encode())
            + element(0x00081197, b"US", b"\x12\1")
            + element(0x00880130, b"SH", b"M" * 16)
            + element(0x00880140, b"UI", b"1." * 31 + b"1\0"),
            ITEM_END,
        )
        for k in range(count)
    )
    start = struct.pack("<HH", 0x0008, 0x1198) + (b"" if implicit else b"SQ\0\0")
    sequence = delimited(start, items, struct.pack("<HHL", 0xFFFE, 0xE0DD, 0))
    return element(0x00081195, b"UI", b"2.25.7") + sequence


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """So many instances may be named; as many as really may take seconds."""
    monkeypatch.setattr(module, "MAX_REPORT_INSTANCES", 50)
    monkeypatch.setattr(module, "_MAX_REPORT_READS", 50 * module._MAX_REPORT_READS // MAX_REPORT_INSTANCES)
    return 50


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("undefined", [False, True])
def test_a_report_may_name_as_many_instances_as_its_limit_says(few: int, implicit: bool, undefined: bool) -> None:
    syntax = UID(ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian)
    data = information(few, implicit=implicit, undefined=undefined)
    assert len(data) <= MAX_REPORT_BYTES - (MAX_REPORT_INSTANCES - few) * module._REPORT_ITEM_BYTES
    report = read_report(data, syntax)
    assert report.TransactionUID == "2.25.7"
    named = [(item.ReferencedSOPInstanceUID, item.FailureReason) for item in report.FailedSOPSequence]
    assert named == [(instance(k), 0x0112) for k in range(few)]
    with pytest.raises(Unreadable, match="more than 50 instances"):
        read_report(information(few + 1, implicit=implicit, undefined=undefined), syntax)


@pytest.mark.parametrize("vr", [b"SQ", b"UN"])
@pytest.mark.parametrize("undefined", [False, True])
def test_a_report_of_nothing_but_elements_is_not_read_to_its_end(few: int, vr: bytes, undefined: bool) -> None:
    elements = b"".join(struct.pack("<HHL", 9, k, 0) for k in range(few * module._REPORT_ITEM_BYTES // 8))
    item = struct.pack("<HHL", 0xFFFE, 0xE000, len(elements)) + elements
    data = struct.pack("<HH2sHL", 0x0008, 0x1198, vr, 0, 0xFFFFFFFF if undefined else len(item)) + item
    with pytest.raises(Unreadable, match="cannot be parsed"):
        read_report(data, UID(ExplicitVRLittleEndian))
