"""What the node wants to know of a data set that it receives, read without trust in any byte of it.

A plain header is found by the strict index, several times quicker than pydicom reads it all; any other, and a report on
storage commitment, is read by pydicom, out of no more of the data set and into no more memory than it can need.
"""

from __future__ import annotations

import zlib
from collections.abc import MutableSequence, Set
from functools import cache, lru_cache
from io import SEEK_CUR, SEEK_SET
from typing import BinaryIO, cast

from pydicom import Dataset
from pydicom.charset import convert_encodings
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.filereader import read_dataset, read_sequence
from pydicom.tag import BaseTag
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicomnode.conditions import NUMERIC_VRS, TEXT_VRS
from pipelines.element_index import HandedOver, index_start

_PLAIN_HEADER_BYTES = 2**15
"""A CT image's header has 2 to 10 kB; a longer one than this is read by pydicom."""
_PLAIN_VRS = NUMERIC_VRS | TEXT_VRS
_IMPLICIT = {ExplicitVRLittleEndian: False, ImplicitVRLittleEndian: True}
_USUAL_CHARACTER_SET_BYTES = 128
"""Room for eight of the longest defined terms (PS3.3 C.12.1.1.2)."""
_HEADER_BYTES = 16_000_000
"""So much of a data set is looked at for its header; deflated, 0.4 MB could inflate to 400."""
_MAX_VALUE_BYTES = 2**18
"""Of a value that is asked for: out of 8 bytes of a sequence pydicom makes some 700, of 2 bytes of numbers 40."""
_MAX_READS = 30_000
"""Of one header by pydicom, which reads two or three times for each element; odd CT images need 1,500."""
_PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_LAST_BEFORE_FRAMES = 0x52009228
"""Then come the functional groups, of which each frame of an object may have its own."""

MAX_REPORT_INSTANCES = 20_000
"""Named in one report on storage commitment, which answers for one series: 60 turns of 320 slices are 19,200."""
_REPORT_ITEM_BYTES = 290
"""With all that may be said of an instance (PS3.4 table J.3-3), each value at its longest."""
MAX_REPORT_BYTES = MAX_REPORT_INSTANCES * _REPORT_ITEM_BYTES + 1024
_MAX_REPORT_READS = 20 * MAX_REPORT_INSTANCES
_ITEM = b"\xfe\xff\x00\xe0"
_REPORT_SEQUENCES = (0x00081198, 0x00081199)
_TRANSACTION_UID = 0x00081195


base_tag = cache(BaseTag)
"""pydicom's object for a tag that the node asks for; always the same, which dictionaries find without comparing."""
dictionary_vr = cache(dictionary_VR)
"""Of a tag that the node asks for."""
_CHARACTER_SET = base_tag(0x00080005)


def tag_of(keyword: str) -> BaseTag | None:
    """The tag of a DICOM keyword; None if it is none."""
    tag = tag_for_keyword(keyword)
    return None if tag is None else base_tag(tag)


class Unreadable(Exception):
    """A data set that cannot be parsed; the text quotes none of it."""


class _TooMuch(Exception):
    """Its name is what the log says."""


def read_header(data: memoryview, syntax: UID, tags: Set[int]) -> Dataset:
    """The elements `tags` of a data set off the network, and its character set.

    Raises
    ------
    Unreadable
    """
    try:
        return _plain_header(data, syntax, tags)
    except Exception:  # whatever is not plain about it, pydicom decides what it means
        return _parse(data, syntax, tags)


def _plain_header(data: memoryview, syntax: UID, tags: Set[int]) -> Dataset:
    implicit = _IMPLICIT[syntax]
    content = bytes(data[:_PLAIN_HEADER_BYTES])
    found: dict[BaseTag, DataElement | RawDataElement] = {}
    for number, element in index_start(content, len(data), implicit, tags).items():
        tag, vr = base_tag(number), element.vr.decode() or None
        if (vr or dictionary_vr(tag)) not in _PLAIN_VRS:
            raise HandedOver("a sequence or bytes are asked for")
        value = content[element.value : element.end]
        found[tag] = RawDataElement(tag, vr, len(value), value, 0, implicit, True)
    header = Dataset(found)
    named = found.get(_CHARACTER_SET)
    if isinstance(named, RawDataElement):
        usual = named.length <= _USUAL_CHARACTER_SET_BYTES
        header[_CHARACTER_SET], encodings = (_usual_character_set if usual else _character_set)(named)
        header.set_original_encoding(implicit, True, encodings)
    return header


def _character_set(named: RawDataElement) -> tuple[DataElement, str | MutableSequence[str]]:
    """Specific Character Set as pydicom reads it, and Python's names for it."""
    header = Dataset({_CHARACTER_SET: named})
    element = header[_CHARACTER_SET]
    return element, convert_encodings(element.value)


_usual_character_set = lru_cache(maxsize=16)(_character_set)
"""All images of a series have the same."""


def _parse(data: memoryview, syntax: UID, tags: Set[int]) -> Dataset:
    last = max((_LAST_BEFORE_FRAMES, *tags))
    try:
        plain: bytes | memoryview = data[:_HEADER_BYTES]
        if syntax.is_deflated:
            plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, _HEADER_BYTES)
        return read_dataset(
            cast(BinaryIO, _Unread(memoryview(plain), _MAX_READS, _MAX_VALUE_BYTES)),
            syntax.is_implicit_VR,
            syntax.is_little_endian,
            stop_when=lambda tag, vr, length: tag in _PIXEL_TAGS or tag > last,
            specific_tags=list(tags),
        )
    except Exception as error:  # whatever the parser stumbles over, the sender learns that we cannot read it
        raise Unreadable(f"the data set cannot be parsed ({type(error).__name__})") from error


def read_report(data: bytes, syntax: UID) -> Dataset:
    """What a report on storage commitment says of which instances (Event Information, PS3.4 table J.3-3).

    Parameters
    ----------
    data
        At most `MAX_REPORT_BYTES`.
    syntax
        A transfer syntax in little endian.

    Raises
    ------
    Unreadable
    """
    if data.count(_ITEM) > MAX_REPORT_INSTANCES:
        raise Unreadable(f"a report on more than {MAX_REPORT_INSTANCES} instances")
    try:
        report = read_dataset(
            _limited(data), syntax.is_implicit_VR, True, specific_tags=[_TRANSACTION_UID, *_REPORT_SEQUENCES]
        )
        for tag in _REPORT_SEQUENCES:
            raw = report.get_item(tag) if tag in report else None
            if isinstance(raw, RawDataElement) and raw.value:  # pydicom would read it later, as far as it goes
                implicit = raw.is_implicit_VR or raw.VR == "UN"
                items = read_sequence(_limited(raw.value), implicit, True, len(raw.value), "iso8859")
                report[tag] = DataElement(tag, "SQ", items)
    except Exception as error:  # whatever the parser stumbles over
        raise Unreadable(f"the report cannot be parsed ({type(error).__name__})") from error
    return report


def _limited(data: bytes) -> BinaryIO:
    return cast(BinaryIO, _Unread(memoryview(data), _MAX_REPORT_READS, len(data)))


class _Unread:
    """A data set as a file, without a copy of it, that may be read from a limited number of times.

    An item of a sequence takes 8 bytes of a data set and some 700 of pydicom's memory: without a limit, an object of
    legal size takes all that the machine has.
    """

    def __init__(self, data: memoryview, max_reads: int, max_value_bytes: int) -> None:
        self._data = data
        self._max_value_bytes = max_value_bytes
        self._left = max_reads
        self._at = 0

    def read(self, count: int) -> bytes:
        self._left -= 1
        if self._left < 0 or count > self._max_value_bytes:
            raise _TooMuch
        found = bytes(self._data[self._at : self._at + count])
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        self._at = offset + (self._at if whence == SEEK_CUR else 0)
        return self._at

    def tell(self) -> int:
        return self._at


def uid_of(header: Dataset, keyword: str) -> str:
    """A UID as it is written, without its padding; empty if it is absent."""
    tag = tag_of(keyword)
    item = None if tag is None else header.get_item(tag, keep_deferred=True)
    value = None if item is None else item.value
    return value.decode("latin-1").rstrip("\0 ") if isinstance(value, bytes) else str(value or "")
