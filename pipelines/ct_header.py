"""What the header of a CT slice must say, and why an object without it is refused.

Reasons name UIDs and positions, never the patient. The same code judges what pydicom read and what
`pipelines.element_index` found.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from pydicom.dataset import Dataset
from pydicom.uid import UID, CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage

from pipelines.elements import BadElement, Header, items, numbers, shown, text, texts

MAX_MATRIX = 2048
"""Largest Rows and Columns; clinical CT reconstructs up to 1024, photon-counting CT up to 2048."""
MAX_STEP_HU = 4.0
"""Largest RescaleSlope in HU per stored step. Rounding to a coarser step adds noise of its own (step / √12, 1.2 HU at
this limit) and hides what denoising did; 12-bit JPEG copies with a slope of 2 still pass."""
MAX_INTERCEPT_HU = 32768.0
"""Largest magnitude of RescaleIntercept: an offset beyond 16 bits is no CT calibration."""
MAX_COSINE_ERROR = 1e-3
"""How far ImageOrientationPatient may be from two orthogonal unit vectors: its decimal strings are rounded."""
MIN_TRANSVERSE_COSINE = math.cos(math.radians(45))
"""Smallest |cosine| between slice normal and patient axis. Gantries tilt by at most 30°: a steeper plane was
reformatted from a volume, or is a localizer, whatever its ImageType says."""

OWN_MANUFACTURER = "dicomnode"
"""Manufacturer in the ContributingEquipmentSequence item of everything this node derives."""
PROCESSING_EQUIPMENT = "109102"
"""(109102, DCM, "Processing Equipment"), CID 7005: purpose of that item."""

SECONDARY_CAPTURE_PREFIX = "1.2.840.10008.5.1.4.1.1.7"
ENHANCED_CT = (EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
LOCALIZER_WORDS = frozenset({"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "SCANOGRAM"})
SCREEN_WORDS = frozenset({"SCREEN SAVE", "SCREENSAVE", "DOSE_INFO", "PATIENT_INFO", "DOSE REPORT"})
DERIVED_WORDS = frozenset(
    {
        *("REFORMATTED", "MPR", "CPR", "CURVED MPR", "PROJECTION IMAGE", "AVERAGE", "MIP", "MINIP", "MAX_IP", "MIN_IP"),
        *("VRT", "VR", "VOLUME RENDERING", "SSD", "3D", "RENDERED", "SUBTRACTION", "PERFUSION"),
        *("DENSITY MAP", "MATERIAL", "IODINE", "VNC", "EFF_ATOMIC_NUM"),
    }
)
"""ImageType words of images that were computed from a volume, or are no HU map."""


class SeriesRefused(Exception):
    """A series cannot be denoised; it is a documented outcome, not a fault.

    Parameters
    ----------
    code
        Stable slug (``"localizer"``, ``"gap"``, …), stored with the job and listed in docs/gate.md.
    detail
        One sentence for a person: what was found, in which slices (UIDs, positions), what to do.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


class PixelDescription(NamedTuple):
    """How pixels are stored."""

    matrix: tuple[int, int]
    """Rows, columns."""
    bits_allocated: int
    bits_stored: int
    signed: bool

    @property
    def size_bytes(self) -> int:
        """Of all pixels, uncompressed."""
        return self.matrix[0] * self.matrix[1] * self.bits_allocated // 8

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest value that the stored bits can hold."""
        return stored_limits(self.bits_stored, self.signed)


def stored_limits(bits_stored: int, signed: bool) -> tuple[int, int]:
    """Lowest and highest value of BitsStored bits with this PixelRepresentation."""
    return (-(1 << bits_stored - 1), (1 << bits_stored - 1) - 1) if signed else (0, (1 << bits_stored) - 1)


def name_of(ds: Header, path: Path) -> str:
    """What to call the object in a reason: its UID where it has one."""
    try:
        uid = text(ds, "SOPInstanceUID")
    except BadElement:
        return path.name
    return uid if _is_uid(uid) else path.name


def refuse_other_objects(ds: Header, uid: str) -> None:
    sop_class, modality = text(ds, "SOPClassUID"), text(ds, "Modality")
    if sop_class.startswith(SECONDARY_CAPTURE_PREFIX):
        raise SeriesRefused(
            "secondary-capture", f"{uid} is a {_class_name(sop_class)} object, a picture and no CT measurement"
        )
    if sop_class not in (CTImageStorage, *ENHANCED_CT) or modality != "CT":
        raise SeriesRefused("not-ct", f"{uid} is {_class_name(sop_class)}, modality {shown(modality) or 'missing'}")
    frames = numbers(ds, "NumberOfFrames", 1) or (1.0,)
    if sop_class in ENHANCED_CT or frames[0] != 1:
        raise SeriesRefused(
            "multi-frame", f"{uid} is a multi-frame object ({_class_name(sop_class)}); only single-frame CT is read"
        )


def _class_name(sop_class: str) -> str:
    """The name of a known class; never what else may stand there."""
    return UID(sop_class).name if _is_uid(sop_class) else "an object of no valid SOP class"


@lru_cache(1024)  # slices share most of theirs
def _is_uid(value: str) -> bool:
    return UID(value).is_valid


def is_own_output(ds: Header) -> bool:
    """Was this derived by a node like this? Says its ContributingEquipmentSequence (PS3.3 C.12.1); never raises."""
    try:
        equipment = items(ds, "ContributingEquipmentSequence")
    except BadElement:
        return False
    return any(map(_is_own_equipment, equipment))


def _is_own_equipment(item: Dataset) -> bool:
    try:
        purposes = {text(code, "CodeValue") for code in items(item, "PurposeOfReferenceCodeSequence")}
        return text(item, "Manufacturer").casefold() == OWN_MANUFACTURER and PROCESSING_EQUIPMENT in purposes
    except BadElement:  # this item of another system; ours may follow
        return False


def refuse_own_output(ds: Header, uid: str) -> None:
    """What this node derived may come back from the PACS; denoising it again would smooth it twice."""
    if is_own_output(ds):
        raise SeriesRefused("own-output", f"{uid} was derived by {OWN_MANUFACTURER} already and is not denoised again")


def refuse_image_type(ds: Header, uid: str) -> None:
    """ImageType (PS3.3 C.8.2.1.1.1): value 1 ORIGINAL or DERIVED, 2 PRIMARY or SECONDARY, 3 AXIAL or LOCALIZER.

    DERIVED alone is no reason: lossy compression and some reconstructions write DERIVED\\PRIMARY\\AXIAL. An image
    without ImageType is judged by its geometry.
    """
    words = [word.strip().upper() for word in texts(ds, "ImageType")]
    if LOCALIZER_WORDS.intersection(words):
        raise SeriesRefused(
            "localizer", f"{uid} is a localizer (ImageType {_shown(words)}); send localizers in a series of their own"
        )
    if SCREEN_WORDS.intersection(words):
        raise SeriesRefused("secondary-capture", f"{uid} is a screen or report page (ImageType {_shown(words)})")
    if any(word.split(" ")[-1] in ("MON", "MONITORING") for word in words):
        raise SeriesRefused(
            "monitoring", f"{uid} watches one place for contrast (ImageType {_shown(words)}); not a volume"
        )
    computed = DERIVED_WORDS.intersection(words) or {word for word in words if word.split(" ")[0] == "CSA"}
    if computed or words[:2] == ["DERIVED", "SECONDARY"] or words == ["DERIVED", "PRIMARY"]:
        raise SeriesRefused(
            "derived", f"{uid} was computed from other images (ImageType {_shown(words)}); send the original slices"
        )
    if len(words) > 2 and words[2] != "AXIAL":
        raise SeriesRefused("derived", f"{uid} does not say that it is an axial CT slice (ImageType {_shown(words)})")


def _shown(words: list[str]) -> str:
    return shown("\\".join(words))


def pixel_description(ds: Header, uid: str) -> PixelDescription:
    """The image pixel module (PS3.3 C.7.6.3), once it is one that this reader can hold and convert."""
    names = ("SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
    values = {name: numbers(ds, name, 1) for name in names}
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise SeriesRefused("undecodable", f"{uid} has no {', '.join(missing)}")
    samples, rows, columns, allocated, stored, high_bit, signed = (int(value[0]) for value in values.values() if value)
    photometric = text(ds, "PhotometricInterpretation")
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise SeriesRefused(
            "colour", f"{uid} is no grey-scale image ({shown(photometric) or 'no photometric interpretation'})"
        )
    if not (1 <= rows <= MAX_MATRIX and 1 <= columns <= MAX_MATRIX):
        raise SeriesRefused("too-large", f"{uid} says {rows} x {columns} pixels; 1 to {MAX_MATRIX} are read")
    if allocated not in (8, 16) or not 1 <= stored <= allocated or high_bit != stored - 1 or signed not in (0, 1):
        raise SeriesRefused(
            "undecodable",
            f"{uid}: BitsAllocated {allocated}, BitsStored {stored}, HighBit {high_bit} is no CT pixel format",
        )
    return PixelDescription((rows, columns), allocated, stored, bool(signed))


def rescale(ds: Header, uid: str) -> tuple[float, float]:
    slope, intercept = numbers(ds, "RescaleSlope", 1), numbers(ds, "RescaleIntercept", 1)
    if slope is None or intercept is None:
        raise SeriesRefused(
            "missing-rescale", f"{uid} has no RescaleSlope or RescaleIntercept: its HU are unknown, never guessed"
        )
    if not (0 < slope[0] <= MAX_STEP_HU and abs(intercept[0]) <= MAX_INTERCEPT_HU):
        raise SeriesRefused(
            "bad-rescale",
            f"{uid}: RescaleSlope {slope[0]:g}, RescaleIntercept {intercept[0]:g}; a slope above 0 and up to "
            f"{MAX_STEP_HU:g} HU per step is needed to hold a denoised image",
        )
    kind = text(ds, "RescaleType")
    if kind not in ("", "HU"):
        raise SeriesRefused("not-hu", f"{uid}: RescaleType {shown(kind)}, the values are not Hounsfield units")
    return slope[0], intercept[0]


def geometry(ds: Header, uid: str) -> tuple[tuple[float, ...], tuple[float, float, float], tuple[float, float]]:
    """(orientation, position, pixel spacing) of the image plane module (PS3.3 C.7.6.2)."""
    orientation = numbers(ds, "ImageOrientationPatient", 6)
    position = numbers(ds, "ImagePositionPatient", 3)
    spacing = numbers(ds, "PixelSpacing", 2)
    if orientation is None or position is None or spacing is None:
        raise SeriesRefused(
            "missing-geometry", f"{uid} lacks ImagePositionPatient, ImageOrientationPatient or PixelSpacing"
        )
    rx, ry, rz, cx, cy, cz = orientation
    errors = (rx * rx + ry * ry + rz * rz - 1, cx * cx + cy * cy + cz * cz - 1, rx * cx + ry * cy + rz * cz)
    if max(map(abs, errors)) > MAX_COSINE_ERROR or min(spacing) <= 0:
        raise SeriesRefused("missing-geometry", f"{uid}: orientation {orientation} with spacing {spacing} is no plane")
    if abs(rx * cy - ry * cx) < MIN_TRANSVERSE_COSINE:  # z of their cross product
        raise SeriesRefused(
            "not-transverse", f"{uid} lies in a coronal or sagittal plane {orientation}: no acquired CT slice"
        )
    return orientation, (position[0], position[1], position[2]), (spacing[0], spacing[1])


def padding_range(ds: Header) -> tuple[int, int] | None:
    """PixelPaddingValue to PixelPaddingRangeLimit, in either order, as the stored pixels spell them.

    Both have the pixels' representation (PS3.3 C.7.5.1.1.2), but files exist that write 63536 as unsigned beside signed
    pixels and mean -2000.
    """
    value = numbers(ds, "PixelPaddingValue", 1)
    if value is None:
        return None
    limit = numbers(ds, "PixelPaddingRangeLimit", 1) or value
    signed = (numbers(ds, "PixelRepresentation", 1) or (0,))[0] == 1
    bits = 1 << 16
    both = [int(number) % bits for number in (value[0], limit[0])]
    if signed:
        both = [number - bits if number >= bits // 2 else number for number in both]
    return min(both), max(both)


def required_uid(ds: Header, keyword: str) -> str:
    value = text(ds, keyword)
    if not _is_uid(value):
        raise BadElement(f"{keyword} is missing or no valid UID")
    return value
