"""What `python -m training simulate` writes goes through the node as a scan of one's own scanner does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import require_peer
from ct_builder import write_series
from node_process import NodeProcess
from numpy.typing import NDArray
from peers import storescp, storescu
from pydicom import Dataset, dcmread

from training.__main__ import main
from training.simulate import unit_noise
from training.sources.phantom import chest_abdomen

pytestmark = pytest.mark.peer

SLICES, SIZE, PIXEL_MM, SPACING_MM = 6, 256, 1.45, 3.0
ROUTES = [
    {
        "name": "scanner",
        "when": {"Modality": "CT", "ImageType": "ORIGINAL"},
        "pipeline": "identity",
        "send_to": ["pacs"],
    },
    {
        "name": "simulated",
        "when": {"Modality": "CT", "SeriesDescription": {"regex": "simulated low dose"}},
        "pipeline": "fast-2.5d",
        "send_to": ["pacs"],
    },
]


def by_place(paths: list[Path]) -> list[Dataset]:
    return sorted((dcmread(path) for path in paths), key=lambda ds: float(ds.ImagePositionPatient[2]))


def hu(images: list[Dataset]) -> NDArray[np.float64]:
    """HU, (z, y, x), by the formula of PS3.3 C.11.1.1.2."""
    return np.stack(
        [ds.pixel_array.astype(float) * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in images]
    )


def test_a_simulated_series_is_routed_denoised_and_delivered(tmp_path: Path) -> None:
    require_peer("storescp", "storescu")
    truth = chest_abdomen(SLICES, SIZE, PIXEL_MM, SPACING_MM, 1)
    scan = np.clip(np.rint(truth + unit_noise(truth, PIXEL_MM, 2)), -1024, 3071)
    scanned = write_series(
        tmp_path / "full", scan, spacing_mm=(SPACING_MM, PIXEL_MM, PIXEL_MM), SeriesDescription="Chest"
    )
    main(["simulate", str(tmp_path / "full"), "--dose", "0.25", "--out", str(tmp_path / "low")])
    simulated = sorted((tmp_path / "low").iterdir())
    with (
        storescp(tmp_path, ae_title="PACS") as pacs,
        NodeProcess(tmp_path / "node", pacs.port, {"routes": ROUTES}) as node,
    ):
        assert storescu(node.port, simulated).returncode == 0
        (job,) = node.wait_jobs("DONE", timeout_s=90)
        assert (job["route"], job["n_in"], job["n_out"]) == ("simulated", SLICES, SLICES)
        arrived = by_place(pacs.files())
    sent = by_place(simulated)
    assert [ds.SourceImageSequence[0].ReferencedSOPInstanceUID for ds in arrived] == [ds.SOPInstanceUID for ds in sent]
    assert {ds.SeriesInstanceUID for ds in arrived} == {job["derived_series_uid"]}
    assert all(ds.SeriesDescription == "Chest simulated low dose 25% denoised" for ds in arrived)
    full, low, denoised = (hu(images) for images in (by_place(scanned), sent, arrived))
    soft = (truth > 0) & (truth < 80)
    errors = [float((image - truth)[soft].std()) for image in (full, low, denoised)]
    assert errors[1] > 1.8 * errors[0]  # a quarter of the dose; how exactly is for the unit tests
    assert errors[2] < 0.8 * errors[1]  # edges between tissues included
