"""When is a series complete? DICOM never says so; evidence plus silence has to do.

Evidence (any one that fails means: wait the long time):

- the sender told how many images there are (ImagesInAcquisition (0020,1002) of a single acquisition, or
  NumberOfSeriesRelatedInstances (0020,1209)), and so many came;
- or the slices lie one beside the other without a gap, on one normal;
- and no association that brought slices of this series is still open.

Proof is more: every image says how many the *series* has (NumberOfSeriesRelatedInstances), so many came, and they are
the evenly spaced slices of one stack, each place once. Then nothing is waited for but a moment. ImagesInAcquisition is
evidence and no proof, as a series may have another acquisition whose first slice is not there yet; nor is a stack
without a gap, which may go on at its ends.

A release of an association proves nothing, and an abort is a pause, not an end: scanners cap the length of a transfer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

KEYWORDS = frozenset(
    {
        "AcquisitionNumber",
        "ImageOrientationPatient",
        "ImagePositionPatient",
        "ImagesInAcquisition",
        "NumberOfSeriesRelatedInstances",
    }
)
"""What evidence is read from; the receiver keeps these of every header."""

Header = Mapping[str, object]
"""DICOM keyword → value, no pixels."""

PROVEN_QUIET_S = 1.0
"""Silence that ends a series of which it is proven that nothing is missing: what was on its way twice has come."""
_EVEN = 0.1
"""Part of the usual distance by which those in a stack may differ from it, where the stack is to prove something."""
_GAP_FACTOR = 1.5
"""A distance above so many times the median distance is a missing slice."""
_FARTHEST_MM = 1e6
"""Positions farther away are none (and products of such numbers would overflow)."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """`complete` with the reason in words, or what speaks against it."""

    complete: bool
    reason: str


def evidence(headers: Sequence[Header]) -> Evidence:
    """What the headers of a series say about its completeness."""
    count = len(headers)
    expected = _expected(headers)
    gap = _gap(headers)
    if expected is not None and count < expected:
        return Evidence(False, f"{count} of {expected} images came")
    if gap is not None:
        return Evidence(False, gap)
    if expected is not None:
        return Evidence(True, f"all {expected} announced images came")
    if count > 1 and _positions(headers) is not None:
        return Evidence(True, f"{count} slices without a gap")
    return Evidence(False, f"{count} images, nothing tells how many there should be")


def proven(headers: Sequence[Header]) -> bool:
    """Whether nothing can be missing, by what the sender says and by geometry; quick to answer where that is not so."""
    count = len(headers)
    if count < 2 or any(_count(header.get("NumberOfSeriesRelatedInstances")) != count for header in headers):
        return False
    positions = _positions(headers)
    if positions is None or len(positions) != count:
        return False
    steps = np.diff(positions)
    usual = float(np.median(steps))
    return usual > 0 and bool((np.abs(steps - usual) <= _EVEN * usual).all())


def _count(value: object) -> int | None:
    """A number of images, as which a sender may give anything."""
    return value if isinstance(value, int) and value > 0 else None


def _expected(headers: Sequence[Header]) -> int | None:
    """Number of images that the sender announced, if it did and the images agree."""
    whole_series = _agreed(headers, "NumberOfSeriesRelatedInstances")
    if whole_series is not None:
        return whole_series
    if len({str(header.get("AcquisitionNumber")) for header in headers}) > 1:
        return None
    return _agreed(headers, "ImagesInAcquisition")


def _agreed(headers: Sequence[Header], keyword: str) -> int | None:
    values = {header.get(keyword) for header in headers if isinstance(header.get(keyword, ()), int | str)}
    if len(values) != 1:
        return None
    (value,) = values
    return _count(value)


def _gap(headers: Sequence[Header]) -> str | None:
    """Where a slice is missing, in words; None if there is no gap or nothing to see one by."""
    positions = _positions(headers)
    if positions is None or len(positions) < 3:
        return None
    steps = np.diff(positions)
    usual = float(np.median(steps))
    if usual <= 0:
        return None
    widest = int(np.argmax(steps))
    if steps[widest] <= _GAP_FACTOR * usual:
        return None
    return (
        f"a gap of {steps[widest]:.2f} mm between the slices at {positions[widest]:.2f} mm and "
        f"{positions[widest + 1]:.2f} mm, where {usual:.2f} mm is usual"
    )


def _positions(headers: Sequence[Header]) -> list[float] | None:
    """Sorted positions (mm) along the most frequent slice normal; None unless most headers have a position.

    Images of another orientation (a localizer in the series) do not count.
    """
    found: list[tuple[tuple[float, ...], np.ndarray]] = []
    for header in headers:
        orientation = _numbers(header.get("ImageOrientationPatient"), 6)
        position = _numbers(header.get("ImagePositionPatient"), 3)
        if orientation is not None and position is not None:
            across = np.cross(orientation[:3], orientation[3:])
            found.append((tuple(np.round(across, 3)), position))
    if not found:
        return None
    normal, count = Counter(normal for normal, _ in found).most_common(1)[0]
    if count < len(headers) / 2:
        return None
    return sorted(float(np.dot(position, normal)) for other, position in found if other == normal)


def _numbers(value: object, count: int) -> np.ndarray | None:
    if not isinstance(value, list | tuple) or len(value) != count:
        return None
    try:
        numbers = np.array([float(item) for item in value])
    except (TypeError, ValueError):
        return None
    return numbers if bool((np.abs(numbers) < _FARTHEST_MM).all()) else None


@dataclass(slots=True)
class OpenSeries:
    """What the node remembers of a series while it may still grow."""

    series_uid: str
    study_uid: str
    generation: int
    headers: dict[str, Header] = field(default_factory=dict)
    """By SOPInstanceUID."""
    may_be_denoised: bool = False
    """Some image of it met a route with a pipeline."""
    judged: Evidence | None = None
    """What `headers` say about completeness; None after they changed."""
    proven: bool | None = None
    """Whether they prove it; None after they changed."""
    last_activity_s: float = 0.0
    """On the monotonic clock."""
    fault: str = ""
    """What keeps the series from being judged, in words: in the node itself, or on its disk."""


def quiet_needed_s(
    judged: Evidence,
    *,
    proven: bool,
    may_be_denoised: bool,
    association_open: bool,
    quiet_s: float,
    without_evidence_s: float,
) -> float:
    """Silence (s) after which a series counts as closed.

    Proof holds with an association open, too: scanners send one series after the other over the same one. Where nothing
    is computed from the series as a whole, a late image costs nothing, and the short time does.
    """
    if proven:
        return min(quiet_s, PROVEN_QUIET_S)
    if not may_be_denoised or (judged.complete and not association_open):
        return quiet_s
    return without_evidence_s
