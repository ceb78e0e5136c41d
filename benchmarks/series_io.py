"""Reading and writing of a series: pydicom's way against ours, in interleaved rounds.

    python benchmarks/series_io.py [--slices 300] [--rounds 5] [--folder FOLDER]

The series is made in a temporary folder (in FOLDER, else where the system has its own): 512 x 512, headers of some 100
elements with private ones and sequences, uncompressed. Syncs are left out on both sides and timed apart. All on one
thread; besides the wall, which other programs stretch, the processor time of that thread is shown, and the ratios are
of that. On ext4 wait some minutes before the next run, or name another FOLDER: for so long each new file looks at the
places of those deleted here, which costs up to 0.5 ms.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from machine import description
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from dicomnode import derive
from dicomnode.config import Derivation
from dicomnode.derive import SeriesWriter
from dicomnode.derived_header import Making
from dicomnode.proof import Meant
from dicomnode.spool import sync_folder, write_durably
from pipelines import ct_slice, element_index
from pipelines.base import Options, load
from pipelines.ct_slice import CTSlice, read_slice
from pipelines.element_index import ElementIndex
from pipelines.volume import Volume, read_volume

BAR = 0.15
SIZE = 512


def header(k: int, series_uid: str, study_uid: str) -> Dataset:
    """Header of slice `k`, with the elements that a scanner writes, private ones and sequences among them."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study_uid, series_uid, study_uid + ".1"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"]
    ds.SpecificCharacterSet, ds.PatientName, ds.PatientID = "ISO_IR 100", "Phantom^Synthetic", "PHANTOM-1"
    for keyword in (
        *("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "InstanceCreationDate"),
        *("PatientBirthDate", "PerformedProcedureStepStartDate"),
    ):
        setattr(ds, keyword, "20240101")
    for keyword in ("StudyTime", "SeriesTime", "AcquisitionTime", "ContentTime", "InstanceCreationTime"):
        setattr(ds, keyword, f"1200{k % 60:02d}.{k:06d}")
    for keyword in (
        *("StudyDescription", "SeriesDescription", "ProtocolName", "InstitutionName", "StationName", "Manufacturer"),
        *("ManufacturerModelName", "DeviceSerialNumber", "SoftwareVersions", "AccessionNumber", "StudyID"),
        *("InstitutionalDepartmentName", "RequestedProcedureDescription", "PatientComments", "FilterType"),
        *("PerformedProcedureStepID", "PerformedProcedureStepDescription", "RequestedProcedureID"),
        *("ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName", "ConvolutionKernel"),
    ):
        setattr(ds, keyword, "Thorax 1.0")
    ds.Modality, ds.PatientPosition, ds.BodyPartExamined, ds.RotationDirection = "CT", "HFS", "CHEST", "CW"
    ds.PatientSex, ds.PatientAge, ds.PatientWeight, ds.ExposureModulationType = "O", "060Y", "70", "XYZ_EC"
    for keyword in (
        *("KVP", "DataCollectionDiameter", "ReconstructionDiameter", "DistanceSourceToDetector", "TableHeight"),
        *("DistanceSourceToPatient", "FocalSpots", "SingleCollimationWidth", "TotalCollimationWidth"),
        *("TableSpeed", "TableFeedPerRotation", "SpiralPitchFactor", "CTDIvol", "ExposureInuAs"),
    ):
        setattr(ds, keyword, 120)
    ds.XRayTubeCurrent, ds.Exposure, ds.ExposureTime, ds.GantryDetectorTilt = 40 + k % 50, 30, 500, "0"
    ds.SeriesNumber, ds.AcquisitionNumber, ds.InstanceNumber = 3, 1, k + 1
    ds.ImagePositionPatient, ds.SliceLocation = ["-170.5", "-170.5", f"{-100 + k:g}"], f"{-100 + k:g}"
    ds.ImageOrientationPatient, ds.PixelSpacing, ds.SliceThickness = [1, 0, 0, 0, 1, 0], ["0.6640625"] * 2, "1"
    ds.WindowCenter, ds.WindowWidth = ["40", "-600"], ["400", "1200"]
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "-1024", "1", "HU"
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.Rows = ds.Columns = SIZE
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.ProcedureCodeSequence = Sequence([_code("CTTHX")])
    ds.RequestAttributesSequence = Sequence([_code("REQ")])
    ds.ReferencedImageSequence = Sequence([_reference(study_uid + ".2"), _reference(study_uid + ".3")])
    ds.ReferencedStudySequence = Sequence([_reference(study_uid)])
    ds["ReferencedStudySequence"].is_undefined_length = True
    for group, creator in ((0x0019, "VENDOR CT ACQ"), (0x0029, "VENDOR CSA"), (0x0043, "VENDOR PARM")):
        block = ds.private_block(group, creator, create=True)
        for number in range(1, 7):
            block.add_new(number, "LO", f"value {number}")
        block.add_new(0x10, "OB", bytes(range(256)) * 4)
    return ds


def _code(value: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "99LOCAL", f"meaning of {value}"
    return item


def _reference(uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, uid
    return item


def make_series(folder: Path, slices: int) -> list[Path]:
    """Files of a series of noise."""
    noise = np.random.default_rng(0).integers(900, 1200, (SIZE, SIZE)).astype("<u2")
    series_uid, study_uid = generate_uid(), generate_uid(None)[:50].rstrip(".")
    paths = []
    for k in range(slices):
        ds = header(k, series_uid, study_uid)
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.PixelData = np.roll(noise, k, axis=1).tobytes()
        paths.append(folder / f"{k:04d}.dcm")
        ds.save_as(paths[-1], enforce_file_format=True)
    return paths


class Clock:
    """Seconds of each step of one round: on the wall, and of this thread's processor time."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}

    def timed(self, name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        """`act`, which adds its time under `name`."""

        def act_timed(*arguments: Any, **named: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return act(*arguments, **named)
            finally:
                before = self.seconds.get(name, (0.0, 0.0))
                after = time.perf_counter() - wall, time.thread_time() - cpu
                self.seconds[name] = before[0] + after[0], before[1] + after[1]

        return act_timed

    def add(self, name: str, steps: tuple[str, ...]) -> None:
        """A step that consists of others."""
        parts = [self.seconds[step] for step in steps]
        self.seconds[name] = sum(part[0] for part in parts), sum(part[1] for part in parts)


def read_round(paths: list[Path], arrays: tuple[NDArray[Any], NDArray[Any], NDArray[Any]]) -> Clock:
    """Each way of reading once; `arrays` are for stored values, HU and padding."""
    stored, hu, padding = arrays
    clock = Clock()

    def by_pydicom() -> None:
        for k, path in enumerate(paths):
            stored[k] = dcmread(path).pixel_array

    def ours() -> None:
        for k, path in enumerate(paths):
            stored[k] = read_slice(path).stored()

    def ours_in_hu() -> None:
        for k, path in enumerate(paths):
            read_slice(path).read_hu(hu[k], padding[k])

    clock.timed(READ_BY_PYDICOM, by_pydicom)()
    forget()
    clock.timed(READ, ours)()
    forget()
    clock.timed(READ_HU, ours_in_hu)()
    return clock


def forget() -> None:
    """What was learnt from files read before: a series comes once."""
    element_index._layouts.clear()
    ct_slice._accepted = ()


def write_round(volume: Volume, datasets: list[Dataset], made: Making, folder: Path) -> Clock:
    """Each way of writing once, without syncs; then the syncs alone.

    Each file is emptied before the next is written: memory that the system had not given out yet would cost more. None
    is deleted: ext4 shuns inodes of files deleted just before, and looks at each of them first.
    """
    clock = Clock()
    fsync = os.fsync
    forget()
    with ExitStack() as patched:
        patched.enter_context(mock.patch("os.fsync", _no_sync))
        for k, ds in enumerate(datasets):
            clock.timed(SAVE_AS, ds.save_as)(folder / f"{k}.dcm")
            os.truncate(folder / f"{k}.dcm", 0)
        with SeriesWriter(volume, made, folder) as writer:
            meant = [
                writer._meant(path, (uid,), volume.plane(k), volume.hu[k] + np.float32(3))
                for k, (path, uid) in enumerate(zip(volume.slice_paths, volume.slice_uids, strict=True))
            ]
            for path, (source, what) in zip(volume.slice_paths, meant, strict=True):
                target = folder / f"{what.sop_instance_uid}.dcm"
                clock.timed(WRITE, _write)(writer, path, source, what, target)
                os.truncate(target, 0)
            del meant
        for name in ("_read", "derived_pixels", "prove", "prove_by_pydicom"):
            patched.enter_context(mock.patch.object(derive, name, clock.timed(name, getattr(derive, name))))
        stored = clock.timed("stored", CTSlice.stored)
        patched.enter_context(mock.patch.object(CTSlice, "stored", lambda *arguments: stored(*arguments)))
        with SeriesWriter(volume, made, folder) as writer:
            for k, hu in enumerate(volume.hu):
                one = clock.timed(ALL, writer._derive)(k, volume.plane(k), hu + np.float32(3))
                os.truncate(one.path, 0)
    content = volume.slice_paths[0].read_bytes()
    for _ in datasets:
        clock.timed(DIGEST, hashlib.sha256)(content)
        with (folder / "synced.dcm").open("wb") as file:
            file.write(content)
            file.flush()
            clock.timed(SYNC, fsync)(file.fileno())
    clock.timed(SYNC, sync_folder)(folder)
    clock.add(SOURCE, ("_read", "stored"))
    clock.add(ROUND, ("derived_pixels",))
    clock.add(PROVE, ("prove", "prove_by_pydicom"))
    return clock


def _write(writer: SeriesWriter, path: Path, source: ElementIndex | None, meant: Meant, target: Path) -> None:
    parts, _ = writer._encode(path, source, meant)
    write_durably(target, parts)


def _no_sync(handle: int) -> None:
    pass  # a mock object would take longer than what it stands for


def derived(path: Path) -> Dataset:
    """What `save_as` writes: the slice under another UID."""
    ds = dcmread(path)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    ds.PixelData = bytes(ds.PixelData)
    return ds


READ_BY_PYDICOM, READ, READ_HU = (
    "read: dcmread().pixel_array",
    "read: ours, stored values",
    "read: ours, HU and padding",
)
SAVE_AS, WRITE = "write: save_as", "write: ours, header and file"
SOURCE, ROUND, PROVE = "… read the source again", "… HU to stored values", "… prove (without reading back)"
DIGEST, ALL, SYNC = "… of that SHA-256", "… all of a slice, with reading back", "syncs of the files and the folder"
BASES = {READ: READ_BY_PYDICOM, READ_HU: READ_BY_PYDICOM} | dict.fromkeys(
    (WRITE, SOURCE, ROUND, PROVE, DIGEST, ALL, SYNC), SAVE_AS
)
BARRED = (READ, WRITE)


def table(rounds: list[Clock]) -> str:
    """Medians over the rounds."""
    lines = ["| step | wall s [least] | CPU s | CPU ratio | bar |", "| --- | --- | --- | --- | --- |"]
    for name in (READ_BY_PYDICOM, READ, READ_HU, SAVE_AS, WRITE, SOURCE, ROUND, PROVE, DIGEST, ALL, SYNC):
        walls = [clock.seconds[name][0] for clock in rounds]
        cpu = statistics.median(clock.seconds[name][1] for clock in rounds)
        ratio = verdict = ""
        if name in BASES:
            part = cpu / statistics.median(clock.seconds[BASES[name]][1] for clock in rounds)
            ratio = f"{part:.3f}"
            if name in BARRED:
                verdict = f"{BAR}: {'met' if part <= BAR else 'missed'}"
        lines.append(
            f"| {name} | {statistics.median(walls):.3f} [{min(walls):.3f}] | {cpu:.3f} | {ratio} | {verdict} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make the series (default: the system's temporary folder)")
    arguments = parser.parse_args()
    made = Making(load("identity").card, Options(), "cafe", "f00d", Derivation(), datetime(2026, 1, 1, tzinfo=UTC))
    rounds = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        (source := Path(scratch) / "source").mkdir()
        paths = make_series(source, arguments.slices)
        stored = np.empty((len(paths), SIZE, SIZE), np.uint16)
        hu, padding = np.empty(stored.shape, np.float32), np.zeros(stored.shape, np.bool_)
        volume, datasets = read_volume(paths), [derived(path) for path in paths]
        gc.collect()
        gc.freeze()  # hundreds of data sets: whoever's turn it is would pay for looking through them
        for count in range(arguments.rounds + 1):
            (folder := Path(scratch) / str(count)).mkdir()
            clock = read_round(paths, (stored, hu, padding))
            clock.seconds |= write_round(volume, datasets, made, folder).seconds
            rounds.append(clock)
        elements = len(dcmread(paths[0], stop_before_pixels=True))
    print(description(1))
    print(f"{len(paths)} slices, {elements} elements each, {arguments.rounds} rounds after one not counted, medians")
    print(table(rounds[1:]))


if __name__ == "__main__":
    main()
