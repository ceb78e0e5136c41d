"""A voxel that changes must change the UIDs: the output of our networks is fixed until the revision is raised."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import golden_output
import numpy as np
import pytest
from ct_builder import write_series
from golden_output import EXECUTION, PIPELINES, SPACING_MM, compare, golden, output_hu, source_hu, write

from pipelines import base, noise, safety, scaling
from pipelines.volume import read_volume


@pytest.mark.parametrize("name", PIPELINES)
def test_output_is_what_this_revision_promises(name: str) -> None:
    pipeline = base.load(name, EXECUTION)
    compare(pipeline.card, output_hu(pipeline))


def test_the_series_reaches_what_can_move_a_voxel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding, metal, and enough soft tissue to measure the noise in."""
    volume = read_volume(write_series(tmp_path, source_hu(), spacing_mm=SPACING_MM))
    assert (volume.padding == (volume.hu == -2048)).all()
    assert 0.2 < volume.padding.mean() < 0.3
    assert (volume.hu[~volume.padding] > safety.METAL_HU).sum() >= 5
    assert noise.noise_level(volume.hu, volume.padding, SPACING_MM[1]) == pytest.approx(25, rel=0.1)
    monkeypatch.setattr(noise, "_mode", lambda sd: -1.0)
    assert noise.noise_level(volume.hu, volume.padding, SPACING_MM[1]) == -1.0


@pytest.mark.parametrize(
    ("name", "module", "constant", "value"),
    [
        ("st3d", safety, "LOW_FREQUENCY_MM", 1.49),
        ("st3d", safety, "METAL_MARGIN_PX", 2),
        ("st3d", safety, "AIR_HU", -999.0),
        ("st3d", scaling, "HU_PER_UNIT", 1001.0),
        ("fast-2.5d", noise, "WINDOW_MM", 8.5),
        ("fast-2.5d", noise, "_BINS", 110),
    ],
)
def test_a_small_change_of_the_code_shows(
    monkeypatch: pytest.MonkeyPatch, name: str, module: ModuleType, constant: str, value: float
) -> None:
    monkeypatch.setattr(module, constant, value)
    pipeline = base.load(name, EXECUTION)
    with pytest.raises(AssertionError, match="raise VOXEL_REVISION"):
        compare(pipeline.card, output_hu(pipeline))


def test_what_is_written_down_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden_output, "FOLDER", tmp_path)
    pipeline = base.load("fast-2.5d", EXECUTION)
    with pytest.raises(AssertionError, match=r"run python tests/golden_output\.py"):
        compare(pipeline.card, source_hu())
    np.savez_compressed(golden(pipeline.card), hu=source_hu())
    with pytest.raises(AssertionError, match="raise VOXEL_REVISION"):
        write(pipeline)
    monkeypatch.setattr(base, "VOXEL_REVISION", base.VOXEL_REVISION + 1)
    write(pipeline)
    assert [path.name for path in tmp_path.iterdir()] == [golden(pipeline.card).name]
    compare(pipeline.card, output_hu(pipeline))
