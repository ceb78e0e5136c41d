"""Typed access to the elements of a header that nobody vouches for: the right type, absent, or `BadElement`."""

from __future__ import annotations

import math
from typing import Any

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from pipelines.element_index import HandedOver
from pipelines.indexed_header import IndexedHeader

Header = Dataset | IndexedHeader


class BadElement(ValueError):
    """An element holds what its definition does not allow; the message names the element, never its value."""


def text(ds: Header, keyword: str) -> str:
    """Value as text without surrounding blanks; empty if absent or empty."""
    value = _value(ds, keyword)
    return "" if value is None else str(value).strip()


def texts(ds: Header, keyword: str) -> list[str]:
    """Values of a multi-valued text element; empty if absent or empty."""
    value = _value(ds, keyword)
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(part) for part in value]


def items(ds: Header, keyword: str) -> list[Dataset]:
    """Items of a sequence; empty if absent or no sequence."""
    value = _value(ds, keyword)
    return [item for item in value if isinstance(item, Dataset)] if isinstance(value, Sequence) else []


def numbers(ds: Header, keyword: str, count: int) -> tuple[float, ...] | None:
    """`count` finite numbers; None if the element is absent or empty.

    Raises
    ------
    BadElement
        If there are more or fewer, or one is not finite.
    """
    value = _value(ds, keyword)
    if value is None:
        return None
    try:
        found = tuple(float(part) for part in ([value] if count == 1 else value))
    except (TypeError, ValueError, OverflowError):
        found = ()
    if len(found) != count or not all(map(math.isfinite, found)):
        raise BadElement(f"{keyword} does not hold {count} finite number(s)")
    return found


def shown(value: str) -> str:
    """`value` for a reason or a log line: one line of ASCII, at most 64 characters."""
    return value.encode("unicode_escape").decode("ascii").replace("\\\\", "\\")[:64]


def _value(ds: Header, keyword: str) -> Any:
    """Value of an element; None if absent or empty."""
    try:
        value = ds.get(keyword)
    except HandedOver:
        raise
    except Exception as error:  # raw bytes are converted on access, by whatever the file says they are
        raise BadElement(f"{keyword} cannot be read ({type(error).__name__})") from error
    return None if value is None or value == "" else value
