"""How fast the configured pipelines are on this very machine: what ``dicomnode benchmark`` measures and prints.

A phantom goes through each pipeline as a series does in a job: by `dicomnode.denoise`, in the compute child, with its
threads and its niceness, from files to files. Nothing is received or sent, and no patient's images are touched.

A short and a long series are timed, each in a child of its own. Both pay for what a series costs whatever its length,
above all for making the network ready for its size of image; so what the long one takes longer are its slices, and from
that follows what a series of any length will take.
"""

from __future__ import annotations

import math
import os
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from dicomnode.config import Compute, Config, PipelineOptions
from dicomnode.denoise import STAGES, Manifest, Report
from dicomnode.errors import NodeError, WorkerDied
from dicomnode.worker import NICENESS, Request, configured_worker
from pipelines.base import Options
from pipelines.body import inside

Array = NDArray[np.float32]

MATRIX = 512
PIXEL_MM = 0.7
SPACING_MM = 1.0
NOISE_HU = 25.0
"""Of a low-dose chest CT in thin slices."""
_BODY = (0.64, 0.86)
"""Half the height and width of the chest, in halves of the image: with the margin around it that is denoised, too, half
of the image."""
_NOISES = 8
"""Different planes of noise; slices share them, turned over and moved."""
SERIES = 300
"""Slices of the series whose time is foretold: a chest in slices of 1 mm."""
MIN_SLICES = 8
"""Fewer are too few to tell the time of a slice from that of a series."""
_SHORT = 4
"""The long series has so many times the slices of the short one."""
WIDTH = 100
"""Columns of the table."""


@dataclass(frozen=True, slots=True)
class Run:
    """One series through one child."""

    slices: int
    start_s: float
    """To start the child, load the pipeline and check it: once after the start of the node."""
    wall_s: float
    """From files to files."""
    stages_s: dict[str, float]
    """Busy seconds, by `dicomnode.denoise.STAGES`."""
    peak_mb: float
    """Most memory that the child had at once."""
    precision: str
    reason: str
    """What computed it, and why that; empty for a pipeline that computes by itself."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One pipeline, with the names under which routes use it."""

    names: str
    short: Run
    long: Run

    def expected_s(self, slices: int) -> float:
        """Seconds of a series of so many slices, files to files, in a node that has started."""
        more = self.long.slices - self.short.slices
        per_slice = (self.long.wall_s - self.short.wall_s) / more
        if per_slice <= 0:  # they are too short for the clock, or something else held the short one up
            return self.long.wall_s * slices / self.long.slices
        return self.short.wall_s + (slices - self.short.slices) * per_slice


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """A pipeline that gave no result, and why."""

    names: str
    why: str


def benchmark(config: Config, slices: int, report: Report, matrix: int = MATRIX) -> Iterator[Measured | NotMeasured]:
    """Measure the pipelines of the routes in `config`, each once however many routes and names it has.

    Parameters
    ----------
    slices
        Of the long series, `MIN_SLICES` or more.
    report
        Is told how far each series is.
    matrix
        Rows and columns.

    Raises
    ------
    NodeError
        If no route has a pipeline.
    ConfigError
        If a pipeline cannot be loaded.
    OSError
        If there is no room for the files.
    """
    used: dict[PipelineOptions, list[str]] = {}
    for name in sorted({route.pipeline for route in config.routes if route.pipeline is not None}):
        used.setdefault(config.pipelines[name], []).append(name)
    if not used:
        raise NodeError("no route has a pipeline; write one, e.g. pipeline: fast-2.5d")
    with tempfile.TemporaryDirectory(prefix="dicomnode-benchmark-") as temporary:
        files = write_phantom(Path(temporary) / "series", slices, matrix)
        for options, names in used.items():
            named = ", ".join(names)
            try:
                short, long = (_run(config, options, files[:count], report) for count in (slices // _SHORT, slices))
            except (_Failed, WorkerDied) as error:
                yield NotMeasured(named, str(error))
            else:
                yield Measured(named, short, long)


class _Failed(Exception):
    """A series that came to another end than a result."""


def _run(config: Config, pipeline: PipelineOptions, files: Sequence[Path], report: Report) -> Run:
    worker = configured_worker(config.compute)
    with tempfile.TemporaryDirectory(dir=files[0].parents[1]) as folder, ExitStack() as ends:
        ends.callback(worker.stop)
        out = Path(folder) / "derived"
        begun = time.monotonic()
        worker.describe(pipeline.uses, Options(pipeline.strength, pipeline.blend))
        ready = time.monotonic()
        outcome = worker.run(
            Request(
                job_id="benchmark",
                paths=tuple(map(str, files)),
                out=str(out),
                uses=pipeline.uses,
                strength=pipeline.strength,
                blend=pipeline.blend,
                fingerprint="0" * 64,
                created_at=datetime.now(UTC).astimezone().isoformat(),
                settings=config.derivation.model_dump(),
            ),
            report,
        )
        wall_s = time.monotonic() - ready
        if outcome.kind != "done":
            raise _Failed(f"{outcome.kind}: {outcome.detail}")
        manifest = Manifest.read(out)
        return Run(
            len(files),
            ready - begun,
            wall_s,
            manifest.seconds,
            _peak_mb(worker.pid),
            manifest.precision,
            manifest.reason,
        )


def _peak_mb(pid: int | None) -> float:
    """Most resident memory of a process so far, MB; see proc(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


# ── what is printed ────────────────────────────────────────────────────────────────────────────────────────────────


def table(rows: Sequence[Measured | NotMeasured], compute: Compute, matrix: int = MATRIX) -> str:
    """All that was measured, on what, and what to do if it is too slow; at most `WIDTH` columns."""
    cores = len(os.sched_getaffinity(0))
    threads = min(compute.threads or cores, cores)
    lines = [
        *_wrapped(
            f"{_cpu()}, {threads} of {cores} cores, niceness {NICENESS}. Phantom of {matrix}x{matrix}, of which "
            f"{_body_share(matrix):.0%} is denoised as body; files in {tempfile.gettempdir()}."
        ),
        *_wrapped(
            f"slices/s and {SERIES} slices: what a series of {SERIES} will take, from files to files. start-up: once "
            "after the node was started. reading to writing: at work in the measured series, side by side."
        ),
        "",
        f"{'pipeline':18} {'runs in':7} {'slices/s':>8} {f'{SERIES} slices':>10} {'start-up':>8} {'memory':>8} "
        f"{'reading':>8} {'network':>8} {'check':>6} {'writing':>8}",
    ]
    for row in rows:
        lines += _lines(row)
    load, enough = os.getloadavg()[0], cores + 1  # the benchmark itself is some of it
    if load > enough:
        lines += _wrapped(f"Other programs used this machine (load {load:.1f}): an idle one is faster. Measure again.")
    return "\n".join([*lines, "", *_wrapped(_advice(compute, cores))])


def _lines(row: Measured | NotMeasured) -> list[str]:
    if isinstance(row, NotMeasured):
        return [row.names, *_wrapped(f"no result: {row.why}", "  ")]
    names = [] if len(row.names) <= 18 else [row.names]
    series_s, long = row.expected_s(SERIES), row.long
    read, network, guard, write = (long.stages_s[stage] for stage in STAGES if stage != "wall")
    return [
        *names,
        f"{'' if names else row.names:18} {long.precision:7} {SERIES / series_s:8.2f} {series_s:8.0f} s "
        f"{max(row.short.start_s, long.start_s):6.1f} s {long.peak_mb:5.0f} MB "
        f"{read:6.1f} s {network:6.1f} s {guard:4.1f} s {write:6.1f} s",
        *_wrapped(f"{long.slices} slices in {long.wall_s:.1f} s" + (long.reason and f" on {long.reason}"), "  "),
    ]


def _advice(compute: Compute, cores: int) -> str:
    """What to do if it is too slow: settings that hold it back, then what always helps."""
    steps = []
    if 0 < compute.threads < cores:
        steps.append(f"compute.threads 0, to use all {cores} cores")
    if compute.precision != "auto":
        steps.append("compute.precision auto, the fastest number format that is safe here")
    if compute.device == "cpu":
        steps.append("compute.device auto, which takes a GPU if there is one")
    steps.append("a faster pipeline in the routes, e.g. fast-2.5d")
    return (
        f"Too slow? In config.yaml: {'; '.join(steps)}. Beyond that: more cores, a CPU with AVX-512 VNNI or AMX, or a "
        "GPU (with the extra gpu)."
    )


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


# ── the phantom ────────────────────────────────────────────────────────────────────────────────────────────────────


def write_phantom(folder: Path, slices: int, matrix: int = MATRIX) -> list[Path]:
    """Write a low-dose chest of simple shapes as a CT series into the new folder `folder`; its UIDs are new.

    Returns
    -------
    list of Path
        In the order of the slices.
    """
    folder.mkdir(parents=True)
    chest, noises = _chest(matrix), _noises(matrix)
    common = _header(matrix)
    paths = []
    for k in range(slices):
        noise = np.roll(noises[k % _NOISES], 7 * (k // _NOISES), axis=1)
        paths.append(folder / f"{k:04d}.dcm")
        _write(paths[-1], common, k, chest + NOISE_HU * noise)
    return paths


def _body_share(matrix: int) -> float:
    """Part of a slice that networks may change."""
    return float(inside(_chest(matrix), PIXEL_MM).mean())


def _chest(matrix: int) -> Array:
    """One slice without noise, HU (y, x): fat, muscle, two lungs with vessels, heart, spine; in halves of the image."""
    axis = np.linspace(-1, 1, matrix, dtype=np.float32)
    y, x = axis[:, None], axis

    def ellipse(cy: float, cx: float, height: float, width: float) -> NDArray[np.bool_]:
        return np.asarray(((y - cy) / height) ** 2 + ((x - cx) / width) ** 2 < 1)

    image = np.full((matrix, matrix), -1000, np.float32)
    height, width = _BODY
    image[ellipse(0, 0, height, width)] = -100
    image[ellipse(0, 0, 0.9 * height, 0.93 * width)] = 45
    for side in (-1, 1):
        lung = ellipse(-0.05, side * 0.42, 0.43, 0.3)
        image[lung] = -850
        for n in range(40):  # a spiral of vessels: detail everywhere
            angle, reach = 2.4 * n, math.sqrt((n + 0.5) / 40)
            cy, cx = -0.05 + 0.4 * reach * math.sin(angle), side * 0.42 + 0.27 * reach * math.cos(angle)
            vessel = ellipse(cy, cx, 0.012, 0.012)
            image[vessel & lung] = 40
    image[ellipse(0.05, 0.08, 0.26, 0.24)] = 50
    image[ellipse(0.38, 0, 0.1, 0.1)] = 350
    return image


def _noises(matrix: int) -> Array:
    """Planes of noise with the spectrum of a filtered back projection, of standard deviation 1, (n, y, x)."""
    white = np.random.default_rng(20261121).standard_normal((_NOISES, matrix, matrix))
    radius = np.hypot(np.fft.fftfreq(matrix)[:, None], np.fft.rfftfreq(matrix))  # periods per pixel
    noises = np.fft.irfft2(np.fft.rfft2(white) * radius * np.exp(-((radius / 0.25) ** 2)), (matrix, matrix))
    return np.asarray(noises / noises.std(), dtype=np.float32)


def _header(matrix: int) -> Dataset:
    """What all images share (PS3.3 A.3, CT Image IOD)."""
    ds = Dataset()
    ds.SOPClassUID = CTImageStorage
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = (generate_uid(prefix=None) for _ in range(3))
    ds.PositionReferenceIndicator = ""
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Phantom^Benchmark", "BENCHMARK", "", ""
    ds.StudyDate, ds.StudyTime, ds.StudyID = "20261121", "120000", "BENCHMARK"
    ds.AccessionNumber = ds.ReferringPhysicianName = ""
    ds.Modality, ds.BodyPartExamined, ds.PatientPosition = "CT", "CHEST", "HFS"
    ds.SeriesNumber, ds.SeriesDescription, ds.AcquisitionNumber = 1, "Benchmark phantom, low dose", 1
    ds.Manufacturer, ds.ManufacturerModelName = "Synthetic", "Benchmark phantom"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.KVP, ds.ConvolutionKernel = "120", "STANDARD"
    ds.PixelSpacing = [f"{PIXEL_MM:g}"] * 2
    ds.SliceThickness = f"{SPACING_MM:g}"
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows = ds.Columns = matrix
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "-1024", "1", "HU"
    return ds


def _write(path: Path, common: Dataset, k: int, hu: Array) -> None:
    ds = Dataset(common)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPInstanceUID = generate_uid(prefix=None)
    ds.InstanceNumber = k + 1
    corner = f"{-(common.Rows - 1) / 2 * PIXEL_MM:g}"
    ds.ImagePositionPatient = [corner, corner, f"{k * SPACING_MM:g}"]
    ds.PixelData = np.clip(np.rint(hu + 1024), 0, 4095).astype("<u2").tobytes()
    ds.save_as(path, enforce_file_format=True)
