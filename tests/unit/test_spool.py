"""The spool: whole or not at all, safe before it is acknowledged, never overwritten, rebuilt from the files alone."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from ct_builder import phantom, uid, write_series
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode import spool as module
from dicomnode.errors import BadIdentifier, NodeError, SpoolError, SpoolFull
from dicomnode.spool import Incoming, Instance, Kept, Spool, dataset_digest, read_instance, valid_uid

SERIES = uid("series")


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A CT image as it comes over the wire, cut out of a file by pydicom's own account of where it begins."""
    (path,) = write_series(tmp_path_factory.mktemp("ct"), phantom(1, 16))
    ds = dcmread(path)
    # (0002,0000) counts what follows it; preamble, DICM and itself are 144 bytes (PS3.10 section 7.1).
    return path.read_bytes()[144 + ds.file_meta.FileMetaInformationGroupLength :]


def incoming(instance: int = 0, **changes: str) -> Incoming:
    what = Incoming(
        sop_instance_uid=uid("series", "instance", instance),
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        calling_ae="SCANNER",
        called_ae="NODE",
    )
    return replace(what, **changes)


def store(
    spool: Spool, what: Incoming, data: bytes, *, series_uid: str = SERIES, keep_conflict: bool = True
) -> tuple[Kept, Instance]:
    with spool.begin(what, memoryview(data)) as arrival:
        return arrival.keep(series_uid, uid("study"), keep_conflict=keep_conflict)


def files(spool: Spool) -> list[str]:
    return sorted(str(path.relative_to(spool.root)) for path in spool.root.rglob("*") if path.is_file())


# ── names ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", ["1", "1.2.840.10008", "1.02.3", "2.25." + "9" * 59, "0" * 64])
def test_a_uid_may_name_a_file(text: str) -> None:
    assert valid_uid(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "../x",
        "1/2",
        "/etc/passwd",
        "1\\2",
        "1.2.3\0",
        "1.2.3\n",
        "\n1.2.3",
        "1.2.3 ",
        "1..2",
        ".1",
        "1.",
        "1.2.3a",
        "١.٢",  # Arabic-Indic digits: str.isdigit and \d take them
        "1.２",  # a fullwidth two
        "²",
        "-1.2",
        "1" * 65,
        "1." * 40,
    ],
)
def test_what_is_no_uid_names_no_file(text: str) -> None:
    with pytest.raises(BadIdentifier) as refused:
        valid_uid(text)
    assert "\n" not in str(refused.value), "a UID off the network must not start a line of its own in the log"


# ── one node per spool ─────────────────────────────────────────────────────────────────────────────────────────────


def test_two_nodes_never_share_a_spool(tmp_path: Path) -> None:
    first = Spool(tmp_path)
    with pytest.raises(NodeError, match="in use by another running node"):
        Spool(tmp_path)
    first.close()
    Spool(tmp_path).close()


def test_the_lock_of_a_killed_node_is_free(tmp_path: Path) -> None:
    code = "import sys, os; from pathlib import Path; from dicomnode.spool import Spool\n"
    code += "Spool(Path(sys.argv[1])); print('held', flush=True); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.returncode) == ("held\n", -9)
    Spool(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match="check the path"):
        Spool(tmp_path / "file" / "spool")


# ── keeping ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_bytes_are_kept_as_they_came(spool: Spool, data_set: bytes) -> None:
    kept, instance = store(spool, incoming(), data_set)
    assert kept is Kept.NEW
    assert instance.path == spool.root / "instances" / SERIES / f"{incoming().sop_instance_uid}.dcm"
    content = instance.path.read_bytes()
    assert content.endswith(data_set)
    assert instance.size_bytes == len(content)
    assert instance.sha256 == hashlib.sha256(data_set).hexdigest() == dataset_digest(instance.path)
    ds = dcmread(instance.path)
    assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID == incoming().sop_instance_uid
    assert ds.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert ds.file_meta.SourceApplicationEntityTitle == "SCANNER"
    assert len(content) == 144 + ds.file_meta.FileMetaInformationGroupLength + len(data_set)


@pytest.mark.parametrize("calling_ae", ["SCANNER", "ODD", "A", "SIXTEENCHARACTRS"])
def test_an_instance_is_rebuilt_from_its_file(spool: Spool, data_set: bytes, calling_ae: str) -> None:
    _, stored = store(spool, incoming(calling_ae=calling_ae), data_set)
    rebuilt = read_instance(stored.path)
    assert replace(rebuilt, received_at=stored.received_at) == stored
    assert abs((rebuilt.received_at - stored.received_at).total_seconds()) < 5


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 128, b"\0" * 128 + b"DICM", os.urandom(300), b"\0" * 128 + b"DICM" * 9]
)
def test_a_strange_file_is_no_instance(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "strange.dcm"
    path.write_bytes(content)
    with pytest.raises(SpoolError):
        read_instance(path)


def test_a_file_damaged_after_reception_is_no_instance(spool: Spool, data_set: bytes) -> None:
    """Whatever the parser stumbles over: start-up must go on."""
    _, stored = store(spool, incoming(transfer_syntax_uid="1.2.840.10008.1.2.1.99"), data_set)
    with pytest.raises(SpoolError, match="not an object that this spool wrote"):  # deflated, it says, and is not
        read_instance(stored.path)


def test_the_same_bytes_again_change_nothing(spool: Spool, data_set: bytes) -> None:
    _, first = store(spool, incoming(), data_set)
    before = first.path.stat()
    kept, again = store(spool, incoming(calling_ae="OTHER"), data_set)
    assert kept is Kept.SAME
    assert (again.path, again.sha256, again.size_bytes) == (first.path, first.sha256, first.size_bytes)
    assert first.path.stat().st_ino == before.st_ino
    assert first.path.stat().st_mtime_ns == before.st_mtime_ns
    assert len(files(spool)) == 2  # the object and the lock


def test_other_bytes_are_kept_apart(spool: Spool, data_set: bytes) -> None:
    other = data_set[:-2] + b"\x12\x34"
    _, first = store(spool, incoming(), data_set)
    kept, apart = store(spool, incoming(), other)
    assert kept is Kept.CONFLICT
    assert apart.path.parent == spool.root / "conflicts" / SERIES
    assert first.path.read_bytes().endswith(data_set)
    assert apart.path.read_bytes().endswith(other)
    assert store(spool, incoming(), other)[0] is Kept.CONFLICT
    assert len(files(spool)) == 3
    assert list(spool.paths()) == [first.path]


def test_other_bytes_are_refused_where_the_site_wants_it(spool: Spool, data_set: bytes) -> None:
    _, first = store(spool, incoming(), data_set)
    kept, _ = store(spool, incoming(), data_set + b"\0\0", keep_conflict=False)
    assert kept is Kept.REFUSED
    assert first.path.read_bytes().endswith(data_set)
    assert len(files(spool)) == 2


def test_the_same_uid_from_eight_threads_at_once(
    spool: Spool, data_set: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four bring one object and four another under its UID: one wins, its twins are the same, the others kept apart."""
    versions = [data_set, data_set[:-2] + b"\x12\x34"]
    gate, results = threading.Barrier(8), []
    real, both_looked = Path.exists, threading.Barrier(2)

    def looked(path: Path) -> bool:
        found = real(path)
        with suppress(threading.BrokenBarrierError):  # as it shall be: while one looks and renames, no other looks
            both_looked.wait(0.2)
        return found

    monkeypatch.setattr(Path, "exists", looked)

    def bring(number: int) -> None:
        gate.wait()
        results.append((number % 2, *store(spool, incoming(), versions[number % 2])))

    threads = [threading.Thread(target=bring, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    (winner,) = [version for version, kept, _ in results if kept is Kept.NEW]
    assert sorted(kept.name for version, kept, _ in results if version == winner) == ["NEW", "SAME", "SAME", "SAME"]
    assert {kept for version, kept, _ in results if version != winner} == {Kept.CONFLICT}
    (path,) = spool.paths()
    assert path.read_bytes().endswith(versions[winner])
    assert len(files(spool)) == 3


def test_many_series_are_not_remembered_for_ever(
    spool: Spool, data_set: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder's name is synced once while it is remembered, and again before the next object once it is not."""
    synced: list[Path] = []
    monkeypatch.setattr(module, "sync_folder", synced.append)
    monkeypatch.setattr(module, "_LASTING_FOLDERS", 3)
    instances = 0

    def named_anew(series: int) -> bool:
        nonlocal instances
        instances += 1
        synced.clear()
        store(spool, incoming(instances), data_set, series_uid=uid("series", series))
        return spool.instances in synced

    assert [named_anew(series) for series in (0, 1, 2, 0, 1, 2)] == [True, True, True, False, False, False]
    assert [named_anew(series) for series in range(3, 40)] == [True] * 37
    assert len(spool._lasting) <= 3
    assert [named_anew(0), named_anew(0)] == [True, False]


# ── failing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_short_writes_are_gone_on_with(spool: Spool, data_set: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "writev", lambda descriptor, parts: os.write(descriptor, b"".join(parts)[:700]))
    _, instance = store(spool, incoming(), data_set)
    monkeypatch.undo()
    assert dataset_digest(instance.path) == hashlib.sha256(data_set).hexdigest()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["writev", "fsync", "open", "rename"])
def test_a_full_disk_leaves_nothing(
    spool: Spool, data_set: bytes, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    real, calls = getattr(os, call), []

    def full(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if call == "open" and not str(arguments[0]).endswith(".part"):
            return real(*arguments, **options)
        if call == "writev" and len(calls) == 1:
            return real(arguments[0], [arguments[1][0][:100]])
        raise OSError(number, os.strerror(number))

    (spool.instances / SERIES).mkdir()
    monkeypatch.setattr(module.os, call, full)
    with pytest.raises(SpoolFull, match="no space left"):
        store(spool, incoming(), data_set)
    monkeypatch.undo()
    assert files(spool) == ["lock"]
    assert store(spool, incoming(), data_set)[0] is Kept.NEW


def test_the_folders_of_a_new_spool_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[Path, list[str]]] = []
    monkeypatch.setattr(
        module, "sync_folder", lambda folder: synced.append((folder, sorted(path.name for path in folder.iterdir())))
    )
    Spool(tmp_path / "new").close()
    assert synced == [(tmp_path / "new", ["conflicts", "derived", "incoming", "instances"]), (tmp_path, ["new"])]


def test_another_failure_leaves_nothing_and_is_no_full_disk(
    spool: Spool, data_set: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module.os, "fsync", broken)
    with pytest.raises(SpoolError, match="Input/output error") as failure:
        store(spool, incoming(), data_set)
    assert not isinstance(failure.value, SpoolFull)
    assert files(spool) == ["lock"]


def test_what_is_refused_before_its_file_was_made_leaves_nothing(
    spool: Spool, data_set: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, over = os.open, threading.Event()

    def slow(*arguments: object, **options: object) -> object:
        over.wait(0.2)  # over never comes: nobody may leave the arrival while it is written
        return real(*arguments, **options)

    monkeypatch.setattr(module.os, "open", slow)
    with pytest.raises(KeyError), spool.begin(incoming(), memoryview(data_set)):
        raise KeyError
    over.set()
    spool.close()
    assert files(spool) == ["lock"]


def test_a_failure_keeps_no_memory(spool: Spool, data_set: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object may be as large as `max_object_mb`, and a full disk is tried again and again."""

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    received = bytearray(data_set)
    monkeypatch.setattr(module.os, "writev", full)
    gc.disable()
    try:
        with (
            pytest.raises(SpoolFull, match="no space left"),
            memoryview(received) as data,
            spool.begin(incoming(), data) as arrival,
        ):
            arrival.keep(SERIES, uid("study"))
        del data, arrival
        received.clear()  # BufferError, if somebody still looks at it
    finally:
        gc.enable()


def test_a_fault_in_a_writer_is_said_and_ends_no_writer(
    spool: Spool, data_set: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the object would count as written, and after sixteen of them nothing would be written any more."""
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_durably", lambda *_: 1 // 0)
        for _ in range(2 * module._WRITERS):
            with pytest.raises(SpoolError, match="ZeroDivisionError at"):
                store(spool, incoming(), data_set)
    assert files(spool) == ["lock"]
    kept, instance = store(spool, incoming(), data_set)
    assert (kept, dataset_digest(instance.path)) == (Kept.NEW, hashlib.sha256(data_set).hexdigest())


def test_no_thread_to_be_had_keeps_nobody_from_writing(
    spool: Spool, data_set: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", exhausted)
    _, instance = store(spool, incoming(), data_set)
    assert files(spool) == [str(instance.path.relative_to(spool.root)), "lock"]


def test_a_spool_without_threads_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, started = threading.Thread.start, []

    def exhausted(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", exhausted)
    with pytest.raises(SpoolError, match="can't start new thread"):
        Spool(tmp_path)
    started[0].join(10)
    assert not started[0].is_alive()
    monkeypatch.undo()
    Spool(tmp_path).close()


def test_what_a_crash_left_half_written_is_removed(spool: Spool, data_set: bytes) -> None:
    _, instance = store(spool, incoming(), data_set)
    _, apart = store(spool, incoming(), data_set + b"\0\0")
    result = spool.derived / "job"
    result.mkdir()
    (result / "manifest.json").write_text("{}")
    for name in ("0123.part", "4567.part"):
        (spool.incoming / name).write_bytes(b"half")
    (spool.derived / "job.4711.part").mkdir()
    (spool.derived / "job.4711.part" / "1.2.dcm").write_bytes(b"half")
    assert spool.remove_partial() == 2
    assert spool.remove_partial() == 0
    assert len(files(spool)) == 4
    assert instance.path.exists()
    assert apart.path.exists()
    assert (result / "manifest.json").exists()


def test_free_bytes_is_what_df_says(spool: Spool) -> None:
    said = subprocess.run(["df", "--output=avail", "-B1", spool.root], capture_output=True, text=True, timeout=10)
    assert spool.free_bytes() == pytest.approx(int(said.stdout.split()[1]), abs=2**28)
