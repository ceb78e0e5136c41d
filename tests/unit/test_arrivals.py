"""Recorded ways in which series arrive (arrivals.yaml), replayed on a clock of our own: none is closed too early."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml
from ct_builder import edit, phantom, uid, write_series
from reception import CT, Reception
from tables import rows

from dicomnode import intake as module
from dicomnode.config import Assembly
from dicomnode.db import JobState, SeriesState

SCRIPTS: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parents[1] / "arrivals.yaml").read_text())
SILENCE = Assembly()
LOOK_S = 0.25
"""How often the node looks; a closing may be so much later."""
SPACING_MM = 2.0
IN_TIME_S = 3.0


def numbers(text: str) -> list[int]:
    """``1-3`` is 1, 2, 3."""
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


class Event(NamedTuple):
    at_s: float
    association: str
    what: str
    """opens, releases, aborts, or a slice such as ``a7`` or ``a7!``."""


def events(script: dict[str, Any]) -> list[Event]:
    """What happens, in the order of time."""
    found = []
    for line in script["arrives"].splitlines():
        at, association, what, *every = line.split()
        if what in ("opens", "releases", "aborts"):
            found.append(Event(float(at), association, what))
            continue
        slices = []
        for part in what.split(","):
            name = part[0] if part[0].isalpha() else "a"
            other = "!" if part.endswith("!") else ""
            slices += [f"{name}{number}{other}" for number in numbers(part.lstrip("abc").rstrip("!"))]
        pause_s = float(every[1]) if every else 0.0
        found += [Event(float(at) + k * pause_s, association, one) for k, one in enumerate(slices)]
    return sorted(found, key=lambda event: event.at_s)


def write(folder: Path, script: dict[str, Any]) -> dict[str, Path]:
    """The files of a script, by the names of their slices."""
    count = script["slices"]
    by_slice: dict[int, dict[str, Any]] = {k: dict(script.get("every", {})) for k in range(1, count + 1)}
    for which, values in script.get("some", {}).items():
        for number in numbers(str(which)):
            by_slice[number] |= values
    for which, places in script.get("places", {}).items():
        places = numbers(places) if isinstance(places, str) else [places]
        for number, place in zip(numbers(str(which)), places, strict=True):
            by_slice[number]["ImagePositionPatient"] = [-22.0, -22.0, -100 + (place - 1) * SPACING_MM]
    files = {}
    for name in sorted({event.what[0] for event in events(script) if event.what[1:2].isdigit()}):
        plain = write_series(folder / name, phantom(count, 16), name=name, spacing_mm=(SPACING_MM, 0.7, 0.7))
        for number, path in enumerate(plain, 1):
            if values := by_slice[number]:
                edit(path, lambda ds, values=values: _change(ds, values))
            files[f"{name}{number}"] = path
            if f"{name}{number}!" in script["arrives"] or (name == "a" and f"{number}!" in script["arrives"]):
                other = folder / f"{name}-{number}-other.dcm"
                other.write_bytes(path.read_bytes())
                edit(other, lambda ds: setattr(ds, "PatientComments", "another content"))
                files[f"{name}{number}!"] = other
    return files


def _change(ds: Any, values: dict[str, Any]) -> None:
    for keyword, value in values.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)


class Replay:
    """A node whose clock stands still between the events of a script, and what it closes when."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        folder.mkdir()
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        self.node = Reception(folder, CT, **SILENCE.model_dump())
        self.node.intake._open_associations = self.open_associations
        self.brought: dict[str, set[str]] = {}
        """Open association → UIDs of the series that it brought something of."""
        self.closed: list[tuple[str, int, float]] = []
        """Series, images in it, time (s)."""

    def open_associations(self, series_uid: str) -> int:
        return sum(series_uid in brought for brought in self.brought.values())

    def run(self, script: dict[str, Any], files: dict[str, Path]) -> None:
        """Everything that the script says, and on until no series is open."""
        left = events(script)
        while left or self.node.intake._open:
            if not self.node.intake._open:
                self.now_s = max(self.now_s, left[0].at_s)  # nothing to see until then
            while left and left[0].at_s <= self.now_s:
                self.happen(left.pop(0), files)
            self.look()
            self.now_s += LOOK_S

    def happen(self, event: Event, files: dict[str, Path]) -> None:
        if event.what == "opens":
            self.brought[event.association] = set()
        elif event.what in ("releases", "aborts"):
            del self.brought[event.association]
        else:
            self.brought[event.association].add(uid(event.what[0]))
            self.node.receive(files[event.what])

    def look(self) -> None:
        """What the node's own thread does every `LOOK_S`."""
        arrived = self.node.intake._queue
        if batch := [arrived.get_nowait() for _ in range(arrived.qsize())]:
            self.node.intake._index_all(batch)
        before = set(self.node.intake._open)
        self.node.intake._close_complete()
        for gone in before - set(self.node.intake._open):
            (row,) = (one for one in rows(self.node.database, "series") if one["series_uid"] == gone)
            assert row["state"] == SeriesState.CLOSED
            self.closed.append((gone, row["n_instances"], self.now_s))


@pytest.fixture
def replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replay]:
    made = Replay(tmp_path / "node", monkeypatch)
    yield made
    made.node.spool.close()


def expected(script: dict[str, Any]) -> list[tuple[str, int, float, float]]:
    """Series, images in it, earliest and latest time (s) of its closing, in the order of the earliest."""
    arrivals = [event for event in events(script) if event.what[1:2].isdigit()]
    found = []
    seen: dict[str, int] = {}
    closings = [line.split() for line in script["closes"].splitlines()]
    for place, (name, images, *when) in enumerate(closings):
        own = [event for event in arrivals if event.what[0] == name]
        more = any(later[0] == name for later in closings[place + 1 :])
        last_s = own[-1].at_s if not more else _last_before_a_long_silence(own, seen.get(name, 0))
        seen[name] = sum(event.at_s <= last_s for event in own)
        earliest_s, latest_s = {
            "proven": (last_s, last_s + IN_TIME_S),
            "short": (last_s + SILENCE.quiet_s, last_s + SILENCE.quiet_s + IN_TIME_S),
            "long": (last_s + SILENCE.quiet_without_evidence_s, last_s + SILENCE.quiet_without_evidence_s + IN_TIME_S),
            "at": (float(when[-1]), float(when[-1]) + IN_TIME_S) if when[0] == "at" else (0.0, 0.0),
        }[when[0]]
        found.append((uid(name), int(images), earliest_s, latest_s))
    return sorted(found, key=lambda one: one[2])


def _last_before_a_long_silence(own: list[Event], after: int) -> float:
    """Time of the arrival behind which nothing comes for longer than the node ever waits."""
    for one, following in zip(own[after:], own[after + 1 :], strict=False):
        if following.at_s - one.at_s > 2 * SILENCE.quiet_without_evidence_s:
            return one.at_s
    raise AssertionError("the script has no such silence")


@pytest.mark.parametrize("script", SCRIPTS, ids=[script["what"].replace(" ", "-") for script in SCRIPTS])
def test_a_series_is_closed_in_time_and_never_early(replay: Replay, tmp_path: Path, script: dict[str, Any]) -> None:
    replay.run(script, write(tmp_path / "ct", script))
    wanted = expected(script)
    assert [closed[:2] for closed in replay.closed] == [one[:2] for one in wanted]
    for (_, _, at_s), (_, _, earliest_s, latest_s) in zip(replay.closed, wanted, strict=True):
        assert earliest_s <= at_s <= latest_s
    # What is denoised is what had come: one job for each set of slices, the newest one of each series not superseded.
    current = {job["series_uid"]: job["n_in"] for job in replay.node.jobs() if job["superseded_by"] is None}
    assert current == {series: images for series, images, _ in replay.closed}
    assert {job["state"] for job in replay.node.jobs()} == {JobState.QUEUED}
    assert len(replay.node.jobs()) == len({closed[:2] for closed in replay.closed})


def test_there_are_enough_scripts_and_each_is_another() -> None:
    assert len(SCRIPTS) >= 20
    assert len({script["what"] for script in SCRIPTS}) == len(SCRIPTS)
