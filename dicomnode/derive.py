"""A denoised volume becomes a derived CT series: files that are written, read back and proved before they count.

Here are the files and the order of things; what is in them is said in `dicomnode.derived_header`, `derived_pixels` and
`uids`, and proved in `proof`. Nothing depends on clock, host or chance: the same job gives the same bytes.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from queue import Queue
from threading import Thread

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread, dcmwrite
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from dicomnode.derived_header import Making, describe, drop_false, explicit_copy
from dicomnode.derived_pixels import derived_pixels
from dicomnode.encoding import LOSSY_METHODS
from dicomnode.errors import DerivationError
from dicomnode.header_template import HeaderTemplate
from dicomnode.proof import BROKEN, DerivedInstance, Meant, prove, prove_by_pydicom
from dicomnode.spool import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, sync_folder, write_durably
from dicomnode.uids import derived_uid
from pipelines.ct_slice import CTSlice, SeriesRefused, plain_slice, read_slice
from pipelines.element_index import ElementIndex, HandedOver, index_file
from pipelines.volume import Plane, Series

__all__ = ["DerivedInstance", "SeriesWriter"]

_QUEUED_SLICES = 4
"""Denoised slices that may wait for the writing thread: enough to bridge a sync, too few to cost memory."""
_MAX_TEMPLATES = 8


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
        Existing folder that nobody reads before `finish` returned; the files are named by their new UIDs.

    Attributes
    ----------
    busy_s : float
        Seconds in which files were derived, written and proved so far.

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
        self._templates: list[HeaderTemplate] = []
        self._error: Exception | None = None
        self._given_up = False
        self.busy_s = 0.0
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
            begun = time.monotonic()
            try:
                self._instances[handed[0]] = self._derive(*handed)
            except Exception as error:  # of whatever kind: it belongs to the caller's thread
                self._error = error
            self.busy_s += time.monotonic() - begun

    def _derive(self, k: int, plane: Plane, hu: NDArray[np.float32]) -> DerivedInstance:
        series = self._series
        near = range(max(0, k - self._radius), min(len(series.slice_uids), k + self._radius + 1))
        source_uids = tuple(series.slice_uids[j] for j in (k, *(j for j in near if j != k)))
        source_path = series.slice_paths[k]
        try:
            source, meant = self._meant(source_path, source_uids, plane, hu)
            parts, long_way = self._encode(source_path, source, meant)
        except SeriesRefused as error:
            raise DerivationError(f"the file of {series.slice_uids[k]} was changed meanwhile: {error}") from error
        except BROKEN as error:
            # no message of a library: it may quote the header
            raise DerivationError(f"{series.slice_uids[k]} cannot be derived from ({type(error).__name__})") from error
        path = self._out_dir / f"{meant.sop_instance_uid}.dcm"
        write_durably(path, parts)
        content = path.read_bytes()
        if not _holds(content, parts):
            size = sum(map(len, parts))
            raise DerivationError(f"{path.name}: read back {len(content)} bytes, other than the {size} written")
        if source is None:
            return prove_by_pydicom(path, content, dcmread(source_path), meant)
        if long_way or k in (0, len(series.slice_paths) - 1):
            prove_by_pydicom(path, content, dcmread(io.BytesIO(source.content)), meant)
        return prove(path, content, source, meant)

    def _meant(
        self, path: Path, source_uids: tuple[str, ...], plane: Plane, hu: NDArray[np.float32]
    ) -> tuple[ElementIndex | None, Meant]:
        """The source file, None if only pydicom can read it, and what is to be written for it."""
        source, one = _read(path)
        uid = source_uids[0]
        if one.sop_instance_uid != uid:
            raise DerivationError(f"{uid}: its file holds another object now")
        pixels = derived_pixels(one, one.stored(source.content if source is not None else None), plane, hu)
        key = (self._made.pipeline_hash, self._made.fingerprint)
        uids = derived_uid(uid, *key, "instance"), derived_uid(one.series_uid, *key, "series")
        return source, Meant(pixels, *uids, source_uids)

    def _encode(self, path: Path, source: ElementIndex | None, meant: Meant) -> tuple[tuple[bytes, ...], bool]:
        """The file in parts, one behind the other, and whether it took the long way."""
        if source is not None:
            for template in self._templates:
                if template.fits(source):
                    try:
                        return (template.header(source, meant.sop_instance_uid, meant.source_uids), meant.pixels), False
                    except HandedOver:
                        break
        encoded = _encode(_header(path, meant, self._made))
        if source is not None:
            with suppress(HandedOver):
                learnt = HeaderTemplate(source, encoded, self._made.settings.keep_private_attributes)
                self._templates = [learnt, *self._templates[: _MAX_TEMPLATES - 1]]
        return (encoded,), True


def _read(path: Path) -> tuple[ElementIndex | None, CTSlice]:
    try:
        source = index_file(path.read_bytes())
        return source, plain_slice(source, path)
    except HandedOver:
        return None, read_slice(path)


def _header(path: Path, meant: Meant, made: Making) -> Dataset:
    """The data set of the derived slice, made element by element."""
    source = dcmread(path)
    header = explicit_copy(source, keep_private=made.settings.keep_private_attributes)  # before anything is decoded
    if source.SOPInstanceUID != meant.source_uids[0] or source.SOPClassUID != CTImageStorage:
        raise DerivationError(f"{meant.source_uids[0]}: its file holds another object now")
    drop_false(header)
    syntax = source.file_meta.TransferSyntaxUID
    lossy = None
    if syntax in LOSSY_METHODS:
        lossy = (LOSSY_METHODS[syntax], len(meant.pixels) / len(source.PixelData))
    describe(header, made, meant.source_uids, lossy)
    header.add(DataElement(Tag("PixelData"), "OW" if source.BitsAllocated > 8 else "OB", meant.pixels))
    meta = header.file_meta = FileMetaDataset()  # nothing of the source's: its sender and implementation are not ours
    meta.MediaStorageSOPClassUID = source.SOPClassUID
    meta.MediaStorageSOPInstanceUID = UID(meant.sop_instance_uid)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    return header


def _encode(header: Dataset) -> bytes:
    buffer = io.BytesIO()
    dcmwrite(buffer, header, enforce_file_format=True)
    return buffer.getvalue()


def _holds(content: bytes, parts: Sequence[bytes]) -> bool:
    """Whether `content` is these parts one after the other."""
    at = 0
    for part in parts:
        if not content.startswith(part, at):
            return False
        at += len(part)
    return at == len(content)
