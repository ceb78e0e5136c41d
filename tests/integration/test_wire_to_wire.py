"""A series over the wire, through the node and into Orthanc, with DCMTK as the scanner."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from io import BytesIO
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


def hu(ds: Dataset) -> np.ndarray:
    """HU by the formula of PS3.3 C.11.1.1.2, without any code of the node."""
    return ds.pixel_array.astype(np.float64) * float(ds.RescaleSlope) + float(ds.RescaleIntercept)


def errors(path: Path) -> set[str]:
    """Lines in which dciodvfy finds an error."""
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, timeout=60, check=False)
    return {line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")}


def derived_of(pacs: Orthanc, sources: list[Path]) -> list[tuple[Dataset, Dataset]]:
    """(source, derived) pairs by position, the derived ones as Orthanc holds them."""
    originals = {tuple(ds.ImagePositionPatient): ds for ds in map(dcmread, sources)}
    known = {ds.SOPInstanceUID for ds in originals.values()}
    derived = [dcmread(BytesIO(pacs.file(uid))) for uids in pacs.series().values() for uid in uids if uid not in known]
    return [(originals[tuple(ds.ImagePositionPatient)], ds) for ds in derived]


def check_derived(pairs: list[tuple[Dataset, Dataset]], count: int, tmp_path: Path) -> None:
    assert len(pairs) == count
    assert len({ds.SOPInstanceUID for _, ds in pairs}) == count
    assert len({ds.SeriesInstanceUID for _, ds in pairs}) == 1
    for source, derived in pairs:
        assert derived.SeriesInstanceUID != source.SeriesInstanceUID
        assert derived.ImageType[0] == "DERIVED"
        for keyword in (*GEOMETRY, *IDENTITY):
            assert derived.get(keyword) == source.get(keyword), keyword
    source, derived = pairs[0]
    source_path, derived_path = tmp_path / "source.dcm", tmp_path / "derived.dcm"
    source.save_as(source_path)
    derived.save_as(derived_path)
    assert errors(derived_path) <= errors(source_path)


@pytest.mark.parametrize("send", [storescu, dcmsend])
def test_identity_gives_back_every_voxel(tmp_path: Path, send: Callable[..., object]) -> None:
    require_peer("Orthanc", "storescu", "dcmsend", "dciodvfy")
    sources = write_series(tmp_path / "ct", phantom(6))
    with orthanc(tmp_path) as pacs, NodeProcess(tmp_path / "node", pacs.port) as node:
        send(node.port, sources)
        node.wait_jobs("DONE")
        wait_for(lambda: pacs.count() == 6)
        pairs = derived_of(pacs, sources)
    check_derived(pairs, 6, tmp_path)
    for source, derived in pairs:
        np.testing.assert_array_equal(hu(derived), hu(source))
        assert derived.PixelData == source.PixelData


@pytest.mark.data
def test_identity_on_a_real_series(tmp_path: Path, ct_series: Callable[[str], list[Path]]) -> None:
    require_peer("Orthanc", "storescu", "dciodvfy")
    sources = ct_series("siemens-sensation10-lungdxA0002-B40f-8mm")
    with orthanc(tmp_path) as pacs, NodeProcess(tmp_path / "node", pacs.port) as node:
        storescu(node.port, sources)
        (job,) = node.wait_jobs("DONE", timeout_s=60)
        assert job["n_in"] == job["n_out"] == len(sources)
        pairs = derived_of(pacs, sources)
    check_derived(pairs, len(sources), tmp_path)
    for source, derived in pairs:
        np.testing.assert_array_equal(hu(derived), hu(source))
