"""One DICOM object: may it be a slice of a CT volume, what does its header say, and what are its HU?

Plain files are read through `pipelines.element_index`, in a tenth of the time; pydicom reads all others. What is
checked is the same code for both.

Whatever an object tells on its own is decided here; what needs the whole series is decided in `pipelines.volume`.
Everything in a file came over the network: sizes are checked before memory is asked for, and no element is trusted to
have the right type. Reasons name UIDs and positions, never the patient.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.pixels.utils import pixel_array
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from pipelines.codestream import declared_size
from pipelines.ct_header import (
    OWN_MANUFACTURER,
    PixelDescription,
    SeriesRefused,
    geometry,
    is_own_output,
    name_of,
    padding_range,
    pixel_description,
    refuse_image_type,
    refuse_other_objects,
    refuse_own_output,
    required_uid,
    rescale,
    stored_limits,
)
from pipelines.element_index import PIXEL_DATA, ElementIndex, HandedOver, index_file, index_head
from pipelines.elements import BadElement, Header, numbers, text
from pipelines.indexed_header import IndexedHeader

__all__ = ["OWN_MANUFACTURER", "CTSlice", "PlainPixels", "SeriesRefused", "is_own_output", "plain_slice", "read_slice"]

MAX_INFLATED_BYTES = 64 * 2**20
"""Largest size of one deflated object (PS3.5 A.5) once inflated: a bomb of 1 MiB would inflate to 1 GiB."""
PADDING_BELOW_HU = -1100.0
"""Below this is no measurement: nothing attenuates less than vacuum (-1000 HU) but for noise."""
PADDING_WOBBLE_HU = 4.0
"""How far padding may differ from a constant; lossy compression moves it by some HU."""
MIN_PADDING_PART = 0.04
"""Part of the image that undeclared padding must fill; one corner outside the FOV circle is 5 %."""

SOP_INSTANCE_UID = 0x00080018
IMAGE_POSITION = 0x00200032
UID_MAX_CHARACTERS = 64
_MAX_ACCEPTED = 8
_UID = re.compile(rb"((?:(?:0|[1-9][0-9]*)\.)*(?:0|[1-9][0-9]*))\0?")
"""A valid UID as it is encoded (PS3.5 section 9.1)."""
_NUMBER = rb" *([+-]?[0-9]{1,12}(?:\.[0-9]{0,14})?) *"
_POSITION = re.compile(rb"\\".join([_NUMBER] * 3))
"""Three plain decimal strings (PS3.5 6.2, DS)."""
_PIXEL_TAGS = (0x00280002, 0x00280010, 0x00280011, 0x00280100, 0x00280101, 0x00280102, 0x00280103)
"""SamplesPerPixel, Rows, Columns, BitsAllocated, BitsStored, HighBit, PixelRepresentation."""


class PlainPixels(NamedTuple):
    """Where a file has its uncompressed pixels, as long as it is the file that was read."""

    offset: int
    end: int
    stored_type: str
    """Of one pixel, in numpy's notation."""
    file_bytes: int
    header_crc32: int
    """Of everything before `offset`: against a file that was replaced meanwhile, not against forgery."""


@dataclass(frozen=True, slots=True)
class CTSlice:
    """What the header of one acceptable CT image says. Lengths in mm, LPS; pixel pairs are (rows, columns)."""

    path: Path
    sop_instance_uid: str
    series_uid: str
    study_uid: str
    patient: tuple[str, str]
    """Name and ID, compared and never shown."""
    frame_of_reference_uid: str
    matrix: tuple[int, int]
    pixel_spacing_mm: tuple[float, float]
    position_mm: tuple[float, float, float]
    orientation: tuple[float, ...]
    """ImageOrientationPatient: direction of a row, then of a column."""
    thickness_mm: float
    """SliceThickness; 0 if the header does not tell."""
    acquisition: str
    reconstruction: tuple[str, str]
    """ConvolutionKernel and KVP."""
    slope: float
    intercept: float
    padding: tuple[int, int] | None
    """Lowest and highest stored value that means "no measurement" (PS3.3 C.7.5.1.1.2)."""
    limits: tuple[int, int]
    """Lowest and highest value that BitsStored and PixelRepresentation allow."""
    plain: PlainPixels | None = field(default=None, compare=False, repr=False)
    """None: only pydicom can tell."""

    def read_hu(self, hu: NDArray[np.float32], padding: NDArray[np.bool_]) -> None:
        """Decode the pixels into two planes (rows, columns): HU, and where nothing was measured.

        HU is the float32 nearest to ``stored · RescaleSlope + RescaleIntercept`` (PS3.3 C.11.1), also where nothing was
        measured. Photometric interpretation MONOCHROME1 changes the display alone, not the stored values.

        Raises
        ------
        SeriesRefused
            ``undecodable``: no decoder, damaged or missing pixel data, another size than the header's.
        """
        self.convert(self.stored(), hu, padding)

    def convert(self, stored: NDArray[Any], hu: NDArray[np.float32], padding: NDArray[np.bool_]) -> None:
        """The same from stored values, (rows, columns)."""
        if self.slope.is_integer() and self.intercept.is_integer():
            # 16-bit integers times at most MAX_STEP_HU stay far below 2^24: exact in float32, and several times as fast
            hu[...] = stored  # first, as numpy converts piece by piece where it also has to compute
            if self.slope != 1:
                hu *= np.float32(self.slope)
            hu += np.float32(self.intercept)
        else:
            hu[...] = stored.astype(np.float64) * self.slope + self.intercept
        if self.padding is not None:
            low, high = self.padding
            padding[...] = (stored == low) if low == high else (stored >= low) & (stored <= high)
        # Undeclared padding (files say -32768 and hold -2000): a constant below any measurement, from a corner inwards.
        # Air under a sharp kernel may be as low, but it is noisy.
        corners = hu[[0, 0, -1, -1], [0, -1, 0, -1]][~padding[[0, 0, -1, -1], [0, -1, 0, -1]]]
        if corners.size and (lowest := corners.min()) < PADDING_BELOW_HU:
            constant = np.abs(hu - lowest) <= PADDING_WOBBLE_HU
            if np.count_nonzero(constant) >= MIN_PADDING_PART * hu.size:
                padding |= hu < PADDING_BELOW_HU

    def stored(self, content: bytes | None = None) -> NDArray[Any]:
        """Stored values, (rows, columns), 8 or 16 bit integers, not to be written to.

        Parameters
        ----------
        content
            Of the file, if it was read already.

        Raises
        ------
        SeriesRefused
            As `read_hu`.
        """
        stored = self._plain(content if content is not None else self.path.read_bytes()) if self.plain else None
        if stored is None:
            stored = self._decoded()
        low, high = self.limits
        limits = np.iinfo(stored.dtype)
        if (low > limits.min and stored.min() < low) or (high < limits.max and stored.max() > high):
            alien = (stored < low) | (stored > high)
            if self.padding is not None:
                alien &= (stored < self.padding[0]) | (stored > self.padding[1])
            if alien.any():
                raise SeriesRefused(
                    "undecodable",
                    f"{int(alien.sum())} pixels of {self.sop_instance_uid} use bits above BitsStored "
                    f"{(high - low).bit_length()} (an overlay inside the pixels, or a wrong header): their HU cannot "
                    "be told",
                )
        return stored

    def _plain(self, content: bytes) -> NDArray[Any] | None:
        """The pixels in the file's bytes; None if these are not those of the file whose header was read."""
        plain = self.plain
        assert plain is not None
        if len(content) != plain.file_bytes or zlib.crc32(memoryview(content)[: plain.offset]) != plain.header_crc32:
            return None
        if plain.end != plain.file_bytes:
            try:
                index_file(content)
            except HandedOver:  # by what follows the pixels
                return None
        count = self.matrix[0] * self.matrix[1]
        return np.frombuffer(content, plain.stored_type, count, plain.offset).reshape(self.matrix)

    def _decoded(self) -> NDArray[Any]:
        """The pixels as pydicom and its decoders read them."""
        try:
            ds = dcmread(self.path)
            if ds.SOPInstanceUID != self.sop_instance_uid:
                raise ValueError("the file was replaced while it was being read")
            native = not ds.file_meta.TransferSyntaxUID.is_encapsulated
            if native:
                expected = self.matrix[0] * self.matrix[1] * ds.BitsAllocated // 8
                if len(ds.PixelData) != expected + expected % 2:
                    raise ValueError(f"{len(ds.PixelData)} bytes of pixel data, the header says {expected}")
            elif ds.file_meta.TransferSyntaxUID != RLELossless:  # RLE has no size of its own
                declared = declared_size(get_frame(ds.PixelData, 0, number_of_frames=1))
                if declared != self.matrix:
                    raise ValueError(f"the compressed frame says {declared}, the header {self.matrix}")
            # unused high bits are looked at in `stored`, not masked; decoders of compressed data set them right
            stored = pixel_array(ds, correct_unused_bits=False) if native else pixel_array(ds)
            if stored.shape != self.matrix or stored.dtype.kind not in "iu":
                raise ValueError(f"decoded to {stored.dtype} {stored.shape}, the header says {self.matrix}")
            if stored_limits(int(ds.BitsStored), bool(ds.PixelRepresentation)) != self.limits:
                raise ValueError("the file was replaced while it was being read")
            return stored
        except (OSError, MemoryError):
            raise  # the machine, not the object
        except Exception as error:  # decoders raise whatever they like on damaged data
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise SeriesRefused(
                "undecodable", f"pixels of {self.sop_instance_uid} cannot be decoded: {reason}"
            ) from error


def read_slice(path: Path) -> CTSlice:
    """Read the header of one file and refuse what is no slice of a CT volume.

    Raises
    ------
    SeriesRefused
        See docs/gate.md: ``unreadable``, ``not-ct``, ``multi-frame``, ``secondary-capture``, ``own-output``,
        ``localizer``, ``monitoring``, ``derived``, ``colour``, ``bad-header``, ``missing-rescale``, ``bad-rescale``,
        ``not-hu``, ``missing-geometry``, ``not-transverse``, ``too-large``, ``undecodable``.
    OSError
        If the file itself cannot be read.
    """
    try:
        return plain_slice(index_head(path), path)
    except HandedOver:
        return _read(_read_header(path), path)


def plain_slice(index: ElementIndex, path: Path) -> CTSlice:
    """As `read_slice`, of a file whose elements are indexed already.

    Raises
    ------
    HandedOver
        Only pydicom can tell.
    """
    global _accepted
    for earlier in _accepted:
        one = earlier.sibling(index, path)
        if one is not None:
            return one
    header = IndexedHeader(index)
    one = _read(header, path)
    tags = tuple(sorted(header.asked - {SOP_INSTANCE_UID, IMAGE_POSITION}))
    _accepted = (_Accepted(index.implicit, tags, index.spans(tags), one), *_accepted[: _MAX_ACCEPTED - 1])
    return one


class _Accepted(NamedTuple):
    """A slice that was accepted, and all elements that were looked at for that: with the same ones others are too."""

    implicit: bool
    tags: tuple[int, ...]
    """All but the UID and the position of the slice."""
    spans: bytes
    one: CTSlice

    def sibling(self, index: ElementIndex, path: Path) -> CTSlice | None:
        """The slice in another file that differs in UID and position alone; None if more differs, or they are odd."""
        plain = self.one.plain
        assert plain is not None
        pixels = index.elements[PIXEL_DATA]
        if (
            index.implicit != self.implicit
            or pixels.end - pixels.value != plain.end - plain.offset
            or index.spans(self.tags) != self.spans
        ):
            return None
        uid = index.elements.get(SOP_INSTANCE_UID)
        place = index.elements.get(IMAGE_POSITION)
        if uid is None or place is None or uid.vr not in (b"UI", b"") or place.vr not in (b"DS", b""):
            return None
        name = _UID.fullmatch(index.content, uid.value, uid.end)
        position = _POSITION.fullmatch(index.content, place.value, place.end)
        if name is None or position is None or len(name[1]) > UID_MAX_CHARACTERS:
            return None
        x, y, z = map(float, position.groups())
        return replace(
            self.one,
            path=path,
            sop_instance_uid=name[1].decode("ascii"),
            position_mm=(x, y, z),
            plain=_plain_pixels(index, plain.stored_type),
        )


_accepted: tuple[_Accepted, ...] = ()
"""The latest: slices of one series agree in nearly all that is looked at."""


def _read(ds: Header, path: Path) -> CTSlice:
    uid = name_of(ds, path)
    try:
        refuse_other_objects(ds, uid)
        refuse_own_output(ds, uid)
        refuse_image_type(ds, uid)
        return _ct_slice(ds, uid, path)
    except BadElement as error:
        raise SeriesRefused("bad-header", f"{uid}: {error}") from error


def _ct_slice(ds: Header, uid: str, path: Path) -> CTSlice:
    described = pixel_description(ds, uid)
    plain = None
    if isinstance(ds, IndexedHeader):
        plain = _described_pixels(ds.index, described)
    else:
        syntax = ds.file_meta.TransferSyntaxUID
        if not (syntax.is_encapsulated or syntax.is_deflated or path.stat().st_size >= described.size_bytes):
            rows, columns = described.matrix
            raise SeriesRefused(
                "undecodable", f"{uid} is shorter than the {rows} x {columns} pixels that its header says"
            )
    slope, intercept = rescale(ds, uid)
    orientation, position, spacing = geometry(ds, uid)
    thickness = numbers(ds, "SliceThickness", 1)
    return CTSlice(
        path=path,
        sop_instance_uid=required_uid(ds, "SOPInstanceUID"),
        series_uid=required_uid(ds, "SeriesInstanceUID"),
        study_uid=required_uid(ds, "StudyInstanceUID"),
        patient=(text(ds, "PatientName"), text(ds, "PatientID")),
        frame_of_reference_uid=text(ds, "FrameOfReferenceUID"),
        matrix=described.matrix,
        pixel_spacing_mm=spacing,
        position_mm=position,
        orientation=orientation,
        thickness_mm=max(0.0, thickness[0]) if thickness else 0.0,
        acquisition=text(ds, "AcquisitionNumber"),
        reconstruction=(text(ds, "ConvolutionKernel"), text(ds, "KVP")),
        slope=slope,
        intercept=intercept,
        padding=padding_range(ds),
        limits=described.limits,
        plain=plain,
    )


def _described_pixels(index: ElementIndex, described: PixelDescription) -> PlainPixels:
    """Where the pixels are, if the elements that describe them are as pydicom's decoder would take them too."""
    for tag in _PIXEL_TAGS:
        element = index.elements[tag]
        if element.vr not in (b"US", b"") or element.end - element.value != 2:
            raise HandedOver("a pixel description of another kind")
    pixels = index.elements[PIXEL_DATA]
    if pixels.end - pixels.value != described.size_bytes + described.size_bytes % 2:
        raise HandedOver("pixels of another size than the header's")
    return _plain_pixels(index, f"<{'i' if described.signed else 'u'}{described.bits_allocated // 8}")


def _plain_pixels(index: ElementIndex, stored_type: str) -> PlainPixels:
    pixels = index.elements[PIXEL_DATA]
    crc32 = zlib.crc32(memoryview(index.content)[: pixels.value])
    return PlainPixels(pixels.value, pixels.end, stored_type, index.file_bytes, crc32)


def _read_header(path: Path) -> Dataset:
    try:
        meta = read_file_meta_info(path)
        if "TransferSyntaxUID" not in meta or not meta.TransferSyntaxUID.is_transfer_syntax:
            raise InvalidDicomError("the file meta information names no transfer syntax")
        if meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian:
            _refuse_bomb(path, 144 + int(meta.FileMetaInformationGroupLength))
        return dcmread(path, stop_before_pixels=True)
    except (OSError, SeriesRefused):
        raise
    except Exception as error:  # a parser may raise whatever it likes on hostile bytes
        raise SeriesRefused(
            "unreadable", f"{path.name} is not a DICOM file that can be read ({type(error).__name__})"
        ) from error


def _refuse_bomb(path: Path, offset: int) -> None:
    """Inflate piece by piece and throw away, because the parser would inflate everything at once."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    size = 0
    with path.open("rb") as file:
        file.seek(offset)
        while not inflater.eof and (chunk := inflater.unconsumed_tail or file.read(2**16)):
            size += len(inflater.decompress(chunk, 2**20))
            if size > MAX_INFLATED_BYTES:
                raise SeriesRefused("too-large", f"{path.name} inflates to more than {MAX_INFLATED_BYTES} bytes")
