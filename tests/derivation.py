"""Derive a series in one call, for tests of what a derived object must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
from ct_builder import edit, phantom, write_series
from numpy.typing import NDArray
from pydicom import Dataset, dcmread

from dicomnode.config import Derivation
from dicomnode.derive import DerivedInstance, SeriesWriter
from dicomnode.derived_header import Making
from pipelines.base import ModelCard, Options, pipeline_hash
from pipelines.volume import Series, read_volume

HU = NDArray[np.float32]
CARD = ModelCard(
    name="st3d",
    version="1.2",
    paper="",
    doi="",
    input="slice",
    patch_zyx=(16, 64, 64),
    overlap_zyx=(2, 2, 2),
    hu_window=(-1000.0, 1000.0),
    precision="fp32",
    weights_sha256="ab" * 32,
)
CREATED_AT = datetime(2026, 11, 20, 10, 4, 5, 678901, tzinfo=timezone(timedelta(hours=1)))
FINGERPRINT = "5e" * 32


def derive(
    paths: Sequence[Path],
    out_dir: Path,
    change: Callable[[HU], HU] = lambda hu: hu,
    *,
    card: ModelCard = CARD,
    options: Options | None = None,
    settings: Derivation | None = None,
    created_at: datetime = CREATED_AT,
    fingerprint: str = FINGERPRINT,
) -> list[DerivedInstance]:
    """Read, change the HU, derive; in the order of the slices. `out_dir` is made if absent."""
    out_dir.mkdir(exist_ok=True)
    volume = read_volume(paths)
    options = options or Options()
    made = Making(card, options, pipeline_hash(card, options), fingerprint, settings or Derivation(), created_at)
    return write_all(volume, change(volume.hu.copy()), made, out_dir)


def making(created_at: datetime = CREATED_AT) -> Making:
    """What a writer is told, where it does not matter."""
    return Making(CARD, Options(), "cafe", "f00d", Derivation(), created_at)


def write_all(series: Series, hu: HU, made: Making, out_dir: Path) -> list[DerivedInstance]:
    """All slices through one `SeriesWriter`."""
    with SeriesWriter(series, made, out_dir) as writer:
        for k, plane in enumerate(hu):
            writer.write(k, plane)
        return writer.finish()


def derive_one(path: Path, out_dir: Path, change: Callable[[HU], HU] = lambda hu: hu, **how: Any) -> Dataset:
    """The derived data set of a series of one slice."""
    return dcmread(derive([path], out_dir, change, **how)[0].path)


def derive_synthetic(tmp_path: Path, *, change: Callable[[Dataset], None] | None = None, **overrides: Any) -> Dataset:
    """The derived data set of a synthetic slice with other elements than usual; `change` edits it before."""
    path, *_ = write_series(tmp_path, phantom(1, 16), **overrides)
    if change is not None:
        edit(path, change)
    return derive_one(path, tmp_path / "out")
