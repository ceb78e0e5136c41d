"""Scans for a training, from the store or made, several at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipelines.volume import SeriesRefused, open_series
from training.sources.layouts import Case
from training.sources.pairs import PairRefused
from training.sources.scans import (
    PHANTOM_REVISION,
    REAL_REVISION,
    Scan,
    ScanRefused,
    Spacing,
    kept,
    paired_scan,
    phantom_scan,
    real_scan,
    thick_to_thin,
)


@dataclass(frozen=True, slots=True)
class Preparation:
    """How scans are made.

    store
        Folder that keeps them.
    seed
        Of the noise of real series.
    z_target_mm
        As in `training.sources.pairs.load_pair`; what has no partner is then shown in slices twice as thick.
    """

    store: Path
    seed: int
    z_target_mm: float | None

    def phantom(self, seed: int) -> Scan:
        """The phantom `seed`."""
        scan = kept(self.store, {"revision": PHANTOM_REVISION, "phantom": seed}, lambda: phantom_scan(seed))
        return thick_to_thin(scan) if self.z_target_mm else scan

    def case(self, case: Case) -> Scan | None:
        """The scan of a case; none if it is refused, which is no reason to stop a training with hundreds of others."""
        what: dict[str, Any] = {"revision": REAL_REVISION, "full": _known(case.full), "seed": self.seed}
        try:
            if case.low is None:
                scan = kept(self.store, what, lambda: real_scan(case, self.seed))
                return thick_to_thin(scan) if self.z_target_mm else scan
            what |= {"low": _known(case.low), "z_target_mm": self.z_target_mm}
            return kept(self.store, what, lambda: paired_scan(case, self.z_target_mm))
        except (SeriesRefused, PairRefused, ScanRefused) as error:
            print(f"{case.name}: left out. {error}")
            return None

    def spacing(self, case: Case) -> Spacing:
        """What the scan of `case` shows, from the headers of its target."""
        with open_series(case.full) as series:
            slices_mm, pixel_mm, _ = series.geometry.spacing_mm
        return Spacing(self.z_target_mm if case.low and self.z_target_mm else slices_mm, pixel_mm)


def _known(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of each file: another export under the same names is another series."""
    states = ((path, path.stat()) for path in files)
    return [(str(path), state.st_size, state.st_mtime_ns) for path, state in states]


def _make(how: Preparation, what: Case | int) -> None:
    torch.set_num_threads(1)
    if isinstance(what, int):
        how.phantom(what)
    else:
        how.case(what)


def make(how: Preparation, what: Sequence[Case | int], workers: int) -> None:
    """Fill the store with phantoms (by seed) and cases, in so many processes; with 0 each is made when asked for."""
    if workers:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.map(partial(_make, how), what, chunksize=1)


def scans_of(how: Preparation, cases: Iterable[Case]) -> dict[Case, Scan]:
    """The scans of the cases that are not refused."""
    return {case: scan for case in cases if (scan := how.case(case))}
