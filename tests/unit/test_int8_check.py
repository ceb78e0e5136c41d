"""INT8 that is not what it was where it was measured does not run: it is refused, or fp32 runs in its place."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import shipped
from pipelines.base import Execution
from pipelines.golden import Deviation
from pipelines.runtime import WEIGHTS, ExecutionRefused, read_card
from pipelines.shipped import Factory

BOUND = (6.0, 1.5)


class Made:
    """What a factory makes, as far as it is looked at."""

    def __init__(self, precision: str, device: str, bound: tuple[float, float] | None) -> None:
        self.device = device
        self.card = replace(read_card("fast-2.5d"), precision=precision, reason="as chosen", int8_bound_hu=bound)


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> Factory:
    """Its INT8 is chosen by ``auto`` and vouched for up to `BOUND`."""

    def made(self: Factory, execution: Execution, folder: Path) -> Made:
        precision = "int8" if execution.precision in ("auto", "int8") else execution.precision
        return Made(precision, execution.device, BOUND)

    monkeypatch.setattr(Factory, "_made", made)
    return Factory("fast-2.5d", "ffdnet.FFDNet")


def deviates(monkeypatch: pytest.MonkeyPatch, found: Deviation) -> list[tuple[str, str, str]]:
    """Precision of the one, precision and device of the other that it was compared with, each time."""
    compared: list[tuple[str, str, str]] = []

    def deviation(one: Made, other: Made) -> Deviation:
        compared.append((one.card.precision, other.card.precision, other.device))
        return found

    monkeypatch.setattr(shipped, "deviation", deviation)
    return compared


def test_within_its_bound_it_runs(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = deviates(monkeypatch, Deviation(*BOUND))
    for precision in ("auto", "int8"):
        assert factory(Execution(precision=precision)).card.precision == "int8"  # type: ignore[arg-type]  # both are one
    assert compared == [("int8", "fp32", "cpu")] * 2  # not on a GPU, which ``auto`` would take for fp32


@pytest.mark.parametrize("found", [Deviation(6.1, 1.0), Deviation(5.0, 1.6), Deviation(float("nan"), 1.0)])
def test_beyond_it_fp32_runs_and_says_why(
    factory: Factory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, found: Deviation
) -> None:
    deviates(monkeypatch, found)
    with caplog.at_level(logging.WARNING):
        card = factory(Execution()).card
    assert card.precision == "fp32"
    assert "its card allows 6.0 (rms 1.50)" in card.reason
    assert card.reason.removeprefix("the CPU, fp32: ") in caplog.text


def test_where_int8_is_demanded_it_is_refused(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    deviates(monkeypatch, Deviation(60.0, 9.0))
    with pytest.raises(ExecutionRefused, match=r"up to 60\.0 HU \(rms 9\.00\) from fp32 on this CPU.*set precision"):
        factory(Execution(precision="int8"))


def test_other_precisions_are_not_compared(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = deviates(monkeypatch, Deviation(60.0, 9.0))
    assert factory(Execution(precision="bf16")).card.precision == "bf16"
    assert compared == []


def test_the_bound_is_read_from_the_card(tmp_path: Path) -> None:
    card = json.loads((WEIGHTS / "fast-2.5d.json").read_text())
    (tmp_path / "fast-2.5d.json").write_text(json.dumps({**card, "int8_bound_hu": [6.0, 1.5]}))
    assert read_card("fast-2.5d", tmp_path).int8_bound_hu == BOUND
