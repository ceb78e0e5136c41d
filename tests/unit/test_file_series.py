"""A series on disk gives the slices of `read_volume`, when they are asked for, and holds few of them."""

from __future__ import annotations

import logging
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ct_builder import phantom, write_series
from peers import wait_for
from pydicom.uid import RLELossless

from dicomnode.denoise import _SLICES_AHEAD
from pipelines import volume as module
from pipelines.base import Envelope, Options, denoise, load
from pipelines.ct_slice import CTSlice
from pipelines.gate import check
from pipelines.identity import Identity
from pipelines.volume import (
    PLANES_AHEAD,
    PLANES_KEPT,
    FileSeries,
    SeriesRefused,
    open_series,
    pydicom_silent,
    read_volume,
)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose pixels were decoded, in that order."""
    names: list[str] = []
    read_hu = CTSlice.read_hu

    def watched(self: CTSlice, *out: Any) -> None:
        read_hu(self, *out)
        names.append(self.path.name)

    monkeypatch.setattr(CTSlice, "read_hu", watched)
    return names


@pytest.fixture(autouse=True)
def _threads_end() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def _names(*slices: int) -> list[str]:
    return [f"series-{k:04d}.dcm" for k in slices]


def _padded(slices: int) -> Any:
    """HU of a field of view that is a disc; what lies around it is declared by PixelPaddingValue."""
    hu = phantom(slices, 24).astype(np.int32)
    y, x = np.mgrid[:24, :24] - 11.5
    hu[:, x * x + y * y > 11.5**2] = -2000
    return hu


@pytest.mark.parametrize(
    "how",
    [
        {"PixelPaddingValue": -976},
        {"transfer_syntax": RLELossless, "slope": 0.5, "step": (0, 0, -1)},
    ],
)
def test_every_slice_is_that_of_the_volume_in_whatever_order_it_is_asked_for(tmp_path: Path, how: Any) -> None:
    hu = _padded(9) if "PixelPaddingValue" in how else phantom(9, 24)
    files = write_series(tmp_path, hu, **how)
    random.Random(1).shuffle(files)
    volume = read_volume(files)
    with open_series(files) as series:
        assert series.shape == volume.shape == (9, 24, 24)
        for name in ("geometry", "slice_uids", "slice_paths", "positions_mm", "thickness_mm", "tilt_deg"):
            assert getattr(series, name) == getattr(volume, name)
        for k in (0, 8, 3, 4, 2, 8, 7, 6, 5, 1, 0):
            plane = series.plane(k)
            assert plane.hu.dtype == np.float32
            assert plane.padding.dtype == np.bool_
            assert np.array_equal(plane.hu, volume.hu[k])
            assert np.array_equal(plane.padding, volume.padding[k])
    expected = hu[::-1] if "step" in how else hu
    assert np.array_equal(volume.hu, expected)
    assert volume.padding.any() == ("PixelPaddingValue" in how)


def test_nothing_is_decoded_before_it_is_asked_for(tmp_path: Path, decoded: list[str]) -> None:
    with open_series(write_series(tmp_path, phantom(12, 32))) as series:
        assert series.shape == (12, 32, 32)
        check(series, replace(Identity.card, input="volume"))
        with pytest.raises(SeriesRefused, match="12 slices"):
            check(series, replace(Identity.card, valid_for=Envelope(max_slices=11)))
    assert decoded == []


def test_the_next_slices_are_read_meanwhile_and_no_more(tmp_path: Path, decoded: list[str]) -> None:
    with open_series(write_series(tmp_path, phantom(12, 16))) as series:
        series.plane(2)
        wait_for(lambda: len(decoded) == 1 + PLANES_AHEAD)
        series.plane(3)
        wait_for(lambda: len(decoded) == 2 + PLANES_AHEAD)
        series.plane(11)
        series.plane(2)
    assert decoded == _names(*range(2, 4 + PLANES_AHEAD), 11)


def test_what_is_kept_is_not_decoded_again_and_what_is_not_is(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of last use: who still asks for a slice keeps it."""
    monkeypatch.setattr(module, "PLANES_AHEAD", 0)
    monkeypatch.setattr(module, "PLANES_KEPT", 3)
    volume = read_volume(files := write_series(tmp_path, phantom(5, 16)))
    decoded.clear()
    with open_series(files) as series:
        for k in (0, 1, 2, 0, 1, 2, 0, 3, 0, 1):
            assert np.array_equal(series.plane(k).hu, volume.hu[k])
    assert decoded == _names(0, 1, 2, 3, 1)


def test_what_a_network_for_volumes_asks_for_again_is_not_decoded_again(tmp_path: Path, decoded: list[str]) -> None:
    """Its answer is compared with the slice some steps after it, by the rail and, where it is ahead, by the guard."""
    behind = 19, 19 + _SLICES_AHEAD
    count = PLANES_KEPT + 20
    with open_series(write_series(tmp_path, phantom(count, 16))) as series:
        for t in range(count + behind[-1]):
            for k in (t, *(t - late for late in behind)):
                if 0 <= k < count:
                    series.plane(k)
    assert sorted(decoded) == _names(*range(count))


def test_a_slice_that_reads_otherwise_the_second_time_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was replaced by another image of the same instance while the series was denoised."""
    monkeypatch.setattr(module, "PLANES_AHEAD", 0)
    monkeypatch.setattr(module, "PLANES_KEPT", 1)
    files = write_series(tmp_path / "a", hu := phantom(3, 16))
    others = write_series(tmp_path / "b", hu + 1)
    with open_series(files) as series:
        for k in (0, 1, 0):
            series.plane(k)
        others[0].replace(series.slice_paths[0])
        series.plane(1)
        with pytest.raises(SeriesRefused, match="changed while they were being read"):
            series.plane(0)


@pytest.mark.parametrize("kept", [5, 8, PLANES_KEPT])
def test_memory_does_not_grow_with_the_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """Every plane that was read is followed until its memory is given back."""
    monkeypatch.setattr(module, "PLANES_KEPT", kept)
    alive: set[int] = set()
    most = 0
    read = FileSeries._read

    def followed(self: FileSeries, k: int) -> module.Plane:
        plane = read(self, k)
        alive.add(k)
        weakref.finalize(plane.hu, alive.discard, k)
        return plane

    monkeypatch.setattr(FileSeries, "_read", followed)
    hu = phantom(60 if kept < PLANES_KEPT else 80, 16)
    with open_series(write_series(tmp_path, hu)) as series:
        for k, out in enumerate(denoise(load("identity"), series, Options())):
            assert np.array_equal(out, hu[k])
            most = max(most, len(alive))
        assert most == kept
    del series
    assert alive == set()


def test_a_slice_belongs_to_all_who_ask_so_none_can_write_into_it(tmp_path: Path) -> None:
    with open_series(write_series(tmp_path, phantom(3, 16))) as series:
        plane = series.plane(1)
        assert series.plane(1).hu is plane.hu
        for values in plane:
            with pytest.raises(ValueError, match="read-only"):
                values[0, 0] = 1


def test_many_may_ask_at_once(tmp_path: Path, decoded: list[str]) -> None:
    hu = phantom(12, 16)
    order = [k for seed in range(8) for k in random.Random(seed).sample(range(12), 12)]
    with open_series(write_series(tmp_path, hu)) as series, ThreadPoolExecutor(8) as askers:
        for k, plane in zip(order, askers.map(series.plane, order), strict=True):
            assert np.array_equal(plane.hu, hu[k])
    assert sorted(decoded) == _names(*range(12))


def test_closing_ends_the_thread_and_what_was_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That no thread is left is asserted for every test here."""
    began, go_on = threading.Event(), threading.Event()
    read = FileSeries._read
    begun: list[int] = []

    def slow(self: FileSeries, k: int) -> module.Plane:
        begun.append(k)
        if k == 1:
            began.set()
            assert go_on.wait(10)
        return read(self, k)

    monkeypatch.setattr(FileSeries, "_read", slow)
    series = open_series(write_series(tmp_path, phantom(12, 16)))
    series.plane(0)
    assert began.wait(10)
    assert any(thread.name.startswith("series-reader") for thread in threading.enumerate())
    with ThreadPoolExecutor(1) as other:
        closing = other.submit(series.close)
        wait_for(lambda: series._reader._shutdown)
        go_on.set()
        closing.result(10)
    assert begun == [0, 1]


def test_pydicom_is_silent_until_the_last_of_several_threads_is_through(caplog: pytest.LogCaptureFixture) -> None:
    """Two series are read at once: the one that ends first must not let the values of the other into the log."""
    logger, filters, show = logging.getLogger("pydicom"), list(warnings.filters), warnings.showwarning
    level = logger.level
    first, second = pydicom_silent(), pydicom_silent()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    logger.error("a name")
    warnings.warn("a name", stacklevel=1)  # pytest makes an error of it
    assert caplog.text == ""
    second.__exit__(None, None, None)
    assert (logger.level, warnings.filters, warnings.showwarning) == (level, filters, show)
    with pytest.raises(UserWarning, match="now heard"):
        warnings.warn("now heard", stacklevel=1)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(("damage", "error"), [(_cut, SeriesRefused), (Path.unlink, FileNotFoundError)])
def test_a_slice_that_cannot_be_read_is_told_when_it_is_asked_for_and_not_earlier(
    tmp_path: Path, damage: Callable[[Path], None], error: type[Exception]
) -> None:
    hu = phantom(8, 16)
    files = write_series(tmp_path, hu)
    with open_series(files) as series:
        damage(files[5])
        for k in (0, 1, 2, 3, 4):  # from slice 1 on, it is among those that are read ahead
            assert np.array_equal(series.plane(k).hu, hu[k])
        for _ in range(2):
            with pytest.raises(error) as caught:
                series.plane(5)
            assert getattr(caught.value, "code", "undecodable") == "undecodable"
        assert np.array_equal(series.plane(6).hu, hu[6])
        results = denoise(load("identity"), series, Options())
        for k in range(5):
            assert np.array_equal(next(results), hu[k])
        with pytest.raises(error):
            next(results)


def test_memory_that_runs_out_is_no_fault_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*arguments: object) -> None:
        bytes(2**62)

    monkeypatch.setattr("pipelines.ct_slice.pixel_array", greedy)
    files = write_series(tmp_path, phantom(3, 16), transfer_syntax=RLELossless)
    with open_series(files) as series, pytest.raises(MemoryError):
        series.plane(1)
