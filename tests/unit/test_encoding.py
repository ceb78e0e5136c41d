"""Data sets for the wire: untouched where the syntax is the file's own, the same image where it is not."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from ct_builder import phantom, write_series
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from scanner import data_set_of

from dicomnode.encoding import UNCOMPRESSED, data_set
from dicomnode.errors import UnreadableFile, UnsendableFile

LOSSLESS = (
    "ts-explicit-le",
    "ts-implicit-le",
    "ts-big-endian",
    "ts-deflated",
    "ts-rle",
    "ts-jpegls-lossless",
    "ts-j2k-lossless",
    "ts-jpeg-lossless-p14",
    "ts-jpeg-lossless-sv1",
)


def read(data: bytes | memoryview, syntax: str) -> Dataset:
    """`data` as a data set in `syntax`."""
    ds = read_dataset(BytesIO(bytes(data)), is_implicit_VR=syntax == ImplicitVRLittleEndian, is_little_endian=True)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    return ds


def one_image(folder: Path, hu: NDArray[np.int16], syntax: str) -> Path:
    """A file with one slice in `syntax`."""
    if syntax != ImplicitVRLittleEndian:
        return write_series(folder, hu, transfer_syntax=syntax)[0]
    (path,) = write_series(folder, hu)
    ds = dcmread(path)
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(path, enforce_file_format=True)
    return path


def sent(path: Path, wanted: str) -> memoryview:
    meta = dcmread(path, stop_before_pixels=True).file_meta
    return data_set(path, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID, wanted)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, JPEGLSLossless])
def test_own_syntax_is_the_bytes_of_the_file(tmp_path: Path, syntax: str) -> None:
    path = one_image(tmp_path, phantom(1), syntax)
    assert bytes(sent(path, syntax)) == data_set_of(path.read_bytes())


@pytest.mark.parametrize("wanted", UNCOMPRESSED)
@pytest.mark.parametrize("own", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, JPEGLSLossless])
def test_rewriting_keeps_every_pixel_and_the_uid(tmp_path: Path, own: str, wanted: str) -> None:
    hu = phantom(1)
    path = one_image(tmp_path, hu, own)
    source, ds = dcmread(path), read(sent(path, wanted), wanted)
    assert ds.SOPInstanceUID == source.SOPInstanceUID
    np.testing.assert_array_equal(ds.pixel_array * ds.RescaleSlope + ds.RescaleIntercept, hu[0])
    for keyword in set(source.dir()) - {"PixelData"}:
        assert ds[keyword].value == source[keyword].value, keyword


@pytest.mark.data
@pytest.mark.parametrize("wanted", UNCOMPRESSED)
@pytest.mark.parametrize("name", LOSSLESS)
def test_one_image_in_nine_syntaxes_stays_one_image(odd_dir: Path, name: str, wanted: str) -> None:
    truth = dcmread(odd_dir / "ts-explicit-le.dcm").pixel_array
    ds = read(sent(odd_dir / f"{name}.dcm", wanted), wanted)
    np.testing.assert_array_equal(ds.pixel_array, truth)
    assert ds.get("LossyImageCompression") in (None, "00")


@pytest.mark.data
@pytest.mark.parametrize("name", ["ts-jpegls-near", "ts-j2k-lossy", "ts-jpeg-baseline-8bit"])
def test_once_lossy_stays_marked_lossy(odd_dir: Path, name: str) -> None:
    source = dcmread(odd_dir / f"{name}.dcm")
    ds = read(sent(odd_dir / f"{name}.dcm", ImplicitVRLittleEndian), ImplicitVRLittleEndian)
    assert ds.LossyImageCompression == source.LossyImageCompression == "01"
    np.testing.assert_array_equal(ds.pixel_array, source.pixel_array)


def test_loss_that_only_the_transfer_syntax_tells_is_marked(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path, phantom(1))
    ds = dcmread(path)
    ds.compress(JPEGLSNearLossless, jls_error=2, generate_instance_uid=False)
    for keyword in ("LossyImageCompression", "LossyImageCompressionMethod", "LossyImageCompressionRatio"):
        ds.pop(keyword, None)
    ds.save_as(path)
    assert read(sent(path, ExplicitVRLittleEndian), ExplicitVRLittleEndian).LossyImageCompression == "01"


def test_big_endian_words_of_every_depth_are_turned(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path, phantom(1))
    ds = dcmread(path)
    truth = ds.pixel_array
    ds.PixelData = truth.astype(">i2").tobytes()
    item = Dataset()
    item.add_new(0x00660016, "OF", np.array([1.5, -2.0], ">f4").tobytes())  # PointCoordinatesData
    ds.ReferencedImageSequence = [item]
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    big = tmp_path / "big.dcm"
    # A data set made little endian is refused by the writer, so it is handed over as one that never had an encoding.
    fresh = Dataset()
    fresh.update({element.tag: element for element in ds})
    fresh.file_meta = ds.file_meta
    fresh.save_as(big, implicit_vr=False, little_endian=False, enforce_file_format=True)
    out = read(sent(big, ExplicitVRLittleEndian), ExplicitVRLittleEndian)
    np.testing.assert_array_equal(out.pixel_array, truth)
    assert np.frombuffer(out.ReferencedImageSequence[0][0x00660016].value, "<f4").tolist() == [1.5, -2.0]


def test_deflated_goes_out_inflated(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path, phantom(1))
    ds = dcmread(path)
    truth = ds.pixel_array
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.save_as(path)
    np.testing.assert_array_equal(read(sent(path, ImplicitVRLittleEndian), ImplicitVRLittleEndian).pixel_array, truth)
    assert len(sent(path, DeflatedExplicitVRLittleEndian)) < truth.nbytes


@pytest.mark.parametrize("wanted", [RLELossless, ExplicitVRLittleEndian])
def test_a_file_that_changed_on_disk_does_not_go(tmp_path: Path, wanted: str) -> None:
    path = one_image(tmp_path, phantom(1), RLELossless)
    uid, whole = dcmread(path).SOPInstanceUID, path.read_bytes()
    digest = hashlib.sha256(data_set_of(whole)).hexdigest()
    assert bytes(data_set(path, uid, RLELossless, wanted, digest)) == bytes(data_set(path, uid, RLELossless, wanted))
    at = len(whole) - 60
    for damaged in (whole[:-2], whole + b"\0\0", whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(UnsendableFile, match="changed on disk"):
            data_set(path, uid, RLELossless, wanted, digest)


def unreadable(number: int) -> Callable[[Path], bytes]:
    def read_bytes(path: Path) -> bytes:
        raise OSError(number, os.strerror(number), str(path))

    return read_bytes


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE])
def test_a_file_that_cannot_be_read_now_is_not_unsendable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = one_image(tmp_path, phantom(1), RLELossless)
    monkeypatch.setattr(Path, "read_bytes", unreadable(number))
    with pytest.raises(UnreadableFile, match=rf"1\.2\.3 cannot be read now \({re.escape(os.strerror(number))}\)"):
        data_set(path, "1.2.3", RLELossless, RLELossless)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EISDIR, errno.EACCES])
def test_a_file_that_is_gone_or_forbidden_is_unsendable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(Path, "read_bytes", unreadable(number))
    with pytest.raises(UnsendableFile, match=re.escape(os.strerror(number))):
        data_set(tmp_path / "x.dcm", "1.2.3", RLELossless, RLELossless)


def test_files_that_cannot_go_say_why(tmp_path: Path) -> None:
    path = one_image(tmp_path, phantom(1), RLELossless)
    meta = dcmread(path).file_meta
    uid, whole = meta.MediaStorageSOPInstanceUID, path.read_bytes()
    with pytest.raises(UnsendableFile, match="cannot be read"):
        data_set(tmp_path / "gone.dcm", uid, RLELossless, RLELossless)
    with pytest.raises(UnsendableFile, match="not the one"):
        data_set(path, "1.2.3", RLELossless, RLELossless)
    with pytest.raises(UnsendableFile, match="is in transfer syntax"):
        data_set(path, uid, ExplicitVRLittleEndian, ExplicitVRLittleEndian)
    path.write_bytes(whole[:128] + b"PLUR" + whole[132:])
    with pytest.raises(UnsendableFile, match="no DICM prefix"):
        data_set(path, uid, RLELossless, RLELossless)
    path.write_bytes(whole[: len(whole) - len(data_set_of(whole))])
    with pytest.raises(UnsendableFile, match="no data set"):
        data_set(path, uid, RLELossless, RLELossless)
    path.write_bytes(whole[:-200])
    with pytest.raises(UnsendableFile, match="cannot be rewritten") as caught:
        data_set(path, uid, RLELossless, ImplicitVRLittleEndian)
    assert "RLE Lossless" in str(caught.value)
    assert str(dcmread(BytesIO(whole)).PatientID) not in str(caught.value)
