"""Received objects on disk: the bytes exactly as they came, whole or not at all.

::

    <spool>/incoming/<run>-<number>.part                            what is being written
    <spool>/instances/<SeriesInstanceUID>/<SOPInstanceUID>.dcm      what was acknowledged
    <spool>/conflicts/<SeriesInstanceUID>/<SOPInstanceUID>.<digest>.dcm
                                                                   same UID, other bytes: kept apart
    <spool>/derived/<job id>/                                       results, with their manifest.json

An object is answered 0x0000 only after its file was synced, renamed into place and the folder synced (PS3.4 B.2.3
leaves the promise to the SCP; this is what makes it true across a power cut). A thread of the spool writes and syncs it
while the receiver reads its header and takes its digest.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import itertools
import os
import re
import shutil
import struct
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from pydicom import dcmread

from dicomnode.errors import BadIdentifier, NodeError, SpoolError, SpoolFull, fault

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_UID_MAX_CHARACTERS = 64
_PREAMBLE = b"\0" * 128 + b"DICM"
_META_OFFSET = len(_PREAMBLE)
_GROUP_LENGTH_BYTES = 12
"""Size of (0002,0000), which precedes the part of the file meta information that it counts."""
IMPLEMENTATION_CLASS_UID = "2.25.67879297425467467846419863404848455815"
IMPLEMENTATION_VERSION_NAME = "DICOMNODE_0_1"
PART_SUFFIX = ".part"
_LASTING_FOLDERS = 1000
"""Remembered as such; far more than are received at once."""
_WRITERS = 16
"""Objects that are written at the same time, at most; the others wait."""


def valid_uid(text: str) -> str:
    """`text`, if it can safely name a file: digits and dots as in PS3.5 section 9.1, at most 64 characters.

    Leading zeros in a component are tolerated (scanners write them); nothing else is.

    Raises
    ------
    BadIdentifier
    """
    if len(text) > _UID_MAX_CHARACTERS or not _UID.fullmatch(text):
        raise BadIdentifier(f"not a UID: {text[:80]!r}")
    return text


@dataclass(frozen=True, slots=True)
class Instance:
    """One received SOP instance."""

    sop_instance_uid: str
    sop_class_uid: str
    series_uid: str
    study_uid: str
    transfer_syntax_uid: str
    path: Path
    size_bytes: int
    """Size of the file."""
    sha256: str
    """Digest of the data set's bytes as received, without the file meta information that we add."""
    received_at: datetime
    """UTC, naive."""
    calling_ae: str
    called_ae: str


class Kept(Enum):
    """What became of an object handed to the spool."""

    NEW = "new"
    SAME = "the same bytes were here already"
    CONFLICT = "another object of this UID was here already; kept apart"
    REFUSED = "another object of this UID was here already; not kept, as the site wants it"


@dataclass(frozen=True, slots=True)
class Incoming:
    """What a C-STORE-RQ and its association say of a data set, after validation."""

    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    calling_ae: str
    called_ae: str


def hold(lock: Path) -> int:
    """Lock what belongs to one node alone, until the returned descriptor is closed or the process ends, however.

    Raises
    ------
    NodeError
        If another process holds it.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise NodeError(f"{lock} is held: the folder is in use by another running node; stop that one first") from None
    return descriptor


class Spool:
    """The folder of received and derived objects. One node at a time may use it.

    Raises
    ------
    NodeError
        If another node holds the folder.
    SpoolError
        If the folder cannot be made or written, or there are no threads to write with.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incoming = root / "incoming"
        self.instances = root / "instances"
        self.conflicts = root / "conflicts"
        self.derived = root / "derived"
        self._writers = _Writers()
        made = not root.is_dir()
        try:
            for folder in (self.incoming, self.instances, self.conflicts, self.derived):
                folder.mkdir(parents=True, exist_ok=True)
            sync_folder(root)
            if made:
                sync_folder(root.parent)
            self._lock_file = hold(root / "lock")
        except OSError as error:
            raise SpoolError(f"spool {root} cannot be used: {error}; check the path and its owner") from error
        self._run = uuid.uuid4().hex
        self._numbers = itertools.count(1)
        self._placing = threading.Lock()
        self._lasting: set[str] = set()
        """Series folders whose own name is synced. That one exists says nothing: its maker may not be so far yet."""

    def close(self) -> None:
        """Give the folder free for another node."""
        self._writers.close()
        os.close(self._lock_file)

    def remove_partial(self) -> int:
        """Delete what a crash left half-written; the number of received files among it, none of them acknowledged.

        Call before reception starts.
        """
        for folder in self.derived.glob(f"*{PART_SUFFIX}"):
            # A child of the dead node may still be at its end in there; the next start deletes the rest.
            shutil.rmtree(folder, ignore_errors=True)
        parts = list(self.incoming.glob(f"*{PART_SUFFIX}"))
        for part in parts:
            part.unlink()
        return len(parts)

    def free_bytes(self) -> int:
        """Space left for us on the spool's file system."""
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    def new_part(self) -> str:
        """A name for a file that is being written, which no other run of the node gives."""
        return f"{self.incoming}/{self._run}-{next(self._numbers)}{PART_SUFFIX}"

    def begin(self, incoming: Incoming, data: memoryview) -> Arrival:
        """Begin to write an object; `data` must stay as it is until the arrival is over."""
        return Arrival(self, incoming, data)

    def folder(self, under: Path, series_uid: str) -> str:
        """The folder of a series in `instances` or `conflicts`, made if it was not there; its own name lasts."""
        folder = f"{under}/{series_uid}"
        if folder not in self._lasting or not os.path.isdir(folder):
            Path(folder).mkdir(exist_ok=True)
            sync_folder(under)
            if len(self._lasting) >= _LASTING_FOLDERS:
                self._lasting.clear()  # a node runs for years; forgetting costs a sync
            self._lasting.add(folder)
        return folder

    def place(self, part: str, path: str) -> bool:
        """Give a written file its name; False, and nothing is done, if there is a file of that name.

        Two associations may bring the same object at once: the second must not overwrite the first.
        """
        with self._placing:
            if os.path.exists(path):
                return False
            os.rename(part, path)
            return True

    def count_conflicts(self, series_uid: str) -> int:
        """Objects of a series that were kept apart because their UID was here with other bytes."""
        return sum(1 for _ in self.conflicts.glob(f"{series_uid}/*.dcm"))

    def paths(self) -> Iterator[Path]:
        """Files of all acknowledged instances, conflicts left out."""
        return self.instances.glob("*/*.dcm")


class Arrival:
    """An object that is being written to disk: it is kept, or nothing is left of it when the context is over.

    What fails on disk, `keep` says; to who does not keep it, it makes no difference.
    """

    def __init__(self, spool: Spool, incoming: Incoming, data: memoryview) -> None:
        self._spool = spool
        self._incoming = incoming
        header = _PREAMBLE + _file_meta(incoming)
        self._size_bytes = len(header) + len(data)
        self._part = spool.new_part()
        self._failed: Exception | None = None
        self._written = threading.Lock()
        self._written.acquire()
        spool._writers.do(functools.partial(self._write, header, data))
        self._placed = False
        # At once: it needs no interpreter, which the writer now waits for between its system calls.
        self._digest = hashlib.sha256(data).hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        with self._written:
            if not self._placed:
                with suppress(FileNotFoundError):  # it could not be made
                    os.unlink(self._part)

    def _write(self, header: bytes, data: memoryview) -> None:
        try:
            write_durably(self._part, (header, data))
        except OSError as error:
            # Another than this one, which holds the data, until nobody knows when.
            self._failed = OSError(error.errno, error.strerror)
        except Exception as error:  # a fault of ours; without it the object would count as written
            self._failed = SpoolError(f"cannot keep {self._incoming.sop_instance_uid}: {fault(error)}")
        finally:
            self._written.release()

    def keep(self, series_uid: str, study_uid: str, *, keep_conflict: bool = True) -> tuple[Kept, Instance]:
        """Keep it durably. When this returns, a power cut does not lose it.

        Raises
        ------
        SpoolFull
            No space (answer 0xA700).
        SpoolError
            Any other failure to write.
        """
        try:
            return self._keep(series_uid, study_uid, keep_conflict)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise SpoolFull(f"no space left in {self._spool.root}; free some or move the spool") from error
            raise SpoolError(f"cannot keep {self._incoming.sop_instance_uid}: {error}") from error

    def _keep(self, series_uid: str, study_uid: str, keep_conflict: bool) -> tuple[Kept, Instance]:
        spool, uid, digest = self._spool, self._incoming.sop_instance_uid, self._digest
        folder = spool.folder(spool.instances, series_uid)
        path = f"{folder}/{uid}.dcm"
        with self._written:
            failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
        kept = Kept.NEW
        if not spool.place(self._part, path):
            if dataset_digest(Path(path)) == digest:
                kept = Kept.SAME
            elif not keep_conflict:
                kept = Kept.REFUSED
            else:
                kept = Kept.CONFLICT
                folder = spool.folder(spool.conflicts, series_uid)
                path = f"{folder}/{uid}.{digest[:16]}.dcm"
                os.replace(self._part, path)
        self._placed = kept in (Kept.NEW, Kept.CONFLICT)
        # Also where the same bytes are: who wrote them may not have synced yet, and we are about to promise it.
        sync_folder(folder)
        instance = Instance(
            sop_instance_uid=uid,
            sop_class_uid=self._incoming.sop_class_uid,
            series_uid=series_uid,
            study_uid=study_uid,
            transfer_syntax_uid=self._incoming.transfer_syntax_uid,
            path=Path(path),
            size_bytes=self._size_bytes if self._placed else os.stat(path).st_size,
            sha256=digest,
            received_at=datetime.now(UTC).replace(tzinfo=None),
            calling_ae=self._incoming.calling_ae,
            called_ae=self._incoming.called_ae,
        )
        return kept, instance


class _Writers:
    """Threads that write, all of them running: for want of one later on, an object would wait in the queue for ever."""

    def __init__(self) -> None:
        self._steps: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name="writer", daemon=True) for _ in range(_WRITERS)]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:
            self.close()
            raise SpoolError(f"no threads to write with: {error}; allow the process more") from error

    def do(self, step: Callable[[], None]) -> None:
        """Have it done as soon as one of them is free."""
        self._steps.put(step)

    def close(self) -> None:
        """End them, once they have done what they were asked for."""
        for _ in self._threads:
            self._steps.put(None)
        for thread in self._threads:
            if thread.ident is not None:  # else it could not be started
                thread.join()

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            step()
            del step  # it holds the data


def read_instance(path: Path) -> Instance:
    """What the spool knows of a file that it wrote: for rebuilding the index after a crash.

    Raises
    ------
    SpoolError
        If the file is no DICOM file with our file meta information.
    """
    try:
        header = dcmread(path, stop_before_pixels=True)
        meta = header.file_meta
        return Instance(
            sop_instance_uid=valid_uid(str(header.SOPInstanceUID)),
            sop_class_uid=str(header.SOPClassUID),
            series_uid=valid_uid(str(header.SeriesInstanceUID)),
            study_uid=valid_uid(str(header.StudyInstanceUID)),
            transfer_syntax_uid=str(meta.TransferSyntaxUID),
            path=path,
            size_bytes=path.stat().st_size,
            sha256=dataset_digest(path),
            received_at=datetime.fromtimestamp(path.stat().st_mtime, UTC).replace(tzinfo=None),
            calling_ae=str(meta.get("SourceApplicationEntityTitle", "")).strip(),
            called_ae=str(meta.get("ReceivingApplicationEntityTitle", "")).strip(),
        )
    except Exception as error:  # whatever the parser stumbles over in a damaged file: start-up goes on without it
        # Not its words: they may quote the header.
        raise SpoolError(f"{path} is not an object that this spool wrote ({type(error).__name__})") from error


def dataset_digest(path: Path) -> str:
    """SHA-256 of the data set in a file of this spool, file meta information left out."""
    with path.open("rb") as file:
        start = file.read(_META_OFFSET + _GROUP_LENGTH_BYTES)
        if len(start) < _META_OFFSET + _GROUP_LENGTH_BYTES or start[128:132] != b"DICM":
            raise SpoolError(f"{path} is not a DICOM file; it was changed behind the node's back")
        (length,) = struct.unpack_from("<L", start, _META_OFFSET + 8)
        file.seek(_META_OFFSET + _GROUP_LENGTH_BYTES + length)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_meta(incoming: Incoming) -> bytes:
    """File Meta Information (PS3.10 section 7.1). The AE titles let the index be rebuilt from the files alone."""
    before, behind = _around(
        incoming.sop_class_uid, incoming.transfer_syntax_uid, incoming.calling_ae, incoming.called_ae
    )
    body = before + _meta_element(0x0003, b"UI", incoming.sop_instance_uid) + behind
    return struct.pack("<HH2sHL", 2, 0, b"UL", 4, len(body)) + body


@functools.lru_cache(maxsize=64)
def _around(sop_class_uid: str, transfer_syntax_uid: str, calling_ae: str, called_ae: str) -> tuple[bytes, bytes]:
    """What stands before and behind the SOP instance UID in it, the same for all objects of an association."""
    before = struct.pack("<HH2sHL", 2, 1, b"OB", 0, 2) + b"\0\1" + _meta_element(0x0002, b"UI", sop_class_uid)
    behind = _meta_element(0x0010, b"UI", transfer_syntax_uid)
    behind += _meta_element(0x0012, b"UI", IMPLEMENTATION_CLASS_UID)
    behind += _meta_element(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME)
    behind += _meta_element(0x0016, b"AE", calling_ae)
    behind += _meta_element(0x0018, b"AE", called_ae)
    return before, behind


def _meta_element(number: int, vr: bytes, value: str) -> bytes:
    raw = value.encode("ascii", "replace")
    if len(raw) % 2:
        raw += b"\0" if vr == b"UI" else b" "
    return struct.pack("<HH2sH", 2, number, vr, len(raw)) + raw


def write_durably(path: str | Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write and sync a file; until then its name stands for half of it."""
    rest = [memoryview(part) for part in parts]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
    try:
        while rest:  # may stop short at the end of the disk without an error; a short file must never count
            written = os.writev(descriptor, rest)
            while rest and written >= len(rest[0]):
                written -= len(rest.pop(0))
            if rest:
                rest[0] = rest[0][written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: str | Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
