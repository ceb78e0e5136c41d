"""HU against an independent computation, and every reason to refuse a series."""

from __future__ import annotations

import random
import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial
from math import cos, radians, sin
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ct_builder import edit, phantom, uid, write_series
from pydicom import dcmread
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from pipelines.volume import SeriesRefused, Volume, read_volume


def code_of(files: list[Path]) -> str:
    """Reason for which these files are refused, or ``"read"``."""
    refusal = None
    try:
        read_volume(files)
    except SeriesRefused as error:
        refusal = error
    if refusal is None:
        return "read"
    assert refusal.detail
    assert "phantom" not in str(refusal).casefold(), "the reason tells who the patient is"
    return refusal.code


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_hu_are_those_that_were_written(tmp_path: Path, signed: bool) -> None:
    hu = phantom(5, 33)
    volume = read_volume(write_series(tmp_path, hu, signed=signed))
    assert volume.hu.dtype == np.float32
    np.testing.assert_array_equal(volume.hu, hu)
    assert not volume.padding.any()


def test_hu_from_the_raw_bytes_with_another_rescale_in_each_slice(tmp_path: Path) -> None:
    slopes, intercepts = [1.0, 0.5, 1.25, 2.0002442], [-1024.0, -1000.0, 0.0, -4047.5]
    files = write_series(
        tmp_path,
        phantom(4),
        RescaleSlope=lambda k: str(slopes[k]),
        RescaleIntercept=lambda k: str(intercepts[k]),
        RescaleType=None,
    )
    volume = read_volume(files)
    for k, path in enumerate(files):
        stored = np.frombuffer(path.read_bytes()[-64 * 64 * 2 :], dtype="<i2").reshape(64, 64)
        expected = np.array([float(v) * slopes[k] + intercepts[k] for v in stored.ravel()]).astype(np.float32)
        np.testing.assert_array_equal(volume.hu[k].ravel(), expected)


@pytest.mark.parametrize("transfer_syntax", [RLELossless, JPEGLSLossless])
def test_compressed_pixels_are_the_same(tmp_path: Path, transfer_syntax: str) -> None:
    hu = phantom(2)
    volume = read_volume(write_series(tmp_path, hu, transfer_syntax=transfer_syntax, intercept=0))
    np.testing.assert_array_equal(volume.hu, hu)


def test_any_order_of_files_gives_the_same_volume(tmp_path: Path) -> None:
    files = write_series(tmp_path, phantom(7, 16), InstanceNumber=lambda k: (k * 3) % 7)
    first = read_volume(files)
    assert first.slice_paths == tuple(files)
    for seed in range(5):
        shuffled = files.copy()
        random.Random(seed).shuffle(shuffled)
        again = read_volume(shuffled)
        np.testing.assert_array_equal(again.hu, first.hu)
        assert (again.geometry, again.slice_uids, again.positions_mm) == (
            first.geometry,
            first.slice_uids,
            first.positions_mm,
        )


def test_slices_that_advance_against_their_normal_are_turned(tmp_path: Path) -> None:
    hu = phantom(4, 16)
    files = write_series(tmp_path, hu, step=(0, 0, -1))
    volume = read_volume(files)
    np.testing.assert_array_equal(volume.hu, hu[::-1])
    assert volume.slice_paths == tuple(reversed(files))
    assert np.linalg.det(np.array(volume.geometry.direction)[::-1]) == pytest.approx(1)


@pytest.mark.parametrize("tilt_deg", [0.0, 18.5, -18.5])
def test_geometry_puts_each_voxel_where_its_header_does(tmp_path: Path, tilt_deg: float) -> None:
    c, s = cos(radians(tilt_deg)), sin(radians(tilt_deg))
    files = write_series(tmp_path, phantom(5, 16), orientation=(1, 0, 0, 0, c, -s), spacing_mm=(2.5, 0.7, 0.6))
    volume = read_volume(files)
    assert volume.tilt_deg == pytest.approx(abs(tilt_deg), abs=1e-4)
    geometry = volume.geometry
    assert geometry.spacing_mm == pytest.approx((2.5, 0.7, 0.6))
    for k, path in enumerate(files):
        ds = dcmread(path)
        across, down = np.array(ds.ImageOrientationPatient[:3]), np.array(ds.ImageOrientationPatient[3:])
        there = np.array(ds.ImagePositionPatient) + 0.6 * 7 * across + 0.7 * 11 * down  # PS3.3 equation C.7.6.2.1-1
        steps = np.array([k, 11, 7]) * geometry.spacing_mm
        np.testing.assert_allclose(
            np.array(geometry.origin_mm) + steps @ np.array(geometry.direction), there, atol=1e-4
        )
        assert volume.positions_mm[k] == pytest.approx(np.cross(across, down) @ ds.ImagePositionPatient)


def test_a_single_slice_is_a_volume(tmp_path: Path) -> None:
    volume = read_volume(write_series(tmp_path, phantom(1), spacing_mm=(3.0, 0.7, 0.7)))
    assert volume.hu.shape == (1, 64, 64)
    assert volume.geometry.spacing_mm == (3.0, 0.7, 0.7)
    assert volume.tilt_deg == 0


def test_reading_holds_the_volume_once(tmp_path: Path) -> None:
    files = write_series(tmp_path, phantom(24, 256))
    read_volume(files[:1])
    tracemalloc.start()
    volume = read_volume(files)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    headers = 24 * 30_000
    assert peak < volume.hu.nbytes + volume.padding.nbytes + 6 * volume.hu[0].nbytes + headers


# --- padding ----------------------------------------------------------------------------------------------------------


def round_series(folder: Path, outside_hu: float, **overrides: Any) -> tuple[list[Path], Any]:
    hu = phantom(2).astype(np.int32)
    y, x = np.mgrid[:64, :64] - 31.5
    outside = np.broadcast_to(x**2 + y**2 > 32**2, hu.shape)
    hu[outside] = outside_hu
    return write_series(folder, hu, **overrides), outside


@pytest.mark.parametrize(
    ("outside_hu", "overrides"),
    [
        pytest.param(-3024, {"PixelPaddingValue": -2000}, id="declared"),
        pytest.param(-3024, {}, id="undeclared, far below any measurement"),
        pytest.param(-3024, {"PixelPaddingValue": -32768}, id="declared as another value"),
        pytest.param(-1024, {"intercept": 0, "PixelPaddingValue": -1024}, id="declared, at air"),
        pytest.param(-1500, {"intercept": 0, "PixelPaddingValue": -1600, "PixelPaddingRangeLimit": -1400}, id="range"),
        pytest.param(
            -1500, {"intercept": 0, "PixelPaddingValue": -1400, "PixelPaddingRangeLimit": -1600}, id="turned range"
        ),
    ],
)
def test_padding_is_found(tmp_path: Path, outside_hu: float, overrides: dict[str, Any]) -> None:
    files, outside = round_series(tmp_path, outside_hu, **overrides)
    volume = read_volume(files)
    declared_air = overrides.get("PixelPaddingValue") == -1024  # air that was clipped to the same value is padding too
    expected = outside | (volume.hu == -1024) if declared_air else outside
    np.testing.assert_array_equal(volume.padding, expected)
    assert (volume.hu[outside] == outside_hu).all()


def test_unsigned_padding_value_beside_signed_pixels_means_its_twos_complement(tmp_path: Path) -> None:
    files, outside = round_series(tmp_path, -2000, intercept=0)
    for path in files:
        # (0028,0120) VR US, 63536, put in front of (0028,1050) by hand: pydicom would write SS
        element = bytes.fromhex("2800 2001") + b"US" + (2).to_bytes(2, "little") + (63536).to_bytes(2, "little")
        raw = path.read_bytes()
        at = raw.index(bytes.fromhex("2800 5010") + b"DS")
        path.write_bytes(raw[:at] + element + raw[at:])
        assert dcmread(path)["PixelPaddingValue"].VR == "US"
    # 1 % of the pixels inside are -2000 as well: only the declared value finds them
    np.testing.assert_array_equal(read_volume(files).padding, outside)


def test_noisy_air_below_vacuum_is_a_measurement(tmp_path: Path) -> None:
    hu = np.rint(np.random.default_rng(1).normal(-1000, 120, (1, 64, 64)))
    hu[0, 0, 0] = -1300
    assert not read_volume(write_series(tmp_path, hu, intercept=0)).padding.any()


# --- reasons ----------------------------------------------------------------------------------------------------------


def own_item(manufacturer: str = "dicomnode", code: str = "109102") -> list[Dataset]:
    purpose = Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning = code, "DCM", "Processing Equipment"
    item = Dataset()
    item.Manufacturer, item.PurposeOfReferenceCodeSequence = manufacturer, [purpose]
    return [item]


def one(index: int, value: Any, usual: Any) -> Callable[[int], Any]:
    return lambda k: value if k == index else usual


AXIAL = ["ORIGINAL", "PRIMARY", "AXIAL"]


@pytest.mark.parametrize(
    ("code", "overrides"),
    [
        ("not-ct", {"Modality": "PT"}),
        ("not-ct", {"Modality": None}),
        ("not-ct", {"SOPClassUID": MRImageStorage}),
        ("multi-frame", {"NumberOfFrames": 2}),
        ("multi-frame", {"SOPClassUID": EnhancedCTImageStorage}),
        ("secondary-capture", {"SOPClassUID": SecondaryCaptureImageStorage}),
        ("secondary-capture", {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}),
        (
            "own-output",
            {"ContributingEquipmentSequence": lambda k: own_item(), "ImageType": ["DERIVED", "SECONDARY", "AXIAL"]},
        ),
        ("read", {"ContributingEquipmentSequence": lambda k: own_item("another")}),
        ("read", {"ContributingEquipmentSequence": lambda k: own_item(code="109103")}),
        ("localizer", {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}),
        ("localizer", {"ImageType": one(3, ["ORIGINAL", "PRIMARY", "LOCALIZER"], AXIAL)}),
        ("localizer", {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "SCOUT"]}),
        ("monitoring", {"ImageType": [*AXIAL, "CT_SOM5 MON"]}),
        ("derived", {"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"]}),
        ("derived", {"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "MPR"]}),
        ("derived", {"ImageType": ["DERIVED", "SECONDARY", "MPR", "CSA MPR", "", "CSAPARALLEL"]}),
        ("derived", {"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "CSA RESAMPLED"]}),
        ("derived", {"ImageType": ["DERIVED", "SECONDARY", "PROJECTION IMAGE", "MIP"]}),
        ("derived", {"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "VRT"]}),
        ("derived", {"ImageType": ["DERIVED", "SECONDARY"]}),
        ("derived", {"ImageType": ["DERIVED", "PRIMARY"]}),
        ("derived", {"ImageType": ["ORIGINAL", "PRIMARY", "VOLUME"]}),
        ("read", {"ImageType": ["DERIVED", "PRIMARY", "AXIAL"]}),
        ("read", {"ImageType": ["ORIGINAL", "SECONDARY", "AXIAL"]}),
        ("read", {"ImageType": [*AXIAL, "CT_SOM5 SPI"]}),
        ("read", {"ImageType": ["ORIGINAL", "PRIMARY"]}),
        ("read", {"ImageType": None}),
        ("colour", {"PhotometricInterpretation": "PALETTE COLOR"}),
        ("colour", {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}),
        ("read", {"PhotometricInterpretation": "MONOCHROME1"}),
        ("missing-rescale", {"RescaleSlope": None}),
        ("missing-rescale", {"RescaleIntercept": one(2, None, "-1024")}),
        ("bad-rescale", {"RescaleSlope": "0"}),
        ("bad-rescale", {"RescaleSlope": "-1"}),
        ("bad-rescale", {"RescaleSlope": "32.1"}),
        ("bad-rescale", {"RescaleIntercept": "1e9"}),
        ("not-hu", {"RescaleType": "US"}),
        ("not-hu", {"RescaleType": "Z_EFF"}),
        ("read", {"RescaleType": None}),
        ("missing-geometry", {"ImagePositionPatient": one(1, None, ["0", "0", "0"])}),
        ("missing-geometry", {"ImageOrientationPatient": None}),
        ("missing-geometry", {"PixelSpacing": None}),
        ("missing-geometry", {"PixelSpacing": ["0", "0"]}),
        ("missing-geometry", {"ImageOrientationPatient": ["1", "0", "0", "1", "0", "0"]}),
        ("not-transverse", {"ImageOrientationPatient": ["1", "0", "0", "0", "0", "-1"], "ImageType": None}),
        ("bad-header", {"PixelSpacing": ["0.7"]}),
        ("bad-header", {"SeriesInstanceUID": None}),
        ("too-large", {"Rows": 60000, "Columns": 60000}),
        ("undecodable", {"Rows": 65}),
        ("undecodable", {"Rows": 63}),
        ("undecodable", {"BitsAllocated": 32}),
        ("undecodable", {"HighBit": 14}),
        ("undecodable", {"BitsStored": 9, "HighBit": 8}),
        ("undecodable", {"PixelData": None}),
        ("mixed-patient", {"PatientID": one(4, "PHANTOM-2", "PHANTOM-1")}),
        ("mixed-study", {"StudyInstanceUID": one(4, uid("other"), uid("study"))}),
        ("mixed-series", {"SeriesInstanceUID": one(4, uid("other"), uid("series"))}),
        ("mixed-frame-of-reference", {"FrameOfReferenceUID": one(4, uid("other"), uid("frame"))}),
        ("mixed-frame-of-reference", {"FrameOfReferenceUID": one(4, None, uid("frame"))}),
        ("read", {"FrameOfReferenceUID": None}),
        ("read", {"FrameOfReferenceUID": lambda k: uid("frame", k)}),
        ("mixed-pixel-spacing", {"PixelSpacing": one(4, ["0.8", "0.8"], ["0.7", "0.7"])}),
        ("mixed-orientation", {"ImageOrientationPatient": one(4, [0, 1, 0, -1, 0, 0], [1, 0, 0, 0, 1, 0])}),
        ("mixed-acquisition", {"ConvolutionKernel": one(4, "B70f", "B40f")}),
        ("mixed-acquisition", {"KVP": lambda k: "80" if k % 2 else "140"}),
        ("mixed-acquisition", {"AcquisitionNumber": lambda k: k % 2}),
        ("read", {"AcquisitionNumber": lambda k: k // 2}),
        ("read", {"AcquisitionNumber": None}),
        ("duplicate-position", {"ImagePositionPatient": lambda k: [0, 0, k // 2]}),
        ("duplicate-instance", {"SOPInstanceUID": uid("always the same")}),
        ("in-plane-shift", {"ImagePositionPatient": lambda k: [3 * (k == 2), 0, k]}),
        ("read", {"ImagePositionPatient": lambda k: [0, 0, k * k]}),
    ],
)
def test_reason(tmp_path: Path, code: str, overrides: dict[str, Any]) -> None:
    assert code_of(write_series(tmp_path, phantom(6), **overrides)) == code


def test_no_files_at_all() -> None:
    assert code_of([]) == "empty"


def _rename(name: str, ds: Dataset) -> None:
    ds.SOPInstanceUID = name


def test_another_matrix(tmp_path: Path) -> None:
    files = write_series(tmp_path, phantom(2)) + write_series(tmp_path / "b", phantom(2, 32), origin_mm=(0, 0, 9))
    for k, path in enumerate(files):
        edit(path, partial(_rename, uid("matrix", k)))
    assert code_of(files) == "mixed-matrix"


def test_the_same_file_twice(tmp_path: Path) -> None:
    files = write_series(tmp_path, phantom(2))
    assert code_of([*files, files[0]]) == "duplicate-instance"


def test_a_file_that_is_not_there_is_a_fault_not_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_volume([tmp_path / "absent.dcm"])


def test_a_duplicate_position_is_named(tmp_path: Path) -> None:
    files = write_series(tmp_path, phantom(3), ImagePositionPatient=lambda k: [0, 0, (7, 7.004, 9)[k]])
    with pytest.raises(SeriesRefused, match=r"7\.00 mm") as refused:
        read_volume(files)
    assert uid("series", "instance", 1) in refused.value.detail


def _acquisition(value: str, ds: Dataset) -> None:
    ds[0x00200012] = DataElement(0x00200012, "LT", value)


def test_a_reason_holds_nothing_that_a_header_may_hide_in_a_number(tmp_path: Path) -> None:
    """The reason goes into log and job; a number may have come as any text, with a name and with line breaks in it."""
    files = write_series(tmp_path, phantom(4), ConvolutionKernel="B40f")
    for k, path in enumerate(files):
        edit(path, partial(_acquisition, "Doe^Jane\r\nforged" if k % 2 else "1"))
    with pytest.raises(SeriesRefused) as refused:
        read_volume(files)
    assert refused.value.code == "mixed-acquisition"
    assert "Doe" not in refused.value.detail
    assert "\n" not in refused.value.detail


def test_a_reason_names_no_kernel(tmp_path: Path) -> None:
    with pytest.raises(SeriesRefused, match="ConvolutionKernel") as refused:
        read_volume(write_series(tmp_path, phantom(2), ConvolutionKernel=one(1, "Doe^Jane", "B40f")))
    assert "Doe" not in refused.value.detail


# --- hostile bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [b"-100", b"-22\\-22\\-100"])
def test_numbers_that_are_none(tmp_path: Path, found: bytes) -> None:
    (path,) = write_series(tmp_path, phantom(1))
    path.write_bytes(path.read_bytes().replace(found, b"nan".ljust(len(found)), 1))
    assert code_of([path]) == "bad-header"


def test_not_dicom_and_cut_short(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path, phantom(1))
    whole = path.read_bytes()
    outcomes = {}
    for size in (0, 100, 140, 200, 600, len(whole) - 1000, len(whole) - 2):
        path.write_bytes(whole[:size])
        outcomes[size] = code_of([path])
    assert set(outcomes.values()) <= {"unreadable", "not-ct", "bad-header", "missing-rescale", "undecodable"}
    assert outcomes[0] == "unreadable"
    assert outcomes[len(whole) - 2] == "undecodable"


def test_a_reason_is_one_short_line_whatever_the_header_says(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path, phantom(1))
    path.write_bytes(path.read_bytes().replace(b"MONOCHROME2 ", b"MONO\nCHROME "))
    with pytest.raises(SeriesRefused, match=r"MONO\\nCHROME") as refused:
        read_volume([path])
    assert str(refused.value).isprintable()


def test_a_deflate_bomb_is_not_inflated(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path, phantom(1))
    ds = dcmread(path)
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.save_as(path, enforce_file_format=True)
    assert code_of([path]) == "read"
    raw = path.read_bytes()
    start = 144 + dcmread(path).file_meta.FileMetaInformationGroupLength
    deflate = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    bomb = zlib.decompress(raw[start:], wbits=-zlib.MAX_WBITS)
    body = deflate.compress(bomb) + b"".join(deflate.compress(bytes(2**20)) for _ in range(100)) + deflate.flush()
    path.write_bytes(raw[:start] + body)
    tracemalloc.start()
    assert code_of([path]) == "too-large"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = write_series(tmp_path, phantom(1, 16))
    whole = path.read_bytes()
    dice = random.Random(20240101)
    caplog.set_level("DEBUG")
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(132, len(whole) - 512)] = dice.randrange(256)
        path.write_bytes(damaged)
        code_of([path])
    assert not caplog.records, "remarks of the parser quote the header"


def test_with_hu_refuses_what_is_no_version_of_the_volume(tmp_path: Path) -> None:
    volume = read_volume(write_series(tmp_path, phantom(2, 16)))
    assert isinstance(volume.with_hu(volume.hu + np.float32(1)), Volume)
    broken = volume.hu.copy()
    broken[1, 2, 3] = np.nan
    wrongs: list[Any] = [volume.hu[:1], volume.hu.astype(np.float64), broken]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"expected float32|not finite"):
            volume.with_hu(wrong)
