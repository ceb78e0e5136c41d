"""Headers off the network: the same whoever reads them, and never more memory than a header needs."""

from __future__ import annotations

import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import pytest
from ct_builder import phantom, write_series
from pydicom import dcmread
from pydicom.datadict import dictionary_VR, keyword_dict, keyword_for_tag, tag_for_keyword
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from scanner import header, image

from dicomnode.received_header import Unreadable, read_header, uid_of
from dicomnode.router import OWN_OUTPUT, header_values
from dicomnode.series import KEYWORDS


def test_a_deflate_bomb_is_inflated_only_as_far_as_a_header_goes() -> None:
    bomb = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    start = struct.pack("<HH2sHL", 0x0008, 0x0005, b"UT", 0, 300_000_000)
    small = bomb.compress(start) + bomb.compress(bytes(300_000_000)) + bomb.flush()
    assert len(small) < 1_000_000
    tracemalloc.start()
    try:
        read = read_header(memoryview(small), DeflatedExplicitVRLittleEndian, frozenset({0x00080018}))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "SOPInstanceUID" not in read, "so it is refused as what cannot be understood"
    assert peak < 80_000_000


SEQUENCE = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)


@pytest.mark.parametrize(
    "data",
    [
        SEQUENCE + struct.pack("<HHL", 0xFFFE, 0xE000, 0) * 100_000,
        b"".join(struct.pack("<HH2sH", 9 + 2 * (k >> 16), k & 0xFFFF, b"SH", 0) for k in range(40_000)),
        (SEQUENCE + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)) * 100_000,
    ],
    ids=["items", "elements", "nested"],
)
def test_a_header_of_nothing_but_elements_takes_no_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(Unreadable, match="cannot be parsed"):
            read_header(memoryview(data), UID(ExplicitVRLittleEndian), frozenset({0x00080018}))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2**20


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
