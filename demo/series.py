"""Series to send: a phantom at low dose with its truth, or the CT series found in a folder."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
    generate_uid,
)

from dicomnode.errors import BadIdentifier
from dicomnode.scu import Outgoing
from dicomnode.spool import valid_uid
from training.simulate import unit_noise
from training.sources.phantom import chest_abdomen

Array = NDArray[np.float32]

MATRIX = 512
PIXEL_MM = 0.8
SPACING_MM = 2.5
DOSE = 0.25
"""Fraction of full dose."""
SEED = 7
"""Of the phantom; its noise has the next one."""
_INTERCEPT_HU = -1024
_STORED_MAX = 4095
"""12 bits, as scanners store CT: what is below -1024 HU or above 3071 HU saturates."""
_SLICES_AT_ONCE = 8
_CT_CLASSES = frozenset({CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage})

Progress = Callable[[float], None]
"""Called with the fraction done, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Source:
    """A series to send, and what it would be without noise, if that is known."""

    series_uid: str
    items: tuple[Outgoing, ...]
    truth_hu: Array | None = None
    """(z, y, x), in the order of InstanceNumber."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a folder holds."""

    sources: tuple[Source, ...]
    other_dicom: int
    """DICOM files that are no CT."""
    not_dicom: int


def truth(slices: int) -> Array:
    """The noise-free phantom, HU, (z, y, x), head first."""
    return chest_abdomen(slices, MATRIX, PIXEL_MM, SPACING_MM, SEED)


def make_phantom(folder: Path, slices: int, progress: Progress) -> Source:
    """Write the phantom at `DOSE` as a CT series of `slices` images into the new folder `folder`.

    A study of its own each time: its UIDs are new.
    """
    folder.mkdir(parents=True)
    clean = truth(slices)
    common = _common(slices)
    items = []
    for first in range(0, slices, _SLICES_AT_ONCE):
        part = clean[first : first + _SLICES_AT_ONCE]
        noisy = part + unit_noise(part, PIXEL_MM, SEED + 1 + first) / np.float32(math.sqrt(DOSE))
        for k, plane in enumerate(noisy, first):
            items.append(_write(folder, common, k, plane))
        progress((first + len(part)) / slices)
    return Source(str(common.SeriesInstanceUID), tuple(items), clean)


def find_ct(folder: Path) -> Found:
    """CT series below `folder`, however the files are named and nested; an object that is there twice counts once.

    Headers are read, nothing is changed. Whether a series may be denoised is for the node to say.
    """
    series: dict[str, dict[str, Outgoing]] = defaultdict(dict)
    other = not_dicom = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            header = dcmread(path, stop_before_pixels=True, specific_tags=["Modality", "SeriesInstanceUID"])
            meta = header.file_meta
            item = Outgoing(
                valid_uid(str(meta.MediaStorageSOPInstanceUID)),
                valid_uid(str(meta.MediaStorageSOPClassUID)),
                valid_uid(str(meta.TransferSyntaxUID)),
                path,
            )
            series_uid = valid_uid(str(header.get("SeriesInstanceUID", "")))
        except (InvalidDicomError, BadIdentifier, AttributeError, OSError, EOFError, ValueError):
            not_dicom += 1
            continue
        if item.sop_class_uid in _CT_CLASSES or str(header.get("Modality", "")) == "CT":
            series[series_uid].setdefault(item.sop_instance_uid, item)
        else:
            other += 1
    sources = tuple(Source(uid, tuple(items.values())) for uid, items in series.items())
    return Found(sources, other, not_dicom)


def _common(slices: int) -> Dataset:
    """What all images of the phantom share (PS3.3 A.3, CT Image IOD)."""
    at = datetime.now()
    date, time = at.strftime("%Y%m%d"), at.strftime("%H%M%S")
    ds = Dataset()
    ds.SOPClassUID = CTImageStorage
    ds.StudyInstanceUID = generate_uid(prefix=None)
    ds.SeriesInstanceUID = generate_uid(prefix=None)
    ds.FrameOfReferenceUID = generate_uid(prefix=None)
    ds.PositionReferenceIndicator = ""
    ds.PatientName, ds.PatientID = "Phantom^Chest-Abdomen", "DEMO-PHANTOM"
    ds.PatientBirthDate, ds.PatientSex = "", "O"
    ds.StudyID, ds.AccessionNumber, ds.ReferringPhysicianName = "DEMO", "", ""
    ds.StudyDescription = "Denoising demonstration"
    for what in ("Study", "Series", "Acquisition", "Content"):
        setattr(ds, f"{what}Date", date)
        setattr(ds, f"{what}Time", time)
    ds.Modality, ds.BodyPartExamined, ds.PatientPosition = "CT", "CHEST", "HFS"
    ds.SeriesNumber, ds.SeriesDescription = 2, f"Phantom low dose ({DOSE:.0%} of full dose)"
    ds.Manufacturer, ds.ManufacturerModelName = "Simulated scanner", "Parallel-beam simulation"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.AcquisitionNumber, ds.ImagesInAcquisition = 1, slices
    ds.KVP, ds.XRayTubeCurrent, ds.ExposureTime, ds.Exposure = "120", 50, 500, 25
    ds.ConvolutionKernel, ds.FilterType = "SOFT", "BODY"
    ds.ScanOptions, ds.RotationDirection, ds.GantryDetectorTilt = "AXIAL MODE", "CW", "0"
    ds.DataCollectionDiameter = ds.ReconstructionDiameter = f"{MATRIX * PIXEL_MM:g}"
    ds.PixelSpacing = [f"{PIXEL_MM:g}"] * 2
    ds.SliceThickness = ds.SpacingBetweenSlices = f"{SPACING_MM:g}"
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows = ds.Columns = MATRIX
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = f"{_INTERCEPT_HU}", "1", "HU"
    ds.WindowCenter, ds.WindowWidth = "40", "400"
    return ds


def _write(folder: Path, common: Dataset, k: int, plane: Array) -> Outgoing:
    """Write image `k` (from 0, head first) with the HU of `plane`."""
    ds = Dataset(common)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPInstanceUID = generate_uid(prefix=None)
    ds.InstanceNumber = k + 1
    corner_mm = -(MATRIX - 1) / 2 * PIXEL_MM
    z_mm = -k * SPACING_MM  # +z is towards the head (PS3.3 C.7.6.2.1.1)
    ds.ImagePositionPatient = [f"{corner_mm:g}", f"{corner_mm:g}", f"{z_mm:g}"]
    ds.SliceLocation = f"{z_mm:g}"
    ds.PixelData = np.clip(np.rint(plane - _INTERCEPT_HU), 0, _STORED_MAX).astype("<u2").tobytes()
    path = folder / f"{k + 1:04d}.dcm"
    ds.save_as(path, enforce_file_format=True)
    return Outgoing(str(ds.SOPInstanceUID), CTImageStorage, ExplicitVRLittleEndian, path)
