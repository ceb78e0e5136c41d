"""A series over the wire, through the node and into Orthanc, with DCMTK as the scanner."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import require_peer
from ct_builder import phantom, write_series
from node_process import NodeProcess
from peers import Orthanc, dcmsend, orthanc, storescu, wait_for
from pydicom import Dataset, dcmread

pytestmark = pytest.mark.peer

GEOMETRY = (
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "FrameOfReferenceUID",
    "Rows",
    "Columns",
)
IDENTITY = ("PatientID", "PatientName", "StudyInstanceUID", "AccessionNumber", "StudyDate")


def hu(path: Path) -> np.ndarray:
    """HU by the formula of PS3.3 C.11.1.1.2, without any code of the node."""
    ds = dcmread(path)
    return ds.pixel_array.astype(np.float64) * float(ds.RescaleSlope) + float(ds.RescaleIntercept)


def errors(path: Path) -> set[str]:
    """Lines in which dciodvfy finds an error."""
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, timeout=60, check=False)
    said = done.stdout + done.stderr
    assert "CTImage" in said, said
    return {line for line in said.splitlines() if line.startswith("Error")}


def derived_of(pacs: Orthanc, sources: list[Path], folder: Path) -> list[tuple[Path, Path]]:
    """(source, derived) files by position; the derived ones in `folder`, byte for byte as Orthanc gives them out."""
    originals = {tuple(ds.ImagePositionPatient): path for path in sources for ds in [header(path)]}
    known = {header(path).SOPInstanceUID for path in sources}
    folder.mkdir()
    pairs = []
    for uid in (uid for uids in pacs.series().values() for uid in uids if uid not in known):
        path = folder / f"{uid}.dcm"
        path.write_bytes(pacs.file(uid))
        pairs.append((originals[tuple(header(path).ImagePositionPatient)], path))
    return pairs


def header(path: Path) -> Dataset:
    return dcmread(path, stop_before_pixels=True)


def check_derived(pairs: list[tuple[Path, Path]], count: int) -> None:
    assert len(pairs) == count
    assert len({header(path).SOPInstanceUID for _, path in pairs}) == count
    assert len({header(path).SeriesInstanceUID for _, path in pairs}) == 1
    for source_path, derived_path in pairs:
        source, derived = header(source_path), header(derived_path)
        assert derived.SeriesInstanceUID != source.SeriesInstanceUID
        assert derived.ImageType[0] == "DERIVED"
        for keyword in (*GEOMETRY, *IDENTITY):
            assert derived.get(keyword) == source.get(keyword), keyword
        assert errors(derived_path) <= errors(source_path), derived_path


@pytest.mark.parametrize("send", [storescu, dcmsend])
def test_identity_gives_back_every_voxel(tmp_path: Path, send: Callable[..., object]) -> None:
    require_peer("Orthanc", "storescu", "dcmsend", "dciodvfy")
    sources = write_series(tmp_path / "ct", phantom(6))
    with orthanc(tmp_path) as pacs, NodeProcess(tmp_path / "node", pacs.port) as node:
        send(node.port, sources)
        node.wait_jobs("DONE")
        wait_for(lambda: pacs.count() == 6)
        pairs = derived_of(pacs, sources, tmp_path / "derived")
    check_derived(pairs, 6)
    for source, derived in pairs:
        np.testing.assert_array_equal(hu(derived), hu(source))
        assert dcmread(derived).PixelData == dcmread(source).PixelData


@pytest.mark.data
def test_identity_on_a_real_series(tmp_path: Path, ct_series: Callable[[str], list[Path]]) -> None:
    require_peer("Orthanc", "storescu", "dciodvfy")
    sources = ct_series("siemens-sensation10-lungdxA0002-B40f-8mm")
    with orthanc(tmp_path) as pacs, NodeProcess(tmp_path / "node", pacs.port) as node:
        storescu(node.port, sources)
        (job,) = node.wait_jobs("DONE", timeout_s=60)
        assert job["n_in"] == job["n_out"] == len(sources)
        pairs = derived_of(pacs, sources, tmp_path / "derived")
    check_derived(pairs, len(sources))
    for source, derived in pairs:
        np.testing.assert_array_equal(hu(derived), hu(source))
