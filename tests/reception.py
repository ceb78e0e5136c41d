"""A spool, tables and an intake, as a test wants them: to be stopped, killed and started again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ct_builder import uid
from peers import wait_for
from pydicom import dcmread
from tables import config_of, database_in, rows

from dicomnode import intake as module
from dicomnode.config import Config
from dicomnode.db import JobKind, SeriesState
from dicomnode.intake import Intake
from dicomnode.router import header_values
from dicomnode.spool import Incoming, Kept, Spool

HASH = "ab" * 32
SERIES = uid("series")
QUIET = {"quiet_s": 0.15, "quiet_without_evidence_s": 0.5}
CT = [{"name": "ct", "when": {"Modality": "CT"}, "pipeline": "identity", "send_to": ["pacs"]}]
ENHANCED = "1.2.840.10008.5.1.4.1.1.2.1"
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


class Reception:
    """A spool, tables, and an intake that may be stopped or killed and started again on them."""

    def __init__(self, folder: Path, routes: list[dict[str, Any]], **assembly: float) -> None:
        self.folder = folder
        self.config: Config = config_of(
            destinations={"pacs": 104, "archive": 105}, routes=routes, assembly={**QUIET, **assembly}
        )
        self.database = database_in(folder)
        self.spool = Spool(folder / "spool")
        self.associations: Counter[str] = Counter()
        self.begin()

    def begin(self) -> None:
        """A new intake, as a new process has it."""
        hashes = dict.fromkeys(self.config.pipelines, HASH)
        self.intake = Intake(self.config, self.database, self.spool, lambda one: self.associations[one], hashes)

    def receive(self, path: Path, calling_ae: str = "SCANNER", *, tell: bool = True) -> Kept:
        """Keep one object as the receiver does; without `tell` as if the process ended before the row was written."""
        ds = dcmread(path)
        content = path.read_bytes()
        incoming = Incoming(
            sop_instance_uid=ds.SOPInstanceUID,
            sop_class_uid=ds.SOPClassUID,
            transfer_syntax_uid=ds.file_meta.TransferSyntaxUID,
            calling_ae=calling_ae,
            called_ae="NODE",
        )
        data = memoryview(content)[144 + ds.file_meta.FileMetaInformationGroupLength :]
        with self.spool.begin(incoming, data) as arrival:
            kept, instance = arrival.keep(ds.SeriesInstanceUID, ds.StudyInstanceUID)
        if tell:
            self.intake.stored(kept, instance, header_values(ds, self.intake.keywords))
        return kept

    def jobs(self, kind: JobKind = JobKind.PIPELINE) -> list[dict[str, Any]]:
        return [job for job in rows(self.database, "jobs", "created_at") if job["kind"] == kind]

    def series(self, column: str) -> Any:
        """A value of the one series; None as long as there is none."""
        found = rows(self.database, "series")
        return found[0][column] if found else None

    def closed(self, count: int = 1) -> None:
        """Wait until so many series are there and closed."""

        def quiet() -> bool:
            states = [one["state"] for one in rows(self.database, "series")]
            return states == [SeriesState.CLOSED] * count and not self.intake._open

        wait_for(quiet, 15, "the series to close")

    def run(self, *paths: Path, series_count: int = 1) -> None:
        """Receive, start, wait until it is closed, stop."""
        for path in paths:
            self.receive(path)
        before = self.series("last_at")
        self.intake.start()
        wait_for(lambda: not paths or self.series("last_at") != before, 15, "the objects to be indexed")
        self.closed(series_count)
        self.intake.stop()


def receptions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Reception]]:
    """Body of a fixture: gives a maker of `Reception`, and stops what it made."""
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.02)
    made: list[Reception] = []

    def make(routes: list[dict[str, Any]] | None = None, **assembly: float) -> Reception:
        made.append(Reception(folder, CT if routes is None else routes, **assembly))
        return made[-1]

    yield make
    for one in made:
        one.intake.stop()
        one.spool.close()
