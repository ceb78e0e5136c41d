"""What series.py and papers.py measure: a pipeline at work, in a process of its own that holds no more than a site's.

PyTorch, which those scripts need for other things, would add 200 MB to the peak. Linux only (/proc).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

from alone import answer, ask
from memory import Repeated, forget_peak, megabytes

from dicomnode.config import Derivation
from dicomnode.denoise import denoise_series
from dicomnode.worker import child_environment
from pipelines.base import Execution, Options, Pipeline, denoise
from pipelines.body import Box
from pipelines.body import box as real_box
from pipelines.network import NetworkPipeline
from pipelines.openvino_core import Precision
from pipelines.testing import water_volume
from pipelines.volume import Series
from training.measuring.uninstalled import load_from

SIZE = 512
WARM, DIFFERENT = 2, 8
"""Slices before the clock starts, and different ones of which a series in memory is made."""


@dataclass(frozen=True, slots=True)
class Case:
    """A series from files to files."""

    pipeline: str
    precision: Precision
    voxels: Literal["all", "body"]
    slices: int
    cores: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What a turn with a series was."""

    stages_s: dict[str, float]
    """By `dicomnode.denoise.STAGES`."""
    peak_mb: float
    matrix: tuple[int, int]
    computed: tuple[int, int]
    """Rows and columns of what the network was given of each slice."""

    @property
    def seconds(self) -> float:
        """From files to files."""
        return self.stages_s["wall"]


class Form(NamedTuple):
    """A pipeline in a number format."""

    pipeline: str
    precision: Precision


class MeasuredSlices(NamedTuple):
    """What a turn with slices in memory was."""

    seconds: float
    """For a slice."""
    peak_mb: float


def run(case: Case, paths: Sequence[Path], weights: Path) -> Measured:
    """One turn of `case` on the first of `paths`.

    Raises
    ------
    SystemExit
        If it failed.
    """
    with tempfile.TemporaryDirectory(dir=paths[0].parent.parent) as scratch:
        told = {
            "case": asdict(case),
            "paths": [str(path) for path in paths[: case.slices]],
            "out": str(Path(scratch) / "out"),
            "weights": str(weights),
        }
        return Measured(**ask(__file__, told, child_environment(case.cores)))


def run_slices(form: Form, slices: int, weights: Path) -> MeasuredSlices:
    """One turn of `form` on `slices` of 512 × 512, from memory to memory, after `WARM` that do not count.

    Raises
    ------
    SystemExit
        If it failed.
    """
    told = {"form": form, "slices": slices, "weights": str(weights)}
    return MeasuredSlices(*ask(__file__, told, child_environment(len(os.sched_getaffinity(0)))))


@contextmanager
def watched(voxels: str) -> Iterator[list[tuple[Box, tuple[int, int]]]]:
    """Take what a pipeline finds to be the body, and of what size slices are; with ``all`` it finds that all is."""
    found: list[tuple[Box, tuple[int, int]]] = []

    def box(series: Series) -> Box:
        rows, columns = series.shape[1:]
        body = real_box(series) if voxels == "body" else (slice(0, rows), slice(0, columns))
        found.append((body, (rows, columns)))
        return body

    with mock.patch("pipelines.network.box", box):
        yield found


def _loaded(form: Form, weights: Path) -> Pipeline:
    pipeline = load_from(weights, form.pipeline, Execution("cpu", form.precision))
    if pipeline.card.precision != form.precision:
        raise SystemExit(f"{form.pipeline} runs in {pipeline.card.precision}: {pipeline.card.reason}")
    return pipeline


def files(case: Case, paths: Sequence[Path], out: Path, weights: Path) -> Measured:
    """Denoise `paths` into `out` and measure it."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: case.cores])
    pipeline = _loaded(Form(case.pipeline, case.precision), weights)
    assert isinstance(pipeline, NetworkPipeline)
    with watched(case.voxels) as found:
        manifest = denoise_series(
            paths,
            out,
            pipeline=pipeline,
            options=Options(),
            fingerprint="benchmark",
            settings=Derivation(),
            created_at=datetime.now(UTC),
            report=lambda progress: None,
        )
    if len(manifest.instances) != case.slices:
        raise SystemExit(f"{case}: {len(manifest.instances)} slices were written")
    ((body, matrix),) = found
    rows, columns = (part.stop - part.start for part in pipeline._seen(body, matrix))
    return Measured(manifest.seconds, megabytes("VmHWM"), matrix, (rows, columns))


def in_memory(form: Form, slices: int, weights: Path) -> MeasuredSlices:
    """Denoise slices that are there already and measure it."""
    block = water_volume((DIFFERENT, SIZE, SIZE))
    forget_peak()
    pipeline = _loaded(form, weights)

    def taken_s(slices: int) -> float:
        series = Repeated(geometry=block.geometry, slice_uids=(), slice_paths=(), block=block, slices=slices)
        begun = time.perf_counter()
        for _ in denoise(pipeline, series, Options()):
            pass
        return time.perf_counter() - begun

    with watched("all"):
        taken_s(WARM)
        taken = taken_s(slices)
    return MeasuredSlices(taken / slices, megabytes("VmHWM"))


def alone(told: Any) -> Any:
    """The other side of `run` and `run_slices`."""
    weights = Path(told["weights"])
    if "form" in told:
        return in_memory(Form(*told["form"]), told["slices"], weights)
    return asdict(files(Case(**told["case"]), [Path(path) for path in told["paths"]], Path(told["out"]), weights))


if __name__ == "__main__":
    answer(alone, lambda: sys.exit("a part of series.py and papers.py, which run it"))
