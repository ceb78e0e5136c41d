"""What a pipeline was validated for, and what it was not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.base import Envelope, ModelCard
from pipelines.gate import check
from pipelines.volume import Geometry, SeriesRefused, Volume


def card(kind: Any, **envelope: Any) -> ModelCard:
    valid_for = Envelope(**envelope)
    return ModelCard("any", "1", "", "", kind, (1, 1, 1), (0, 0, 0), (-1024, 3071), "fp32", "", valid_for=valid_for)


def volume(
    positions_mm: list[float],
    *,
    thickness_mm: float = 0.0,
    tilt_deg: float = 0.0,
    pixel_mm: float = 0.7,
    matrix: tuple[int, int] = (32, 32),
) -> Volume:
    n = len(positions_mm)
    step = float(np.median(np.diff(positions_mm))) if n > 1 else thickness_mm
    return Volume(
        hu=np.zeros((n, *matrix), np.float32),
        geometry=Geometry((0, 0, 0), (step, pixel_mm, pixel_mm), ((0, 0, 1), (0, 1, 0), (1, 0, 0)), "2.25.1"),
        slice_uids=tuple(f"2.25.{k}" for k in range(n)),
        slice_paths=tuple(Path(str(k)) for k in range(n)),
        padding=np.zeros((n, *matrix), np.bool_),
        positions_mm=tuple(positions_mm),
        thickness_mm=thickness_mm,
        tilt_deg=tilt_deg,
    )


def regular(n: int, step: float = 1.0, **more: Any) -> Volume:
    return volume([-50 + step * k for k in range(n)], **more)


def refusal(v: Volume, c: ModelCard) -> SeriesRefused:
    with pytest.raises(SeriesRefused) as caught:
        check(v, c)
    return caught.value


@pytest.mark.parametrize("kind", ["slice", "slab3", "volume"])
@pytest.mark.parametrize(
    "good",
    [
        regular(20),
        regular(20, 0.8, thickness_mm=1.25),
        regular(3, 5, thickness_mm=5, tilt_deg=0.2),
        regular(1, thickness_mm=40),
        volume([0, 1, 2.02, 3, 3.99]),
        regular(20, 2.5, thickness_mm=2.0),
    ],
)
def test_regular_volumes_pass(kind: str, good: Volume) -> None:
    check(good, card(kind))


STACKED = [
    pytest.param(volume([0, 1, 2, 4, 5, 6]), "gap", "2.00 and 4.00 mm", id="one missing"),
    pytest.param(volume([0, 1, 2, 5, 6, 7, 9, 10]), "gap", "3 slice", id="three missing in two places"),
    pytest.param(regular(20, 10, thickness_mm=1), "gap", "10.00 mm apart", id="HRCT, 1 mm every 10 mm"),
    pytest.param(volume([0, 1, 2, 2.5, 3, 4, 5]), "irregular-spacing", "2.00 and 2.50 mm", id="a scout in the middle"),
    pytest.param(volume([0, 4, 8, 9.08, 16, 23]), "irregular-spacing", "1.08 to 7.00", id="two table feeds"),
    pytest.param(regular(20, tilt_deg=18.5), "gantry-tilt", "18.5 degrees", id="tilt"),
    pytest.param(regular(20, 0.1), "outside-envelope", "0.10 mm", id="too thin"),
    pytest.param(regular(20, 12), "outside-envelope", "12.00 mm", id="too thick"),
]


@pytest.mark.parametrize("kind", ["slab3", "volume"])
@pytest.mark.parametrize(("bad", "code", "told"), STACKED)
def test_neighbours_must_be_neighbours(kind: str, bad: Volume, code: str, told: str) -> None:
    refused = refusal(bad, card(kind))
    assert refused.code == code
    assert told in refused.detail


@pytest.mark.parametrize(("bad", "code", "told"), STACKED)
def test_single_slices_need_no_neighbours(bad: Volume, code: str, told: str) -> None:
    check(bad, card("slice"))


def test_every_reason_is_documented() -> None:
    """docs/gate.md has a row for each code that the source can raise, and for no other."""
    root = Path(__file__).parents[2]
    source = "".join(path.read_text() for path in (root / "pipelines").glob("*.py"))
    raised = set(re.findall(r'SeriesRefused\(\s*"([a-z-]+)"', source))
    rows = re.findall(r"^\| (`[a-z-]+`(?:, `[a-z-]+`)*) \|", (root / "docs" / "gate.md").read_text(), re.MULTILINE)
    assert {code for row in rows for code in re.findall(r"`([a-z-]+)`", row)} == raised


def test_tilt_passes_where_it_was_validated() -> None:
    check(regular(20, tilt_deg=18.5), card("volume", gantry_tilt=True))


def test_a_volume_without_positions_is_regular() -> None:
    check(replace(regular(5, 3.0), positions_mm=()), card("volume"))
    assert refusal(replace(regular(5, 30.0), positions_mm=()), card("volume")).code == "outside-envelope"


@pytest.mark.parametrize("kind", ["slice", "slab3", "volume"])
@pytest.mark.parametrize(
    ("bad", "envelope", "told"),
    [
        (regular(2), {"min_slices": 3}, "2 slices; any 1 was validated for 3 to 3000"),
        (regular(4), {"max_slices": 3}, "4 slices"),
        (regular(4, pixel_mm=2.5), {}, "pixels of 2.5 mm; any 1 was validated for 0.2 to 2 mm"),
        (regular(4, pixel_mm=0.1), {}, "pixels of 0.1 mm"),
    ],
)
def test_the_envelope_holds_for_every_pipeline(kind: str, bad: Volume, envelope: dict[str, Any], told: str) -> None:
    refused = refusal(bad, card(kind, **envelope))
    assert refused.code == "outside-envelope"
    assert told in refused.detail


@pytest.mark.parametrize("kind", ["slice", "slab3", "volume"])
@pytest.mark.parametrize("matrix", [(31, 512), (512, 31), (1, 1)])
def test_a_matrix_without_an_inside_is_refused(kind: str, matrix: tuple[int, int]) -> None:
    refused = refusal(regular(2, matrix=matrix), card(kind))
    assert refused.code == "too-small"
    assert f"{matrix[0]} x {matrix[1]} pixels" in refused.detail
