"""Values of a header that `pipelines.element_index` found, as pydicom reads them.

Nothing is decoded here by rules of our own: the bytes of one element, with those that its meaning depends on, go
through pydicom, and as slices of a series share most of their values, most are decoded once.
"""

from __future__ import annotations

from functools import cache, lru_cache
from io import BytesIO
from typing import Any

from pydicom.charset import python_encoding
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.filereader import read_dataset

from pipelines.element_index import ElementIndex, HandedOver

_CHARACTER_SET = 0x00080005
_PIXEL_REPRESENTATION = 0x00280103
_MAX_VALUE_BYTES = 2**14
"""Longer values are handed over: none that is asked for here is, and the length of a longer one may look like a VR."""
_MAX_REMEMBERED_BYTES = 256
"""Longer values are decoded each time: what is remembered came over the network and is bounded."""
_MAX_REMEMBERED = 4096


class IndexedHeader:
    """The values of one header by keyword, in place of a pydicom data set.

    Raises
    ------
    HandedOver
        The character set is none that the standard names.
    """

    def __init__(self, index: ElementIndex) -> None:
        self.index = index
        self.asked = {_CHARACTER_SET, _PIXEL_REPRESENTATION}
        """Tags of all elements that a value may depend on, of those asked for so far."""
        self._context = index.spans(sorted(self.asked))
        """What the meaning of other elements depends on: text on the character set, US or SS on the pixels' sign."""
        for name in (index.value(_CHARACTER_SET) or b"").split(b"\\"):
            if name.strip().decode("latin-1") not in python_encoding:
                raise HandedOver("an unknown character set")

    def get(self, keyword: str) -> Any:
        """Value of an element, None if it is absent, as `pydicom.Dataset.get` gives it.

        Raises
        ------
        HandedOver
            The element is a sequence, or of unknown representation.
        Exception
            Whatever pydicom raises on a value that it cannot decode.
        """
        tag, is_sequence = _definition(keyword)
        self.asked.add(tag)
        element = self.index.elements.get(tag)
        if element is None:
            return None
        length = element.end - element.value
        if is_sequence or element.vr in (b"SQ", b"UN") or length > _MAX_VALUE_BYTES:
            raise HandedOver(f"{keyword} is a sequence, of unknown representation, or very long")
        decode = _decoded if length <= _MAX_REMEMBERED_BYTES else _decoded.__wrapped__
        return decode(keyword, self.index.spans((tag,)), self._context, self.index.implicit)


@cache  # as many as there are keywords in our code
def _definition(keyword: str) -> tuple[int, bool]:
    """Tag of a keyword, and whether it is a sequence."""
    tag = tag_for_keyword(keyword)
    assert tag is not None, keyword
    return tag, dictionary_VR(tag) == "SQ"


@lru_cache(_MAX_REMEMBERED)
def _decoded(keyword: str, span: bytes, context: bytes, implicit: bool) -> Any:
    """Value of the element `span` in a data set that else has the elements `context` only."""
    return read_dataset(BytesIO(context + span), implicit, True).get(keyword)
