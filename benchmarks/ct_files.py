"""Series of any length to measure with: a phantom, or the slices of a real series to and fro."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import chain, cycle, islice
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from demo.series import find_ct, make_phantom
from pipelines.body import inside
from pipelines.safety import network_input
from pipelines.volume import open_series, read_volume

PHANTOM_SLICES = 64


def phantom(folder: Path, slices: int) -> list[Path]:
    """Files of a chest-and-abdomen phantom at low dose, 512 × 512, in `folder`."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        make_phantom(source := Path(scratch) / "phantom", min(slices, PHANTOM_SLICES), lambda part: None)
        return repeated(source, folder, slices)


def repeated(source: Path, folder: Path, slices: int) -> list[Path]:
    """Files of a series of `slices` in `folder`, uncompressed: those of the one in `source`, to and fro.

    The first of them are a series by themselves.

    Raises
    ------
    SystemExit
        If `source` does not hold one CT series.
    pipelines.volume.SeriesRefused
        If that is no volume.
    """
    found = find_ct(source).sources
    if len(found) != 1:
        raise SystemExit(f"{source.name} holds {len(found)} CT series: give the folder of one")
    with open_series([item.path for item in found[0].items]) as series:
        files, geometry = series.slice_paths, series.geometry
    step = np.array(geometry.direction[0]) * geometry.spacing_mm[0]
    series_uid, acquisition = generate_uid(), dcmread(files[0], stop_before_pixels=True).get("AcquisitionNumber")
    folder.mkdir()
    paths = []
    for k, path in enumerate(islice(cycle(chain(files, files[-2:0:-1])), slices)):
        ds = dcmread(path)
        if ds.file_meta.TransferSyntaxUID.is_encapsulated:
            ds.decompress()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SeriesInstanceUID, ds.AcquisitionNumber, ds.InstanceNumber = series_uid, acquisition, k + 1
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        place = np.array(geometry.origin_mm) + k * step
        ds.ImagePositionPatient, ds.SliceLocation = [f"{mm:.4f}" for mm in place], f"{place[2]:.4f}"
        paths.append(folder / f"{k:05d}.dcm")
        ds.save_as(paths[-1])
    return paths


def body_part(paths: Sequence[Path]) -> float:
    """Part of the voxels of a series that are body, or so near to it that they are denoised."""
    volume = read_volume(paths)
    pixel_mm = volume.geometry.spacing_mm[1]
    return float(np.mean([inside(network_input(volume.plane(k)), pixel_mm).mean() for k in range(volume.shape[0])]))
