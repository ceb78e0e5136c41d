"""A derived file is read back and compared with its source and with what was meant before it counts.

Never with the header that was written: a fault in making it would be in both.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydicom import dcmread
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode.errors import DerivationError
from pipelines.ct_slice import OWN_MANUFACTURER
from pipelines.element_index import EXPLICIT_LITTLE, PIXEL_DATA, Element, ElementIndex, HandedOver, index_file, items

BROKEN = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, InvalidDicomError, LookupError),
    *(NotImplementedError, RuntimeError, TypeError, ValueError),
)
"""What reading, decoding or encoding a damaged object raises; not OSError and MemoryError: the machine may recover."""

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
_KEPT_TAGS = tuple(int(Tag(keyword)) for keyword in _KEPT)
_META_SOP_CLASS, _META_SOP_INSTANCE, _META_SYNTAX = 0x00020002, 0x00020003, 0x00020010
_IMAGE_TYPE, _SOP_CLASS, _SOP_INSTANCE = 0x00080008, 0x00080016, 0x00080018
_MANUFACTURER, _REFERENCED_SOP_INSTANCE, _SOURCE_IMAGES = 0x00080070, 0x00081155, 0x00082112
_EQUIPMENT, _SERIES = 0x0018A001, 0x0020000E

_Element = DataElement | RawDataElement


class Meant(NamedTuple):
    """What the file of one slice must hold, but for what its source says."""

    pixels: bytes
    sop_instance_uid: str
    series_uid: str
    source_uids: tuple[str, ...]
    """SOP instances that fed the slice, itself first."""


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


def prove(path: Path, content: bytes, source: ElementIndex, meant: Meant) -> DerivedInstance:
    """Compare a file, read back as `content`, with its indexed source and with what was meant.

    Raises
    ------
    DerivationError
        With what differs.
    """
    try:
        return _prove(path, content, source, meant)
    except HandedOver as error:
        raise DerivationError(f"{path.name} cannot be read back ({error})") from error


def _prove(path: Path, content: bytes, source: ElementIndex, meant: Meant) -> DerivedInstance:
    written = index_file(content)
    elements, meta = written.elements, written.meta
    sop_instance, series = written.value(_SOP_INSTANCE), written.value(_SERIES)
    pixels = elements[PIXEL_DATA]
    wrong = [] if _same_spans(source, written) else _not_kept(source, written)
    if _uid(series) != meant.series_uid:
        wrong.append("SeriesInstanceUID")
    if _uid(sop_instance) != meant.sop_instance_uid:
        wrong.append("SOPInstanceUID")
    if not content.startswith(meant.pixels, pixels.value) or pixels.value + len(meant.pixels) != len(content):
        wrong.append("PixelData")
    if (
        _uid(_of(content, meta, _META_SOP_INSTANCE)) != meant.sop_instance_uid
        or _of(content, meta, _META_SOP_CLASS) != written.value(_SOP_CLASS)
        or _uid(_of(content, meta, _META_SYNTAX)) != EXPLICIT_LITTLE.decode("ascii")
    ):
        wrong.append("file meta information")
    if (written.value(_IMAGE_TYPE) or b"").split(b"\\")[0] != b"DERIVED":
        wrong.append("ImageType")
    named = [_uid(_of(content, item, _REFERENCED_SOP_INSTANCE)) for item in items(written, _SOURCE_IMAGES)]
    if named != list(meant.source_uids):
        wrong.append("SourceImageSequence")
    last = [{}, *items(written, _EQUIPMENT)][-1]
    if (_of(content, last, _MANUFACTURER) or b"").strip() != OWN_MANUFACTURER.encode("ascii"):
        wrong.append("ContributingEquipmentSequence")
    if wrong:
        raise _differs(path, wrong)
    return DerivedInstance(
        sop_instance_uid=meant.sop_instance_uid,
        sop_class_uid=_uid(written.value(_SOP_CLASS)),
        transfer_syntax_uid=EXPLICIT_LITTLE.decode("ascii"),
        path=path,
        sha256=hashlib.sha256(memoryview(content)[written.data_set :]).hexdigest(),
        size_bytes=len(content),
        series_uid=meant.series_uid,
    )


def _same_spans(source: ElementIndex, written: ElementIndex) -> bool:
    return not source.implicit and source.spans(_KEPT_TAGS) == written.spans(_KEPT_TAGS)


def _not_kept(source: ElementIndex, written: ElementIndex) -> list[str]:
    """What did not come over as it was: absent in both, or the same bytes under the same value representation.

    An implicit source says no value representation, but the dictionary knows it.
    """
    wrong = []
    for keyword, tag in zip(_KEPT, _KEPT_TAGS, strict=True):
        before, after = source.elements.get(tag), written.elements.get(tag)
        if before is None or after is None:
            same = before is after
        else:
            right = after.vr == before.vr if before.vr else after.vr.decode("ascii") in dictionary_VR(tag).split(" or ")
            same = right and source.value(tag) == written.value(tag)
        if not same:
            wrong.append(keyword)
    return wrong


def _of(content: bytes, elements: Mapping[int, Element], tag: int) -> bytes | None:
    element = elements.get(tag)
    return None if element is None else content[element.value : element.end]


def _uid(value: bytes | None) -> str:
    return (value or b"").rstrip(b"\0").decode("latin-1")


def prove_by_pydicom(path: Path, content: bytes, source: Dataset, meant: Meant) -> DerivedInstance:
    """The same by another reader, which takes sources of any transfer syntax.

    Parameters
    ----------
    source
        The source file as it was just read, nothing of it looked at yet.
    """
    try:
        written = dcmread(io.BytesIO(content))
        meta = written.file_meta
        wrong = [keyword for keyword in _KEPT if not _carried(_as_read(source, keyword), _as_read(written, keyword))]
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
        if [item.ReferencedSOPInstanceUID for item in written.SourceImageSequence] != list(meant.source_uids):
            wrong.append("SourceImageSequence")
        if written.ContributingEquipmentSequence[-1].Manufacturer != OWN_MANUFACTURER:
            wrong.append("ContributingEquipmentSequence")
    except BROKEN as error:
        raise DerivationError(f"{path.name} cannot be read back ({type(error).__name__})") from error
    if wrong:
        raise _differs(path, wrong)
    data_set = 144 + int(meta.FileMetaInformationGroupLength)
    return DerivedInstance(
        sop_instance_uid=str(written.SOPInstanceUID),
        sop_class_uid=str(written.SOPClassUID),
        transfer_syntax_uid=str(meta.TransferSyntaxUID),
        path=path,
        sha256=hashlib.sha256(memoryview(content)[data_set:]).hexdigest(),
        size_bytes=len(content),
        series_uid=str(written.SeriesInstanceUID),
    )


def _differs(path: Path, wrong: list[str]) -> DerivationError:
    return DerivationError(f"{path.name} differs from its source or from what was meant in {', '.join(wrong)}")


def _as_read(ds: Dataset, keyword: str) -> _Element | None:
    """An element of a file that was just read: its bytes, unless it is empty or the character set."""
    return ds.get_item(Tag(keyword), keep_deferred=True) if keyword in ds else None


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
