"""One DICOM object: may it be a slice of a CT volume, what does its header say, and what are its HU?

Whatever an object tells on its own is decided here; what needs the whole series is decided in `pipelines.volume`.
Everything in a file came over the network: sizes are checked before memory is asked for, and no element is trusted to
have the right type. Reasons name UIDs and positions, never the patient.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    RLELossless,
)

from pipelines.codestream import declared_size
from pipelines.elements import BadElement, items, numbers, shown, text, texts

MAX_MATRIX = 2048
"""Largest Rows and Columns; clinical CT reconstructs up to 1024, photon-counting CT up to 2048."""
MAX_INFLATED_BYTES = 64 * 2**20
"""Largest size of one deflated object (PS3.5 A.5) once inflated: a bomb of 1 MiB would inflate to 1 GiB."""
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
PADDING_BELOW_HU = -1100.0
"""Below this is no measurement: nothing attenuates less than vacuum (-1000 HU) but for noise."""
PADDING_WOBBLE_HU = 4.0
"""How far padding may differ from a constant; lossy compression moves it by some HU."""
MIN_PADDING_PART = 0.04
"""Part of the image that undeclared padding must fill; one corner outside the FOV circle is 5 %."""

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

    def read_hu(self, hu: NDArray[np.float32], padding: NDArray[np.bool_]) -> None:
        """Decode the pixels into two planes (rows, columns): HU, and where nothing was measured.

        HU is the float32 nearest to ``stored · RescaleSlope + RescaleIntercept`` (PS3.3 C.11.1), also where nothing was
        measured. Photometric interpretation MONOCHROME1 changes the display alone, not the stored values.

        Raises
        ------
        SeriesRefused
            ``undecodable``: no decoder, damaged or missing pixel data, another size than the header's.
        """
        stored = self._stored()
        if self.slope.is_integer() and self.intercept.is_integer():
            # 16-bit integers times at most MAX_STEP_HU stay far below 2^24: exact in float32, and twice as fast
            np.multiply(stored, np.float32(self.slope), out=hu, casting="unsafe")
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

    def _stored(self) -> NDArray[Any]:
        """Stored values, (rows, columns), 8 or 16 bit integers."""
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
            # unused high bits are looked at below, not silently masked away; decoders of compressed data set them right
            stored = pixel_array(ds, correct_unused_bits=False) if native else pixel_array(ds)
            if stored.shape != self.matrix or stored.dtype.kind not in "iu":
                raise ValueError(f"decoded to {stored.dtype} {stored.shape}, the header says {self.matrix}")
        except OSError:
            raise  # the disk, not the object
        except Exception as error:  # decoders raise whatever they like on damaged data
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise SeriesRefused(
                "undecodable", f"pixels of {self.sop_instance_uid} cannot be decoded: {reason}"
            ) from error
        bits = int(ds.BitsStored)
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if ds.PixelRepresentation else (0, (1 << bits) - 1)
        if bits < 8 * stored.itemsize and (stored.min() < low or stored.max() > high):
            alien = (stored < low) | (stored > high)
            if self.padding is not None:
                alien &= (stored < self.padding[0]) | (stored > self.padding[1])
            if alien.any():
                raise SeriesRefused(
                    "undecodable",
                    f"{int(alien.sum())} pixels of {self.sop_instance_uid} use bits above BitsStored {bits} (an "
                    "overlay inside the pixels, or a wrong header): their HU cannot be told",
                )
        return stored


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
    ds = _read_header(path)
    uid = _name(ds, path)
    try:
        _refuse_other_objects(ds, uid)
        _refuse_own_output(ds, uid)
        _refuse_image_type(ds, uid)
        return _ct_slice(ds, uid, path)
    except BadElement as error:
        raise SeriesRefused("bad-header", f"{uid}: {error}") from error


def _ct_slice(ds: Dataset, uid: str, path: Path) -> CTSlice:
    matrix = _pixel_description(ds, uid, path)
    slope, intercept = _rescale(ds, uid)
    orientation, position, spacing = _geometry(ds, uid)
    thickness = numbers(ds, "SliceThickness", 1)
    return CTSlice(
        path=path,
        sop_instance_uid=_required_uid(ds, "SOPInstanceUID"),
        series_uid=_required_uid(ds, "SeriesInstanceUID"),
        study_uid=_required_uid(ds, "StudyInstanceUID"),
        patient=(text(ds, "PatientName"), text(ds, "PatientID")),
        frame_of_reference_uid=text(ds, "FrameOfReferenceUID"),
        matrix=matrix,
        pixel_spacing_mm=spacing,
        position_mm=position,
        orientation=orientation,
        thickness_mm=max(0.0, thickness[0]) if thickness else 0.0,
        acquisition=text(ds, "AcquisitionNumber"),
        reconstruction=(text(ds, "ConvolutionKernel"), text(ds, "KVP")),
        slope=slope,
        intercept=intercept,
        padding=_padding_range(ds),
    )


def _name(ds: Dataset, path: Path) -> str:
    """What to call the object in a reason: its UID where it has one."""
    try:
        uid = UID(text(ds, "SOPInstanceUID"))
    except BadElement:
        return path.name
    return uid if uid.is_valid else path.name


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


def _refuse_other_objects(ds: Dataset, uid: str) -> None:
    sop_class, modality = text(ds, "SOPClassUID"), text(ds, "Modality")
    # the name of a known class; never what else may stand there
    name = UID(sop_class).name if UID(sop_class).is_valid else "an object of no valid SOP class"
    if sop_class.startswith(SECONDARY_CAPTURE_PREFIX):
        raise SeriesRefused("secondary-capture", f"{uid} is a {name} object, a picture and no CT measurement")
    if sop_class not in (CTImageStorage, *ENHANCED_CT) or modality != "CT":
        raise SeriesRefused("not-ct", f"{uid} is {name}, modality {shown(modality) or 'missing'}")
    frames = numbers(ds, "NumberOfFrames", 1) or (1.0,)
    if sop_class in ENHANCED_CT or frames[0] != 1:
        raise SeriesRefused("multi-frame", f"{uid} is a multi-frame object ({name}); only single-frame CT is read")


def is_own_output(ds: Dataset) -> bool:
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


def _refuse_own_output(ds: Dataset, uid: str) -> None:
    """What this node derived may come back from the PACS; denoising it again would smooth it twice."""
    if is_own_output(ds):
        raise SeriesRefused("own-output", f"{uid} was derived by {OWN_MANUFACTURER} already and is not denoised again")


def _refuse_image_type(ds: Dataset, uid: str) -> None:
    """ImageType (PS3.3 C.8.2.1.1.1): value 1 ORIGINAL or DERIVED, 2 PRIMARY or SECONDARY, 3 AXIAL or LOCALIZER.

    DERIVED alone is no reason: lossy compression and some reconstructions write DERIVED\\PRIMARY\\AXIAL. An image
    without ImageType is judged by its geometry.
    """
    words = [word.strip().upper() for word in texts(ds, "ImageType")]
    type_shown = shown("\\".join(words))
    if LOCALIZER_WORDS.intersection(words):
        raise SeriesRefused(
            "localizer", f"{uid} is a localizer (ImageType {type_shown}); send localizers in a series of their own"
        )
    if SCREEN_WORDS.intersection(words):
        raise SeriesRefused("secondary-capture", f"{uid} is a screen or report page (ImageType {type_shown})")
    if any(word.split(" ")[-1] in ("MON", "MONITORING") for word in words):
        raise SeriesRefused(
            "monitoring", f"{uid} watches one place for contrast (ImageType {type_shown}); not a volume"
        )
    computed = DERIVED_WORDS.intersection(words) or {word for word in words if word.split(" ")[0] == "CSA"}
    if computed or words[:2] == ["DERIVED", "SECONDARY"] or words == ["DERIVED", "PRIMARY"]:
        raise SeriesRefused(
            "derived", f"{uid} was computed from other images (ImageType {type_shown}); send the original slices"
        )
    if len(words) > 2 and words[2] != "AXIAL":
        raise SeriesRefused("derived", f"{uid} does not say that it is an axial CT slice (ImageType {type_shown})")


def _pixel_description(ds: Dataset, uid: str, path: Path) -> tuple[int, int]:
    """(rows, columns), once the image pixel module (PS3.3 C.7.6.3) is one that this reader can hold and convert."""
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
    syntax = ds.file_meta.TransferSyntaxUID
    if not (syntax.is_encapsulated or syntax.is_deflated or path.stat().st_size >= rows * columns * allocated // 8):
        raise SeriesRefused("undecodable", f"{uid} is shorter than the {rows} x {columns} pixels that its header says")
    return rows, columns


def _rescale(ds: Dataset, uid: str) -> tuple[float, float]:
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


def _geometry(ds: Dataset, uid: str) -> tuple[tuple[float, ...], tuple[float, float, float], tuple[float, float]]:
    """(orientation, position, pixel spacing) of the image plane module (PS3.3 C.7.6.2)."""
    orientation = numbers(ds, "ImageOrientationPatient", 6)
    position = numbers(ds, "ImagePositionPatient", 3)
    spacing = numbers(ds, "PixelSpacing", 2)
    if orientation is None or position is None or spacing is None:
        raise SeriesRefused(
            "missing-geometry", f"{uid} lacks ImagePositionPatient, ImageOrientationPatient or PixelSpacing"
        )
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    errors = (abs(row @ row - 1), abs(column @ column - 1), abs(row @ column))
    if max(errors) > MAX_COSINE_ERROR or min(spacing) <= 0:
        raise SeriesRefused("missing-geometry", f"{uid}: orientation {orientation} with spacing {spacing} is no plane")
    if abs(np.cross(row, column)[2]) < MIN_TRANSVERSE_COSINE:
        raise SeriesRefused(
            "not-transverse", f"{uid} lies in a coronal or sagittal plane {orientation}: no acquired CT slice"
        )
    return orientation, (position[0], position[1], position[2]), (spacing[0], spacing[1])


def _padding_range(ds: Dataset) -> tuple[int, int] | None:
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


def _required_uid(ds: Dataset, keyword: str) -> str:
    value = text(ds, keyword)
    if not UID(value).is_valid:
        raise BadElement(f"{keyword} is missing or no valid UID")
    return value
