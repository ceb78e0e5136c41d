"""Low-dose series as DICOM files: values, header, identity, refusals, dciodvfy, and the command."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRBigEndian, ImplicitVRLittleEndian, JPEGLSLossless, RLELossless

from pipelines.ct_slice import SeriesRefused, is_own_output
from pipelines.volume import Volume, read_volume
from tests.conftest import require_peer
from tests.ct_builder import edit, write_series
from training.__main__ import main
from training.simulate import added_noise
from training.simulation import simulated_series
from training.simulation.calibration import Calibration
from training.simulation.counts import Beam
from training.simulation.projection import Kernel
from training.simulation.simulated_series import read_series
from training.simulation.simulated_volume import simulate, unmeasured

Array = NDArray[np.float32]
N = 96
SPACING_MM = (3.0, 3.0, 3.0)
KNOWN = Calibration(Kernel(0.12), Beam(2e6), 1.0, (1.0, 1.0, 1.0), 10.0, "default")


def body(slices: int = 3) -> Array:
    y, x = np.mgrid[:N, :N] - (N - 1) / 2
    noise = np.random.default_rng(5).normal(0, 10, (slices, N, N))
    return np.asarray(np.rint(np.where(np.hypot(x, y) < 38, 40, -950) + noise), np.float32)


@pytest.fixture
def source(tmp_path: Path) -> list[Path]:
    return write_series(tmp_path / "source", body(), spacing_mm=SPACING_MM)


def write(volume: Volume, hu: Array, out: Path, made: str = "made") -> list[Path]:
    return simulated_series.write_series(volume, hu, 0.25, made, out)


def test_a_simulated_series_is_known_as_one(source: list[Path], tmp_path: Path) -> None:
    def made_by(ds: Dataset, manufacturer: str) -> None:
        ds.ContributingEquipmentSequence = [Dataset()]
        ds.ContributingEquipmentSequence[0].Manufacturer = manufacturer

    volume = read_volume(source)
    assert not simulated_series.is_simulated(source[0])
    assert all(simulated_series.is_simulated(path) for path in write(volume, volume.hu, tmp_path / "out"))
    edit(source[0], lambda ds: made_by(ds, "dicomnode training"))
    assert not simulated_series.is_simulated(source[0])


def test_what_is_read_back_is_what_was_simulated(source: list[Path], tmp_path: Path) -> None:
    volume = read_volume(source)
    hu = simulate(volume, 0.25, 1, KNOWN)
    again = read_volume(write(volume, hu, tmp_path / "out"))
    assert np.abs(again.hu - hu).max() <= 0.5
    assert np.array_equal(again.hu, np.rint(again.hu))
    assert again.geometry == volume.geometry
    assert again.positions_mm == volume.positions_mm
    assert again.thickness_mm == volume.thickness_mm
    noise = again.hu - volume.hu
    centre = np.s_[:, 36:60, 36:60]
    expected = added_noise(volume.hu, 3.0, 0.25, 1, KNOWN.kernel, KNOWN.beam)
    assert float(noise[centre].std()) == pytest.approx(float(expected[centre].std()), rel=0.02)
    assert float(noise[centre].std()) > 3


def test_simulation_is_the_source_and_the_noise_alone(source: list[Path]) -> None:
    volume = read_volume(source)
    low, same = (simulate(volume, 0.25, seed, KNOWN) for seed in (1, 1))
    assert np.array_equal(low, same)
    assert not np.array_equal(low, simulate(volume, 0.25, 2, KNOWN))
    assert np.array_equal(simulate(volume, 1.0, 1, KNOWN), volume.hu)
    with pytest.raises(ValueError, match="fraction"):
        simulate(volume, 0.0, 1, KNOWN)


def test_values_fill_the_bits_and_no_more(tmp_path: Path) -> None:
    """Saturation at what 12 bits hold, as in a scanner; never a value that wraps around."""
    files = write_series(tmp_path / "source", body(), spacing_mm=SPACING_MM, signed=False, BitsStored=12, HighBit=11)
    volume = read_volume(files)
    hu = volume.hu.copy()
    hu[:, 0, :2] = -5000, 9000
    again = read_volume(write(volume, hu, tmp_path / "out"))
    assert again.hu[:, 0, :2].tolist() == [[-1024, 3071]] * 3
    assert np.array_equal(again.hu[:, 1:], volume.hu[:, 1:])


def test_slope_and_intercept_stay(tmp_path: Path) -> None:
    files = write_series(tmp_path / "source", body(), spacing_mm=SPACING_MM, slope=0.5, intercept=-1000)
    volume = read_volume(files)
    hu = volume.hu + np.float32(0.6)
    made = write(volume, hu, tmp_path / "out")
    assert [(d.RescaleSlope, d.RescaleIntercept) for d in map(dcmread, made)] == [(0.5, -1000)] * 3
    assert np.abs(read_volume(made).hu - hu).max() <= 0.25


def test_padding_stays_and_is_never_made(tmp_path: Path) -> None:
    hu = body()
    hu[:, :20, :20] = -1024
    files = write_series(tmp_path / "source", hu, spacing_mm=SPACING_MM, signed=False, PixelPaddingValue=0)
    volume = read_volume(files)
    assert volume.padding.any()
    low = simulate(volume, 0.25, 1, KNOWN)
    low[:, 90, 90] = -1024.2
    again = read_volume(write(volume, low, tmp_path / "out"))
    assert np.array_equal(again.padding, volume.padding)
    assert (again.hu[:, 90, 90] == -1023).all()
    assert (again.hu[volume.padding] == -1024).all()


def test_a_constant_surround_of_the_field_of_view_stays(tmp_path: Path) -> None:
    hu = body()
    y, x = np.mgrid[:N, :N] - (N - 1) / 2
    outside = np.hypot(x, y) > N / 2 + 1
    hu[:, outside] = -1000
    volume = read_volume(write_series(tmp_path, hu, spacing_mm=SPACING_MM))
    assert np.array_equal(unmeasured(volume), np.broadcast_to(outside, hu.shape))
    assert (simulate(volume, 0.1, 1, KNOWN)[:, outside] == -1000).all()


def test_header_says_what_it_is_and_keeps_the_patient(source: list[Path], tmp_path: Path) -> None:
    for path in source:
        edit(path, lambda ds: ds.private_block(0x11, "SCANNER", create=True).add_new(1, "LO", "dose 12"))
    volume = read_volume(source)
    before = [dcmread(path) for path in source]
    after = [dcmread(path) for path in write(volume, volume.hu, tmp_path / "out")]
    for a, b in zip(after, before, strict=True):
        for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID", "KVP", "InstanceNumber"):
            assert a[keyword] == b[keyword]
        assert a.SOPInstanceUID != b.SOPInstanceUID
        assert a.file_meta.MediaStorageSOPInstanceUID == a.SOPInstanceUID
        assert a.SeriesInstanceUID == after[0].SeriesInstanceUID != b.SeriesInstanceUID
        assert a.ImageType[:3] == ["DERIVED", "PRIMARY", "AXIAL"]
        assert a.SeriesDescription.endswith("simulated low dose 25%")
        assert len(a.SeriesDescription) <= 64
        assert "Never acquired at that dose" in a.DerivationDescription
        assert len(a.DerivationDescription) <= 1024
        assert a.SourceImageSequence[0].ReferencedSOPInstanceUID == b.SOPInstanceUID
        assert not [tag for tag in a.keys() if tag.is_private]


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("XRayTubeCurrent", 200), ("Exposure", 100), ("ExposureInuAs", 100_000), ("CTDIvol", 12.5)],
)
def test_no_dose_is_claimed(tmp_path: Path, keyword: str, value: float) -> None:
    dose: dict[str, Any] = {keyword: value}
    volume = read_volume(write_series(tmp_path / "source", body(), spacing_mm=SPACING_MM, **dose))
    assert keyword in dcmread(volume.slice_paths[0])
    assert keyword not in dcmread(write(volume, volume.hu, tmp_path / "out")[0])


def test_a_long_description_keeps_its_end(tmp_path: Path) -> None:
    volume = read_volume(write_series(tmp_path / "source", body(), spacing_mm=SPACING_MM, SeriesDescription="x" * 64))
    made = dcmread(write(volume, volume.hu, tmp_path / "out")[0])
    assert made.SeriesDescription == "x" * 41 + " simulated low dose 25%"


def test_the_same_making_is_the_same_object(source: list[Path], tmp_path: Path) -> None:
    volume = read_volume(source)
    files = [write(volume, volume.hu, tmp_path / name, made) for name, made in (("a", "x"), ("b", "x"), ("c", "y"))]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    uids = [{str(dcmread(path).SOPInstanceUID) for path in paths} for paths in files]
    assert len(uids[0]) == 3
    assert not uids[0] & uids[2]


def test_the_node_takes_it_for_a_scan_not_for_its_own(source: list[Path], tmp_path: Path) -> None:
    volume = read_volume(source)
    assert not any(is_own_output(dcmread(path)) for path in write(volume, volume.hu, tmp_path / "out"))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, JPEGLSLossless, RLELossless])
def test_sources_of_every_encoding(tmp_path: Path, syntax: UID) -> None:
    files = write_series(tmp_path / "source", body(), spacing_mm=SPACING_MM)
    for path in files:
        ds = dcmread(path)
        if syntax in (JPEGLSLossless, RLELossless):
            ds.compress(syntax, generate_instance_uid=False)
        elif syntax == ExplicitVRBigEndian:
            ds.PixelData = np.frombuffer(ds.PixelData, "<i2").astype(">i2").tobytes()
            ds.file_meta.TransferSyntaxUID = syntax
        else:
            ds.file_meta.TransferSyntaxUID = syntax
        dcmwrite(path, ds, enforce_file_format=True)
    volume = read_volume(files)
    made = write(volume, volume.hu, tmp_path / "out")
    assert np.array_equal(read_volume(made).hu, body())


def test_a_file_that_was_exchanged_is_noticed(source: list[Path], tmp_path: Path) -> None:
    volume = read_volume(source)
    source[0].write_bytes(source[1].read_bytes())
    with pytest.raises(SeriesRefused, match="replaced"):
        write(volume, volume.hu, tmp_path / "out")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_series(tmp_path / "source", body(4), spacing_mm=SPACING_MM)
    (tmp_path / "source" / "notes.txt").write_text("not DICOM")
    main(["simulate", str(tmp_path / "source"), "--dose", "0.25", "--out", str(tmp_path / "out"), "--seed", "3"])
    said = capsys.readouterr().out
    assert "noise" in said
    assert "4 images at 0.25 of the dose" in said
    low, full = read_series(tmp_path / "out"), read_volume(files)
    centre = np.s_[:, 36:60, 36:60]
    assert float((low.hu - full.hu)[centre].std()) == pytest.approx(10 * 3**0.5, rel=0.2)
    with pytest.raises(SystemExit, match="not empty"):
        main(["simulate", str(tmp_path / "source"), "--dose", "0.25", "--out", str(tmp_path / "out")])


def test_unsuitable_series_are_refused_with_the_reason(tmp_path: Path) -> None:
    write_series(tmp_path / "scout", body(), spacing_mm=SPACING_MM, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    (tmp_path / "empty").mkdir()
    for name, reason in (("scout", "localizer"), ("empty", "there are no files")):
        with pytest.raises(SystemExit, match=reason):
            main(["simulate", str(tmp_path / name), "--dose", "0.25", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def complaints(path: Path) -> set[str]:
    done = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False, timeout=60)
    return {line.strip() for line in (done.stdout + done.stderr).splitlines() if re.match("Error|Warning", line)}


@pytest.mark.peer
@pytest.mark.data
@pytest.mark.parametrize(
    "name",
    [
        "siemens-sensation10-lungdxA0002-B70f-8mm",
        "philips-brilliance16-lungdxA0001-L-5mm",
        "philips-ingenuity-headphantom-5mm-UB",
        "ge-vct-cmbcrc-chest-LUNG-2p5mm",
    ],
)
def test_dciodvfy_finds_nothing_new_in_a_real_series(
    ct_series: Callable[[str], list[Path]], tmp_path: Path, name: str
) -> None:
    require_peer("dciodvfy")
    volume = read_volume(ct_series(name)[10:12])
    made = write(volume, volume.hu, tmp_path / "out")
    for new, old in zip(made, volume.slice_paths, strict=True):
        assert complaints(new) <= complaints(old)
    assert np.array_equal(read_volume(made).hu, volume.hu)
