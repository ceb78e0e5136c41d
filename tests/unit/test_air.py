"""Air around the body leaves as it came and is not computed; what is in the body comes out as if it were."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pipelines import network as module
from pipelines.base import Execution, Options, denoise_volume, load
from pipelines.body import inside
from pipelines.safety import network_input
from pipelines.testing import water_volume
from pipelines.volume import Series, Volume

ROUNDING_HU = 0.02
FP32 = Execution(device="cpu", precision="fp32", threads=1)


@pytest.fixture(scope="module")
def volume() -> Volume:
    """A small body in much air, away from the middle."""
    whole = water_volume((4, 96, 96))
    hu = np.random.default_rng(3).normal(-1000, 20, (4, 260, 300)).astype(np.float32)
    hu[:, 70:166, 130:226] = whole.hu
    return Volume(
        geometry=whole.geometry,
        slice_uids=whole.slice_uids,
        slice_paths=whole.slice_paths,
        hu=hu,
        padding=np.zeros(hu.shape, np.bool_),
    )


@pytest.mark.parametrize("name", ["quality-2.5d", "fast-2.5d", "drl", "st3d"])
def test_the_body_is_denoised_as_in_the_whole_slice(volume: Volume, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load(name, FP32)
    part = denoise_volume(pipeline, volume)
    sizes = []

    def everything(series: Series) -> tuple[slice, slice]:
        sizes.append(series.shape)
        return slice(0, series.shape[1]), slice(0, series.shape[2])

    monkeypatch.setattr(module, "box", everything)
    whole = denoise_volume(pipeline, volume)
    assert sizes
    assert np.abs(part - whole).max() <= ROUNDING_HU
    mask = np.stack([inside(network_input(volume.plane(k)), volume.geometry.spacing_mm[1]) for k in range(4)])
    assert 0.05 < mask.mean() < 0.3
    assert np.array_equal(part[~mask], volume.hu[~mask])
    assert np.abs(part - volume.hu)[mask].mean() > 1


def test_the_network_is_given_the_body_and_what_it_depends_on(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load("fast-2.5d", FP32)
    assert isinstance(pipeline, module.NetworkPipeline)
    engine, shapes = pipeline._planes, []

    def watched(slices: np.ndarray, noise_map: np.ndarray | None) -> np.ndarray:
        shapes.append(slices.shape)
        return engine(slices, noise_map)

    monkeypatch.setattr(pipeline, "_planes", watched)
    denoise_volume(pipeline, volume)
    halo = pipeline.card.overlap_zyx[1]
    assert len(shapes) == 4
    assert len(set(shapes)) == 1
    assert 96 <= shapes[0][1] <= 96 + 2 * (halo + 10 + 24)
    assert shapes[0][1] * shapes[0][2] < 0.7 * 260 * 300


def test_a_stream_is_given_the_body_and_what_it_depends_on(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load("st3d", FP32)
    assert isinstance(pipeline, module.NetworkPipeline)
    engine, sizes = pipeline._volumes, []

    class Watched:
        def stream(self, planes: Iterator[np.ndarray], shape: tuple[int, int]) -> Iterator[np.ndarray]:
            def seen() -> Iterator[np.ndarray]:
                for plane in planes:
                    sizes.append(plane.shape)
                    yield plane

            return engine.stream(seen(), shape)

    monkeypatch.setattr(pipeline, "_volumes", Watched())
    denoise_volume(pipeline, volume)
    assert len(sizes) == 4
    assert len(set(sizes)) == 1
    halo = pipeline.card.overlap_zyx[1]
    assert 96 <= sizes[0][0] <= 96 + 2 * (halo + 10 + 24)
    assert sizes[0][0] * sizes[0][1] < 0.7 * 260 * 300


@pytest.mark.parametrize("name", ["fast-2.5d", "st3d"])
def test_air_is_left_alone_in_what_a_site_runs_in(volume: Volume, name: str) -> None:
    """In INT8 or bfloat16, where the CPU has instructions for them: no rounding leaks out of the body."""
    out = denoise_volume(load(name, Execution(device="cpu", threads=1)), volume)
    mask = np.stack([inside(network_input(volume.plane(k)), volume.geometry.spacing_mm[1]) for k in range(4)])
    assert np.array_equal(out[~mask], volume.hu[~mask])
    assert np.abs(out - volume.hu)[mask].mean() > 1


def test_a_series_of_air_comes_back_as_it_is(volume: Volume) -> None:
    air = np.ascontiguousarray(volume.hu[:, :64, :64])
    nothing = volume.padding[:, :64, :64]
    alone = Volume(
        geometry=volume.geometry,
        slice_uids=volume.slice_uids,
        slice_paths=volume.slice_paths,
        hu=air,
        padding=nothing,
    )
    for name in ("fast-2.5d", "st3d"):
        assert np.array_equal(denoise_volume(load(name, FP32), alone, Options(blend=0.5)), air)
