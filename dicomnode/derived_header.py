"""The header of a derived CT image: what stays to the last byte, what would be false and goes, what is said anew.

Elements are carried over as bytes, never decoded and encoded again: a name in any character set, a decimal string or
a private value comes out as it went in. Only the encoding around them becomes Explicit VR Little Endian.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import numpy as np
from pydicom.charset import convert_encodings, decode_bytes, default_encoding, encode_string, python_encoding
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as ItemSequence
from pydicom.tag import BaseTag, Tag
from pydicom.valuerep import TEXT_VR_DELIMS

from dicomnode.config import Derivation
from dicomnode.uids import derived_uid, device_uid
from pipelines.base import ModelCard, Options
from pipelines.ct_slice import OWN_MANUFACTURER

LO_MAX_CHARACTERS = 64
ST_MAX_CHARACTERS = 1024
LT_MAX_CHARACTERS = 10240
IS_MAX = 2**31 - 1
"""Limits of the value representations LO, ST, LT and IS (PS3.5 table 6.2-1)."""

FALSE_AFTERWARDS = (
    # numbers and pictures of the pixels that were there (PS3.3 C.7.6.3)
    *("SmallestImagePixelValue", "LargestImagePixelValue", "SmallestPixelValueInSeries", "LargestPixelValueInSeries"),
    *("SmallestImagePixelValueInPlane", "LargestImagePixelValueInPlane"),
    *("SmallestValidPixelValue", "LargestValidPixelValue", "HistogramSequence", "IconImageSequence"),
    # the source's pixels and how they were encoded
    *("PixelData", "PixelDataProviderURL", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("EncapsulatedPixelDataValueTotalLength", "LengthToEnd", "DataSetTrailingPadding"),
    # signatures over the source, and its standing as the authorised original (PS3.3 C.12.1)
    *("DigitalSignaturesSequence", "MACParametersSequence", "SOPInstanceStatus", "SOPAuthorizationDateTime"),
    *("SOPAuthorizationComment", "AuthorizationEquipmentCertificationNumber", "InstanceCreatorUID"),
    # where the source is kept, and how many images there are without ours
    *("RetrieveAETitle", "InstanceAvailability", "RetrieveURL", "RetrieveURI", "RetrieveLocationUID"),
    *("NumberOfSeriesRelatedInstances", "NumberOfStudyRelatedInstances", "NumberOfStudyRelatedSeries"),
    # the scanner's step lists the images that it made; ours are not among them, and a PACS that counts would stumble
    "ReferencedPerformedProcedureStepSequence",
)
"""Keywords that a derived image never takes over."""

PIXEL_DEPENDENT_PRIVATE: dict[tuple[str, int], frozenset[int]] = {
    # ranges of pixel values, overflow and underflow of the image
    ("GEMS_IMPS_01", 0x0029): frozenset({*range(0x04, 0x0B), *range(0x15, 0x19), 0x34, 0x35}),
    ("GEMS_IMAG_01", 0x0029): frozenset({*range(0x15, 0x19), 0x34, 0x35}),
    ("GEMS_PARM_01", 0x0043): frozenset({0x28, 0x29}),  # unique image identifier, histogram tables
    ("ELSCINT1", 0x07A1): frozenset({0x0A}),  # compressed copy of the pixels
    ("SPI-P Release 1", 0x7FE1): frozenset({0x10}),  # copy of the pixels
    ("SPI-P Release 1;1", 0x0019): frozenset({0x06, 0x07, 0x16, 0x17}),  # smallest and largest sample
    ("MAROTECH Inc.", 0x0037): frozenset({0x21, 0x22, 0x23}),  # icon
}
"""(private creator, group) → element offsets known to depend on the pixels."""

SAID_ANEW = frozenset(
    int(Tag(keyword))
    for keyword in (
        *("SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "ImageType", "ImageComments"),
        *("InstanceCreationDate", "InstanceCreationTime", "ContentDate", "ContentTime", "SeriesDate", "SeriesTime"),
        *("LossyImageCompression", "LossyImageCompressionMethod", "LossyImageCompressionRatio"),
        *("DerivationDescription", "DerivationCodeSequence", "SourceImageSequence", "ContributingEquipmentSequence"),
    )
)
"""What `describe` may write."""
DECISIVE = frozenset(
    int(Tag(keyword))
    for keyword in (
        *("SpecificCharacterSet", "SOPClassUID", "TimezoneOffsetFromUTC"),
        *("Rows", "Columns", "BitsAllocated", "PixelRepresentation"),
        *("SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "ImageType", "ImageComments"),
        *("LossyImageCompression", "LossyImageCompressionMethod", "LossyImageCompressionRatio"),
        *("DerivationCodeSequence", "ContributingEquipmentSequence"),
    )
)
"""What `explicit_copy`, `drop_false` and `describe` read of the source to say something else; beside these, private
creators and the types of curves decide what goes."""

_APPENDED = (Tag("ContributingEquipmentSequence"), Tag("DerivationCodeSequence"))
_IMPLICIT_AMBIGUOUS = {"OB or OW": "OW", "US or OW": "OW", "US or SS or OW": "OW"}
_WORD_BYTES = {
    **dict.fromkeys(("AT", "OW", "SS", "US"), 2),
    **dict.fromkeys(("FL", "OF", "OL", "SL", "UL"), 4),
    **dict.fromkeys(("FD", "OD", "OV", "SV", "UV"), 8),
}
_MAX_UTC_OFFSET_H = 14
_ESCAPE = b"\x1b"
"""Begins a switch to another character set (PS3.5 6.1.2.5)."""


@dataclass(frozen=True, slots=True)
class Making:
    """How a derived series is made: the same for each of its images."""

    card: ModelCard
    options: Options
    pipeline_hash: str
    fingerprint: str
    settings: Derivation
    created_at: datetime


def explicit_copy(source: Dataset, *, keep_private: bool) -> Dataset:
    """All elements of `source`, byte by byte, as Explicit VR Little Endian; without group lengths (PS3.5 7.2).

    Private elements of an implicit source become UN, their bytes unchanged (PS3.5 6.2.2).
    """
    return _copy(source, source.original_encoding, keep_private, bool(source.get("PixelRepresentation")))


def _copy(source: Dataset, parent: tuple[bool | None, bool | None], keep_private: bool, signed: bool) -> Dataset:
    encoding = parent if source.original_encoding == (None, None) else source.original_encoding
    implicit, little = encoding
    elements: dict[BaseTag, DataElement | RawDataElement] = {}
    for tag in list(source.keys()):
        if tag.group < 0x0008 or tag.element == 0 or (tag.is_private and not keep_private):
            continue
        element = source.get_item(tag, keep_deferred=True)
        vr = element.VR or _implicit_vr(tag, signed)
        opened = not isinstance(element, RawDataElement) or implicit or not little or not keep_private
        if vr == "SQ" and (opened or tag in _APPENDED):
            items = [_copy(item, encoding, keep_private, signed) for item in source[tag].value or []]
            elements[tag] = DataElement(tag, "SQ", ItemSequence(items))
        elif isinstance(element, RawDataElement):
            value = element.value or b""
            if not little:
                value = _swapped(value, vr)
            elements[tag] = element._replace(VR=vr, value=value, is_implicit_VR=False, is_little_endian=True)
        else:
            elements[tag] = element
    target = Dataset(elements)
    # tells pydicom that the bytes need no decoding on the way out
    charset = target.get("SpecificCharacterSet")
    target.set_original_encoding(False, True, convert_encodings(charset) if charset else default_encoding)
    return target


def _implicit_vr(tag: BaseTag, signed: bool) -> str:
    if tag.is_private:
        return "LO" if tag.is_private_creator else "UN"
    try:
        vr = str(dictionary_VR(tag))
    except KeyError:
        return "UN"
    if vr == "US or SS":
        return "SS" if signed else "US"
    return _IMPLICIT_AMBIGUOUS.get(vr, vr)


def _swapped(value: bytes, vr: str) -> bytes:
    size = _WORD_BYTES.get(vr, 1)
    if size == 1 or len(value) % size:
        return value
    return np.frombuffer(value, f">u{size}").astype(f"<u{size}").tobytes()


def drop_false(header: Dataset) -> None:
    """Remove from a copied header whatever the new pixels make false."""
    for keyword in FALSE_AFTERWARDS:
        header.pop(_tag(keyword), None)
    pixels = int(header["Rows"].value) * int(header["Columns"].value)
    for tag in [tag for tag in header.keys() if tag.is_private and not tag.is_private_creator]:
        creator = _bytes(header, Tag(tag.group, tag.element >> 8)).decode("latin-1").strip(" \0")
        if tag.element & 0xFF in PIXEL_DEPENDENT_PRIVATE.get((creator, tag.group), ()) or _holds_image(
            header, tag, pixels
        ):
            del header[tag]
    for group in {tag.group for tag in header.keys() if not tag.is_private}:
        if group & 0xFF00 == 0x6000:
            # without data of its own an overlay lies in unused bits of the pixels (retired, PS3.3 C.9.2), and is gone
            if Tag(group, 0x3000) not in header:
                _drop_group(header, group)
            for statistic in (0x1302, 0x1303):  # ROI Mean, ROI Standard Deviation
                header.pop(Tag(group, statistic), None)
        elif group & 0xFF00 == 0x5000 and _bytes(header, Tag(group, 0x0020)).strip() in (b"HIST", b"PROF"):
            _drop_group(header, group)  # a curve of the pixels (retired)


def _drop_group(header: Dataset, group: int) -> None:
    for tag in [tag for tag in header.keys() if tag.group == group]:
        del header[tag]


def _holds_image(header: Dataset, tag: BaseTag, pixels: int) -> bool:
    """Whether a private element is as long as an image of one byte a pixel, or has an item with pixel data."""
    element = header.get_item(tag, keep_deferred=True)
    if element.VR != "SQ":
        return isinstance(element.value, bytes) and len(element.value) >= pixels
    items = Dataset({tag: element})[tag].value or []  # opened in a copy: what stays, stays as bytes
    return any("PixelData" in item or any(_holds_image(item, inner, pixels) for inner in item.keys()) for item in items)


def describe(header: Dataset, made: Making, source_uids: Sequence[str], lossy: tuple[bytes, float] | None) -> None:
    """Say in a copied header what the new image is.

    Parameters
    ----------
    header
        From `explicit_copy`, changed in place.
    made
        How the series is made.
    source_uids
        SOPInstanceUID of every slice that fed this one; the slice at the same place is the first.
    lossy
        Method and ratio, if the source's pixels came through a lossy transfer syntax; None if not.
    """
    settings = made.settings
    key = (made.pipeline_hash, made.fingerprint)
    series_uid = _bytes(header, _tag("SeriesInstanceUID")).rstrip(b" \0").decode("ascii")
    _put(header, "SOPInstanceUID", derived_uid(source_uids[0], *key, "instance"))
    _put(header, "SeriesInstanceUID", derived_uid(series_uid, *key, "series"))
    _put(header, "SeriesNumber", str(_series_number(header, settings.series_number_offset)))
    _put(header, "SeriesDescription", _series_description(header, settings.series_description_suffix))
    kept = [value.strip() for value in _bytes(header, _tag("ImageType")).split(b"\\")][2:]
    if not kept or not kept[0]:
        kept[:1] = [b"AXIAL"]  # value 3 is required (PS3.3 C.8.2.1.1.1), and localizers never come here
    _put(header, "ImageType", b"\\".join((b"DERIVED", settings.image_type_value_2.encode(), *kept)))
    if settings.image_comments:
        before = _bytes(header, _tag("ImageComments")).rstrip(b" \0")
        comments = settings.image_comments.encode("ascii") + (b"\r\n" + before if before else b"")
        _put(
            header,
            "ImageComments",
            comments if len(comments) <= LT_MAX_CHARACTERS else settings.image_comments,
        )
    moment = made.created_at.astimezone(_utc_offset(header) or made.created_at.tzinfo)
    for what in ("InstanceCreation", "Content", "Series"):
        _put(header, f"{what}Date", moment.strftime("%Y%m%d"))
        _put(header, f"{what}Time", moment.strftime("%H%M%S.%f"))
    if lossy is not None and _bytes(header, _tag("LossyImageCompression")).strip() != b"01":
        _put(header, "LossyImageCompression", b"01")
        _put(header, "LossyImageCompressionMethod", lossy[0])
        _put(header, "LossyImageCompressionRatio", f"{lossy[1]:.4g}")
    _put(header, "DerivationDescription", _derivation_description(made))
    _append(header, "DerivationCodeSequence", code("113087", "Smoothing"))
    sop_class_uid = _bytes(header, _tag("SOPClassUID")).rstrip(b" \0").decode("ascii")
    sources = [source_item(sop_class_uid, uid, same_place=k == 0) for k, uid in enumerate(source_uids)]
    header.SourceImageSequence = ItemSequence(sources)
    _append(header, "ContributingEquipmentSequence", _equipment(made, moment))


def code(value: str, meaning: str) -> Dataset:
    """A coded concept of the DICOM Controlled Terminology (PS3.16 annex D)."""
    item = Dataset()
    item.CodeValue = value
    item.CodingSchemeDesignator = "DCM"
    item.CodeMeaning = meaning
    return item


def source_item(sop_class_uid: str, uid: str, *, same_place: bool) -> Dataset:
    """Item of SourceImageSequence (PS3.3 C.7.6.1.1.4); `same_place` for the slice that this one replaces."""
    item = Dataset()
    item.ReferencedSOPClassUID = sop_class_uid
    item.ReferencedSOPInstanceUID = uid
    item.SpatialLocationsPreserved = "YES" if same_place else "NO"
    item.PurposeOfReferenceCodeSequence = ItemSequence([code("121322", "Source image for image processing operation")])
    return item


def _equipment(made: Making, moment: datetime) -> Dataset:
    """What made the image, one item for the algorithm (PS3.3 C.12.1, IHE AI Results)."""
    item = Dataset()
    item.Manufacturer = OWN_MANUFACTURER  # by which reader and router know what this node derived
    item.ManufacturerModelName = _plain(made.card.name, LO_MAX_CHARACTERS)
    item.SoftwareVersions = _plain(made.card.version, LO_MAX_CHARACTERS)
    item.DeviceUID = device_uid(made.card)
    item.ContributionDateTime = moment.strftime("%Y%m%d%H%M%S.%f%z")
    item.ContributionDescription = "Noise reduction"
    item.PurposeOfReferenceCodeSequence = ItemSequence([code("109102", "Processing Equipment")])
    return item


def _derivation_description(made: Making) -> str:
    card, options = made.card, made.options
    weights = f", weights SHA-256 {card.weights_sha256[:16]}" if card.weights_sha256 else ""
    strength = f"strength {options.strength:g}, " if card.noise_map or options.strength != 1 else ""
    return _plain(
        f"Noise reduction by {card.name} {card.version} (precision {card.precision}{weights}): "
        f"{strength}blend {options.blend:g}",
        ST_MAX_CHARACTERS,
    )


def _series_number(header: Dataset, offset: int) -> int:
    """The source's number plus `offset`; `offset` where the source has none or the sum is too large."""
    text = _bytes(header, _tag("SeriesNumber")).strip(b" \0")
    number = int(text) if re.fullmatch(rb"[+-]?[0-9]{1,11}", text) else 0
    return number + offset if abs(number + offset) <= IS_MAX else offset


def _series_description(header: Dataset, suffix: str) -> bytes:
    """The source's description, cut so that the suffix fits, and the suffix.

    Every character set that DICOM knows ends a value in ASCII (PS3.5 6.1.2.5.3), so ASCII is appended as bytes.
    """
    before = _bytes(header, _tag("SeriesDescription")).rstrip(b" \0")
    if not before:
        return suffix.strip().encode("ascii")
    room = LO_MAX_CHARACTERS - len(suffix)
    if len(before) <= room:
        return before + suffix.encode("ascii")
    try:
        encodings = _encodings(header)
        text = _decoded(before, encodings)
        for length in (room, room - 1):  # the second leaves room for the padding space, where the first needs one
            start = text[:length].rstrip()
            cut = encode_string(start, encodings)
            if _decoded(cut, encodings) != start:
                raise ValueError("the character set does not take back what it gave")
            if len(cut + suffix.encode("ascii")) % 2 == 0:
                break
        return cut + suffix.encode("ascii")
    except (UserWarning, LookupError, ValueError):
        return suffix.strip().encode("ascii")  # not in the character set that the source declares: nothing to cut


def _encodings(header: Dataset) -> list[str]:
    """Python's names of the character sets; LookupError if one is none of the standard's."""
    declared = header.get("SpecificCharacterSet") or ""
    for name in [declared] if isinstance(declared, str) else declared:
        python_encoding[name]
    return convert_encodings(declared or default_encoding)


def _decoded(value: bytes, encodings: list[str]) -> str:
    """Text of a value; ValueError where pydicom would put replacement characters.

    Without `warnings.catch_warnings`, which pydicom's own sign of them would need, and which threads share.
    """
    if _ESCAPE not in value:
        return value.decode(encodings[0])
    text = decode_bytes(value, encodings, TEXT_VR_DELIMS)
    if "\ufffd" in text:
        raise ValueError("a character outside of its character set")
    return text


def _utc_offset(header: Dataset) -> timezone | None:
    """TimezoneOffsetFromUTC: if there, it governs all dates and times of the data set (PS3.3 C.12.1), so ours too."""
    match = re.fullmatch(rb"([+-])([0-9]{2})([0-5][0-9])", _bytes(header, _tag("TimezoneOffsetFromUTC")).strip(b" \0"))
    if match is None or int(match[2]) > _MAX_UTC_OFFSET_H:
        return None
    offset = timedelta(hours=int(match[2]), minutes=int(match[3]))
    return timezone(-offset if match[1] == b"-" else offset)


def _plain(text: str, limit: int) -> str:
    """Printable ASCII without backslash, which every character set has and no value representation splits."""
    return re.sub(r"[^\x20-\x7e]|\\", "_", text)[:limit]


def _append(header: Dataset, keyword: str, item: Dataset) -> None:
    before = header[keyword].value if keyword in header else None
    items = list(before) if isinstance(before, ItemSequence) else []
    header[_tag(keyword)] = DataElement(_tag(keyword), "SQ", ItemSequence([*items, item]))


def _tag(keyword: str) -> BaseTag:
    tag = tag_for_keyword(keyword)
    assert tag is not None, keyword
    return Tag(tag)


def _bytes(header: Dataset, tag: BaseTag) -> bytes:
    """Value of an element as it is encoded; empty if the element is absent or a sequence."""
    element = header.get_item(tag, keep_deferred=True) if tag in header else None
    return element.value if element is not None and isinstance(element.value, bytes) else b""


def _put(header: Dataset, keyword: str, value: str | bytes) -> None:
    """Set an element to an encoded value, padded to even length (PS3.5 6.2)."""
    tag = _tag(keyword)
    vr = str(dictionary_VR(tag))
    encoded = value.encode("ascii") if isinstance(value, str) else value
    if len(encoded) % 2:
        encoded += b"\0" if vr == "UI" else b" "
    header[tag] = RawDataElement(tag, vr, len(encoded), encoded, 0, False, True)
