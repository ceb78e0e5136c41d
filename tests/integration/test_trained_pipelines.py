"""The trained networks over the wire: what the PACS holds is less noisy, nearer the truth, and shifted nowhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import require_peer
from ct_builder import write_series
from node_process import NodeProcess
from numpy.typing import NDArray
from peers import orthanc, storescu
from test_wire_to_wire import check_derived, derived_of, header, hu

from pipelines.runtime import WEIGHTS
from training.simulate import low_dose
from training.sources.phantom import chest_abdomen
from training.tissues import tissue_masks

pytestmark = pytest.mark.peer

PIPELINES = [name for name in ("fast-2.5d", "st3d", "quality-2.5d") if (WEIGHTS / f"{name}.json").exists()]
"""The networks that a site is meant to use. The others run by the same code, and a way over the wire takes long."""
SLICES = 10
MATRIX = 320
"""The body is wider; the real series below are whole slices of 512."""
PIXEL_MM = 0.8
SPACING_MM = 2.5
DOSE = 0.25
SEED = 20261120
"""Trained phantoms have small seeds."""
LEAST_GAIN_DB = 3.0
MOST_SHIFT_HU = 1.0


def settings(pipeline: str) -> dict[str, object]:
    return {"routes": [{"name": "ct", "when": {"Modality": "CT"}, "pipeline": pipeline, "send_to": ["pacs"]}]}


def psnr_db(image: NDArray[np.floating], truth: NDArray[np.floating]) -> float:
    """Over the window [-160, 240] HU, clipped: 20·log10(400 / RMSE)."""
    error = np.clip(image, -160, 240) - np.clip(truth, -160, 240)
    return float(20 * np.log10(400 / np.sqrt(np.mean(error**2))))


@pytest.fixture(scope="module")
def truth() -> NDArray[np.float32]:
    return chest_abdomen(SLICES, MATRIX, pixel_mm=PIXEL_MM, spacing_mm=SPACING_MM, seed=SEED)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_quarter_dose_phantom_comes_back_denoised(tmp_path: Path, truth: NDArray[np.float32], pipeline: str) -> None:
    require_peer("Orthanc", "storescu", "dciodvfy")
    noisy = low_dose(truth, PIXEL_MM, DOSE, seed=SEED)
    sources = write_series(tmp_path / "ct", noisy, spacing_mm=(SPACING_MM, PIXEL_MM, PIXEL_MM))
    with orthanc(tmp_path) as pacs, NodeProcess(tmp_path / "node", pacs.port, settings(pipeline)) as node:
        storescu(node.port, sources)
        (job,) = node.wait_jobs("DONE", timeout_s=120)
        pairs = derived_of(pacs, sources, tmp_path / "derived")
    check_derived(pairs, SLICES)
    pairs.sort(key=lambda pair: float(header(pair[0]).ImagePositionPatient[2]))
    before = np.stack([hu(source) for source, _ in pairs])
    after = np.stack([hu(derived) for _, derived in pairs])
    gain_db = psnr_db(after, truth) - psnr_db(before, truth)
    assert gain_db >= LEAST_GAIN_DB
    for tissue, mask in tissue_masks(truth).items():
        shift = float((after[mask] - before[mask]).mean())
        assert abs(shift) < MOST_SHIFT_HU, (tissue, shift)
    assert job["pipeline"] == pipeline


@pytest.mark.data
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_real_series_comes_back_with_less_noise(
    tmp_path: Path, ct_series: Callable[[str], list[Path]], pipeline: str
) -> None:
    require_peer("Orthanc", "storescu", "dciodvfy")
    # A stretch of a noisy thin-slice chest that no training saw.
    sources = ct_series("philips-brilliance16p-lidc0314-chest-1mm")[30:40]
    with orthanc(tmp_path) as pacs, NodeProcess(tmp_path / "node", pacs.port, settings(pipeline)) as node:
        storescu(node.port, sources)
        node.wait_jobs("DONE", timeout_s=120)
        pairs = derived_of(pacs, sources, tmp_path / "derived")
    check_derived(pairs, len(sources))
    changed = [hu(derived) - hu(source) for source, derived in pairs]
    assert float(np.std(changed)) > 1.0
    for source, derived in pairs:
        assert noise_hu(hu(derived)) < 0.8 * noise_hu(hu(source))


def noise_hu(image: NDArray[np.floating]) -> float:
    """Noise in soft tissue from the median |difference of neighbours|, which is 0.6745·√2·σ for white noise."""
    smooth = sum(np.roll(image, (i, j), (0, 1)) for i in range(-3, 4) for j in range(-3, 4)) / 49
    soft = (smooth > 0) & (smooth < 100)
    step = np.abs(np.diff(image, axis=1))[soft[:, :-1]]
    return float(np.median(step) / (np.sqrt(2) * 0.6745))
