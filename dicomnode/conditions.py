"""What a routing rule may ask about one attribute: the conditions, their check at start-up, and their answer for a value.

A rule is data, never an expression that is evaluated. Each condition is checked against the attribute's value
representation (PS3.5 section 6.2) when the configuration is read, so that a range on a text or a misspelt keyword is found
at start and not when the first patient comes.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, FiniteFloat, Strict, StrictBool, Tag, field_validator
from pydantic_core import PydanticCustomError
from pydicom.datadict import dictionary_VR, keyword_dict, tag_for_keyword

Scalar = str | int | float
"""One value of an attribute as rules see it: text, or a number."""

MAX_TEXT_CHARS = 256
"""Longest text that a regular expression is tried on; LO (PS3.5 table 6.2-1), the usual description, has at most 64."""

MAX_PATTERN_CHARS = 256

ASSOCIATION_KEYWORDS = frozenset({"CallingAETitle", "CalledAETitle"})
"""Names of rule subjects that the association gives, not the object."""

NUMERIC_VRS = frozenset({"DS", "IS", "FD", "FL", "SS", "US", "SL", "UL", "SV", "UV", "US or SS"})
TEXT_VRS = frozenset({"AE", "AS", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT"})


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)


class Equals(_Part):
    """Any value of the attribute equals any of `values`; case counts. In the file: a value, or a list of values."""

    values: tuple[Scalar, ...] = Field(min_length=1)

    @field_validator("values", mode="before")
    @classmethod
    def _comparable(cls, values: Any) -> Any:
        for value in values if isinstance(values, list | tuple) else ():
            if isinstance(value, bool) or value is None:
                raise ValueError(f"{_yaml(value)} is never the value of an attribute; put text in quotes")
            if not isinstance(value, str | int | float):
                raise ValueError("a list here may hold only texts and numbers")
        return values


class Between(_Part):
    """Any value of the attribute is a number from `min` to `max`, both included, in the unit of the attribute."""

    min: Annotated[FiniteFloat, Strict()] | None = None
    max: Annotated[FiniteFloat, Strict()] | None = None

    @field_validator("max", mode="after")
    @classmethod
    def _not_below_min(cls, highest: float | None, info: Any) -> float | None:
        lowest = info.data.get("min")
        if highest is not None and lowest is not None and highest < lowest:
            raise ValueError(f"max {highest:g} is below min {lowest:g}; no number lies between")
        return highest


class Matches(_Part):
    """The regular expression occurs in any value of the attribute (``re.search``); ``(?i)`` in front ignores case."""

    regex: Annotated[str, Strict()] = Field(min_length=1, max_length=MAX_PATTERN_CHARS)

    @field_validator("regex")
    @classmethod
    def _sound(cls, pattern: str) -> str:
        try:
            compiled_pattern(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        refuse_slow(pattern)
        return pattern


class Exists(_Part):
    """The attribute is there and not empty (true), or missing or empty (false)."""

    exists: StrictBool


class Not(_Part):
    """The other condition does not hold; a missing attribute meets it, unless that other one is ``exists``."""

    condition: Condition = Field(alias="not")


def _kind(value: Any) -> str | None:
    """Tag of the condition that `value` (from the file, or already made) stands for."""
    if isinstance(value, Equals | Between | Matches | Exists | Not):
        return type(value).__name__
    if not isinstance(value, Mapping):
        return "Equals"
    keys = set(value)
    for names, tag in (
        ({"min", "max"}, "Between"),
        ({"regex"}, "Matches"),
        ({"exists"}, "Exists"),
        ({"not"}, "Not"),
    ):
        if keys and keys <= names:
            return tag
    return None


def _as_equals(value: Any) -> Any:
    """Make the file's bare value or list a mapping, as the model wants it."""
    if isinstance(value, Equals | Mapping):
        return value
    return {"values": value if isinstance(value, list | tuple) else [value]}


def _spelt_out(value: Any, handler: Any) -> Any:
    return handler(value)


Condition = Annotated[
    Annotated[Equals, Tag("Equals")]
    | Annotated[Between, Tag("Between")]
    | Annotated[Matches, Tag("Matches")]
    | Annotated[Exists, Tag("Exists")]
    | Annotated[Not, Tag("Not")],
    Discriminator(_kind),
]
