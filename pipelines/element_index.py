"""Where the elements of a DICOM file are: a strict scanner for the files that every scanner writes.

It knows Explicit and Implicit VR Little Endian (PS3.5 section 7.1) with uncompressed pixels, finds top-level elements
and decodes nothing. It never guesses: what is not exactly as the standard says is handed over (`HandedOver`), and
whoever asked reads the file with pydicom, which knows what broken files mean. So a file has one meaning, found in one
of two ways. Bytes come from the network: every length is checked against what is there, and depth is bounded.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.datadict import dictionary_VR

EXPLICIT_LITTLE = b"1.2.840.10008.1.2.1"
IMPLICIT_LITTLE = b"1.2.840.10008.1.2"
PIXEL_DATA = 0x7FE00010
_META_LENGTH, _TRANSFER_SYNTAX = 0x00020000, 0x00020010
_LAST_BEFORE_PIXELS = 0x7FE00000
"""Group length of the pixels' group, which old files have."""
MAX_FILE_BYTES = 64 * 2**20
"""Larger files are handed over; 2048 x 2048 pixels of 16 bits are 8 MiB."""

_HEAD_BYTES = 2**15
"""Read first: the header of a CT image has 2 to 10 kB, seldom more."""
_MAX_DEPTH = 16
"""Nesting of sequences of undefined length; clinical headers have up to 5."""
_UNDEFINED = 0xFFFFFFFF
_ANY_TAG = range(2**32)
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_SHORT = frozenset(
    (
        *(b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL"),
        *(b"SS", b"ST", b"TM", b"UI", b"UL", b"US"),
    )
)
"""VRs with a two-byte length (PS3.5 table 7.1-2)."""
LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
"""VRs with two reserved bytes and a four-byte length (PS3.5 table 7.1-1)."""
_EXPLICIT = struct.Struct("<HH2sH").unpack_from
_IMPLICIT = struct.Struct("<HHL").unpack_from
_LENGTH = struct.Struct("<L").unpack_from
_PREFIX = 128
"""Bytes before ``DICM`` (PS3.10 section 7.1)."""


class HandedOver(Exception):
    """These bytes are not plain enough for this scanner; read them with pydicom."""


class Element(NamedTuple):
    """Where one element is, as offsets in the file."""

    vr: bytes
    """As written; empty in an implicit data set."""
    start: int
    """Of its tag."""
    value: int
    """Of its first byte of value."""
    end: int
    """Behind its value, the delimiter of an undefined length included."""


@dataclass(frozen=True, slots=True)
class ElementIndex:
    """The top-level elements of one file."""

    content: bytes
    """The file, at least up to its pixels."""
    file_bytes: int
    """Size of the file."""
    implicit: bool
    meta: Mapping[int, Element]
    """File meta information by tag."""
    data_set: int
    """Where the data set begins."""
    elements: Mapping[int, Element]
    """By tag, ascending. The last of a head that was read alone is PixelData, whose value lies behind `content`."""

    def value(self, tag: int) -> bytes | None:
        """Encoded value; None if the element is absent."""
        element = self.elements.get(tag)
        return None if element is None else self.content[element.value : element.end]

    def spans(self, tags: Iterable[int]) -> bytes:
        """These elements as they are encoded, one after the other; nothing of those that are absent."""
        content, elements = self.content, self.elements
        found = [elements[tag] for tag in tags if tag in elements]
        return b"".join([content[element.start : element.end] for element in found])


def index_head(path: Path) -> ElementIndex:
    """Index the elements of a file up to and with PixelData, which is not read.

    Raises
    ------
    HandedOver
        The file is not one for this scanner.
    OSError
        If it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size > MAX_FILE_BYTES:
            raise HandedOver("too large to be read at once")
        head = os.pread(descriptor, _HEAD_BYTES, 0)
        known = _known(head, size)
        if known is not None:
            return known
        try:
            index = _index(head, size, whole=False)
            _remember(index)
            return index
        except HandedOver:
            if size <= len(head):
                raise
        return _index(os.pread(descriptor, size, 0), size, whole=False)
    finally:
        os.close(descriptor)


def index_start(content: bytes, size: int, implicit: bool, tags: Container[int]) -> dict[int, Element]:
    """The elements `tags` of a data set of `size` bytes, from its beginning up to and with PixelData, by tag.

    For bytes that nobody vouches for yet: what is remembered of a layout may be many times the size of a header, so
    nothing is. The other elements are checked as strictly, and not kept.

    Raises
    ------
    HandedOver
        The data set is not one for this scanner, or its header longer than `content`.
    """
    return _index_data_set(content, 0, size, implicit, tags)[0]


def index_file(content: bytes) -> ElementIndex:
    """Index all elements of a whole file.

    Raises
    ------
    HandedOver
        The file is not one for this scanner.
    """
    known = _known(content, len(content))
    if known is not None and known.elements[PIXEL_DATA].end == len(content):
        return known
    index = _index(content, len(content), whole=True)
    if index.elements[PIXEL_DATA].value <= _HEAD_BYTES and index.elements[PIXEL_DATA].end == len(content):
        _remember(index)
    return index


def items(index: ElementIndex, tag: int) -> Iterator[dict[int, Element]]:
    """The elements of each item of a sequence; nothing if it is absent.

    Raises
    ------
    HandedOver
        The sequence is not as the standard says.
    """
    sequence = index.elements.get(tag)
    if sequence is not None:
        if sequence.vr not in (b"SQ", b""):
            raise HandedOver(f"({tag:08x}) is no sequence")
        yield from _items(index.content, sequence, index.implicit)


def _items(content: bytes, sequence: Element, implicit: bool) -> Iterator[dict[int, Element]]:
    at, end = sequence.value, sequence.end
    while at < end:
        found, length = _item(content, at, end)
        if found == _SEQUENCE_END:
            return
        elements: dict[int, Element] = {}
        at = _walk_item(content, at + 8, length, end, implicit, 0, elements)
        yield elements


class _Layout(NamedTuple):
    """The way that the scanner took through one header.

    It depends on the bytes that the scanner looked at and on nothing else: a header with the same bytes at the same
    positions has the same elements at the same places. Slices of one series have few layouts.
    """

    positions: NDArray[np.intp]
    """Of all bytes before the pixels but those of values that were stepped over."""
    looked_at: bytes
    known: ElementIndex

    def of(self, head: bytes) -> ElementIndex | None:
        """The elements of another header of the same layout; None if it has another one."""
        content = np.frombuffer(head, np.uint8)
        if content.size <= self.positions[-1] or content[self.positions].tobytes() != self.looked_at:
            return None
        return replace(self.known, content=head)


_layouts: dict[int, tuple[_Layout, ...]] = {}
"""By size of the file."""
_MAX_SIZES, _MAX_LAYOUTS = 64, 4


def _known(head: bytes, size: int) -> ElementIndex | None:
    for layout in _layouts.get(size, ()):
        index = layout.of(head)
        if index is not None:
            return index
    return None


def _remember(index: ElementIndex) -> None:
    stepped_over = np.zeros(index.elements[PIXEL_DATA].value, np.bool_)
    stepped_over[:_PREFIX] = True
    for elements in (index.meta, index.elements):
        for element in _leaves(index.content, elements.values(), index.implicit):
            stepped_over[element.value : element.end] = True
    for tag in (_META_LENGTH, _TRANSFER_SYNTAX):
        element = index.meta[tag]
        stepped_over[element.value : element.end] = False
    positions = np.flatnonzero(~stepped_over)
    looked_at = np.frombuffer(index.content, np.uint8)[positions].tobytes()
    if len(_layouts) >= _MAX_SIZES:
        _layouts.clear()  # another series
    same_size = _layouts.get(index.file_bytes, ())
    layout = _Layout(positions, looked_at, replace(index, content=b""))
    _layouts[index.file_bytes] = (layout, *same_size[: _MAX_LAYOUTS - 1])


def _leaves(content: bytes, elements: Iterable[Element], implicit: bool) -> Iterator[Element]:
    """The elements whose values the scanner stepped over, at any depth."""
    for element in elements:
        undefined = content[element.value - 4 : element.value] == b"\xff\xff\xff\xff"
        if undefined and element.vr in (b"SQ", b""):
            for item in _items(content, element, implicit):
                yield from _leaves(content, item.values(), implicit)
        else:
            yield element


def _index(content: bytes, size: int, *, whole: bool) -> ElementIndex:
    """`content` is the beginning of a file of `size` bytes; with `whole` what follows the pixels is indexed too."""
    meta, data_set = _meta(content)
    syntax = meta.get(_TRANSFER_SYNTAX)
    name = b"" if syntax is None else content[syntax.value : syntax.end].rstrip(b"\0")
    if name not in (EXPLICIT_LITTLE, IMPLICIT_LITTLE):
        raise HandedOver("another transfer syntax")
    implicit = name == IMPLICIT_LITTLE
    elements, behind = _index_data_set(content, data_set, size, implicit, _ANY_TAG)
    if whole and _walk(content, behind, size, implicit, 0, elements, None) != size:
        raise HandedOver("the file ends inside an element")
    return ElementIndex(content, size, implicit, meta, data_set, elements)


def _index_data_set(
    content: bytes, begin: int, size: int, implicit: bool, tags: Container[int]
) -> tuple[dict[int, Element], int]:
    """The elements `tags` of the data set at `begin` up to and with PixelData, and the offset behind that."""
    if int.from_bytes(content[begin : begin + 2], "little") < 8:
        raise HandedOver("a group that no data set has")
    if implicit and content[begin + 4 : begin + 6].isalpha():
        raise HandedOver("value representations where there should be none")
    elements: dict[int, Element] = {}
    at = _walk(content, begin, len(content), implicit, 0, elements, PIXEL_DATA, tags=tags)
    if at == len(content):
        raise HandedOver("no pixels")
    pixels = _pixels(content, at, implicit)
    if pixels.end > size:
        raise HandedOver("the file ends inside its pixels")
    if PIXEL_DATA in tags:
        elements[PIXEL_DATA] = pixels
    return elements, pixels.end


def _meta(content: bytes) -> tuple[dict[int, Element], int]:
    """File meta information (PS3.10 section 7.1), which says its own length, and where it ends."""
    begin = _PREFIX + 4
    if (
        content[_PREFIX:begin] != b"DICM"
        or content[begin : begin + 8] != b"\2\0\0\0UL\4\0"
        or len(content) < begin + 12
    ):
        raise HandedOver("no file meta information")
    end = begin + 12 + _LENGTH(content, begin + 8)[0]
    if end > len(content):
        raise HandedOver("the file ends inside its file meta information")
    meta: dict[int, Element] = {}
    _walk(content, begin, end, False, 0, meta, None)
    if max(meta) >> 16 != 2:
        raise HandedOver("the file meta information does not end where it says")
    return meta, end


def _pixels(content: bytes, at: int, implicit: bool) -> Element:
    """PixelData, whose tag is at `at`; its value may lie behind `content`."""
    if len(content) < at + 12:
        raise HandedOver("the content ends before the pixels")
    if implicit:
        vr, value, length = b"", at + 8, _LENGTH(content, at + 4)[0]
    else:
        vr, value, length = content[at + 4 : at + 6], at + 12, _LENGTH(content, at + 8)[0]
        if vr not in (b"OB", b"OW") or content[at + 6 : at + 8] != b"\0\0":
            raise HandedOver("pixels of another kind")
    if length == _UNDEFINED or length % 2:
        raise HandedOver("compressed pixels, or of odd length")
    return Element(vr, at, value, value + length)


def _walk(
    content: bytes,
    at: int,
    end: int,
    implicit: bool,
    depth: int,
    elements: dict[int, Element],
    stop: int | None,
    delimited: bool = False,
    tags: Container[int] = _ANY_TAG,
) -> int:
    """Add the elements `tags` from `at` to `end`, all of which are checked; the offset where it stopped.

    Stops at the tag `stop`, or, with `delimited`, behind the delimiter of the item that they stand in, which must come.
    """
    last = max(elements) if elements else 0
    vr = b""
    try:
        while at < end:
            if implicit:
                group, number, length = _IMPLICIT(content, at)
            else:
                group, number, vr, length = _EXPLICIT(content, at)
            tag = group << 16 | number
            value = at + 8
            if not last < tag <= _LAST_BEFORE_PIXELS:
                if tag == stop:
                    return at
                if tag == _ITEM_END and delimited and content[at + 4 : value] == b"\0\0\0\0":
                    return value
                if group == 0xFFFE or (group == 0x7FE0 and depth == 0):
                    raise HandedOver("a delimiter out of place, or pixels of another kind")
                if tag <= last:
                    raise HandedOver("elements out of order")
            if not implicit and vr not in _SHORT:
                if vr not in LONG_VRS or length:
                    raise HandedOver("an unknown value representation")
                (length,) = _LENGTH(content, value)
                value += 4
            behind = value + length
            if length % 2:  # as the undefined length is
                if length != _UNDEFINED:
                    raise HandedOver("a value of odd length")
                behind = _walk_items(content, tag, vr, value, end, implicit, depth)
            if behind > end:
                raise HandedOver("the content ends inside a value")
            if tag in tags:
                elements[tag] = Element(vr, at, value, behind)
            last, at = tag, behind
    except struct.error:
        raise HandedOver("the content ends inside an element") from None
    if delimited:
        raise HandedOver("an item without an end")
    return at


def _walk_items(content: bytes, tag: int, vr: bytes, at: int, end: int, implicit: bool, depth: int) -> int:
    """Offset behind a sequence of undefined length, all items of which are walked through."""
    if depth >= _MAX_DEPTH:
        raise HandedOver("sequences nested too deep")
    if implicit:
        try:
            known = str(dictionary_VR(tag))
        except KeyError:
            known = "SQ"  # if it has items, which is seen to below
        if known != "SQ":
            raise HandedOver("an undefined length outside of a sequence")
    elif vr != b"SQ":
        raise HandedOver("an undefined length outside of a sequence")
    while True:
        found, length = _item(content, at, end)
        if found == _SEQUENCE_END:
            return at + 8
        at = _walk_item(content, at + 8, length, end, implicit, depth + 1, {})


def _item(content: bytes, at: int, end: int) -> tuple[int, int]:
    """Tag and length of an item, or of the end of a sequence (PS3.5 section 7.5)."""
    if at + 8 > end:
        raise HandedOver("the content ends inside a sequence")
    group, number, length = _IMPLICIT(content, at)
    tag = group << 16 | number
    if tag != _ITEM and (tag != _SEQUENCE_END or length):
        raise HandedOver("a sequence that holds other than items")
    return tag, length


def _walk_item(
    content: bytes, at: int, length: int, end: int, implicit: bool, depth: int, elements: dict[int, Element]
) -> int:
    """Add the elements of one item; the offset behind it."""
    if length == _UNDEFINED:
        return _walk(content, at, end, implicit, depth + 1, elements, None, delimited=True)
    behind = at + length
    if behind > end:
        raise HandedOver("the content ends inside an item")
    if _walk(content, at, behind, implicit, depth + 1, elements, None) != behind:
        raise HandedOver("an item that does not end where it says")
    return behind
