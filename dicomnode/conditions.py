"""What a routing rule may ask about one attribute: the conditions, and their check when the configuration is read.

A rule is data, never an expression that is evaluated. Each condition is checked against the value representation of its
attribute (PS3.5 section 6.2), so that a range on a text or a misspelt keyword is found at start and not when the first
patient comes.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydicom.datadict import dictionary_VR, keyword_dict, tag_for_keyword

Scalar = str | int | float
"""One value of an attribute as rules see it: text, or a number in the unit of the attribute."""

MAX_TEXT_CHARS = 128
"""Longest text that a regular expression is tried on; LO (PS3.5 table 6.2-1), the usual description, has at most 64."""

MAX_PATTERN_CHARS = 256
MAX_STEPS = 20_000_000
"""Most steps that a search with a pattern may need in the worst case; some tenths of a second."""

MAX_NOT_DEPTH = 3

ASSOCIATION_KEYWORDS = frozenset({"CallingAETitle", "CalledAETitle"})
"""Subjects of rules that the association gives, not the object."""

NUMERIC_VRS = frozenset({"DS", "IS", "FD", "FL", "SS", "US", "SL", "UL", "SV", "UV", "US or SS"})
TEXT_VRS = frozenset({"AE", "AS", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT"})


@dataclass(frozen=True, slots=True)
class Equals:
    """Any value of the attribute equals any of `values`; case counts. In the file: a value, or a list of values."""

    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class Between:
    """Any value of the attribute is a number from `min` to `max`, both included, in the unit of the attribute."""

    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, slots=True)
class Matches:
    """The regular expression occurs in any value of the attribute (``re.search``); ``(?i)`` in front ignores case."""

    regex: str


@dataclass(frozen=True, slots=True)
class Exists:
    """The attribute has a value (true), or is missing or empty (false)."""

    exists: bool


@dataclass(frozen=True, slots=True)
class Not:
    """The other condition is not met; a missing attribute therefore meets ``not: CT``."""

    condition: Condition


Condition = Equals | Between | Matches | Exists | Not


class ConditionError(ValueError):
    """A condition that cannot be used: `where` (keys below the keyword) and why, in words."""

    def __init__(self, reason: str, *where: str | int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.where = where


def vr_of(keyword: str) -> str:
    """Value representation of the attribute `keyword`, ``AE`` for those of the association.

    Raises
    ------
    ConditionError
        If the data dictionary (PS3.6) has no such keyword; names the nearest ones.
    """
    if keyword in ASSOCIATION_KEYWORDS:
        return "AE"
    tag = tag_for_keyword(keyword)
    if tag is None:
        near = difflib.get_close_matches(keyword, [*keyword_dict, *ASSOCIATION_KEYWORDS], n=2, cutoff=0.75)
        advice = (
            f"did you mean {' or '.join(near)}?" if near else "use a keyword of DICOM PS3.6, e.g. SeriesDescription"
        )
        raise ConditionError(f"unknown DICOM keyword {keyword!r}; {advice}")
    return dictionary_VR(tag)


def parse(keyword: str, value: object) -> Condition:
    """The condition that `value`, as read from the file, puts on the attribute `keyword`.

    Raises
    ------
    ConditionError
        If the keyword is unknown, or the condition is malformed or does not suit the attribute.
    """
    return _parse(keyword, vr_of(keyword), value, ())


def _parse(keyword: str, vr: str, value: object, where: tuple[str | int, ...]) -> Condition:
    if isinstance(value, Equals | Between | Matches | Exists | Not):
        return value
    if not isinstance(value, dict):
        return _equals(keyword, vr, value, where)
    keys = set(value)
    if keys == {"exists"}:
        if not isinstance(value["exists"], bool):
            raise ConditionError("exists wants true or false", *where, "exists")
        return Exists(value["exists"])
    if keys == {"not"}:
        if len(where) >= MAX_NOT_DEPTH:
            raise ConditionError("not within not within not; write the condition once", *where)
        return Not(_parse(keyword, vr, value["not"], (*where, "not")))
    if keys == {"regex"}:
        return _matches(keyword, vr, value["regex"], (*where, "regex"))
    if keys and keys <= {"min", "max"}:
        return _between(keyword, vr, value, where)
    raise ConditionError(
        f"no condition has the keys {', '.join(map(str, value)) or '(none)'}; write a value, [a, list], "
        '{min: 0.5, max: 1.5}, {regex: "..."}, {exists: true} or {not: ...}',
        *where,
    )


def _equals(keyword: str, vr: str, value: object, where: tuple[str | int, ...]) -> Equals:
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise ConditionError("an empty list is met by nothing; write the values", *where)
    wanted: list[Scalar] = []
    for position, one in enumerate(values):
        here = (*where, position) if isinstance(value, list | tuple) else where
        if one is None:
            raise ConditionError("no value; write one, or {exists: false} for an attribute without value", *here)
        if vr not in NUMERIC_VRS | TEXT_VRS:
            raise ConditionError(f"{keyword} (VR {vr}) cannot be compared; only {{exists: true}} can be asked", *here)
        if vr in NUMERIC_VRS:
            if isinstance(one, bool) or not isinstance(one, int | float):
                raise ConditionError(
                    f"{keyword} is a number (VR {vr}), {one!r} is not; write the number without quotes or unit", *here
                )
            wanted.append(one)
        else:
            if not isinstance(one, str):
                raise ConditionError(f"{keyword} is text (VR {vr}), {one!r} is not; put it in quotes", *here)
            wanted.append(one.strip())
    return Equals(tuple(wanted))


def _between(keyword: str, vr: str, value: dict[str, object], where: tuple[str | int, ...]) -> Between:
    if vr not in NUMERIC_VRS:
        raise ConditionError(f"min and max are for numbers, {keyword} is none (VR {vr}); use a list or a regex", *where)
    limits: dict[str, float] = {}
    for name, limit in value.items():
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not math.isfinite(limit):
            raise ConditionError(
                f"{limit!r} is not a number; write the number in the unit of {keyword}, without quotes or unit",
                *where,
                name,
            )
        limits[name] = float(limit)
    between = Between(**limits)
    if between.min is not None and between.max is not None and between.max < between.min:
        raise ConditionError(f"max {between.max:g} is below min {between.min:g}; exchange them", *where, "max")
    return between


def _matches(keyword: str, vr: str, pattern: object, where: tuple[str | int, ...]) -> Matches:
    if vr not in TEXT_VRS:
        raise ConditionError(f"a regex is for text, {keyword} is none (VR {vr}); use min and max, or a value", *where)
    if not isinstance(pattern, str) or not pattern:
        raise ConditionError("a regex wants a text in quotes", *where)
    if len(pattern) > MAX_PATTERN_CHARS:
        raise ConditionError(f"longer than {MAX_PATTERN_CHARS} characters; split it over several routes", *where)
    try:
        compiled(pattern)
        slow = why_slow(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConditionError(f"{pattern!r} is no regular expression ({error}); correct it", *where) from error
    if slow:
        raise ConditionError(f"{pattern!r} could take hours on some texts: {slow}; simplify it", *where)
    return Matches(pattern)


@functools.cache
def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression, compiled once in the life of the process."""
    return re.compile(pattern)


def why_slow(pattern: str) -> str | None:
    """Why a search for `pattern` may take very long on some text; None for one that surely does not.

    Backtracking tries every combination of choices. Within a repetition they multiply with each round, which is refused
    outright; otherwise u repetitions without a limit share out n characters in at most n^(u+1)/(u+1)! ways, counting
    where the match begins, and other choices multiply that. A few harmless patterns are refused with the others.
    """
    tree = importlib.import_module("re._parser").parse(pattern)
    alternatives = tree[0][1][1] if len(tree) == 1 and str(tree[0][0]) == "BRANCH" else [tree]
    steps = 0.0
    for alternative in alternatives:
        unbounded, ways = 0, 1
        for choices, repeated in _choice_points(alternative, repeated=False):
            if repeated:
                return "a choice within a repetition, as in (a+)+ or (ab|c)*"
            unbounded += choices >= MAX_TEXT_CHARS
            ways *= 1 if choices >= MAX_TEXT_CHARS else choices
        steps += ways * MAX_TEXT_CHARS ** (unbounded + 1) / math.factorial(unbounded + 1)
    return "too many of *, +, ?, {m,n} and (a|b) after one another" if steps > MAX_STEPS else None


def _choice_points(tree: Any, repeated: bool) -> Iterator[tuple[int, bool]]:
    """Each point where a search has choices: how many, and whether the point lies within something that repeats."""
    for operation, argument in tree:
        name = str(operation)
        if name in {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}:
            lowest, highest, body = argument
            if lowest != highest:
                yield int(highest) - int(lowest) + 1, repeated
            yield from _choice_points(body, repeated or highest > 1)
        elif name == "BRANCH":
            yield len(argument[1]), repeated
            for alternative in argument[1]:
                yield from _choice_points(alternative, repeated)
        elif name == "SUBPATTERN":
            yield from _choice_points(argument[-1], repeated)
        elif name == "ATOMIC_GROUP":
            yield from _choice_points(argument, repeated)
        elif name in {"ASSERT", "ASSERT_NOT"}:
            yield from _choice_points(argument[1], repeated)
        elif name == "GROUPREF_EXISTS":
            for alternative in argument[1:]:
                yield from _choice_points(alternative or (), repeated)
