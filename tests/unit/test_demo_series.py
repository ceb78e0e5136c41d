"""The demo's phantom as DICOM, and what it finds in a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from ct_builder import phantom, write_series
from pydicom import dcmread

from demo.series import find_ct, make_phantom
from pipelines.volume import read_volume


def test_the_phantom_is_a_ct_volume_with_noise_and_nothing_else_added(tmp_path: Path) -> None:
    fractions: list[float] = []
    source = make_phantom(tmp_path / "ct", 3, fractions.append)
    assert fractions[-1] == 1
    assert source.truth_hu is not None
    volume = read_volume([item.path for item in source.items])
    assert volume.geometry.spacing_mm == (2.5, 0.8, 0.8)
    hu = volume.hu[::-1]  # read from the feet, made from the head
    body = source.truth_hu > -200
    error = (hu - source.truth_hu)[body]
    assert abs(float(error.mean())) < 0.5
    assert 15 < float(error.std()) < 60
    for item in source.items:
        header = dcmread(item.path, stop_before_pixels=True)
        assert header.SOPInstanceUID == item.sop_instance_uid
        assert header.SeriesInstanceUID == source.series_uid


def test_two_phantoms_are_two_series_of_the_same_voxels(tmp_path: Path) -> None:
    one, two = (make_phantom(tmp_path / name, 2, lambda fraction: None) for name in "ab")
    assert one.series_uid != two.series_uid
    for a, b in zip(one.items, two.items, strict=True):
        assert a.sop_instance_uid != b.sop_instance_uid
        np.testing.assert_array_equal(dcmread(a.path).pixel_array, dcmread(b.path).pixel_array)


def test_a_folder_is_searched_through(tmp_path: Path) -> None:
    one = write_series(tmp_path / "x" / "y", phantom(4, 16), name="one")
    write_series(tmp_path, phantom(2, 16), name="two")
    write_series(tmp_path, phantom(1, 16), name="mr", Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    shutil.copy(one[0], tmp_path / "copy")
    (tmp_path / "readme").write_text("text")
    (tmp_path / "empty").touch()
    (tmp_path / "cut.dcm").write_bytes(one[0].read_bytes()[:140])
    found = find_ct(tmp_path)
    assert sorted(len(source.items) for source in found.sources) == [2, 4]
    assert (found.other_dicom, found.not_dicom) == (1, 3)
