"""Where a slice shows the patient: against SciPy's morphology, and on shapes whose place is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from pipelines.body import BLOCK_PX, MARGIN_MM, box, inside, span
from pipelines.safety import network_input
from pipelines.testing import water_volume
from pipelines.volume import Plane, Volume

SIZE = 256
PIXEL_MM = 1.0
Y, X = np.mgrid[:SIZE, :SIZE]


def disc(y: float, x: float, radius: float) -> np.ndarray:
    return (Y - y) ** 2 + (X - x) ** 2 < radius**2


BODY = disc(120, 128, 70)
LUNG = disc(120, 100, 30)
TABLE = (Y >= 222) & (Y < 232)


def given(body: np.ndarray, lung: np.ndarray | None = None, noise_hu: float = 0.0) -> np.ndarray:
    hu = np.where(body, 40.0, -1000.0)
    if lung is not None:
        hu[lung] = -1000.0
    hu += np.random.default_rng(0).normal(0, noise_hu, hu.shape)
    return np.maximum(hu, -1024).astype(np.float32)


@pytest.mark.parametrize("noise_hu", [0.0, 150.0])
def test_the_body_with_its_lungs_is_inside_and_distant_air_and_table_are_not(noise_hu: float) -> None:
    mask = inside(given(BODY | TABLE, LUNG, noise_hu), PIXEL_MM)
    assert mask[BODY].all()
    reach = MARGIN_MM + 3 * BLOCK_PX  # of what blocks round off, and of the margin
    assert not mask[ndimage.distance_transform_edt(~BODY) > reach].any()
    assert mask[ndimage.distance_transform_edt(~BODY) < MARGIN_MM / 2].all()


def test_a_hollow_phantom_is_inside_as_a_whole() -> None:
    shell = disc(120, 128, 90) & ~disc(120, 128, 80)
    assert inside(given(shell), PIXEL_MM)[disc(120, 128, 90)].all()


def test_air_alone_and_padding_are_outside() -> None:
    assert not inside(given(np.zeros((SIZE, SIZE), np.bool_), noise_hu=100.0), PIXEL_MM).any()
    hu = np.full((61, 47), -3024.0, np.float32)
    assert not inside(network_input(Plane(hu, np.ones(hu.shape, np.bool_))), PIXEL_MM).any()


def test_of_a_field_of_view_within_the_lung_only_emphysema_at_its_rim_is_outside() -> None:
    """The rim of a hole of 5 by 5 blocks in the corner counts as body: a block that opening gives, and the margin."""
    hu = np.full((SIZE, SIZE), -850.0, np.float32)
    hu[disc(120, 128, 40)] = -960.0
    assert inside(hu, PIXEL_MM).all()
    hu[: 5 * BLOCK_PX, : 5 * BLOCK_PX] = -960.0
    missed = 5 - math.ceil(MARGIN_MM / (BLOCK_PX * PIXEL_MM))
    expected = np.ones((SIZE, SIZE), np.bool_)
    expected[: missed * BLOCK_PX, : missed * BLOCK_PX] = False
    assert np.array_equal(inside(hu, PIXEL_MM), expected)


def test_any_shape_agrees_with_scipy() -> None:
    rng = np.random.default_rng(1)
    blocks = ndimage.binary_opening(rng.random((32, 32)) < 0.75, np.ones((3, 3)))
    blocks[4:12, 20:28] = True
    blocks[6:10, 22:26] = False
    hu = np.where(blocks.repeat(BLOCK_PX, 0).repeat(BLOCK_PX, 1), 0.0, -1000.0).astype(np.float32)
    filled = ndimage.binary_fill_holes(blocks)
    opened = ndimage.binary_dilation(ndimage.binary_erosion(filled, np.ones((3, 3)), border_value=1), np.ones((3, 3)))
    expected = ndimage.binary_dilation(opened, np.ones((3, 3)), iterations=2)
    assert 0.05 < expected.mean() < 0.95
    mask = inside(hu, MARGIN_MM / (2 * BLOCK_PX))
    assert np.array_equal(mask, expected.repeat(BLOCK_PX, 0).repeat(BLOCK_PX, 1))


def test_the_box_of_a_series_holds_every_slice() -> None:
    planes = [given(disc(90, 100, 50)), given(disc(140, 150, 50)), given(np.zeros((SIZE, SIZE), np.bool_))]
    volume = water_volume((3, SIZE, SIZE))
    series = Volume(
        geometry=volume.geometry,
        slice_uids=volume.slice_uids,
        slice_paths=volume.slice_paths,
        hu=np.stack(planes),
        padding=np.zeros((3, SIZE, SIZE), np.bool_),
    )
    both = inside(planes[0], volume.geometry.spacing_mm[1]) | inside(planes[1], volume.geometry.spacing_mm[1])
    rows, columns = box(series)
    found = ndimage.find_objects(both.astype(int))[0]
    assert (rows, columns) == tuple(slice(int(part.start), int(part.stop)) for part in found)


def test_spans() -> None:
    assert span(np.array([False, True, False, True, False])) == slice(1, 4)
    assert span(np.zeros(4, np.bool_)) == slice(0, 0)
