"""Pixels and files of a derived series: rounding, saturation, padding, and what is proved before a file counts."""

from __future__ import annotations

import struct
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ct_builder import edit, phantom, uid, write_series
from derivation import CARD, FINGERPRINT, HU, derive, derive_one, making, write_all
from pydicom import Dataset, dcmread
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless, RLELossless
from scanner import image

from dicomnode import derive as module
from dicomnode.derive import DerivedInstance, SeriesWriter
from dicomnode.derived_header import describe
from dicomnode.derived_pixels import stored_values
from dicomnode.errors import DerivationError
from dicomnode.uids import derived_uid
from pipelines.base import Options, pipeline_hash
from pipelines.volume import SeriesRefused, Volume, read_volume


def stored(path: Path) -> np.ndarray[Any, Any]:
    """Stored values straight from the bytes of an uncompressed file."""
    ds = dcmread(path)
    dtype = f"<{'i' if ds.PixelRepresentation else 'u'}{ds.BitsAllocated // 8}"
    return np.frombuffer(ds.PixelData, dtype)[: ds.Rows * ds.Columns].reshape(ds.Rows, ds.Columns)


def quantise(hu: list[float], source: list[int], **how: Any) -> list[int]:
    """`stored_values` of one row whose HU all changed; slope 1, intercept -1024, int16, unless told otherwise."""
    settings: dict[str, Any] = {"slope": 1.0, "intercept": -1024.0, "limits": (-32768, 32767), "reserved": None}
    row = np.array([hu], np.float32)
    padding = np.array([how.pop("padding", [False] * len(hu))])
    made = stored_values(row, row + 1, np.array([source], np.int16), padding, **(settings | how))
    assert made.dtype == np.int16
    return [int(v) for v in made[0]]


# --- stored values -------------------------------------------------------------------------------------------------


def test_rounding_is_half_to_even() -> None:
    assert quantise([-1, 1, 3, 5, 2.9], [9] * 5, slope=2.0, intercept=0.0) == [0, 0, 2, 2, 1]


def test_saturation_never_wraps() -> None:
    assert quantise([40000, -40000], [0, 0]) == [32767, -32768]
    assert quantise([5000, -3000], [0, 0], limits=(0, 4095)) == [4095, 0]
    assert quantise([5000, -5000], [0, 0], limits=(-2048, 2047)) == [2047, -2048]


def test_padding_stays_and_nothing_measured_takes_its_value() -> None:
    at = -2000 - 1024.0
    made = quantise(
        [50, at, at - 0.4, at + 0.4], [-2000, 7, 7, 7], padding=[True] + [False] * 3, reserved=(-2000, -2000)
    )
    assert made == [-2000, -1999, -2001, -1999]


def test_a_range_of_padding_is_left_on_the_nearer_side() -> None:
    hu = [v - 1024.0 for v in (-1996, -1992, -1989, -2001)]
    assert quantise(hu, [0] * 4, reserved=(-2000, -1990)) == [-2001, -1989, -1989, -2001]


def test_padding_at_the_end_of_the_range_is_left_inwards() -> None:
    assert quantise([-1024, -3000], [9, 9], limits=(0, 4095), reserved=(0, 0)) == [1, 1]
    assert quantise([3071, 9000], [9, 9], limits=(0, 4095), reserved=(4095, 4095)) == [4094, 4094]
    assert quantise([-40000], [9], reserved=(-32768, -32768)) == [-32767]


def test_padding_everywhere_leaves_no_value() -> None:
    with pytest.raises(DerivationError, match="leave no stored value"):
        quantise([0], [0], limits=(0, 255), reserved=(0, 255))


# --- through the files ---------------------------------------------------------------------------------------------


def test_saturates_twelve_bits_unsigned(tmp_path: Path) -> None:
    path, *_ = write_series(tmp_path, phantom(1), signed=False, BitsStored=12, HighBit=11)

    def change(hu: HU) -> HU:
        hu[0, 0, :3] = (9000, -9000, 100.4)
        return hu

    derive_one(path, tmp_path / "out", change)
    made = stored(next((tmp_path / "out").glob("*.dcm")))
    assert made[0, :3].tolist() == [4095, 0, 1124]
    np.testing.assert_array_equal(made[1:], stored(path)[1:])


def test_each_slice_has_its_own_rescale(tmp_path: Path) -> None:
    slopes = (0.5, 1.0, 2.0002442)
    paths = write_series(
        tmp_path, phantom(3, 32), RescaleSlope=lambda k: str(slopes[k]), RescaleIntercept=lambda k: str(-1000 - k)
    )
    made = derive(paths, tmp_path / "out", lambda hu: hu + np.float32(7.25))
    for k, (path, instance) in enumerate(zip(paths, made, strict=True)):
        expected = np.rint(stored(path) + 7.25 / slopes[k])
        np.testing.assert_array_equal(stored(instance.path), expected)
        assert dcmread(instance.path).RescaleSlope == slopes[k]


@pytest.mark.parametrize("slope", [1.0, 0.1, 2.0002442, 1e-5])
def test_unchanged_hu_gives_unchanged_stored_values(tmp_path: Path, slope: float) -> None:
    # at 1e-5 HU per step float32 cannot tell neighbouring stored values apart
    paths = write_series(tmp_path, phantom(2, 32), RescaleSlope=str(slope))
    for path, instance in zip(paths, derive(paths, tmp_path / "out"), strict=True):
        assert dcmread(path).PixelData == dcmread(instance.path).PixelData


@pytest.mark.parametrize(
    ("vr", "written"), [("SS", -2000), ("US", 63536)], ids=["signed", "unsigned element beside signed pixels"]
)
def test_padding_of_the_file(tmp_path: Path, vr: str, written: int) -> None:
    hu = phantom(1)
    hu[0, :8, :8] = -3024  # stored -2000
    path, *_ = write_series(tmp_path, hu)
    edit(path, lambda ds: ds.add_new(0x00280120, vr, written))
    assert (stored(path)[:8, :8] == -2000).all()

    def change(hu: HU) -> HU:
        hu += np.float32(11)
        hu[0, 20, 20] = -3024  # would be -2000
        return hu

    ds = derive_one(path, tmp_path / "out", change)
    made = stored(next((tmp_path / "out").glob("*.dcm")))
    assert (made[:8, :8] == -2000).all()
    assert made[20, 20] == -1999
    outside = np.ones(made.shape, bool)
    outside[:8, :8] = outside[20, 20] = False
    np.testing.assert_array_equal(made[outside], stored(path)[outside] + 11)
    assert (ds["PixelPaddingValue"].VR, ds.PixelPaddingValue) == (vr, written)


def test_eight_bits_of_odd_length(tmp_path: Path) -> None:
    def narrow(ds: Dataset) -> None:
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
        ds.Rows = ds.Columns = 15
        ds.RescaleSlope, ds.RescaleIntercept = "4", "-1000"
        ds.PixelData = bytes(range(225)) + b"\0"
        ds["PixelData"].VR = "OB"

    path, *_ = write_series(tmp_path, phantom(1, 16))
    edit(path, narrow)
    ds = derive_one(path, tmp_path / "out", lambda hu: hu + np.float32(4))
    assert ds.PixelData == bytes(range(1, 226)) + b"\0"


@pytest.mark.parametrize("syntax", [JPEGLSLossless, RLELossless])
def test_compressed_sources_give_the_pixels_that_went_in(tmp_path: Path, syntax: str) -> None:
    hu = phantom(1)
    plain = derive(write_series(tmp_path / "plain", hu), tmp_path / "plain-out", lambda hu: hu + np.float32(1))
    other = derive(
        write_series(tmp_path / "other", hu, transfer_syntax=syntax),
        tmp_path / "other-out",
        lambda hu: hu + np.float32(1),
    )
    assert plain[0].path.read_bytes() == other[0].path.read_bytes()


LOSSLESS = (
    *("big-endian", "deflated", "implicit-le", "j2k-lossless", "jpegls-lossless", "rle"),
    *("jpeg-lossless-p14", "jpeg-lossless-sv1"),
)


@pytest.mark.data
@pytest.mark.parametrize("name", LOSSLESS)
def test_one_slice_in_many_transfer_syntaxes_gives_one_derived_image(odd_dir: Path, tmp_path: Path, name: str) -> None:
    reference = derive_one(odd_dir / "ts-explicit-le.dcm", tmp_path / "reference", lambda hu: hu * np.float32(0.9))
    try:
        made = derive_one(odd_dir / f"ts-{name}.dcm", tmp_path / "made", lambda hu: hu * np.float32(0.9))
    except SeriesRefused as refused:
        pytest.skip(f"no decoder for {name}: {refused.code}")
    # whoever made the JPEG files left a derivation code in them, which stays before ours
    ours = {tag: made.get_item(tag).value for tag in made.keys() if tag != 0x00089215 or "jpeg-" not in name}
    theirs = {tag: reference.get_item(tag).value for tag in reference.keys()}
    assert set(made.keys()) == set(theirs)
    assert {f"{tag}" for tag in ours if ours[tag] != theirs[tag]} == set()
    assert made.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"


# --- files ---------------------------------------------------------------------------------------------------------


def test_what_is_returned_is_what_is_there(tmp_path: Path) -> None:
    paths = write_series(tmp_path, phantom(3, 16))
    digest = pipeline_hash(CARD, Options())
    made = derive(paths, tmp_path / "out")
    assert sorted(i.path for i in made) == sorted((tmp_path / "out").iterdir())
    for k, instance in enumerate(made):
        content = instance.path.read_bytes()
        ds = dcmread(instance.path)
        assert instance.sop_instance_uid == ds.SOPInstanceUID
        assert instance.sop_instance_uid == derived_uid(uid("series", "instance", k), digest, FINGERPRINT, "instance")
        assert instance.series_uid == ds.SeriesInstanceUID == derived_uid(uid("series"), digest, FINGERPRINT, "series")
        assert instance.sop_class_uid == ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.2"
        assert instance.transfer_syntax_uid == "1.2.840.10008.1.2.1"
        assert instance.sha256 == image(instance.path).sha256
        assert instance.size_bytes == len(content)
        assert ds.InstanceNumber == k + 1


def test_the_file_meta_information_is_our_own(tmp_path: Path) -> None:
    path, *_ = write_series(tmp_path, phantom(1, 16))

    def sign(ds: Dataset) -> None:
        ds.file_meta.SourceApplicationEntityTitle = "SCANNER"
        ds.file_meta.ImplementationClassUID = UID("1.2.3")

    edit(path, sign)
    content = derive([path], tmp_path / "out")[0].path.read_bytes()
    meta = dcmread(next((tmp_path / "out").iterdir())).file_meta
    assert [e.tag.element for e in meta] == [0x00, 0x01, 0x02, 0x03, 0x10, 0x12, 0x13]
    assert meta.ImplementationClassUID.startswith("2.25.")
    # the group length ends where the data set begins (PS3.10 7.1)
    (length,) = struct.unpack("<I", content[140:144])
    assert content[:132] == bytes(128) + b"DICM"
    assert content[144 + length : 144 + length + 4] == b"\x08\x00\x08\x00"
    assert b"SCANNER" not in content


def test_a_second_run_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = write_series(tmp_path, phantom(3, 16))
    first = derive(paths, tmp_path / "one", lambda hu: hu * np.float32(0.5))
    second = derive(paths[::-1], tmp_path / "two", lambda hu: hu * np.float32(0.5))
    assert [i.path.name for i in first] == [i.path.name for i in second]
    assert [i.path.read_bytes() for i in first] == [i.path.read_bytes() for i in second]
    again = derive(
        paths, tmp_path / "one", lambda hu: hu * np.float32(0.5)
    )  # over the files of an attempt that was lost
    assert again == first


def test_the_reader_refuses_what_we_made(tmp_path: Path) -> None:
    made = derive(write_series(tmp_path, phantom(2, 16)), tmp_path / "out")
    with pytest.raises(SeriesRefused) as refused:
        read_volume([i.path for i in made])
    assert refused.value.code == "own-output"


# --- what is refused -----------------------------------------------------------------------------------------------


def call(volume: Volume, hu: HU, out_dir: Path) -> list[DerivedInstance]:
    return write_all(volume, hu, making(), out_dir)


def test_refuses_wrong_arguments(tmp_path: Path) -> None:
    volume = read_volume(write_series(tmp_path, phantom(2, 16)))
    with pytest.raises(ValueError, match="slice 0: 256 values are not finite"):
        call(volume, np.full_like(volume.hu, np.nan), tmp_path)
    with pytest.raises(ValueError, match="expected float32"):
        call(volume, volume.hu[:, 1:], tmp_path)
    with pytest.raises(ValueError, match="expected float32"):
        call(volume, volume.hu.astype(np.float64), tmp_path)  # type: ignore[arg-type]  # mypy refuses it too
    with pytest.raises(ValueError, match="no time zone"):
        SeriesWriter(volume, making(datetime(2026, 1, 1)), tmp_path)


def _rename(ds: Dataset) -> None:
    ds.SOPInstanceUID = "1.2.3"


def _shift(ds: Dataset) -> None:
    ds.RescaleIntercept = "-1000"


def _cut(ds: Dataset) -> None:
    ds.PixelData = ds.PixelData[:-2]


@pytest.mark.parametrize(
    ("change", "reason"), [(_rename, "another object"), (_shift, "256 voxels"), (_cut, "510 bytes of pixel data")]
)
def test_refuses_a_source_that_changed_under_it(tmp_path: Path, change: Callable[[Dataset], None], reason: str) -> None:
    paths = write_series(tmp_path, phantom(2, 16))
    volume = read_volume(paths)
    edit(paths[1], change)
    with pytest.raises(DerivationError, match=reason) as refused:
        call(volume, volume.hu, tmp_path)
    assert uid("series", "instance", 1) in str(refused.value)
    assert "Phantom" not in str(refused.value)


@pytest.mark.parametrize("what", ["PixelData", "PatientID", "RescaleIntercept"])
def test_a_file_that_is_not_what_was_meant_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    encode = module._encode

    def spoil(header: Dataset) -> bytes:
        spoilt = {"PixelData": bytes(512), "PatientID": "OTHER", "RescaleIntercept": "-1000"}[what]
        before = header[what].value
        setattr(header, what, spoilt)
        content = encode(header)
        setattr(header, what, before)
        return content

    monkeypatch.setattr(module, "_encode", spoil)
    volume = read_volume(write_series(tmp_path, phantom(1, 16)))
    with pytest.raises(DerivationError, match=what):
        call(volume, volume.hu, tmp_path)


def _swap_patient(header: Dataset) -> None:
    header.PatientID = "OTHER"


def _move(header: Dataset) -> None:
    header.ImagePositionPatient = [-22, -22, -99]


def _round(header: Dataset) -> None:
    header.RescaleSlope = "1.0"  # the same number in other bytes


def _forget(header: Dataset) -> None:
    del header.AccessionNumber


def _invent(header: Dataset) -> None:
    header.SliceLocation = "1"


def _retype(header: Dataset) -> None:
    header.add_new("KVP", "LO", "120 ")  # the same bytes as another type


def _keep_series(header: Dataset) -> None:
    header.SeriesInstanceUID = uid("series")


def _keep_instance(header: Dataset) -> None:
    header.SOPInstanceUID = uid("series", "instance", 0)


def _change_charset(header: Dataset) -> None:
    header.SpecificCharacterSet = "ISO_IR 192"


def _name_another_source(header: Dataset) -> None:
    header.SourceImageSequence[-1].ReferencedSOPInstanceUID = uid("series", "instance", 9)


FAULTS = {
    "SourceImageSequence": _name_another_source,
    "SpecificCharacterSet": _change_charset,
    "PatientID": _swap_patient,
    "ImagePositionPatient": _move,
    "RescaleSlope": _round,
    "AccessionNumber": _forget,
    "SliceLocation": _invent,
    "KVP": _retype,
    "SeriesInstanceUID": _keep_series,
    "SOPInstanceUID": _keep_instance,
}


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_of_our_own_in_the_header_does_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syntax: str, what: str
) -> None:
    """The proof looks at the source, not at the header that was meant to be written."""

    def faulty(header: Dataset, *how: Any) -> None:
        describe(header, *how)
        FAULTS[what](header)

    (path,) = write_series(tmp_path, phantom(1, 16))
    edit(path, lambda ds: setattr(ds.file_meta, "TransferSyntaxUID", UID(syntax)))
    assert dcmread(path).original_encoding == (syntax == ImplicitVRLittleEndian, True)
    volume = read_volume([path])
    call(volume, volume.hu, tmp_path)
    monkeypatch.setattr(module, "describe", faulty)
    with pytest.raises(DerivationError, match=rf" in {what}\b") as refused:
        call(volume, volume.hu, tmp_path)
    assert "OTHER" not in str(refused.value)


def test_a_fault_of_our_own_in_the_copy_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = module.explicit_copy

    def faulty(source: Dataset, **how: Any) -> Dataset:
        made = copy(source, **how)
        made.PatientName, made.Rows = "Other^Person", 8
        return made

    volume = read_volume(write_series(tmp_path, phantom(1, 16)))
    monkeypatch.setattr(module, "explicit_copy", faulty)
    with pytest.raises(DerivationError, match="in PatientName, Rows"):
        call(volume, volume.hu, tmp_path)
