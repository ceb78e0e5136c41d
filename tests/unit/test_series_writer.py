"""The writer of a derived series: each slice once, durably, in a thread of its own whose faults reach the caller."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from ct_builder import phantom, write_series
from derivation import derive, making, write_all

from dicomnode import derive as module
from dicomnode.derive import SeriesWriter
from dicomnode.errors import DerivationError
from pipelines.volume import read_volume


def test_each_slice_is_written_once(tmp_path: Path) -> None:
    volume = read_volume(write_series(tmp_path, phantom(3, 16)))
    with SeriesWriter(volume, making(), tmp_path) as writer:
        writer.write(2, volume.hu[2])
        for k in (2, 3, -1):
            with pytest.raises(ValueError, match=f"slice {k} of 3 is not to be written"):
                writer.write(k, volume.hu[0])
        writer.write(0, volume.hu[0])
        with pytest.raises(ValueError, match="2 of 3 slices were written"):
            writer.finish()
        with pytest.raises(ValueError, match="slice 1 of 3 is not to be written"):
            writer.write(1, volume.hu[1])


def test_a_disk_that_loses_bytes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write_durably", lambda path, parts: path.write_bytes(b"".join(parts)[:-100]))
    volume = read_volume(write_series(tmp_path, phantom(1, 16)))
    with pytest.raises(DerivationError, match="read back"):
        write_all(volume, volume.hu, making(), tmp_path)


def test_a_full_disk_is_no_fault_of_the_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    volume = read_volume(write_series(tmp_path, phantom(1, 16)))
    with pytest.raises(OSError, match="No space left"):
        write_all(volume, volume.hu, making(), tmp_path)


@pytest.mark.parametrize("step", ["derive.derived_pixels", "derive._encode", "proof.dcmread"])
def test_memory_that_runs_out_is_no_fault_of_the_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def greedy(*arguments: object) -> None:
        bytes(2**62)

    monkeypatch.setattr(f"dicomnode.{step}", greedy)
    volume = read_volume(write_series(tmp_path, phantom(1, 16)))
    with pytest.raises(MemoryError):
        write_all(volume, volume.hu, making(), tmp_path)


def test_each_file_is_synced_and_the_folder_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def watch(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    monkeypatch.setattr("os.fsync", watch)
    made = derive(write_series(tmp_path, phantom(2, 16)), tmp_path / "out")
    assert synced == [f"{one.sop_instance_uid}.dcm" for one in made] + ["out"]


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "series-writer"]


def test_a_fault_of_the_thread_reaches_the_caller_at_the_next_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many slices are still to come: nobody waits for room in the queue of a writer that has failed."""

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    volume = read_volume(write_series(tmp_path / "in", phantom(40, 16)))
    handed = 0
    (tmp_path / "out").mkdir()
    with (  # noqa: PT012  # which slice meets the fault is a matter of time
        pytest.raises(OSError, match="No space left"),
        SeriesWriter(volume, making(), tmp_path / "out") as writer,
    ):
        for k, plane in enumerate(volume.hu):
            writer.write(k, plane)
            handed += 1
        writer.finish()
    assert handed < 40
    assert not writers()


def test_leaving_early_ends_the_thread(tmp_path: Path) -> None:
    volume = read_volume(write_series(tmp_path / "in", phantom(3, 16)))
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyError), SeriesWriter(volume, making(), tmp_path / "out") as writer:  # noqa: PT012  # leaving is what is tested
        writer.write(0, volume.hu[0])
        assert len(writers()) == 1
        raise KeyError
    assert not writers()


def test_the_caller_waits_rather_than_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, handed = threading.Event(), 0
    write = module.write_durably

    def slow(path: Path, parts: Sequence[bytes]) -> None:
        assert let_go.wait(20)
        write(path, parts)

    monkeypatch.setattr(module, "write_durably", slow)
    volume = read_volume(write_series(tmp_path / "in", phantom(12, 16)))
    (tmp_path / "out").mkdir()
    with SeriesWriter(volume, making(), tmp_path / "out") as writer:

        def hand_over() -> None:
            nonlocal handed
            for k, plane in enumerate(volume.hu):
                writer.write(k, plane)
                handed += 1

        caller = threading.Thread(target=hand_over)
        caller.start()
        deadline = time.monotonic() + 20
        while handed < 4 and time.monotonic() < deadline:
            time.sleep(0.001)  # the thread is watched from outside: it sets nothing that could be waited for
        caller.join(0.05)
        assert 4 <= handed <= 5  # four in the queue, one in hand
        let_go.set()
        caller.join(20)
        assert len(writer.finish()) == 12
