"""One series, files to files: load → gate → denoise → guard → derive.

The node's child process and `dicomnode denoise` run the same function. Its result is a folder that appears whole or not
at all: derived files and ``manifest.json``. Whoever sends reads only that folder.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dicomnode.config import Derivation
from dicomnode.derive import DerivedInstance, derive_series
from dicomnode.errors import NodeError
from dicomnode.spool import PART_SUFFIX, sync_folder
from pipelines import gate, guard
from pipelines.base import ModelCard, OptionRefused, Options, Pipeline, check_options, pipeline_hash
from pipelines.volume import read_volume

MANIFEST = "manifest.json"
Report = Callable[[str, float], None]
"""Called with the stage's name and the fraction of the whole job that is done (0 to 1)."""
_SHARE = {"load": 0.05, "denoise": 0.80, "guard": 0.05, "derive": 0.10}
"""Part of the whole that each stage is shown as; only for the progress display."""


class Withheld(NodeError):
    """The guard found that the output is no denoised version of the input: nothing may leave the node.

    Attributes
    ----------
    figures
        What it measured.
    """

    def __init__(self, reason: str, figures: dict[str, Any]) -> None:
        super().__init__(reason)
        self.figures = figures


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a result folder holds and how it came about."""

    pipeline: str
    version: str
    precision: str
    options: Options
    pipeline_hash: str
    fingerprint: str
    derived_series_uid: str
    n_in: int
    instances: tuple[DerivedInstance, ...]
    seconds: dict[str, float]
    noise_before_hu: float | None
    """Noise of the input as the guard measured it; None where there was too little to measure it in."""
    noise_after_hu: float | None
    guard: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write ``manifest.json``, durably; paths are kept relative to `folder`."""
        content = asdict(self)
        for instance in content["instances"]:
            instance["path"] = instance["path"].name
        path = folder / MANIFEST
        with path.open("w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest in `folder`; `OSError` if there is none."""
        content = json.loads((folder / MANIFEST).read_text())
        content["options"] = Options(**content["options"])
        content["instances"] = tuple(
            DerivedInstance(**{**instance, "path": folder / instance["path"]}) for instance in content["instances"]
        )
        return cls(**content)


def identify(card: ModelCard, options: Options) -> str:
    """Hash of a pipeline with these options, which becomes part of every derived UID.

    Raises
    ------
    NodeError
        If the pipeline cannot take an option.
    """
    try:
        check_options(card, options)
    except OptionRefused as error:
        raise NodeError(f"{error}; change it in config.yaml") from error
    return pipeline_hash(card, options)


def denoise_series(
    paths: Sequence[Path],
    out: Path,
    *,
    pipeline: Pipeline,
    options: Options,
    fingerprint: str,
    settings: Derivation,
    created_at: datetime,
    report: Report,
) -> Manifest:
    """Derive a denoised series from the files `paths` into the new folder `out`.

    Parameters
    ----------
    out
        Must not exist, or hold the finished result of the same work, which is then returned at once.
    fingerprint
        Digest of the set of source slices; with the pipeline's hash it decides the derived UIDs.
    created_at
        Time written into the derived objects, with its zone; not read from the clock, so that a second run gives the
        same bytes.

    Raises
    ------
    pipelines.volume.SeriesRefused
        The series may not be denoised (by this pipeline).
    Withheld
        The guard said no.
    NodeError
        The options are not for this pipeline.
    DerivationError, OSError
        The result could not be written as meant.
    """
    if (out / MANIFEST).exists():
        return Manifest.read(out)
    identity = identify(pipeline.card, options)
    part = out.with_name(f"{out.name}.{os.getpid()}{PART_SUFFIX}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        clock = _Stages(report)
        volume = read_volume(paths)
        gate.check(volume, pipeline.card)
        clock.done("load")
        hu = pipeline.denoise(volume, options, clock.within("denoise"))
        clock.done("denoise")
        verdict = guard.check(volume, hu)
        if verdict.withheld:
            raise Withheld(verdict.withheld, asdict(verdict))
        clock.done("guard")
        instances = derive_series(
            volume,
            hu,
            card=pipeline.card,
            options=options,
            pipeline_hash=identity,
            fingerprint=fingerprint,
            settings=settings,
            created_at=created_at,
            out_dir=part,
            progress=clock.within("derive"),
        )
        clock.done("derive")
        manifest = Manifest(
            pipeline=pipeline.card.name,
            version=pipeline.card.version,
            precision=pipeline.card.precision,
            options=options,
            pipeline_hash=identity,
            fingerprint=fingerprint,
            derived_series_uid=instances[0].series_uid,
            n_in=len(paths),
            instances=tuple(instances),
            seconds=clock.seconds,
            noise_before_hu=verdict.noise_before_hu,
            noise_after_hu=verdict.noise_after_hu,
            guard=asdict(verdict),
        )
        manifest.write(part)
        _publish(part, out)
        return Manifest.read(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_partial(out: Path) -> None:
    """Delete what attempts at `out` left half-written whose process was killed; none may be under way."""
    for part in out.parent.glob(f"{out.name}.*{PART_SUFFIX}"):
        shutil.rmtree(part, ignore_errors=True)  # the next start tries again


def _publish(part: Path, out: Path) -> None:
    """Make the result visible in one step; if another process was first, its result stands."""
    sync_folder(part)
    try:
        part.rename(out)
    except OSError:
        if not (out / MANIFEST).exists():
            raise
    sync_folder(out.parent)


class _Stages:
    """Seconds per stage, and the progress of the whole."""

    def __init__(self, report: Report) -> None:
        self.seconds: dict[str, float] = {}
        self._report = report
        self._since = time.monotonic()

    def done(self, stage: str) -> None:
        self.seconds[stage] = round(time.monotonic() - self._since, 3)
        self._since = time.monotonic()
        self._report(stage, self._before(stage) + _SHARE[stage])

    def within(self, stage: str) -> Callable[[float], None]:
        return lambda fraction: self._report(stage, self._before(stage) + fraction * _SHARE[stage])

    def _before(self, stage: str) -> float:
        names = list(_SHARE)
        return sum(_SHARE[name] for name in names[: names.index(stage)])
