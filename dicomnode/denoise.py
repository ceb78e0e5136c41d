"""One series, files to files: read → gate → network → guard → write.

All but the gate, which judges the whole series by its headers, and the look for the body, for which our networks read
all slices once, happen slice by slice and at the same time: one thread reads ahead, one runs the pipeline, the caller's
compares, one encodes and writes. Memory is that of some slices. Each stage is timed where it runs, without what it
waits for the others.

The node's child process and `dicomnode denoise` run the same function. Its result is a folder that appears whole or not
at all: derived files and ``manifest.json``. Whoever sends reads only that folder.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicomnode.config import Derivation
from dicomnode.derive import DerivedInstance, SeriesWriter
from dicomnode.derived_header import Making
from dicomnode.errors import DerivationError, NodeError
from dicomnode.spool import PART_SUFFIX, dataset_digest, sync_folder
from pipelines import base, gate
from pipelines.base import ModelCard, OptionRefused, Options, Pipeline, check_options, pipeline_hash
from pipelines.guard import Guard
from pipelines.volume import Plane, Series, open_series

Array = NDArray[np.float32]

MANIFEST = "manifest.json"
STAGES = {"read": "reading", "network": "network", "guard": "output check", "write": "writing", "wall": "in all"}
"""What was timed, and what people call it: the stages, and how long the whole took. Stages run side by side, so their
sum may be more than that; a stage that waited for a free core was at work."""
_SLICES_AHEAD = 4
"""That the pipeline may be ahead of the comparison."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a series is."""

    slices: int
    """Denoised and compared."""
    of: int
    seconds: dict[str, float]
    """By `STAGES`, so far."""


Report = Callable[[Progress], None]
"""Called when the files are opened, after each slice, and when all is written."""


def seconds_in_words(seconds: Mapping[str, float]) -> str:
    """``reading 3.1 s, network 40.2 s, output check 2.0 s, writing 3.3 s, in all 41.0 s``."""
    return ", ".join(f"{STAGES.get(stage, stage)} {value:.1f} s" for stage, value in seconds.items())


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
    backend: str
    """What computed it, and why that; empty for a pipeline that computes by itself."""
    reason: str
    options: Options
    pipeline_hash: str
    fingerprint: str
    derived_series_uid: str
    n_in: int
    instances: tuple[DerivedInstance, ...]
    seconds: dict[str, float]
    """By `STAGES`."""
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
    sha256: Sequence[str] | None = None,
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
    sha256
        Hexadecimal, of the data set of each file as it was received; None if nobody recorded it.

    Raises
    ------
    pipelines.volume.SeriesRefused
        The series may not be denoised (by this pipeline).
    Withheld
        The guard said no.
    NodeError
        The options are not for this pipeline.
    DerivationError, OSError
        A file is not what was received, or the result could not be written as meant.
    """
    if (out / MANIFEST).exists():
        return Manifest.read(out)
    identity = identify(pipeline.card, options)
    part = out.with_name(f"{out.name}.{os.getpid()}{PART_SUFFIX}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    begun = time.monotonic()
    seconds = dict.fromkeys(STAGES, 0.0)
    try:
        with ExitStack() as resources:
            with _timed(seconds, "read"):
                if sha256 is not None:
                    _check_unchanged(paths, sha256)
                series = resources.enter_context(open_series(paths))
                gate.check(series, pipeline.card)
            guard = Guard((series.geometry.spacing_mm[1], series.geometry.spacing_mm[2]))
            made = Making(pipeline.card, options, identity, fingerprint, settings, created_at)
            writer = resources.enter_context(SeriesWriter(series, made, part))
            awaited = _Awaited(**{one.name: getattr(series, one.name) for one in fields(Series)}, source=series)
            denoised = resources.enter_context(
                closing(_ahead(base.denoise(pipeline, awaited, options), awaited, seconds))
            )
            count = series.shape[0]

            def so_far() -> dict[str, float]:
                now = {
                    "read": seconds["read"] + series.read_s,
                    "write": writer.busy_s,
                    "wall": time.monotonic() - begun,
                }
                return {stage: round(value, 3) for stage, value in (seconds | now).items()}

            report(Progress(0, count, so_far()))
            for k in range(count + 1):
                hu = next(denoised, None)  # the one after the last is none, or a fault
                if hu is None:
                    break
                plane = series.plane(k)
                with _timed(seconds, "guard"):
                    guard.add(k, plane, hu)
                writer.write(k, hu)
                report(Progress(k + 1, count, so_far()))
            verdict = guard.verdict()
            if verdict.withheld:
                raise Withheld(verdict.withheld, asdict(verdict))
            instances = writer.finish()
            report(Progress(count, count, so_far()))
        manifest = Manifest(
            pipeline=pipeline.card.name,
            version=pipeline.card.version,
            precision=pipeline.card.precision,
            backend=pipeline.card.backend,
            reason=pipeline.card.reason,
            options=options,
            pipeline_hash=identity,
            fingerprint=fingerprint,
            derived_series_uid=instances[0].series_uid,
            n_in=len(paths),
            instances=tuple(instances),
            seconds=so_far(),
            noise_before_hu=verdict.noise_before_hu,
            noise_after_hu=verdict.noise_after_hu,
            guard=asdict(verdict),
        )
        manifest.write(part)
        _publish(part, out)
        return Manifest.read(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_unchanged(paths: Sequence[Path], sha256: Sequence[str]) -> None:
    for path, recorded in zip(paths, sha256, strict=True):
        try:
            found = dataset_digest(path)
        except OSError as error:
            error.filename = str(path)  # an error of reading does not say of what
            raise
        if found != recorded:
            raise DerivationError(
                f"{path} was changed on disk since it was received (SHA-256 of its data set); check the disk, "
                "put the file back from a backup and retry the job"
            )


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


@dataclass(frozen=True, kw_only=True)
class _Awaited(Series):
    """The series as the pipeline is given it, which notes how long each thread waited for slices."""

    source: Series
    waited_s: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    """By thread; a pipeline may read ahead in one of its own, and compute meanwhile."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns."""
        return self.source.shape

    def plane(self, k: int) -> Plane:
        """Slice `k`."""
        begun = time.monotonic()
        try:
            return self.source.plane(k)
        finally:
            self.waited_s[get_ident()] += time.monotonic() - begun


def _ahead(slices: Iterator[Array], source: _Awaited, seconds: dict[str, float]) -> Generator[Array]:
    """The same slices, made from `source` by a thread of its own while the caller works on those before."""
    maker = ThreadPoolExecutor(1, "pipeline")

    def make() -> Array | None:
        begun, waited = time.monotonic(), source.waited_s[get_ident()]
        hu = next(slices, None)
        seconds["network"] += time.monotonic() - begun - (source.waited_s[get_ident()] - waited)
        return hu

    try:
        coming = deque(maker.submit(make) for _ in range(_SLICES_AHEAD))
        while (hu := coming.popleft().result()) is not None:
            coming.append(maker.submit(make))
            yield hu
    finally:
        maker.shutdown(cancel_futures=True)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time of the block to ``seconds[stage]``."""
    start = time.monotonic()
    yield
    seconds[stage] += time.monotonic() - start
