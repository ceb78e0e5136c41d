"""Synthetic CT series that pass dciodvfy, for tests that need DICOM files with known HU.

>>> files = write_series(tmp_path, hu)                                   # hu: (z, y, x)
>>> write_series(tmp_path, hu, ConvolutionKernel="B70f")                 # any keyword, for every slice
>>> write_series(tmp_path, hu, AcquisitionNumber=lambda k: 1 + k // 4)   # ... by slice index
>>> write_series(tmp_path, hu, ImageType=None)                           # ... left out
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

_NAMESPACE = uuid.UUID("6f1d0d52-1f6c-4c2b-9d0f-0f5a0c3c7e11")


def uid(*what: object) -> str:
    """A UUID-derived UID (PS3.5 B.2) that depends on `what` alone."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, '/'.join(map(str, what))).int}"


def phantom(slices: int = 8, size: int = 64, *, noise_hu: float = 15.0, seed: int = 0) -> NDArray[np.int16]:
    """Whole HU values (slices, size, size): a soft-tissue body with lung, fat and bone in air, plus white noise."""
    y, x = np.mgrid[:size, :size] / (size - 1) * 2 - 1
    plane = np.full((size, size), -1000.0)
    plane[x**2 + y**2 < 0.85**2] = -100  # fat
    plane[x**2 + y**2 < 0.75**2] = 45  # soft tissue
    plane[((x + 0.35) / 0.25) ** 2 + (y / 0.4) ** 2 < 1] = -850  # lung
    plane[((x - 0.35) / 0.2) ** 2 + (y / 0.2) ** 2 < 1] = 700  # bone
    noise = np.random.default_rng(seed).normal(0, noise_hu, (slices, size, size))
    return np.asarray(np.clip(np.rint(plane + noise), -1024, 3071), dtype=np.int16)


def write_series(
    folder: Path,
    hu: NDArray[Any],
    *,
    name: str = "series",
    spacing_mm: tuple[float, float, float] = (2.0, 0.7, 0.7),
    origin_mm: tuple[float, float, float] = (-22.0, -22.0, -100.0),
    orientation: tuple[float, float, float, float, float, float] = (1, 0, 0, 0, 1, 0),
    step: tuple[float, float, float] = (0, 0, 1),
    slope: float = 1.0,
    intercept: float = -1024.0,
    signed: bool = True,
    transfer_syntax: str = ExplicitVRLittleEndian,
    **overrides: Any,
) -> list[Path]:
    """Write `hu` as single-frame CT images of one series; the same arguments give the same bytes.

    Parameters
    ----------
    folder
        Where ``{name}-0000.dcm``, … go; made if absent.
    hu
        HU, (z, y, x); ``(hu - intercept) / slope`` is rounded and must fit 16 bits.
    name
        Names the series; every UID but the study's and the frame of reference's comes from it.
    spacing_mm, origin_mm
        Spacing (z, y, x) and the position of voxel (0, 0, 0), LPS.
    orientation, step
        ImageOrientationPatient, and the unit vector in which the slices advance: differs from the slice normal
        for a tilted gantry.
    slope, intercept, signed
        Rescale and PixelRepresentation, for all slices. RescaleSlope and RescaleIntercept as `overrides` change
        the header only, as a broken file would have it.
    transfer_syntax
        Explicit VR Little Endian, or any that pydicom encodes.
    **overrides
        Keyword of an element → value for every slice, a function of the slice index, or None to leave it out.

    Returns
    -------
    list of Path
        One file per slice, in the order of axis 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<i2" if signed else "<u2")
    stored = np.rint((np.asarray(hu, dtype=np.float64) - intercept) / slope)
    limits = np.iinfo(dtype)
    if stored.min() < limits.min or stored.max() > limits.max:
        raise ValueError(f"stored values {stored.min():.0f} to {stored.max():.0f} do not fit {dtype}")
    paths = []
    for k, plane in enumerate(stored.astype(dtype)):
        ds = _image(name, k, plane)
        position = np.asarray(origin_mm) + k * spacing_mm[0] * np.asarray(step)
        ds.PixelSpacing = [_ds(v) for v in spacing_mm[1:]]
        ds.SliceThickness = _ds(spacing_mm[0])
        ds.ImagePositionPatient = [_ds(v) for v in position]
        ds.ImageOrientationPatient = [_ds(v) for v in orientation]
        ds.RescaleIntercept, ds.RescaleSlope = _ds(intercept), _ds(slope)
        ds.PixelRepresentation = int(signed)
        for keyword, value in overrides.items():
            _override(ds, keyword, value(k) if callable(value) else value)
        path = folder / f"{name}-{k:04d}.dcm"
        if transfer_syntax != ExplicitVRLittleEndian:
            ds.compress(transfer_syntax, generate_instance_uid=False)
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def edit(path: Path, change: Callable[[Dataset], None]) -> None:
    """Change one file in place."""
    ds = dcmread(path)
    change(ds)
    ds.save_as(path, enforce_file_format=True)


def _ds(value: float) -> str:
    """A decimal string of at most 16 characters (PS3.5 6.2, DS)."""
    return f"{value:.10g}"


def _override(ds: Dataset, keyword: str, value: Any) -> None:
    if value is not None:
        setattr(ds, keyword, value)
    elif keyword in ds:
        delattr(ds, keyword)


def _image(name: str, k: int, plane: NDArray[Any]) -> Dataset:
    """One CT image (PS3.3 A.3) without geometry and rescale."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = CTImageStorage
    ds.SOPInstanceUID = uid(name, "instance", k)
    ds.StudyInstanceUID = uid("study")
    ds.SeriesInstanceUID = uid(name)
    ds.FrameOfReferenceUID = uid("frame of reference")
    ds.PositionReferenceIndicator = ""
    # patient and study; Type 2 elements are there but empty
    ds.PatientName, ds.PatientID = "Phantom^Synthetic", "PHANTOM-1"
    ds.PatientBirthDate = ds.PatientSex = ""
    ds.StudyDate, ds.StudyTime, ds.StudyID = "20240101", "120000", "1"
    ds.AccessionNumber = ds.ReferringPhysicianName = ""
    # series and equipment
    ds.Modality, ds.SeriesNumber, ds.SeriesDescription = "CT", 3, "Chest low dose"
    ds.PatientPosition, ds.BodyPartExamined = "HFS", "CHEST"
    ds.Manufacturer, ds.ManufacturerModelName = "Synthetic", "Phantom"
    # acquisition
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.ContentDate, ds.ContentTime = "20240101", "120001"
    ds.AcquisitionDate, ds.AcquisitionTime = "20240101", "120000"
    ds.AcquisitionNumber, ds.InstanceNumber = 1, k + 1
    ds.KVP, ds.XRayTubeCurrent, ds.ExposureTime = "120", 40, 500
    ds.ConvolutionKernel = "STANDARD"
    # pixels
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = plane.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.RescaleType = "HU"
    ds.WindowCenter, ds.WindowWidth = "40", "400"
    ds.PixelData = plane.tobytes()
    return ds
