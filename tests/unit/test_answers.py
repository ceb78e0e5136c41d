"""What each answer of a peer means."""

from __future__ import annotations

import pytest

from dicomnode.answers import Verdict, judge


def _meaning(status: int, unanswered_before: bool) -> Verdict:
    """The standard in code of its own, for every status there is (PS3.4 table B.2-1, PS3.7 annex C)."""
    if status in (0x0000, 0xB000, 0xB006, 0xB007) or (status == 0x0111 and unanswered_before):
        return Verdict.ACCEPTED
    if status in (0x0111, 0x0117, 0x0122, 0x0124) or 0xA900 <= status <= 0xA9FF:
        return Verdict.REFUSED
    return Verdict.LATER if 0xA700 <= status <= 0xA7FF else Verdict.COUNTED


@pytest.mark.parametrize("unanswered_before", [False, True])
def test_every_status_there_is(unanswered_before: bool) -> None:
    wrong = [
        hex(status)
        for status in range(0x10000)
        if judge(status, unanswered_before=unanswered_before) is not _meaning(status, unanswered_before)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (0x0000, Verdict.ACCEPTED),
        (0xB000, Verdict.ACCEPTED),  # coercion of data elements
        (0xB006, Verdict.ACCEPTED),  # elements discarded
        (0xB007, Verdict.ACCEPTED),  # data set does not match SOP class
        (0x0001, Verdict.COUNTED),  # a warning of another service
        (0xB001, Verdict.COUNTED),
        (0xFF00, Verdict.COUNTED),  # pending: no answer to a C-STORE
        (0x0110, Verdict.COUNTED),
        (0x0111, Verdict.REFUSED),
        (0x0117, Verdict.REFUSED),
        (0x0122, Verdict.REFUSED),
        (0x0124, Verdict.REFUSED),
        (0xA700, Verdict.LATER),
        (0xA702, Verdict.LATER),
        (0xA900, Verdict.REFUSED),
        (0xC000, Verdict.COUNTED),
        (0xCFFF, Verdict.COUNTED),
    ],
)
def test_what_an_answer_means(status: int, verdict: Verdict) -> None:
    assert judge(status, unanswered_before=False) is verdict


def test_a_duplicate_is_ours_only_if_an_answer_was_lost() -> None:
    assert judge(0x0111, unanswered_before=True) is Verdict.ACCEPTED
    assert judge(0x0111, unanswered_before=False) is Verdict.REFUSED
