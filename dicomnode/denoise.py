"""One series, files to files: load → gate → denoise → guard → derive.

All but the gate, which judges the whole series by its headers, happen slice by slice and at the same time: one thread
reads ahead, one runs the pipeline, the caller's compares, one encodes and writes. Memory is that of some slices.

The node's child process and `dicomnode denoise` run the same function. Its result is a folder that appears whole or not
at all: derived files and ``manifest.json``. Whoever sends reads only that folder.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicomnode.config import Derivation
from dicomnode.derive import DerivedInstance, SeriesWriter
from dicomnode.derived_header import Making
from dicomnode.errors import NodeError
from dicomnode.spool import PART_SUFFIX, sync_folder
from pipelines import base, gate
from pipelines.base import ModelCard, OptionRefused, Options, Pipeline, check_options, pipeline_hash
from pipelines.guard import Guard
from pipelines.volume import open_series

Array = NDArray[np.float32]

MANIFEST = "manifest.json"
Report = Callable[[str, float], None]
"""Called with the stage that has ended, or of which a slice has, and the fraction of the job that is done (0 to 1)."""
STAGES = ("load", "denoise", "guard", "derive")
"""Where the time of the caller's thread goes; denoising, comparing and writing happen at the same time, and the slowest
of them shows."""
_SLICES_AHEAD = 4
"""That the pipeline may be ahead of the comparison."""


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
    seconds = dict.fromkeys(STAGES, 0.0)
    try:
        with ExitStack() as resources:
            with _timed(seconds, "load"):
                series = resources.enter_context(open_series(paths))
                gate.check(series, pipeline.card)
            report("load", 0.0)
            guard = Guard((series.geometry.spacing_mm[1], series.geometry.spacing_mm[2]))
            made = Making(pipeline.card, options, identity, fingerprint, settings, created_at)
            writer = resources.enter_context(SeriesWriter(series, made, part))
            denoised = resources.enter_context(closing(_ahead(base.denoise(pipeline, series, options))))
            count = series.shape[0]
            for k in range(count + 1):
                with _timed(seconds, "denoise"):
                    hu = next(denoised, None)  # the one after the last is none, or a fault
                if hu is None:
                    break
                with _timed(seconds, "guard"):
                    guard.add(k, series.plane(k), hu)
                with _timed(seconds, "derive"):
                    writer.write(k, hu)
                report("denoise", (k + 1) / count)
            verdict = guard.verdict()
            if verdict.withheld:
                raise Withheld(verdict.withheld, asdict(verdict))
            with _timed(seconds, "derive"):
                instances = writer.finish()
            report("derive", 1.0)
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
            seconds={stage: round(value, 3) for stage, value in seconds.items()},
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


def _ahead(slices: Iterator[Array]) -> Generator[Array]:
    """The same slices, made by a thread of its own while the caller works on those before."""
    maker = ThreadPoolExecutor(1, "pipeline")
    try:
        coming = deque(maker.submit(next, slices, None) for _ in range(_SLICES_AHEAD))
        while (hu := coming.popleft().result()) is not None:
            coming.append(maker.submit(next, slices, None))
            yield hu
    finally:
        maker.shutdown(cancel_futures=True)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time of the block to ``seconds[stage]``."""
    start = time.monotonic()
    yield
    seconds[stage] += time.monotonic() - start
