"""Which regular expressions a condition may have: none that takes hours on a hostile text."""

from __future__ import annotations

import time

import pytest

from dicomnode import conditions


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a*)*", "(a|bc)*", "(a|aa)+$", "(a?){30}a{30}", "((ab?c)+d)*", "(?:x{2,9}){2,9}", ".*.*.*.*", "a?" * 20],
)
def test_patterns_that_may_explode_are_refused(pattern: str):
    assert conditions.why_slow(pattern) is not None


@pytest.mark.parametrize(
    "pattern",
    [
        "(?i)low.?dose|LDCT|screening",
        "^LD",
        "(lung|chest).*low",
        r"\b\d{1,3}\s*mAs\b",
        "(abc){3}",
        "(?=.*low)(?=.*dose)",
    ],
)
def test_patterns_that_people_write_are_allowed(pattern: str):
    assert conditions.why_slow(pattern) is None


@pytest.mark.parametrize(
    "pattern", ["a*a*a*b", "a?" * 12 + "a" * 12 + "b", "(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)b", ".*a.*a.*b"]
)
def test_the_slowest_patterns_that_are_allowed_take_no_more_than_moments(pattern: str):
    assert conditions.why_slow(pattern) is None
    before = time.monotonic()
    assert not conditions.compiled(pattern).search("a" * conditions.MAX_TEXT_CHARS)
    assert time.monotonic() - before < 5
