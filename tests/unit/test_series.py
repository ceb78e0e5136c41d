"""When a series counts as complete: evidence from its headers, and the silence that goes with it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dicomnode.series import Evidence, evidence, proven, quiet_needed_s

AXIAL = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
CORONAL = [1.0, 0.0, 0.0, 0.0, 0.0, -1.0]


def slices(positions: list[float], **values: Any) -> list[dict[str, Any]]:
    """Axial slices at these z (mm)."""
    return [
        {
            "ImageOrientationPatient": AXIAL,
            "ImagePositionPatient": [-200.0, -200.0, z],
            "AcquisitionNumber": 1,
            **values,
        }
        for z in positions
    ]


def every(step: float, count: int) -> list[float]:
    return [-100 + k * step for k in range(count)]


# ── counts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("keyword", ["ImagesInAcquisition", "NumberOfSeriesRelatedInstances"])
def test_the_sender_said_how_many(keyword: str) -> None:
    headers = slices(every(2, 5), **{keyword: 5})
    assert evidence(headers) == Evidence(True, "all 5 announced images came")
    assert evidence(headers[:4]) == Evidence(False, "4 of 5 images came")
    assert evidence(headers[:1]) == Evidence(False, "1 of 5 images came")


def test_the_count_of_the_series_goes_before_that_of_the_acquisition() -> None:
    headers = slices(every(2, 5), ImagesInAcquisition=5, NumberOfSeriesRelatedInstances=6)
    assert not evidence(headers).complete


def test_the_count_of_one_acquisition_says_nothing_about_two() -> None:
    headers = slices(every(2, 3), ImagesInAcquisition=3)
    more = slices(every(2, 3), ImagesInAcquisition=3, AcquisitionNumber=2)
    assert evidence(headers).reason == "all 3 announced images came"
    assert "announced" not in evidence(headers + more).reason


def test_images_that_disagree_about_the_count_say_nothing() -> None:
    headers = slices(every(2, 4), ImagesInAcquisition=4)
    headers[0]["ImagesInAcquisition"] = 9
    assert evidence(headers) == Evidence(True, "4 slices without a gap")


def test_more_came_than_was_announced() -> None:
    assert evidence(slices(every(2, 7), ImagesInAcquisition=5)).complete


# ── geometry ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("missing", [1, 4, 8])
def test_a_missing_slice_is_a_gap(missing: int) -> None:
    positions = every(2.5, 10)
    lost = positions.pop(missing)
    judged = evidence(slices(positions))
    assert not judged.complete
    assert judged.reason == (
        f"a gap of 5.00 mm between the slices at {lost - 2.5:.2f} mm and {lost + 2.5:.2f} mm, where 2.50 mm is usual"
    )


def test_a_gap_speaks_louder_than_a_count() -> None:
    positions = every(2, 6)
    del positions[3]
    assert not evidence(slices(positions, ImagesInAcquisition=5)).complete


def test_slices_come_in_any_order() -> None:
    positions = every(2, 9)
    assert evidence(slices(positions[::2] + positions[1::2])) == Evidence(True, "9 slices without a gap")


@pytest.mark.parametrize("factor", [1.0, 1.49])
def test_a_little_unevenness_is_no_gap(factor: float) -> None:
    positions = every(2, 6)
    assert evidence(slices([*positions, positions[-1] + 2 * factor])).complete


def test_a_localizer_inside_is_no_gap_and_no_slice() -> None:
    headers = slices(every(2, 6))
    headers.insert(3, {"ImageOrientationPatient": CORONAL, "ImagePositionPatient": [0.0, -500.0, 300.0]})
    assert evidence(headers).complete
    del headers[4]
    assert "a gap of 4.00 mm" in evidence(headers).reason


def test_oblique_slices_are_measured_along_their_normal() -> None:
    angle = math.radians(30)
    orientation = [1.0, 0.0, 0.0, 0.0, math.cos(angle), math.sin(angle)]
    normal = [0.0, -math.sin(angle), math.cos(angle)]
    headers = [
        {"ImageOrientationPatient": orientation, "ImagePositionPatient": [3.0 * k * n for n in normal]}
        for k in (0, 1, 2, 4, 5)
    ]
    assert "a gap of 6.00 mm" in evidence(headers).reason


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_images_without_positions_prove_nothing(count: int) -> None:
    judged = evidence([{"AcquisitionNumber": 1}] * count)
    assert judged == Evidence(False, f"{count} images, nothing tells how many there should be")


def test_one_slice_alone_proves_nothing() -> None:
    assert not evidence(slices([0.0])).complete


def test_most_images_must_have_a_position() -> None:
    without = [{"AcquisitionNumber": 1}] * 4
    assert not evidence(slices(every(2, 3)) + without).complete
    assert evidence(slices(every(2, 4)) + without).complete


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "x",
        [],
        ["1", "2"],
        ["a", "b", "c"],
        [1.0] * 99,
        {},
        b"1",
        7,
        [None] * 3,
        [math.nan] * 3,
        [1e308, 1e308, 1e308],
        [1e400, 0.0, 0.0],
        ["1e999", "0", "0"],
        [[1], [2], [3]],
    ],
)
@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "ImageOrientationPatient"])
def test_a_hostile_position_is_none(keyword: str, value: object) -> None:
    several = value * 2 if isinstance(value, list) and keyword == "ImageOrientationPatient" else value
    headers = slices(every(2, 5))
    headers[2][keyword] = several
    judged = evidence(headers)
    assert not judged.complete
    assert "a gap of 4.00 mm" in judged.reason  # the slice is counted as missing, and nothing was raised


@pytest.mark.parametrize("value", ["5", -5, 0, 2.0, [5, 6], True and 10**30, "x" * 5000])
def test_a_hostile_count_completes_nothing(value: object) -> None:
    judged = evidence([{"NumberOfSeriesRelatedInstances": value}] * 5)
    assert not judged.complete


# ── proof ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def announced(positions: list[float], count: object = None, **values: Any) -> list[dict[str, Any]]:
    """Slices of which each says that so many are in the series; as many as there are, unless told otherwise."""
    return slices(positions, NumberOfSeriesRelatedInstances=len(positions) if count is None else count, **values)


def test_a_whole_stack_of_the_announced_size_is_proof() -> None:
    assert proven(announced(every(2.5, 9)))
    assert proven(announced(every(2.5, 9)[::-1]))
    assert proven(announced(every(-0.625, 300)))
    assert proven(announced([0, 2.0, 4.19, 6.0]))  # a table is not moved to the micrometre
    assert proven(announced(every(2, 2)))


@pytest.mark.parametrize(
    "headers",
    [
        [],
        slices(every(2, 6)),
        slices(every(2, 6), ImagesInAcquisition=6),
        announced(every(2, 6), 7),
        announced(every(2, 6), 5),
        announced(every(2, 6), "6"),
        announced(every(2, 6), 6.0),
        announced(every(2, 6), [6, 6]),
        announced(every(2, 1)),
        [*announced(every(2, 5), 6), *slices([-90.0])],
        [*announced(every(2, 5), 6), *announced([-90.0], 5)],
        announced([0, 2, 4, 6, 8, 12]),
        announced([0, 2, 4, 6, 8, 10.3]),
        announced([0, 2, 4, 6, 8, 8]),
        announced([0] * 6),
        announced(every(2, 6), ImagePositionPatient=None),
        announced(every(2, 6), ImageOrientationPatient=None),
        [*announced(every(2, 5), 6), {**announced([-90.0], 6)[0], "ImageOrientationPatient": CORONAL}],
        [*announced(every(2, 5), 6), {"NumberOfSeriesRelatedInstances": 6}],
    ],
    ids=[
        "nothing",
        "no count",
        "count of the acquisition",
        "one is missing",
        "one too many",
        "text",
        "fraction",
        "two counts",
        "one slice",
        "one says nothing",
        "one says otherwise",
        "gap",
        "uneven",
        "two in one place",
        "all in one place",
        "no places",
        "no orientation",
        "localizer",
        "one without place",
    ],
)
def test_what_is_no_proof(headers: list[dict[str, Any]]) -> None:
    assert not proven(headers)


# ── silence ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("may_be_denoised", "complete", "association_open", "seconds"),
    [
        (True, True, False, 15),
        (True, True, True, 120),
        (True, False, False, 120),
        (True, False, True, 120),
        (False, True, False, 15),
        (False, True, True, 15),
        (False, False, False, 15),
        (False, False, True, 15),
    ],
)
def test_how_long_it_must_be_quiet(
    may_be_denoised: bool, complete: bool, association_open: bool, seconds: float
) -> None:
    needed = quiet_needed_s(
        Evidence(complete, ""),
        proven=False,
        may_be_denoised=may_be_denoised,
        association_open=association_open,
        quiet_s=15,
        without_evidence_s=120,
    )
    assert needed == seconds


@pytest.mark.parametrize("association_open", [True, False])
@pytest.mark.parametrize(("quiet_s", "seconds"), [(15.0, 1.0), (0.2, 0.2)])
def test_proof_is_waited_for_a_moment_only(association_open: bool, quiet_s: float, seconds: float) -> None:
    needed = quiet_needed_s(
        Evidence(True, ""),
        proven=True,
        may_be_denoised=True,
        association_open=association_open,
        quiet_s=quiet_s,
        without_evidence_s=120,
    )
    assert needed == seconds
