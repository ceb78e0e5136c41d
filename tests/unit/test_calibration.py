"""A scanner that is known is found again; real series get noise like their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.volume import Geometry, Volume, read_volume
from tests.ct_builder import write_series
from training.simulate import full_dose_noise
from training.simulation import check as checking
from training.simulation.calibration import DEFAULT_KERNEL, KERNELS, Calibration, calibrate, overlap_of, tube_current
from training.simulation.check import Check, check
from training.simulation.counts import ELECTRONIC_COUNTS, Beam
from training.simulation.projection import Kernel
from training.simulation.simulated_volume import simulate

Array = NDArray[np.float32]
N, SLICES, PIXEL_MM = 256, 8, 1.0
KERNEL = Kernel(0.4)
BEAM = Beam(4e6, ELECTRONIC_COUNTS)


def body(inside_hu: float = 40.0) -> Array:
    """An elliptic cylinder with a spine."""
    y, x = np.mgrid[:N, :N] - (N - 1) / 2
    plane = np.where((x / 110) ** 2 + (y / 80) ** 2 < 1, inside_hu, -1000)
    plane[np.hypot(x, y - 50) < 14] = 400
    return np.repeat(plane[None].astype(np.float32), SLICES, 0)


def volume_of(hu: Array, thickness_mm: float = 3.0) -> Volume:
    geometry = Geometry((0, 0, 0), (3.0, PIXEL_MM, PIXEL_MM), ((0, 0, 1), (0, 1, 0), (1, 0, 0)), "")
    return Volume(
        hu=hu,
        geometry=geometry,
        slice_uids=(),
        slice_paths=(),
        padding=np.zeros(hu.shape, np.bool_),
        thickness_mm=thickness_mm,
    )


@pytest.fixture(scope="module")
def scan() -> Array:
    return body() + full_dose_noise(body(), PIXEL_MM, 11, KERNEL, BEAM)


@pytest.fixture(scope="module")
def found(scan: Array) -> Calibration:
    return calibrate(volume_of(scan))


def shape(kernel: Kernel) -> Array:
    f = np.linspace(0.02, 0.5 / PIXEL_MM, 50)
    return np.asarray(kernel.ramp(f) / kernel.ramp(f).max(), np.float32)


def test_kernel_and_photons_are_found(found: Calibration) -> None:
    assert found.kernel_from == "differences of slices"
    assert np.abs(shape(found.kernel) - shape(KERNEL)).max() < 0.1
    assert found.beam.n0 == pytest.approx(BEAM.n0, rel=0.12)
    assert found.current == pytest.approx([1] * SLICES, abs=0.12)
    assert found.overlap == 1


def test_quarter_dose_has_twice_the_noise_and_the_same_texture(scan: Array, found: Calibration) -> None:
    result = check(volume_of(scan), found, 3)
    assert result.ratio == pytest.approx(2, abs=0.15)
    assert result.frequency_error == pytest.approx(0, abs=0.05)


def test_a_simulator_that_is_off_misses_the_bar(scan: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = volume_of(scan)
    found = Calibration(KERNEL, BEAM, 1.0, (1.0,) * SLICES, 13.0, "known")
    assert check(volume, found).missed == []

    def missed(low: Callable[[Volume, float, int, Calibration], Array]) -> list[str]:
        monkeypatch.setattr(checking, "simulate", low)
        return check(volume, found, 3).missed

    assert missed(lambda part, *how: simulate(part, *how) + np.float32(0.7)) == ["water"]
    # √(1 + 3·1.2²) = 2.3
    assert missed(lambda part, *how: part.hu + np.float32(1.2) * (simulate(part, *how) - part.hu)) == ["noise"]
    soft = replace(found, kernel=Kernel(0.3), current=(1.0,) * 3)
    assert "frequency" in missed(lambda part, dose, seed, _: simulate(part, dose, seed, soft))
    assert Check(math.nan, math.nan, math.nan, math.nan).missed == ["noise", "frequency", "water"]


def test_the_table_judges_series_with_enough_noise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(volume: Volume) -> Calibration:
        return Calibration(KERNEL, BEAM, 1.0, (1.0,), float(volume.hu[0, 0, 0]), "known")

    results = {13: Check(2.1, 0.30, 0.31, 0.02), 12: Check(2.2, 0.30, 0.34, 0.02), 3: Check(2.2, 0.30, 0.30, 0.0)}
    monkeypatch.setattr(checking, "read_series", lambda path: volume_of(np.full((1, 8, 8), int(path.name), np.float32)))
    monkeypatch.setattr(checking, "calibrate", found)
    monkeypatch.setattr(checking, "check", lambda volume, found, slices: results[int(found.noise_hu)])
    checking.main(["13", "12", "3"])
    head, line, *rows, _, said = capsys.readouterr().out.splitlines()
    assert {text.count("|") for text in (head, line, *rows)} == {13}
    assert rows[0].endswith("| × 2.10 | 0.300 → 0.310 | +3.3% | +0.02 | met |")
    assert rows[1].endswith("| **missed**: noise, frequency |")
    assert rows[2].endswith("| none below 4 HU |")
    assert said == "1 of 2 series with at least 4 HU of noise meet the bar."


def test_one_seed_one_calibration(scan: Array) -> None:
    assert calibrate(volume_of(scan), 3) == calibrate(volume_of(scan), 3)


def test_a_single_slice_is_enough(scan: Array) -> None:
    found = calibrate(volume_of(scan[:1]))
    assert found.kernel_from == "single slices"
    assert np.abs(shape(found.kernel) - shape(KERNEL)).max() < 0.15
    assert found.beam.n0 == pytest.approx(BEAM.n0, rel=0.25)


def test_overlapping_slices_are_told_from_the_header(scan: Array) -> None:
    assert overlap_of(volume_of(scan, thickness_mm=6.0)) == 2
    assert overlap_of(volume_of(scan, thickness_mm=0.0)) == 1
    assert overlap_of(volume_of(scan[:1], thickness_mm=6.0)) == 1


def test_photons_follow_the_current_of_the_headers(tmp_path: Path) -> None:
    currents = (100, 100, 150, 150, 200, 200, 250, 250)
    relative = tuple(one / 175 for one in currents)
    hu = np.maximum(body() + full_dose_noise(body(), PIXEL_MM, 12, KERNEL, BEAM, current=relative), -1024)
    files = write_series(tmp_path, hu, spacing_mm=(3.0, PIXEL_MM, PIXEL_MM), XRayTubeCurrent=lambda k: currents[k])
    found = calibrate(read_volume(files))
    assert np.array(found.current) * found.beam.n0 == pytest.approx(np.array(relative) * BEAM.n0, rel=0.2)


def test_photons_follow_the_noise_where_headers_are_silent() -> None:
    relative = np.linspace(0.7, 1.3, SLICES)
    hu = body() + full_dose_noise(body(), PIXEL_MM, 13, KERNEL, BEAM, current=list(relative))
    found = calibrate(volume_of(hu))
    assert np.array(found.current) * found.beam.n0 == pytest.approx(relative * BEAM.n0, rel=0.2)


@pytest.mark.parametrize("current", [None, 0, lambda k: 100, lambda k: 1 + 1000 * k])
def test_currents_that_tell_nothing_are_not_used(tmp_path: Path, current: object) -> None:
    files = write_series(tmp_path, body()[:3, :64, :64], XRayTubeCurrent=current)
    assert tube_current(read_volume(files)) == ()


@pytest.mark.parametrize(
    ("name", "kernel", "source"),
    [
        ("B70f", KERNELS["b70"], "table: b70"),
        ("LUNG", KERNELS["lung"], "table: lung"),
        ("X1", DEFAULT_KERNEL, "default"),
    ],
)
def test_without_soft_tissue_the_kernel_comes_from_its_name(
    tmp_path: Path, name: str, kernel: Kernel, source: str
) -> None:
    noise = np.random.default_rng(1).normal(0, 20, (SLICES, N, N))
    hu = np.maximum(body(400.0) + noise, -1024)
    found = calibrate(read_volume(write_series(tmp_path, hu, ConvolutionKernel=name)))
    assert (found.kernel, found.kernel_from, found.tiles) == (kernel, source, 0)
    assert math.isnan(found.residual)


def test_series_that_teach_nothing_are_refused(scan: Array) -> None:
    with pytest.raises(ValueError, match="no noise"):
        calibrate(volume_of(np.zeros((2, N, N), np.float32)))
    with pytest.raises(ValueError, match="square"):
        calibrate(volume_of(scan[:, :, 10:]))
    oblong = volume_of(scan)
    with pytest.raises(ValueError, match="square"):
        calibrate(replace(oblong, geometry=replace(oblong.geometry, spacing_mm=(3.0, 1.0, 1.1))))
    with pytest.raises(ValueError, match="no body"):
        calibrate(volume_of(np.random.default_rng(0).normal(-1000, 10, (2, N, N)).astype(np.float32)))


@pytest.mark.data
@pytest.mark.parametrize(
    "name",
    [
        "siemens-sensation10-lungdxA0002-B70f-8mm",
        "philips-brilliance16-lungdxA0001-L-5mm",
        "ge-revolution-cptacpda-LUNG-5mm",
        "ge-vct-cmbcrc-chest-LUNG-2p5mm",
        "ge-lightspeed16-rider-chestpe-1p25mm",
    ],
)
def test_inserted_noise_is_like_that_of_the_series(ct_series: Callable[[str], list[Path]], name: str) -> None:
    volume = read_volume(ct_series(name))
    found = calibrate(volume)
    assert found.kernel_from == "differences of slices"
    assert check(volume, found, 9).missed == []
