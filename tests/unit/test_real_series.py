"""Every real series and every odd file has a written outcome: read (and by which pipelines denoised), or a reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import pytest
from pydicom import dcmread

from pipelines.base import Envelope, ModelCard
from pipelines.gate import check
from pipelines.volume import SeriesRefused, Volume, read_volume

pytestmark = pytest.mark.data


def card(kind: Any, **envelope: Any) -> ModelCard:
    valid_for = Envelope(**envelope)
    return ModelCard("any", "1", "", "", kind, (1, 1, 1), (0, 0, 0), (-1024, 3071), "fp32", "", valid_for=valid_for)


def reason(act: Callable[[], object]) -> str:
    try:
        act()
    except SeriesRefused as refusal:
        return refusal.code
    return ""


def gdcm_hu(path: Path) -> Any:
    """HU of one file by GDCM alone: another parser and another decoder."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    image = reader.GetImage()
    dtype = {gdcm.PixelFormat.INT16: "<i2", gdcm.PixelFormat.UINT16: "<u2", gdcm.PixelFormat.UINT12: "<u2"}[
        image.GetPixelFormat().GetScalarType()
    ]
    raw = image.GetBuffer().encode("utf-8", errors="surrogateescape")
    columns, rows = image.GetDimension(0), image.GetDimension(1)
    stored = np.frombuffer(raw, dtype=dtype).reshape(rows, columns)
    return (stored * image.GetSlope() + image.GetIntercept()).astype(np.float32)


# name → slices, lowest measured HU, part of padding, tilt, reason against a pipeline that looks at neighbours
SERIES = {
    "ge-hispeed-head-tilt-varspacing": (16, -1023, 0.237, 18.5, "irregular-spacing"),
    "ge-lightspeed16-rider-chestpe-1p25mm": (60, -1024, 0.213, 0, ""),
    "ge-revolution-cptacpda-LUNG-5mm": (35, -1024, 0.216, 0, ""),
    "ge-vct-cmbcrc-chest-LUNG-2p5mm": (56, -1024, 0.213, 0, ""),
    "philips-brilliance16-lungdxA0001-B-5mm": (40, -1024, 0, 0, ""),
    "philips-brilliance16-lungdxA0001-L-5mm": (40, -1024, 0, 0, ""),
    "philips-brilliance16p-lidc0314-chest-1mm": (80, -1000, 0, 0, ""),
    "philips-ingenuity-headphantom-1mm-UB": (40, -1024, 0, 0, ""),
    "philips-ingenuity-headphantom-1mm-YA": (40, -1024, 0, 0, ""),
    "philips-ingenuity-headphantom-5mm-UB": (28, -1024, 0, 0, ""),
    "philips-ingenuity-headphantom-tilt-neg18": (54, -1024, 0, 18.5, "gantry-tilt"),
    "siemens-sensation10-lungdxA0002-B40f-8mm": (30, -1024, 0, 0, ""),
    "siemens-sensation10-lungdxA0002-B70f-8mm": (30, -1024, 0, 0, ""),
    "siemens-sensation16-acrinflt013-petct-B10f": (49, -1024, 0, 0, ""),
}


@pytest.mark.parametrize("name", SERIES)
def test_series(name: str, ct_series: Callable[[str], list[Path]]) -> None:
    slices, lowest, padded, tilt_deg, neighbours = SERIES[name]
    files = ct_series(name)
    volume = read_volume(files)
    assert volume.hu.shape == (slices, 512, 512)
    assert volume.hu[~volume.padding].min() == lowest
    assert volume.padding.mean() == pytest.approx(padded, abs=5e-4)
    assert volume.tilt_deg == pytest.approx(tilt_deg, abs=0.01)
    assert reason(lambda: check(volume, card("slice"))) == ""
    assert reason(lambda: check(volume, card("volume"))) == neighbours
    assert reason(lambda: check(volume, card("slab3"))) == neighbours
    for k in (0, slices // 2, slices - 1):
        path = volume.slice_paths[k]
        np.testing.assert_array_equal(volume.hu[k], gdcm_hu(path))
        assert dcmread(path, stop_before_pixels=True).SOPInstanceUID == volume.slice_uids[k]


def test_a_frame_of_reference_of_its_own_for_each_slice(ct_series: Callable[[str], list[Path]]) -> None:
    volume = read_volume(ct_series("philips-brilliance16p-lidc0314-chest-1mm"))
    assert volume.geometry.frame_of_reference_uid == ""


def test_a_tilted_gantry_passes_where_the_card_allows_it(ct_series: Callable[[str], list[Path]]) -> None:
    volume = read_volume(ct_series("philips-ingenuity-headphantom-tilt-neg18"))
    check(volume, card("volume", gantry_tilt=True))


# One outcome for each single file: "read", or the reason.
ODD = {
    "bad-vr": "not-ct",
    "ct-16x16-axial": "read",
    "ct-localizer-16x16": "localizer",
    "ct-small-128": "read",
    "ct-small-no-file-meta": "unreadable",
    "d2n-gantrytilt-1": "read",
    "d2n-gantrytilt-2": "read",
    "d2n-gantrytilt-3": "read",
    "d2n-gantrytilt-4": "read",
    "d2n-notavolume-mon-1": "monitoring",
    "d2n-notavolume-mon-2": "monitoring",
    "d2n-sliceincrement-ge-1": "read",
    "d2n-sliceincrement-ge-2": "read",
    "d2n-sliceincrement-siemens-0003": "read",
    "d2n-sliceincrement-siemens-0005": "read",
    "dcmqi-enhanced-ct-legacy-converted": "multi-frame",
    "dcmqi-liver-01": "read",
    "dcmqi-liver-03": "read",
    "dicomdir": "not-ct",
    "dicomdir-bigendian": "not-ct",
    "empty-charset": "not-ct",
    "enhanced-ct-2frame-jpeg12-fragmented-nobot": "multi-frame",
    "enhanced-ct-2frame-perfusion": "multi-frame",
    "jpegls-near-16": "secondary-capture",
    "meta-missing-transfer-syntax": "unreadable",
    "mr-padded": "not-ct",
    "mr-truncated": "not-ct",
    "nested-private-sequence": "not-ct",
    "pancreasct-un-vr-j2k": "read",
    "philips-dicomdir": "not-ct",
    "philips-examsummary-doseinfo-8bit": "secondary-capture",
    "philips-examsummary-patientinfo-8bit": "secondary-capture",
    "philips-localizer-716x512-j2k": "localizer",
    "philips-surview-256x512": "localizer",
    "rtdose-multiframe": "not-ct",
    "rtstruct": "unreadable",
    "seg-1frame": "not-ct",
    "sr-report": "not-ct",
    "sr-test": "not-ct",
    "ts-big-endian": "read",
    "ts-deflated": "read",
    "ts-explicit-le": "read",
    "ts-implicit-le": "read",
    "ts-j2k-lossless": "read",
    "ts-j2k-lossy": "read",
    "ts-jpeg-baseline-8bit": "bad-rescale",
    "ts-jpeg-extended-12bit": "undecodable",  # GDCM has no 12-bit lossy JPEG
    "ts-jpeg-lossless-p14": "read",
    "ts-jpeg-lossless-sv1": "read",
    "ts-jpeg-p10_12-retired": "undecodable",
    "ts-jpeg-p6_8-retired": "undecodable",
    "ts-jpegls-lossless": "read",
    "ts-jpegls-near": "read",
    "ts-rle": "read",
    "un-sequence": "not-ct",
    "us-no-pixel-spacing-rle": "not-ct",
    **{f"charset-{x}": "secondary-capture" for x in ("Arab", "Greek", "H31", "H32", "Hbrw", "I2", "Russ", "X1", "X2")},
    **{f"charset-{x}": "not-ct" for x in ("JapMulti", "KoreanMulti")},
}


def test_no_odd_file_is_without_an_outcome(odd_dir: Path) -> None:
    assert {path.stem for path in odd_dir.glob("*.dcm")} == set(ODD)


@pytest.mark.parametrize("name", ODD)
def test_odd_file(name: str, odd_dir: Path) -> None:
    assert (reason(lambda: read_volume([odd_dir / f"{name}.dcm"])) or "read") == ODD[name]


GROUPS = [
    (["d2n-gantrytilt-1", "d2n-gantrytilt-2", "d2n-gantrytilt-3", "d2n-gantrytilt-4"], "", "gantry-tilt"),
    (["d2n-sliceincrement-ge-1", "d2n-sliceincrement-ge-2"], "", ""),
    (["d2n-sliceincrement-siemens-0003", "d2n-sliceincrement-siemens-0005"], "", "gantry-tilt"),
    (["dcmqi-liver-01", "dcmqi-liver-03"], "", "gap"),
    (["ts-explicit-le", "ts-j2k-lossless"], "duplicate-instance", ""),
    (["ct-small-128", "ct-16x16-axial"], "mixed-patient", ""),
]


@pytest.mark.parametrize(("names", "not_read", "not_stacked"), GROUPS)
def test_odd_files_together(names: list[str], not_read: str, not_stacked: str, odd_dir: Path) -> None:
    volumes: list[Volume] = []
    assert reason(lambda: volumes.append(read_volume([odd_dir / f"{name}.dcm" for name in names]))) == not_read
    for volume in volumes:
        assert reason(partial(check, volume, card("slice"))) == ""
        assert reason(partial(check, volume, card("volume"))) == not_stacked


LOSSLESS = ["implicit-le", "big-endian", "deflated", "j2k-lossless", "jpegls-lossless", "jpeg-lossless-p14"]


@pytest.mark.parametrize("syntax", [*LOSSLESS, "jpeg-lossless-sv1", "rle"])
def test_one_slice_in_any_lossless_transfer_syntax_is_the_same(syntax: str, odd_dir: Path) -> None:
    expected = read_volume([odd_dir / "ts-explicit-le.dcm"])
    volume = read_volume([odd_dir / f"ts-{syntax}.dcm"])
    np.testing.assert_array_equal(volume.hu, expected.hu)
    np.testing.assert_array_equal(volume.padding, expected.padding)


@pytest.mark.parametrize("syntax", ["j2k-lossy", "jpegls-near"])
def test_lossy_compression_keeps_the_padding_apart(syntax: str, odd_dir: Path) -> None:
    expected = read_volume([odd_dir / "ts-explicit-le.dcm"])
    volume = read_volume([odd_dir / f"ts-{syntax}.dcm"])
    assert np.count_nonzero(volume.padding != expected.padding) < 100
    assert np.abs(volume.hu - expected.hu)[~expected.padding].max() < 60
