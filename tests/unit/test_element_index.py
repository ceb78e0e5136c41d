"""Where the scanner finds elements, against pydicom's own offsets, and what it leaves to pydicom."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from ct_builder import edit, phantom, write_series
from pydicom import Dataset, dcmread
from pydicom.dataelem import RawDataElement
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from pipelines.element_index import PIXEL_DATA, HandedOver, index_file, index_head, index_start, items


def _nested(depth: int) -> Dataset:
    """Sequences of undefined length in one another."""
    ds = Dataset()
    ds.CodeValue = "X"
    for _ in range(depth):
        outer = Dataset()
        outer.ConceptCodeSequence = Sequence([ds])
        outer["ConceptCodeSequence"].is_undefined_length = True
        ds.is_undefined_length_sequence_item = True
        ds = outer
    return ds


def plain(folder: Path, syntax: str = ExplicitVRLittleEndian, depth: int = 2) -> Path:
    """A file with sequences of defined and of undefined length."""
    (path,) = write_series(folder, phantom(1, 16))

    def change(ds: Dataset) -> None:
        item = Dataset()
        item.Manufacturer, item.SeriesDescription = "Somebody", "inside"
        ds.ContributingEquipmentSequence = Sequence([item, item])
        ds.update(_nested(depth))
        ds.private_block(0x0029, "VENDOR", create=True).add_new(0x01, "UN", b"\1\2\3\4")
        ds.file_meta.TransferSyntaxUID = UID(syntax)

    edit(path, change)
    return path


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_elements_are_where_pydicom_finds_them(tmp_path: Path, syntax: str) -> None:
    path = plain(tmp_path, syntax)
    index, head, ds = index_file(path.read_bytes()), index_head(path), dcmread(path)
    assert list(index.elements) == [int(tag) for tag in ds.keys()]
    assert head.elements == index.elements
    start, size = path.read_bytes()[index.data_set : 2000], path.stat().st_size - index.data_set
    for tags in (frozenset(index.elements), frozenset({0x00080018, 0x00091001, 0x00280010})):
        expected = {
            tag: (vr, *(offset - index.data_set for offset in offsets))
            for tag, (vr, *offsets) in index.elements.items()
            if tag in tags
        }
        assert index_start(start, size, syntax == ImplicitVRLittleEndian, tags) == expected
    for tag in ds.keys():
        element = ds.get_item(tag)
        if isinstance(element, RawDataElement):
            assert index.elements[tag].value == element.value_tell
            assert index.value(tag) == (element.value or b"")
            assert index.elements[tag].vr.decode() == (element.VR or "")
    assert [e.tag for e in ds.file_meta] == list(index.meta)
    assert index.elements[PIXEL_DATA].end == path.stat().st_size
    # in the order of the file, without gaps: every byte belongs to one element
    ends = [index.data_set, *(element.end for element in index.elements.values())]
    assert ends[:-1] == [element.start for element in index.elements.values()]


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_items(tmp_path: Path, syntax: str) -> None:
    index = index_file(plain(tmp_path, syntax).read_bytes())
    found = list(items(index, 0x0018A001))
    assert [index.content[item[0x00080070].value : item[0x00080070].end] for item in found] == [b"Somebody"] * 2
    assert [list(item) for item in items(index, 0x0040A168)] == [[0x0040A168]]
    assert list(items(index, 0x00082112)) == []
    if syntax == ExplicitVRLittleEndian:
        with pytest.raises(HandedOver, match="no sequence"):
            list(items(index, 0x00080018))


def test_what_is_left_to_pydicom(tmp_path: Path) -> None:
    path = plain(tmp_path)
    whole = path.read_bytes()
    (tmp_path / "rle").mkdir()
    (rle,) = write_series(tmp_path / "rle", phantom(1, 16), transfer_syntax=RLELossless)
    swapped = whole.replace(ExplicitVRLittleEndian.encode(), ExplicitVRBigEndian.encode())
    odd = whole.replace(b"\x18\0\x60\0DS\4\x00120 ", b"\x18\0\x60\0DS\3\x00120")
    unknown = whole.replace(b"\x18\0\x60\0DS", b"\x18\0\x60\0ZZ")
    twice = whole.replace(b"\x18\0\x60\0DS\4\x00120 ", b"\x18\0\x60\0DS\4\x00120 " * 2)
    for content in (rle.read_bytes(), swapped, odd, unknown, twice, whole[132:], whole[:-1], whole + b"\0" * 9, b""):
        assert content != whole
        with pytest.raises(HandedOver):
            index_file(content)


def test_a_header_beyond_the_first_read(tmp_path: Path) -> None:
    path = plain(tmp_path)
    edit(path, lambda ds: ds.add_new(0x00291002, "OB", bytes(100_000)))
    index = index_head(path)
    assert index.elements[0x00291002].end - index.elements[0x00291002].value == 100_000
    assert index.value(0x00280010) == b"\x10\0"


def test_a_layout_is_not_mistaken_for_another(tmp_path: Path) -> None:
    """Files of one size: the same elements at other places, other elements, another representation."""
    path = plain(tmp_path)
    whole = path.read_bytes()
    first = index_head(path)
    assert index_head(path).elements is first.elements  # remembered
    longer = whole.replace(b"\x18\0\x60\0DS\4\x00120 ", b"\x18\0\x60\0DS\6\x00120.0 ").replace(
        b"SH\2\x001 ", b"SH\0\0", 1
    )
    other_tag = whole.replace(b"\x18\0\x60\0DS", b"\x18\0\x61\0DS")
    other_vr = whole.replace(b"\x18\0\x60\0DS", b"\x18\0\x60\0LO")
    for content in (longer, other_tag, other_vr):
        assert len(content) == len(whole)
        assert content != whole
        path.write_bytes(content)
        index = index_head(path)
        assert index.elements != first.elements
        assert list(index.elements) == [int(tag) for tag in dcmread(path).keys()]
    path.write_bytes(whole.replace(b"120 ", b"140 "))
    assert index_head(path).elements is first.elements
    assert index_head(path).value(0x00180060) == b"140 "


def test_depth_is_bounded(tmp_path: Path) -> None:
    index_head(plain(tmp_path, depth=6))
    with pytest.raises(HandedOver, match="too deep"):
        index_head(plain(tmp_path, depth=40))
    whole = plain(tmp_path).read_bytes()
    opened = b"\x40\0\x68\xa1SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff"
    at = whole.index(opened)
    with pytest.raises(HandedOver):  # not a RecursionError
        index_file(whole[:at] + opened * 100_000 + whole[at:])


def test_time_grows_with_the_bytes_alone(tmp_path: Path) -> None:
    """Four million bytes of empty items: seconds at most, on any machine."""
    whole = plain(tmp_path).read_bytes()
    opened = b"\x40\0\x68\xa1SQ\0\0\xff\xff\xff\xff"
    at = whole.index(opened) + len(opened)
    begun = time.process_time()
    index = index_file(whole[:at] + struct.pack("<HHL", 0xFFFE, 0xE000, 0) * 500_000 + whole[at:])
    assert time.process_time() - begun < 10
    assert index.value(0x00280010) == b"\x10\0"
