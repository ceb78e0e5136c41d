"""What networks learn from: phantoms seen through a kernel, thick slices, and scans that are made once."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from ct_builder import write_series
from numpy.typing import NDArray

from training.physics import mean_frequency, nps_2d, radial_nps
from training.simulate import unit_noise
from training.simulation.projection import Kernel
from training.sources import prepare, scans
from training.sources.layouts import Case
from training.sources.prepare import Preparation
from training.sources.scans import Scan, kept, phantom_scan, real_scan, seen_through, thick_to_thin


def _ramp() -> Scan:
    z = np.arange(9, dtype=np.float32)[:, None, None] * np.ones((9, 4, 4), np.float32)
    noise = np.random.default_rng(0).normal(0, 10, (9, 256, 256)).astype(np.float16)
    half = (z * 8).astype(np.float16)
    return Scan("ramp", "ramp", half, half, (noise, noise), 0.0, 0.0, (10.0, 10.0))


def test_a_kernel_is_the_transfer_function_of_what_it_shows() -> None:
    """A wave of frequency f comes out with its amplitude times the apodisation at f."""
    pixel_mm, kernel = 0.5, Kernel(0.6, 2.0)
    x = np.arange(256) * pixel_mm
    for cycles in (0, 16, 40, 77, 100):
        f = cycles / (256 * pixel_mm)
        wave = np.broadcast_to(100 * np.cos(2 * np.pi * f * x), (1, 256, 256)).astype(np.float32)
        seen = seen_through(wave, pixel_mm, kernel)
        assert np.allclose(seen, wave * kernel.apodisation(np.array(f)), atol=1e-3)


def test_thick_slices_show_the_same_with_less_noise() -> None:
    thick = thick_to_thin(_ramp())
    assert np.array_equal(thick.target, _ramp().target)
    assert np.allclose(thick.source[1:7], _ramp().target[1:7])  # a ramp is kept by averaging and interpolation
    # between two thick slices of weight 3/4 and 1/4, each the mean of two slices
    expected = 10 * np.sqrt((0.75**2 + 0.25**2) / 2)
    assert thick.noises[0][3].astype(np.float32).std() == pytest.approx(expected, rel=0.02)
    # places at 1/4 and 3/4 between thick slices, and at the two ends a thick slice itself
    variances = [0.5, *[(0.75**2 + 0.25**2) / 2] * 6, 0.5, 0.5]
    assert thick.noise_hu == pytest.approx([10 * np.sqrt(np.mean(variances))] * 2, rel=0.02)


def test_the_own_noise_of_a_real_series_falls_with_its_slices() -> None:
    scan = replace(_ramp(), target_noise_hu=8.0, source_noise_hu=8.0)
    thick = thick_to_thin(scan)
    assert thick.target_noise_hu == 8
    assert thick.source_noise_hu == pytest.approx(0.8 * thick.noise_hu[0])


def test_a_phantom_has_the_spacing_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, float]] = []

    class Enough(Exception):
        pass

    def draw(count: int, matrix: int, pixel_mm: float, spacing_mm: float, *others: object) -> None:
        told.append((spacing_mm, pixel_mm))
        raise Enough

    monkeypatch.setattr(scans, "chest_abdomen", draw)
    for seed in range(50):
        with pytest.raises(Enough):
            phantom_scan(seed)
    assert told == [scans.phantom_spacing(seed) for seed in range(50)]
    slices, pixels = np.array(told).T
    assert (1 < slices.min() < 1.3, 4.7 < slices.max() < 5) == (True, True)
    assert (0.65 < pixels.min() < 0.67, 0.93 < pixels.max() < 0.95) == (True, True)


def test_a_series_has_the_spacing_of_its_target(tmp_path: Path) -> None:
    files = tuple(write_series(tmp_path, np.zeros((3, 8, 8)), spacing_mm=(2.5, 0.7, 0.7)))
    case = Case("a", "a", files, None, None, "", 2.5)
    assert Preparation(tmp_path, 1, None).spacing(case) == pytest.approx((2.5, 0.7))
    assert Preparation(tmp_path, 1, 1.0).spacing(case) == pytest.approx((2.5, 0.7))  # shown in thick slices, no thinner
    assert Preparation(tmp_path, 1, 1.0).spacing(replace(case, low=files)) == pytest.approx((1.0, 0.7))


def test_a_scan_is_made_once(tmp_path: Path) -> None:
    made = []

    def make() -> Scan:
        made.append(1)
        return _ramp()

    first, again = (kept(tmp_path, {"what": 1}, make) for _ in range(2))
    other = kept(tmp_path, {"what": 2}, make)
    assert len(made) == 2
    for scan in (first, again, other):
        assert np.array_equal(scan.target, _ramp().target)
        assert np.array_equal(scan.source, _ramp().source)
        assert all(np.array_equal(a, b) for a, b in zip(scan.noises, _ramp().noises, strict=True))
        assert (scan.name, scan.noise_hu, scan.source_noise_hu) == ("ramp", (10.0, 10.0), 0.0)


def test_a_phantom_comes_with_the_noise_that_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "PHANTOM_SLICES", 3)
    scan = phantom_scan(5)
    assert scan.target.shape == (3, 512, 512)
    assert scan.target_noise_hu == 0
    body = scan.target > -200
    for noise, level in zip(scan.noises, scan.noise_hu, strict=True):
        assert noise.astype(np.float32)[body].std() == pytest.approx(level, rel=0.35)  # the middle is noisier
    assert np.corrcoef(*(n.astype(np.float32)[body] for n in scan.noises))[0, 1] == pytest.approx(0, abs=0.05)


def test_an_oblong_series_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_series(tmp_path / "series", np.full((3, 48, 64), 40))
    case = Case("somebody", "1.2.3", tuple(files), None, None, "", 1.0)
    assert Preparation(tmp_path / "store", 1, None).case(case) is None
    said = capsys.readouterr().out
    assert said.startswith("1.2.3: left out. ")
    assert "the virtual scan needs square ones" in said


def test_a_real_series_gets_noise_of_its_own_kernel(tmp_path: Path) -> None:
    """Its own noise, made here with a known kernel, and the noise to add have about the same spectrum."""
    pixel_mm, kernel = 1.5, Kernel(0.25)
    rng = np.random.default_rng(8)
    y, x = np.mgrid[:192, :192] - 95.5
    clean = np.where(np.hypot(x, y) < 85, 40.0, -1000.0)[None].repeat(8, 0).astype(np.float32)
    own = unit_noise(clean, pixel_mm, 3, f50=kernel.f50)
    series = clean + own * np.float32(20 / own[:, 64:128, 64:128].std()) + rng.normal(0, 0.1, clean.shape)
    files = write_series(tmp_path, series, spacing_mm=(2.0, pixel_mm, pixel_mm), SliceThickness=3)
    scan = real_scan(Case("somebody", "1.2.3", tuple(files), None, None, "", 3.0), 1)
    assert scan.target_noise_hu == pytest.approx(20, rel=0.2)

    def mean(noise: NDArray[np.float32]) -> float:
        tiles = noise[:, 64:128, 64:128]
        return mean_frequency(radial_nps(nps_2d(tiles, pixel_mm), pixel_mm))

    for noise in scan.noises:
        assert mean(noise.astype(np.float32)) == pytest.approx(mean(own), rel=0.25)
    # slices of 3 mm every 2 mm share a third of what they show
    between = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairwise(scan.noises[0][:, 64:128, 64:128])]
    assert np.mean(between) == pytest.approx(1 / 3, abs=0.05)


def test_files_that_were_replaced_are_read_again(tmp_path: Path) -> None:
    """Another export of a pair under the same names, of either dose."""
    rng = np.random.default_rng(0)
    files = {
        dose: tuple(write_series(tmp_path / dose, rng.normal(40, 20, (3, 48, 48)), name=dose)) for dose in ("f", "l")
    }
    case = Case("somebody", "a pair", files["f"], files["l"], 0.25, "", 2.0)

    def middle() -> tuple[float, float]:
        scan = Preparation(tmp_path / "store", 1, None).case(case)
        assert scan is not None
        return float(np.median(scan.target)), float(np.median(scan.source))

    first = middle()
    assert middle() == first
    assert len(list((tmp_path / "store").iterdir())) == 1
    for k, dose in enumerate("fl"):
        write_series(tmp_path / dose, rng.normal(300, 20, (3, 48, 48)), name=dose)
        changed = middle()
        assert changed[k] == pytest.approx(300, abs=5)
        assert len(list((tmp_path / "store").iterdir())) == 2 + k


@pytest.mark.parametrize("slices", [1, 6])
def test_a_series_without_partner_is_shown_thick_too(
    tmp_path: Path, slices: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every second slice brighter: averaged in pairs, that is gone."""
    rng = np.random.default_rng(3)
    hu = rng.normal(40, 20, (slices, 96, 96)) + 60.0 * (np.arange(slices) % 2)[:, None, None]
    files = write_series(tmp_path / "series", hu, spacing_mm=(2.0, 2.0, 2.0))
    case = Case("somebody", "1.2.3", tuple(files), None, None, "", 1.0)
    scan = Preparation(tmp_path / "store", 1, 1.0).case(case)
    if slices == 1:
        assert scan is None
        assert "1.2.3: left out. one slice only" in capsys.readouterr().out
        return
    assert scan is not None
    assert np.ptp(np.median(scan.target.astype(np.float32), axis=(1, 2))) == pytest.approx(60, abs=3)
    assert np.ptp(np.median(scan.source.astype(np.float32), axis=(1, 2))) < 5
    unpaired = Preparation(tmp_path / "store", 1, None).case(case)
    assert unpaired is not None
    assert np.array_equal(unpaired.source, unpaired.target)
    assert np.array_equal(unpaired.target, scan.target)


def test_phantoms_stay_in_the_store_when_real_scans_are_made_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phantoms are known by seed and revision alone; the digest is that of sha256sum."""
    monkeypatch.setattr(prepare, "phantom_scan", lambda seed: _ramp())
    Preparation(tmp_path, 1, None).phantom(5)
    # printf '{"phantom": 5, "revision": 3}' | sha256sum
    assert [path.name for path in tmp_path.iterdir()] == ["fa5544340e1a0669"]
