"""Make a low-dose series out of a full-dose one.

Reads a CT series, learns kernel and photons of its scanner from the noise of its images, adds the noise that is missing
at the fraction of the dose, and writes a new series of ordinary CT images: a test series of your own scanner. The
images keep name, identity and dates of the patient, as the series stays with you. Method: docs/simulation.md.
"""

from __future__ import annotations

import argparse
import uuid
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.utils import pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
)

from pipelines.ct_slice import read_slice
from pipelines.elements import BadElement, items, numbers, text, texts
from pipelines.volume import SeriesRefused, Volume, pydicom_silent, read_volume
from training.command_line import dose_fraction
from training.simulation.calibration import Calibration, calibrate
from training.simulation.simulated_volume import simulate, unmeasured
from training.sources.layouts import is_dicom

HELP = "make a low-dose series out of a full-dose one"
NAMESPACE = uuid.UUID("0a3d5a86-8c53-4f0e-b7f1-4a5b1b7f7a0e")
"""Made once at random. Never change it: every simulated object would get another identity."""
MANUFACTURER, MODEL = "dicomnode training", "low-dose simulation"
"""In the ContributingEquipmentSequence; not that of the node, which refuses what it derived itself."""
SERIES_NUMBER_OFFSET = 2000
LO_MAX_CHARACTERS = 64
_LOSSY = (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless)
NOT_TRUE_AFTERWARDS = (
    # the dose that was given is not the dose of these images, and the dose of these images was never given
    *("XRayTubeCurrent", "XRayTubeCurrentInuA", "XRayTubeCurrentInmA", "Exposure", "ExposureInuAs", "ExposureInmAs"),
    *("CTDIvol", "EstimatedDoseSaving", "ExposureModulationType"),
    *("ExposuresOnPlate", "ImageAndFluoroscopyAreaDoseProduct", "EntranceDose", "EntranceDoseInmGy"),
    # numbers, pictures and signatures of the pixels that were there
    *("SmallestImagePixelValue", "LargestImagePixelValue", "SmallestPixelValueInSeries", "LargestPixelValueInSeries"),
    *("SmallestValidPixelValue", "LargestValidPixelValue", "HistogramSequence", "IconImageSequence"),
    *("DigitalSignaturesSequence", "MACParametersSequence", "SOPInstanceStatus", "SOPAuthorizationDateTime"),
    *("SOPAuthorizationComment", "AuthorizationEquipmentCertificationNumber"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths", "EncapsulatedPixelDataValueTotalLength"),
    # when and by whom the source was created, and where it is kept
    *("InstanceCreationDate", "InstanceCreationTime", "InstanceCreatorUID"),
    *("RetrieveAETitle", "InstanceAvailability", "RetrieveURL", "RetrieveURI", "RetrieveLocationUID"),
    "ReferencedPerformedProcedureStepSequence",
)
"""Elements that a simulated image does not take over; nor any private one, which may hold copies of all these."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("series", type=Path, metavar="SERIES", help="folder of one CT series at full dose")
    parser.add_argument(
        "--dose", type=dose_fraction, required=True, help="fraction of the dose of SERIES, e.g. 0.25 for a quarter"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="empty or new folder of the new series. Its images keep the patient's data: de-identify before you share",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise; same seed, same images (default: 0)")
    parser.add_argument(
        "--modulation",
        type=float,
        default=0.0,
        metavar="ALPHA",
        help="how the tube current follows the attenuation p of each direction, as exp(ALPHA p): 0 not at all "
        "(default), 0.5 fully",
    )
    parser.add_argument(
        "--poisson",
        action="store_true",
        help="draw counts one reading at a time: slower, and photon starvation makes streaks and bias as in a raw scan",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Simulate and write."""
    if args.out.exists() and any(args.out.iterdir()):
        raise SystemExit(f"{args.out} is not empty: name a new folder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        volume = read_series(args.series)
        found = calibrate(volume, args.seed, args.modulation, device)
    except (SeriesRefused, ValueError) as error:
        raise SystemExit(f"{args.series}: {error}") from error
    print(describe(found))
    hu = simulate(volume, args.dose, args.seed, found, args.poisson, device)
    made = f"{args.dose!r},{args.seed},{args.poisson},{found.kernel},{found.beam},{found.current}"
    paths = write_series(volume, hu, args.dose, made, args.out)
    print(f"{len(paths)} images at {args.dose:.4g} of the dose in {args.out}")


def describe(found: Calibration) -> str:
    """What was found out about the scanner, one line."""
    fitted = f", {found.tiles} tiles, difference {found.residual:.1%}" if found.tiles else ""
    return (
        f"noise {found.noise_hu:.1f} HU; kernel f50 {found.kernel.f50:.3f}/mm, boost {found.kernel.boost:.2f} "
        f"(from {found.kernel_from}{fitted}); {found.beam.n0:.3g} photons per mm and degree; thickness/increment "
        f"{found.overlap:.2f}; current {min(found.current):.2f} to {max(found.current):.2f}"
    )


def is_simulated(path: Path) -> bool:
    """Was this image written by `write_series`? Its ContributingEquipmentSequence tells (PS3.3 C.12.1).

    Raises
    ------
    pipelines.elements.BadElement
        If that sequence cannot be read.
    """
    with pydicom_silent():
        ds = dcmread(path, stop_before_pixels=True, specific_tags=["ContributingEquipmentSequence"])
        return any(
            (text(item, "Manufacturer"), text(item, "ManufacturerModelName")) == (MANUFACTURER, MODEL)
            for item in items(ds, "ContributingEquipmentSequence")
        )


def read_series(folder: Path) -> Volume:
    """The one CT series in `folder` and below; what is no DICOM file at all is passed over.

    Raises
    ------
    pipelines.volume.SeriesRefused
        If these files are no series that may be processed.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return read_volume([path for path in paths if is_dicom(path)])


def write_series(volume: Volume, hu: NDArray[np.float32], dose: float, made: str, out: Path) -> list[Path]:
    """Write `hu` as a CT series beside that of `volume`, one file a slice, Explicit VR Little Endian.

    Parameters
    ----------
    volume
        The source; its files are read again.
    hu
        The simulated HU, (z, y, x).
    dose
        Fraction of full dose, for the descriptions.
    made
        All that decided the noise: another text gives other UIDs, the same text the same.
    out
        Folder; made if missing.

    Returns
    -------
    list of Path
        In the order of the slices.

    Raises
    ------
    pipelines.volume.SeriesRefused
        If a file is not what was read as `volume` any more.
    """
    out.mkdir(parents=True, exist_ok=True)
    kept = unmeasured(volume)
    paths = []
    for k, source in enumerate(volume.slice_paths):
        with pydicom_silent():
            ds = _image(source, volume.slice_uids[k], hu[k], kept[k], dose, made)
            path = out / f"{k + 1:04d}.dcm"
            dcmwrite(path, ds, enforce_file_format=True)
        paths.append(path)
    return paths


def _image(source: Path, uid: str, hu: NDArray[np.float32], kept: NDArray[np.bool_], dose: float, made: str) -> Dataset:
    one = read_slice(source)
    ds = dcmread(source)
    if one.sop_instance_uid != uid or ds.SOPClassUID != CTImageStorage:
        raise SeriesRefused("undecodable", f"the file of {uid} was replaced while it was being read")
    stored = pixel_array(ds)
    bits = int(ds.BitsStored)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if ds.PixelRepresentation else (0, (1 << bits) - 1)
    values = np.clip(np.rint((hu.astype(np.float64) - one.intercept) / one.slope), low, high)
    if one.padding is not None:  # a measured value is never one that means "no measurement"
        first, last = one.padding
        beside = last + 1 if first <= low else first - 1
        values[(values >= first) & (values <= last)] = beside
    pixels = np.where(kept, stored, values.astype(stored.dtype))

    if ds.file_meta.TransferSyntaxUID in _LOSSY:
        ds.LossyImageCompression = "01"
    _drop_untrue(ds)
    _say(ds, one.series_uid, uid, dose, made)
    encoded = pixels.astype(stored.dtype.newbyteorder("<")).tobytes()
    ds.PixelData = encoded + b"\0" * (len(encoded) % 2)
    ds["PixelData"].VR = "OW" if ds.BitsAllocated > 8 else "OB"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return ds


def _drop_untrue(ds: Dataset) -> None:
    """Remove what the new pixels make false."""
    ds.remove_private_tags()
    for keyword in NOT_TRUE_AFTERWARDS:
        if keyword in ds:
            delattr(ds, keyword)
    for group in range(0x6000, 0x6100, 2):
        # an overlay without data of its own lies in unused bits of the pixels (retired, PS3.3 C.9.2), where it is gone
        if (group, 0x3000) not in ds:
            for tag in [tag for tag in ds.keys() if tag.group == group]:
                del ds[tag]


def _say(ds: Dataset, series_uid: str, uid: str, dose: float, made: str) -> None:
    """Say in the header what the image is."""
    ds.SOPInstanceUID = _uid(uid, made)
    ds.SeriesInstanceUID = _uid(series_uid, made)
    suffix = f"simulated low dose {100 * dose:.3g}%"
    before = text(ds, "SeriesDescription")[: LO_MAX_CHARACTERS - len(suffix) - 1].rstrip()
    ds.SeriesDescription = f"{before} {suffix}".strip()
    try:
        number = int((numbers(ds, "SeriesNumber", 1) or (0,))[0])
    except BadElement:
        number = 0
    ds.SeriesNumber = SERIES_NUMBER_OFFSET + max(number, 0)
    # PRIMARY: a stage of the examination's own images. SECONDARY would say that it is no slice for a viewer or a node
    ds.ImageType = ["DERIVED", "PRIMARY", *(texts(ds, "ImageType")[2:] or ["AXIAL"])]
    ds.DerivationDescription = (
        f"Low-dose simulation: noise added to what the fraction {dose:.4g} of the original dose would have given. "
        "Never acquired at that dose; exposure and dose of the original acquisition are left out."
    )
    _append(ds, "DerivationCodeSequence", _code("113042", "Pixel by pixel addition"))
    source = Dataset()
    source.ReferencedSOPClassUID = ds.SOPClassUID
    source.ReferencedSOPInstanceUID = uid
    source.SpatialLocationsPreserved = "YES"
    source.PurposeOfReferenceCodeSequence = Sequence([_code("121322", "Source image for image processing operation")])
    ds.SourceImageSequence = Sequence([source])
    equipment = Dataset()
    equipment.Manufacturer = MANUFACTURER
    equipment.ManufacturerModelName = MODEL
    equipment.ContributionDescription = "Low-dose simulation"
    equipment.PurposeOfReferenceCodeSequence = Sequence([_code("109102", "Processing Equipment")])
    _append(ds, "ContributingEquipmentSequence", equipment)


def _append(ds: Dataset, keyword: str, item: Dataset) -> None:
    setattr(ds, keyword, Sequence([*items(ds, keyword), item]))


def _code(value: str, meaning: str) -> Dataset:
    """A coded concept of the DICOM Controlled Terminology (PS3.16 annex D)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item


def _uid(source_uid: str, made: str) -> UID:
    """The same source made in the same way is the same object (PS3.5 B.2)."""
    return UID(f"2.25.{uuid.uuid5(NAMESPACE, f'{source_uid},{made}').int}")
