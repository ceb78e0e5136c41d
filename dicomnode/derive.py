"""A denoised volume becomes a derived CT series: files that are written, read back and proved before they count.

The header is `dicomnode.derived_header`'s, the UIDs are `dicomnode.uids`'s; here are the pixels and the files. Nothing
depends on clock, host or chance: the same job gives the same bytes.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread, dcmwrite
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels.utils import pixel_array
from pydicom.tag import Tag
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from dicomnode.derived_header import Making, describe, drop_false, explicit_copy
from dicomnode.encoding import LOSSY_METHODS
from dicomnode.errors import DerivationError
from dicomnode.spool import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, dataset_digest, sync_folder
from dicomnode.uids import derived_uid
from pipelines.ct_slice import OWN_MANUFACTURER, CTSlice, SeriesRefused, read_slice
from pipelines.volume import Plane, Series

_BROKEN = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, InvalidDicomError, LookupError, MemoryError),
    *(NotImplementedError, RuntimeError, SeriesRefused, TypeError, ValueError),
)
"""What reading, decoding or encoding a damaged object raises; OSError is not among them: the disk may recover."""

_KEPT = (
    *("SOPClassUID", "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber"),
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "FrameOfReferenceUID"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SliceLocation"),
    *("GantryDetectorTilt", "InstanceNumber", "AcquisitionNumber", "AcquisitionDate", "AcquisitionTime"),
    *("KVP", "XRayTubeCurrent", "Exposure", "ExposureTime", "CTDIvol"),
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("RescaleSlope", "RescaleIntercept", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    "SpecificCharacterSet",
)
"""Looked at again in the written file: the same bytes as in the source."""

_QUEUED_SLICES = 4
"""Denoised slices that may wait for the writing thread: enough to bridge a sync, too few to cost memory."""

_Element = DataElement | RawDataElement


class _Meant(NamedTuple):
    """What the file of one slice must hold. `header` is what is written, the rest is what it is judged by."""

    header: Dataset
    pixels: bytes
    kept: dict[str, _Element | None]
    """`_KEPT` of the source, as the source's file has them; None where it has none."""
    sop_instance_uid: str
    series_uid: str


@dataclass(frozen=True, slots=True)
class DerivedInstance:
    """One written, proved file of a derived series."""

    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    path: Path
    sha256: str
    """Of the data set, as everywhere in this node."""
    size_bytes: int
    series_uid: str


class SeriesWriter:
    """Writes a denoised series slice by slice, one file per slice, Explicit VR Little Endian.

    Files are encoded, written, synced and proved in a thread of their own, so that the caller can go on with its next
    slices. A fault of that thread is raised by the next `write`, or by `finish`. Use as a context manager: leaving it
    ends the thread; without `finish` before, what was not written yet is given up.

    Parameters
    ----------
    series
        What was denoised; its files are read again for header and stored values.
    made
        The pipeline that ran and what the site wants said. `card.input` says which slices fed one slice: itself
        (``slice``), its two neighbours too (``slab3``), or ``card.overlap_zyx[0]`` on each side, the radius of the
        receptive field (``volume``). `created_at` is written in the source's TimezoneOffsetFromUTC where it has one,
        else in the zone it is given in: pass local time, as dates without offset are read as such (PS3.3 C.12.1).
    out_dir
        Existing folder; the files are named by their new UIDs.

    Raises
    ------
    ValueError
        `made.created_at` has no time zone.
    """

    def __init__(self, series: Series, made: Making, out_dir: Path) -> None:
        if made.created_at.tzinfo is None:
            raise ValueError("created_at has no time zone")
        self._series = series
        self._made = made
        self._out_dir = out_dir
        self._radius = {"slice": 0, "slab3": 1, "volume": made.card.overlap_zyx[0]}[made.card.input]
        self._instances: dict[int, DerivedInstance] = {}
        self._given: set[int] = set()
        self._error: Exception | None = None
        self._given_up = False
        self._queue: Queue[tuple[int, Plane, NDArray[np.float32]] | None] = Queue(_QUEUED_SLICES)
        self._thread = Thread(target=self._work, name="series-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> SeriesWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._given_up = True
        self._end()

    def write(self, k: int, hu: NDArray[np.float32]) -> None:
        """Hand over the denoised HU of slice `k`, each slice once; waits while too many slices are queued.

        Parameters
        ----------
        k
            Index of the slice in the volume.
        hu
            Float32, (y, x), not to be changed afterwards. Where it equals the source's HU the stored value stays as it
            is.

        Raises
        ------
        ValueError
            `hu` is no finite float32 array of the slice's shape, or there is no such slice left to write.
        SeriesRefused
            The slice's pixels cannot be read.
        DerivationError, OSError
            As `finish`, for a slice handed over earlier.
        """
        shape = self._series.shape[1:]
        if hu.shape != shape or hu.dtype != np.float32:
            raise ValueError(f"expected float32 {shape}, got {hu.dtype} {hu.shape}")
        if not np.isfinite(hu).all():
            raise ValueError(f"slice {k}: {np.count_nonzero(~np.isfinite(hu))} values are not finite")
        if k in self._given or not 0 <= k < len(self._series.slice_paths) or not self._thread.is_alive():
            raise ValueError(f"slice {k} of {len(self._series.slice_paths)} is not to be written (again)")
        self._raise_error()
        self._given.add(k)
        self._queue.put((k, self._series.plane(k), hu))

    def finish(self) -> list[DerivedInstance]:
        """Wait for the last file and sync the folder.

        Returns
        -------
        list of DerivedInstance
            In the order of the slices; all of them are on disk.

        Raises
        ------
        DerivationError
            A source file is not what was read as the volume, cannot be encoded, or a written file is not what was
            meant.
        ValueError
            A slice was not handed over.
        OSError
            The disk failed; trying again may help.
        """
        self._end()
        self._raise_error()
        count = len(self._series.slice_paths)
        if len(self._instances) != count:
            raise ValueError(f"{len(self._instances)} of {count} slices were written")
        sync_folder(self._out_dir)
        instances = [self._instances[k] for k in range(count)]
        for what, values in (
            ("instances", {one.sop_instance_uid for one in instances}),
            ("files", set(self._series.slice_paths)),
        ):
            if len(values) != count:
                raise DerivationError(f"{count} slices have only {len(values)} different {what}")
        return instances

    def _end(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (handed := self._queue.get()) is not None:
            if self._error is not None or self._given_up:
                continue  # taken off the queue all the same: the caller may wait for room in it
            try:
                self._instances[handed[0]] = self._derive(*handed)
            except Exception as error:  # of whatever kind: it belongs to the caller's thread
                self._error = error

    def _derive(self, k: int, source: Plane, hu: NDArray[np.float32]) -> DerivedInstance:
        series = self._series
        near = range(max(0, k - self._radius), min(len(series.slice_uids), k + self._radius + 1))
        sources = [series.slice_uids[j] for j in (k, *(j for j in near if j != k))]
        try:
            meant = _derive_slice(series.slice_paths[k], sources, source, hu, self._made)
            encoded = _encode(meant.header)
        except _BROKEN as error:
            # no message of a library: it may quote the header
            raise DerivationError(f"{series.slice_uids[k]} cannot be derived from ({type(error).__name__})") from error
        path = self._out_dir / f"{meant.sop_instance_uid}.dcm"
        _write_durably(path, encoded)
        return _prove(path, encoded, meant)


def stored_values(
    hu: NDArray[np.float32],
    source_hu: NDArray[np.float32],
    source: NDArray[Any],
    padding: NDArray[np.bool_],
    *,
    slope: float,
    intercept: float,
    limits: tuple[int, int],
    reserved: tuple[int, int] | None,
) -> NDArray[Any]:
    """Stored values of one slice: ``(hu - intercept) / slope`` (PS3.3 C.11.1), rounded half to even, then saturated.

    Parameters
    ----------
    hu, source_hu
        Denoised and original HU, (y, x).
    source
        Stored values that `source_hu` came from, (y, x). They stay where HU did not change.
    padding
        True where nothing was measured: `source` stays there, (y, x).
    slope, intercept
        Rescale of this slice.
    limits
        Lowest and highest value that BitsStored and PixelRepresentation allow.
    reserved
        Range of stored values that mean padding; a measured voxel that changed goes to the nearest value outside.

    Returns
    -------
    ndarray
        Of `source`'s type.

    Raises
    ------
    DerivationError
        If `reserved` leaves no value to a measured voxel.
    """
    low, high = limits
    exact = (hu.astype(np.float64) - intercept) / slope
    stored = np.clip(np.rint(exact), low, high)
    if reserved is not None:
        first, last = reserved
        below, above = first - 1, last + 1
        if below < low and above > high:
            raise DerivationError(f"padding values {first} to {last} leave no stored value of {low} to {high}")
        hit = (stored >= first) & (stored <= last)
        upwards = (exact >= (first + last) / 2) & (above <= high) | (below < low)
        stored = np.where(hit, np.where(upwards, above, below), stored)
    return np.where(padding | (hu == source_hu), source, stored.astype(source.dtype))


def _derive_slice(path: Path, sources: list[str], plane: Plane, hu: NDArray[np.float32], made: Making) -> _Meant:
    """What to write for the slice in `path`; `sources` names what fed it, itself first, `plane` is what was read."""
    uid = sources[0]
    one = read_slice(path)
    source = dcmread(path)
    kept = {keyword: _as_read(source, keyword) for keyword in _KEPT}
    keep_private = made.settings.keep_private_attributes
    header = explicit_copy(source, keep_private=keep_private)  # before anything of the source is decoded
    if one.sop_instance_uid != uid or source.SOPInstanceUID != uid:
        raise DerivationError(f"{uid}: its file holds another object now")
    if source.SOPClassUID != CTImageStorage:
        raise DerivationError(f"{uid}: SOP class {source.SOPClassUID} is not CT Image Storage")
    pixels = _pixels(source, one, plane, hu)

    drop_false(header)
    syntax = source.file_meta.TransferSyntaxUID
    lossy = None
    if syntax in LOSSY_METHODS:
        lossy = (LOSSY_METHODS[syntax], len(pixels) / len(source.PixelData))
    describe(header, made, sources, lossy)
    header.add(DataElement(Tag("PixelData"), "OW" if source.BitsAllocated > 8 else "OB", pixels))
    meta = header.file_meta = FileMetaDataset()  # nothing of the source's: its sender and implementation are not ours
    meta.MediaStorageSOPClassUID = source.SOPClassUID
    key = (made.pipeline_hash, made.fingerprint)
    sop_instance_uid = derived_uid(uid, *key, "instance")
    meta.MediaStorageSOPInstanceUID = UID(sop_instance_uid)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    return _Meant(header, pixels, kept, sop_instance_uid, derived_uid(one.series_uid, *key, "series"))


def _pixels(source: Dataset, one: CTSlice, plane: Plane, hu: NDArray[np.float32]) -> bytes:
    """PixelData of the derived slice, little endian, of even length."""
    source_hu, padding = plane
    encapsulated = source.file_meta.TransferSyntaxUID.is_encapsulated
    before = pixel_array(source, correct_unused_bits=encapsulated)
    # a padding value may use bits above BitsStored; of a measured voxel they are no part (PS3.5 8.1.1)
    unused = int(source.BitsAllocated) - int(source.BitsStored)
    measured = before << unused >> unused
    if before.shape != hu.shape:
        raise DerivationError(f"{one.sop_instance_uid} has {before.shape} pixels, the volume {hu.shape}")
    expected = (measured * np.float64(one.slope) + one.intercept).astype(np.float32)
    away = np.abs(expected - source_hu) > one.slope / 2
    strangers = int((away & ~padding).sum())
    if strangers:
        raise DerivationError(f"{one.sop_instance_uid}: {strangers} voxels of its file are not those of the volume")
    bits = int(source.BitsStored)
    stored = stored_values(
        hu,
        source_hu,
        np.where(padding, before, measured),
        padding,
        slope=one.slope,
        intercept=one.intercept,
        limits=(-(1 << bits - 1), (1 << bits - 1) - 1) if source.PixelRepresentation else (0, (1 << bits) - 1),
        reserved=one.padding,
    )
    encoded = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    return encoded + b"\0" * (len(encoded) % 2)


def _encode(header: Dataset) -> bytes:
    buffer = io.BytesIO()
    dcmwrite(buffer, header, enforce_file_format=True)
    return buffer.getvalue()


def _write_durably(path: Path, content: bytes) -> None:
    """Write, sync, rename: the name never stands for half a file."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def _prove(path: Path, encoded: bytes, meant: _Meant) -> DerivedInstance:
    """Read the file back as a stranger would and compare it with its source and with what was meant.

    Not with the header that was written: a fault in making it would be in both.

    Raises
    ------
    DerivationError
        With what differs.
    """
    content = path.read_bytes()
    if content != encoded:
        raise DerivationError(f"{path.name}: read back {len(content)} bytes, other than the {len(encoded)} written")
    try:
        written = dcmread(io.BytesIO(content))
        meta = written.file_meta
        wrong = [
            keyword for keyword, element in meant.kept.items() if not _carried(element, _as_read(written, keyword))
        ]
        if written.SeriesInstanceUID != meant.series_uid:
            wrong.append("SeriesInstanceUID")
        if written.SOPInstanceUID != meant.sop_instance_uid:
            wrong.append("SOPInstanceUID")
        if written.PixelData != meant.pixels:
            wrong.append("PixelData")
        if (
            meta.MediaStorageSOPInstanceUID != meant.sop_instance_uid
            or meta.MediaStorageSOPClassUID != written.SOPClassUID
            or meta.TransferSyntaxUID != ExplicitVRLittleEndian
        ):
            wrong.append("file meta information")
        if written.ImageType[0] != "DERIVED":
            wrong.append("ImageType")
        if written.SourceImageSequence[0].ReferencedSOPInstanceUID == written.SOPInstanceUID:
            wrong.append("SourceImageSequence")
        if written.ContributingEquipmentSequence[-1].Manufacturer != OWN_MANUFACTURER:
            wrong.append("ContributingEquipmentSequence")
    except _BROKEN as error:
        raise DerivationError(f"{path.name} cannot be read back ({type(error).__name__})") from error
    if wrong:
        raise DerivationError(f"{path.name} differs from its source or from what was meant in {', '.join(wrong)}")
    return DerivedInstance(
        sop_instance_uid=str(written.SOPInstanceUID),
        sop_class_uid=str(written.SOPClassUID),
        transfer_syntax_uid=str(meta.TransferSyntaxUID),
        path=path,
        sha256=dataset_digest(path),
        size_bytes=len(content),
        series_uid=str(written.SeriesInstanceUID),
    )


def _as_read(ds: Dataset, keyword: str) -> _Element | None:
    """An element of a file that was just read: its bytes, unless it is empty or the character set."""
    return ds.get_item(Tag(keyword)) if keyword in ds else None


def _carried(source: _Element | None, written: _Element | None) -> bool:
    """Whether an element came over as it was: absent, or the same bytes under the same value representation.

    The words of a big endian source lie the other way round. An implicit one says no value representation, and where an
    explicit one says UN, the dictionary knows it.
    """
    if source is None or written is None:
        return source is written
    known = source.VR not in (None, "UN")
    if written.VR != source.VR and (known or written.VR not in dictionary_VR(source.tag).split(" or ")):
        return False
    if not isinstance(source, RawDataElement) or not isinstance(written, RawDataElement):
        return source == written or not (source.value or written.value)
    value = source.value or b""
    if not source.is_little_endian and written.VR in ("US", "SS"):
        value = np.frombuffer(value, ">u2").astype("<u2").tobytes()
    return value == (written.value or b"")
