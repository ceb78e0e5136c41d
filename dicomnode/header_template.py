"""Headers of a derived series without decoding each source header: learnt from one slice, filled in for the others.

`dicomnode.derived_header` makes the header of one slice. What it does depends on few elements of the source, which the
slices of a series share (`DECISIVE`, private creators, which elements there are); all others come over as bytes. So
another slice with the same decisive elements gets the same bytes around its own elements. What does not fit is handed
over to the long way, and a template that would not give back the very header that it was learnt from is not used.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from io import BytesIO

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.tag import Tag

from dicomnode.derived_header import DECISIVE, SAID_ANEW, explicit_copy, source_item
from pipelines.element_index import LONG_VRS, PIXEL_DATA, Element, ElementIndex, HandedOver, index_file, items

_META_LENGTH, _META_SOP_INSTANCE = 0x00020000, 0x00020003
_CHARACTER_SET, _SOP_CLASS, _SOP_INSTANCE = 0x00080005, 0x00080016, 0x00080018
_REFERENCED_SOP_INSTANCE, _SOURCE_IMAGES, _PIXEL_REPRESENTATION = 0x00081155, 0x00082112, 0x00280103
_UNDEFINED = b"\xff\xff\xff\xff"
_ITEM = b"\xfe\xff\x00\xe0"
_PIXEL_DATA_TAG = b"\xe0\x7f\x10\x00"
_PLACEHOLDER = "0." * 31 + "0"
_MAX_SHORT = 0xFFFF
_MAX_LAYOUTS = 64
_MAX_REMEMBERED_BYTES = 4096

_Run = tuple[int, int]


class _Plan:
    """How the headers of source files of one layout are put together."""

    def __init__(self, elements: Mapping[int, Element]) -> None:
        self.elements = elements
        self.parts: list[bytes | _Run | int] = []
        """Bytes that are the same in each header, runs of the source's bytes, tags of what is made for each slice."""
        self.private_sequences: list[_Run] = []

    def add(self, part: bytes | _Run | int) -> None:
        last = self.parts[-1] if self.parts else 0
        if isinstance(part, bytes) and isinstance(last, bytes):
            self.parts[-1] = last + part
        elif isinstance(part, tuple) and isinstance(last, tuple) and last[1] == part[0]:
            self.parts[-1] = (last[0], part[1])
        else:
            self.parts.append(part)


class HeaderTemplate:
    """Headers of all slices that agree with one slice in what decides about a header.

    Parameters
    ----------
    source
        A source file, whole.
    made
        The derived file that was made of it in the long way.
    keep_private
        Whether private elements are kept.

    Raises
    ------
    HandedOver
        No template can be learnt from this slice.
    """

    def __init__(self, source: ElementIndex, made: bytes, keep_private: bool) -> None:
        self._keep_private = keep_private
        self._implicit = source.implicit
        self._written = written = index_file(made)
        pixels = written.elements[PIXEL_DATA]
        if pixels.end != len(made):
            raise HandedOver("elements behind the pixels")
        self._pixel_bytes = pixels.end - pixels.value
        self._order = _order(source)
        self._decisive_tags = tuple(filter(_decides, source.elements))
        self._decisive = source.spans(self._decisive_tags)
        self._carried = source.elements.keys() & written.elements.keys() - SAID_ANEW - {PIXEL_DATA}
        strange = written.elements.keys() - self._carried - SAID_ANEW - {PIXEL_DATA}
        if strange:
            raise HandedOver("elements of unknown origin")
        self._plans: dict[int, _Plan] = {}
        """By identity of the elements, which files of one layout share."""
        self._sop_class = _text(written, written.elements[_SOP_CLASS])
        sources = [_text(written, item[_REFERENCED_SOP_INSTANCE]) for item in items(written, _SOURCE_IMAGES)]
        again = self.header(source, _text(written, written.elements[_SOP_INSTANCE]), sources)
        if again != made[: pixels.value]:
            raise HandedOver("a header that is more than its parts")

    def fits(self, source: ElementIndex) -> bool:
        """Whether this source file agrees in what decides about a header."""
        pixels = source.elements[PIXEL_DATA]
        return (
            source.implicit == self._implicit
            and pixels.end - pixels.value == self._pixel_bytes
            and (id(source.elements) in self._plans or _order(source) == self._order)
            and source.spans(self._decisive_tags) == self._decisive
        )

    def header(self, source: ElementIndex, sop_instance_uid: str, source_uids: Sequence[str]) -> bytes:
        """The derived file up to its pixels.

        Parameters
        ----------
        source
            Of a file that `fits`.
        sop_instance_uid
            Of the derived slice.
        source_uids
            SOPInstanceUID of every slice that fed this one; the slice at the same place is the first.

        Raises
        ------
        HandedOver
            An element needs a closer look than its bytes.
        """
        content, plan = source.content, self._plan(source)
        for start, end in plan.private_sequences:
            if _PIXEL_DATA_TAG in content[start:end]:
                raise HandedOver("a private sequence that may hold an image")
        parts = [self._meta(sop_instance_uid)]
        for part in plan.parts:
            if isinstance(part, bytes):
                parts.append(part)
            elif isinstance(part, tuple):
                parts.append(content[part[0] : part[1]])
            elif part == _SOP_INSTANCE:
                parts.append(_uid(part, sop_instance_uid))
            elif part == _SOURCE_IMAGES:
                parts.append(self._source_images(source_uids))
            else:
                parts.append(self._recoded(source, part))
        return b"".join(parts)

    def _plan(self, source: ElementIndex) -> _Plan:
        plan = self._plans.get(id(source.elements))
        if plan is None:
            if len(self._plans) >= _MAX_LAYOUTS:
                self._plans.clear()
            # the plan holds the elements, so that no others get their identity
            plan = self._plans[id(source.elements)] = self._planned(source)
        return plan

    def _planned(self, source: ElementIndex) -> _Plan:
        plan = _Plan(source.elements)
        written = self._written
        for tag, element in source.elements.items():
            private = bool(tag >> 16 & 1)
            if private and element.end - element.value >= self._pixel_bytes // 2:
                raise HandedOver("a private element as large as an image")
            if private and element.vr in (b"SQ", b""):
                plan.private_sequences.append((element.start, element.end))
        for tag, made in written.elements.items():
            if tag in (_SOP_INSTANCE, _SOURCE_IMAGES):
                plan.add(tag)
            elif tag not in self._carried:
                plan.add(written.content[made.start : made.value if tag == PIXEL_DATA else made.end])
            else:
                self._plan_carried(plan, source, tag, made.vr)
        return plan

    def _plan_carried(self, plan: _Plan, source: ElementIndex, tag: int, vr: bytes) -> None:
        element = source.elements[tag]
        undefined = source.content[element.value - 4 : element.value] == _UNDEFINED
        if vr == b"SQ" and (undefined or source.implicit or not self._keep_private):
            plan.add(tag)
        elif undefined:
            raise HandedOver("an undefined length outside of a sequence")
        elif source.implicit:
            plan.add(_head(tag, vr, element.end - element.value))
            plan.add((element.value, element.end))
        else:
            plan.add((element.start, element.end))

    def _recoded(self, source: ElementIndex, tag: int) -> bytes:
        """A sequence as Explicit VR Little Endian with items of defined length."""
        element = source.elements[tag]
        span = source.content[element.start : element.end]
        context = source.spans((_CHARACTER_SET, _PIXEL_REPRESENTATION))
        recode = _recoded if len(span) <= _MAX_REMEMBERED_BYTES else _recoded.__wrapped__
        return recode(tag, span, context, source.implicit, self._keep_private)

    def _source_images(self, source_uids: Sequence[str]) -> bytes:
        content = b"".join([_item(self._sop_class, uid, k == 0) for k, uid in enumerate(source_uids)])
        return _head(_SOURCE_IMAGES, b"SQ", len(content)) + content

    def _meta(self, sop_instance_uid: str) -> bytes:
        """Preamble and file meta information (PS3.10 section 7.1)."""
        made, meta = self._written.content, self._written.meta
        length, own = meta[_META_LENGTH], meta[_META_SOP_INSTANCE]
        body = (
            made[length.end : own.start]
            + _uid(_META_SOP_INSTANCE, sop_instance_uid)
            + made[own.end : self._written.data_set]
        )
        return made[: length.value] + struct.pack("<L", len(body)) + body


def _order(source: ElementIndex) -> tuple[tuple[int, bytes], ...]:
    return tuple((tag, element.vr) for tag, element in source.elements.items())


def _decides(tag: int) -> bool:
    """Whether the header depends on the value of this element: also private creators, and the type of a curve."""
    group, number = tag >> 16, tag & 0xFFFF
    return (
        tag in DECISIVE
        or (group % 2 == 1 and 0x10 <= number <= 0xFF)
        or (0x5000 <= group <= 0x50FF and number == 0x0020)
    )


@lru_cache(256)  # each slice is named by all slices that it fed
def _item(sop_class: str, uid: str, same_place: bool) -> bytes:
    """Item of SourceImageSequence."""
    before, after = _around_uid(sop_class, same_place)
    item = before + _uid(_REFERENCED_SOP_INSTANCE, uid) + after
    return _ITEM + struct.pack("<L", len(item)) + item


@lru_cache(256)
def _recoded(tag: int, span: bytes, context: bytes, implicit: bool, keep_private: bool) -> bytes:
    copy = explicit_copy(read_dataset(BytesIO(context + span), implicit, True), keep_private=keep_private)
    return _encoded(Dataset({Tag(tag): copy.get_item(Tag(tag))}))


@lru_cache(2)  # the same for all series
def _around_uid(sop_class: str, same_place: bool) -> tuple[bytes, bytes]:
    """An encoded item of the source images before and behind the UID."""
    item = source_item(sop_class, _PLACEHOLDER, same_place=same_place)
    before, after = _encoded(item).split(_uid(_REFERENCED_SOP_INSTANCE, _PLACEHOLDER))
    return before, after


def _encoded(ds: Dataset) -> bytes:
    out = DicomBytesIO()
    out.is_little_endian, out.is_implicit_VR = True, False
    write_dataset(out, ds)
    return out.getvalue()


def _text(index: ElementIndex, element: Element) -> str:
    return index.content[element.value : element.end].rstrip(b"\0").decode("ascii")


def _uid(tag: int, value: str) -> bytes:
    encoded = value.encode("ascii")
    encoded += b"\0" * (len(encoded) % 2)
    return _head(tag, b"UI", len(encoded)) + encoded


def _head(tag: int, vr: bytes, length: int) -> bytes:
    """Tag, value representation and length of an element as Explicit VR Little Endian (PS3.5 section 7.1.2)."""
    if vr in LONG_VRS:
        return struct.pack("<HH2sHL", tag >> 16, tag & 0xFFFF, vr, 0, length)
    if length > _MAX_SHORT:
        raise HandedOver("a value too long for its representation")
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, length)
