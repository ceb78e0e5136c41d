"""What a network learns from: phantoms, real series with simulated noise, real pairs; kept on disk once made."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.noise import noise_level
from pipelines.safety import network_input
from pipelines.volume import read_volume
from training.simulate import unit_noise
from training.simulation.calibration import calibrate
from training.simulation.projection import Kernel
from training.sources.layouts import Case
from training.sources.lesions import add_lesions
from training.sources.pairs import load_pair
from training.sources.phantom import chest_abdomen

Array = NDArray[np.float32]
Half = NDArray[np.float16]

PHANTOM_SLICES = 24
HU_RANGE = (-1024.0, 4000.0)
"""Targets are clipped to this; padding becomes air."""
SOFT_F50, SHARP_F50, SHARP_BOOST = (0.35, 0.8), (0.5, 1.1), (0.5, 3.0)
"""Kernels for soft tissue, and for lung and bone: see `training.simulation.projection.Kernel`."""
SHARP_PART = 0.3
"""Part of the phantoms that were reconstructed with a sharp kernel."""
PHANTOM_PIXEL_MM, PHANTOM_SPACING_MM = (0.65, 0.95), (1.0, 5.0)
"""Pixels and slice distances that phantoms are drawn from."""
OVERLAP, OVERLAP_PART = (1.0, 2.0), 0.3
"""Slice thickness over distance of the phantoms whose slices overlap, and their part."""
DETECTOR_F50 = 1.2
"""Frequency (1/mm) that focal spot and detector halve, before any kernel."""
PHANTOM_REVISION, REAL_REVISION = 3, 4
"""Parts of what a stored phantom, or a stored scan of real series, is known by: raise the one whose scans would come
out otherwise today."""


class ScanRefused(ValueError):
    """A series is no scan to learn from; says why."""


@dataclass(frozen=True, slots=True)
class Scan:
    """A target, what a network is shown of it, and noise to add; all (z, y, x) float16 HU."""

    name: str
    subject: str
    target: Half
    source: Half
    """What the noise is added to: the target, or a thicker or a real low-dose image of it."""
    noises: tuple[Half, ...]
    """Full-dose noise of two kernels, independent; none for a real low-dose image."""
    target_noise_hu: float
    """Noise level of the target; 0 for a phantom."""
    source_noise_hu: float
    """Noise level of the source."""
    noise_hu: tuple[float, ...]
    """Noise level of each noise image, measured as it will be measured at inference."""

    def digest(self) -> str:
        """Of the numbers that were measured on all of it and of its middle slices: to know it again without reading
        gigabytes."""
        numbers = (self.name, self.subject, self.target_noise_hu, self.source_noise_hu, *self.noise_hu)
        found = hashlib.sha256(json.dumps(numbers).encode())
        for images in (self.target, self.source, *self.noises):
            found.update(repr(images.shape).encode())
            found.update(images[len(images) // 2].tobytes())
        return found.hexdigest()


def _measured(hu: Array, pixel_mm: float) -> float:
    return noise_level(hu, np.zeros(hu.shape, np.bool_), pixel_mm)


def _with_noise(
    name: str,
    subject: str,
    target: Array,
    pixel_mm: float,
    clean: bool,
    kernels: tuple[Kernel, Kernel],
    overlap: float,
    seed: int,
) -> Scan:
    noises = [
        unit_noise(target, pixel_mm, seed + 7919 * (i + 1), f50=kernel.f50, boost=kernel.boost, overlap=overlap)
        for i, kernel in enumerate(kernels)
    ]
    own = _measured(target, pixel_mm)
    # three times the noise, so that the structure of the target adds little to the measured level
    levels = [math.sqrt(max(_measured(target + 3 * n, pixel_mm) ** 2 - own**2, 0)) / 3 for n in noises]
    half = target.astype(np.float16)
    level = 0.0 if clean else own
    return Scan(
        name, subject, half, half, tuple(n.astype(np.float16) for n in noises), level, level, (levels[0], levels[1])
    )


def _near(kernel: Kernel, rng: np.random.Generator) -> Kernel:
    """A kernel whose band is near that of `kernel`: noise and edges of an image have passed the same one, about."""
    return Kernel(kernel.f50 * rng.uniform(0.85, 1.2), kernel.boost * rng.uniform(0.8, 1.25))


def seen_through(hu: Array, pixel_mm: float, kernel: Kernel) -> Array:
    """`hu` (z, y, x) with the apodisation of `kernel` as its modulation transfer function."""
    rows, columns = (np.fft.fftfreq(n, pixel_mm) for n in hu.shape[1:])
    transfer = kernel.apodisation(np.hypot(rows[:, None], columns[None, : hu.shape[2] // 2 + 1]))
    return np.stack([np.fft.irfft2(np.fft.rfft2(image) * transfer, image.shape) for image in hu]).astype(np.float32)


class Spacing(NamedTuple):
    """What a scan shows, mm."""

    slices: float
    """From slice to slice; 0 if unknown."""
    pixels: float


def _phantom_spacing(rng: np.random.Generator) -> Spacing:
    pixel_mm = float(rng.uniform(*PHANTOM_PIXEL_MM))
    return Spacing(float(rng.uniform(*PHANTOM_SPACING_MM)), pixel_mm)


def phantom_spacing(seed: int) -> Spacing:
    """That of the phantom `seed`."""
    return _phantom_spacing(_phantom_numbers(seed))


def _phantom_numbers(seed: int) -> np.random.Generator:
    return np.random.default_rng((seed, 1))


def phantom_scan(seed: int) -> Scan:
    """A phantom with faint lesions, reconstructed with a kernel, with the noise of two kernels like it."""
    rng = _phantom_numbers(seed)
    spacing_mm, pixel_mm = _phantom_spacing(rng)
    if rng.random() < SHARP_PART:
        kernel = Kernel(rng.uniform(*SHARP_F50), rng.uniform(*SHARP_BOOST))
    else:
        kernel = Kernel(rng.uniform(*SOFT_F50))
    overlap = rng.uniform(*OVERLAP) if rng.random() < OVERLAP_PART else 1.0
    target = chest_abdomen(PHANTOM_SLICES, 512, pixel_mm, spacing_mm, seed, DETECTOR_F50)
    target = add_lesions(target, (spacing_mm, pixel_mm, pixel_mm), rng)
    target = np.clip(seen_through(target, pixel_mm, kernel), *HU_RANGE)
    kernels = _near(kernel, rng), _near(kernel, rng)
    return _with_noise(f"phantom {seed}", f"phantom {seed}", target, pixel_mm, True, kernels, overlap, seed)


def real_scan(case: Case, seed: int) -> Scan:
    """A real series as target, with faint lesions put into it and noise to add as its own scanner would make it.

    The kernel of that noise is near the one that the noise of the series itself shows: a sharp image under soft noise
    is what no scanner makes.

    Raises
    ------
    pipelines.volume.SeriesRefused
        If the series is none that may be denoised.
    ScanRefused
        If its slices are not square, or nothing can be learnt of its scanner.
    """
    volume = read_volume(case.full)
    try:
        scanner = calibrate(volume, seed)
    except ValueError as error:
        raise ScanRefused(str(error)) from error
    rng = np.random.default_rng((seed, 2))
    target = np.minimum(network_input(volume), np.float32(HU_RANGE[1]))
    spacing_mm = volume.geometry.spacing_mm
    target = add_lesions(target, spacing_mm, rng, noisy=True)
    kernels = _near(scanner.kernel, rng), _near(scanner.kernel, rng)
    return _with_noise(case.name, case.subject, target, spacing_mm[1], False, kernels, scanner.overlap, seed)


def paired_scan(case: Case, z_target_mm: float | None = None) -> Scan:
    """A real series at full dose as target, and its real low-dose image.

    Raises
    ------
    pipelines.volume.SeriesRefused
        If a series is none that may be denoised.
    ValueError
        If the two do not show the same slices.
    """
    pair = load_pair(case, z_target_mm)
    target, source = (np.clip(hu, *HU_RANGE).astype(np.float32) for hu in (pair.full, pair.low))
    levels = _measured(target, pair.pixel_mm), _measured(source, pair.pixel_mm)
    return Scan(case.name, case.subject, target.astype(np.float16), source.astype(np.float16), (), *levels, ())


def thick_to_thin(scan: Scan) -> Scan:
    """`scan` with a source twice as thick as its target: two slices averaged, then interpolated to the slices again.

    Wei and Hsu (MIDL 2021) learn 1.0 mm from 2.0 mm. The noise is that of the thick slices, and so are its levels; the
    own noise of a real target falls as the noise to add does.

    Raises
    ------
    ScanRefused
        If there is one slice only.
    """
    if len(scan.target) < 2:
        raise ScanRefused("one slice only: there is none to average it with")

    def averaged(hu: Half) -> Half:
        pairs = hu[: len(hu) // 2 * 2].astype(np.float32).reshape(-1, 2, *hu.shape[1:]).mean(1)
        # slice k lies at (k - 1/2)/2 between the thick slices
        place = np.clip((np.arange(len(hu)) - 0.5) / 2, 0, len(pairs) - 1)
        low = np.minimum(place.astype(int), len(pairs) - 2)
        part = (place - low).astype(np.float32)[:, None, None]
        thick: Half = ((1 - part) * pairs[low] + part * pairs[low + 1]).astype(np.float16)
        return thick

    noises = tuple(averaged(n) for n in scan.noises)
    falls = [
        float(after.std(dtype=np.float64) / before.std(dtype=np.float64))
        for before, after in zip(scan.noises, noises, strict=True)
    ]
    return replace(
        scan,
        name=f"{scan.name}, thick",
        source=averaged(scan.source),
        source_noise_hu=scan.source_noise_hu * sum(falls) / len(falls),
        noises=noises,
        noise_hu=tuple(level * fall for level, fall in zip(scan.noise_hu, falls, strict=True)),
    )


def kept(store: Path, what: dict[str, Any], make: Callable[[], Scan]) -> Scan:
    """The scan that `make` makes, from `store` if it is there; arrays are mapped, not read.

    Parameters
    ----------
    store
        Folder that keeps the scans.
    what
        Everything the scan depends on, its revision included.
    make
        Makes it.
    """
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    folder = store / key
    if not folder.exists():
        scan = make()
        partial = store / f"{key}.{os.getpid()}.part"
        partial.mkdir(parents=True, exist_ok=True)
        np.save(partial / "target.npy", scan.target)
        if scan.source is not scan.target:
            np.save(partial / "source.npy", scan.source)
        for k, noise in enumerate(scan.noises):
            np.save(partial / f"noise{k}.npy", noise)
        values = {f.name: getattr(scan, f.name) for f in fields(scan) if f.name not in ("target", "source", "noises")}
        (partial / "scan.json").write_text(json.dumps(values), encoding="utf-8")
        try:
            partial.rename(folder)
        except OSError:  # another training has made it meanwhile
            shutil.rmtree(partial)
    values = json.loads((folder / "scan.json").read_text(encoding="utf-8"))
    target = np.load(folder / "target.npy", mmap_mode="r")
    source = np.load(folder / "source.npy", mmap_mode="r") if (folder / "source.npy").exists() else target
    noises = tuple(np.load(path, mmap_mode="r") for path in sorted(folder.glob("noise*.npy")))
    return Scan(**{**values, "noise_hu": tuple(values["noise_hu"])}, target=target, source=source, noises=noises)
