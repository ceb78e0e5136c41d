"""Received objects on disk: the bytes exactly as they came, whole or not at all.

::

    <spool>/instances/<SeriesInstanceUID>/<SOPInstanceUID>.dcm      what was acknowledged
    <spool>/conflicts/<SeriesInstanceUID>/<SOPInstanceUID>.<digest>.dcm
                                                                   same UID, other bytes: kept apart
    <spool>/derived/<job id>/                                       results, with their manifest.json

An object is answered 0x0000 only after its file was synced, renamed into place and the folder synced (PS3.4 B.2.3
leaves the promise to the SCP; this is what makes it true across a power cut).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import struct
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

from pydicom import dcmread

from dicomnode.errors import BadIdentifier, NodeError, SpoolError, SpoolFull

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
    """What a C-STORE-RQ says of its data set, after validation."""

    sop_instance_uid: str
    sop_class_uid: str
    series_uid: str
    study_uid: str
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
        If the folder cannot be made or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.instances = root / "instances"
        self.conflicts = root / "conflicts"
        self.derived = root / "derived"
        made = not root.is_dir()
        try:
            for folder in (self.instances, self.conflicts, self.derived):
                folder.mkdir(parents=True, exist_ok=True)
            sync_folder(root)
            if made:
                sync_folder(root.parent)
            self._lock_file = hold(root / "lock")
        except OSError as error:
            raise SpoolError(f"spool {root} cannot be used: {error}; check the path and its owner") from error
        self._placing = threading.Lock()
        self._lasting: set[Path] = set()
        """Series folders whose own name is synced. That one exists says nothing: its maker may not be so far yet."""

    def close(self) -> None:
        """Give the folder free for another node."""
        os.close(self._lock_file)

    def remove_partial(self) -> int:
        """Delete what a crash left half-written; the number of received files among it, none of them acknowledged.

        Call before reception starts.
        """
        for folder in self.derived.glob(f"*{PART_SUFFIX}"):
            # A child of the dead node may still be at its end in there; the next start deletes the rest.
            shutil.rmtree(folder, ignore_errors=True)
        parts = [*self.instances.glob(f"*/*{PART_SUFFIX}"), *self.conflicts.glob(f"*/*{PART_SUFFIX}")]
        for part in parts:
            part.unlink()
        return len(parts)

    def free_bytes(self) -> int:
        """Space left for us on the spool's file system."""
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    def store(self, incoming: Incoming, data: memoryview, *, keep_conflict: bool = True) -> tuple[Kept, Instance]:
        """Keep one object durably. When this returns, a power cut does not lose it.

        Raises
        ------
        SpoolFull
            No space (answer 0xA700). Nothing of the object is left behind.
        SpoolError
            Any other failure to write. Nothing is left behind.
        """
        digest = hashlib.sha256(data).hexdigest()
        try:
            return self._store(incoming, data, digest, keep_conflict)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise SpoolFull(f"no space left in {self.root}; free some or move the spool") from error
            raise SpoolError(f"cannot keep {incoming.sop_instance_uid}: {error}") from error

    def _store(self, incoming: Incoming, data: memoryview, digest: str, keep_conflict: bool) -> tuple[Kept, Instance]:
        folder = self._folder(self.instances, incoming.series_uid)
        path = folder / f"{incoming.sop_instance_uid}.dcm"
        header = _PREAMBLE + _file_meta(incoming)
        size_bytes = len(header) + len(data)
        if not path.exists():
            part = _write_part(folder, header, data)
            # Two associations may bring the same object at once; the second must not overwrite the first.
            with self._placing:
                if not path.exists():
                    _put_in_place(part, path)
                    return Kept.NEW, _instance(incoming, path, size_bytes, digest)
            part.unlink()
        if dataset_digest(path) == digest:
            # Whoever wrote it may not have synced the folder yet, and we are about to promise that it is safe.
            sync_folder(folder)
            return Kept.SAME, _instance(incoming, path, path.stat().st_size, digest)
        if not keep_conflict:
            return Kept.REFUSED, _instance(incoming, path, path.stat().st_size, digest)
        apart = self._folder(self.conflicts, incoming.series_uid)
        kept = apart / f"{incoming.sop_instance_uid}.{digest[:16]}.dcm"
        _put_in_place(_write_part(apart, header, data), kept)
        return Kept.CONFLICT, _instance(incoming, kept, size_bytes, digest)

    def _folder(self, under: Path, series_uid: str) -> Path:
        folder = under / series_uid
        if folder not in self._lasting or not folder.is_dir():
            folder.mkdir(exist_ok=True)
            sync_folder(under)
            if len(self._lasting) >= _LASTING_FOLDERS:
                self._lasting.clear()  # a node runs for years; forgetting costs a sync
            self._lasting.add(folder)
        return folder

    def count_conflicts(self, series_uid: str) -> int:
        """Objects of a series that were kept apart because their UID was here with other bytes."""
        return sum(1 for _ in self.conflicts.glob(f"{series_uid}/*.dcm"))

    def paths(self) -> Iterator[Path]:
        """Files of all acknowledged instances, conflicts left out."""
        return self.instances.glob("*/*.dcm")


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


def _instance(incoming: Incoming, path: Path, size_bytes: int, digest: str) -> Instance:
    return Instance(
        sop_instance_uid=incoming.sop_instance_uid,
        sop_class_uid=incoming.sop_class_uid,
        series_uid=incoming.series_uid,
        study_uid=incoming.study_uid,
        transfer_syntax_uid=incoming.transfer_syntax_uid,
        path=path,
        size_bytes=size_bytes,
        sha256=digest,
        received_at=datetime.now(UTC).replace(tzinfo=None),
        calling_ae=incoming.calling_ae,
        called_ae=incoming.called_ae,
    )


def _file_meta(incoming: Incoming) -> bytes:
    """File Meta Information (PS3.10 section 7.1). The AE titles let the index be rebuilt from the files alone."""

    def element(number: int, vr: bytes, value: str) -> bytes:
        raw = value.encode("ascii", "replace")
        if len(raw) % 2:
            raw += b"\0" if vr == b"UI" else b" "
        return struct.pack("<HH2sH", 2, number, vr, len(raw)) + raw

    body = struct.pack("<HH2sHL", 2, 1, b"OB", 0, 2) + b"\0\1"
    body += element(0x0002, b"UI", incoming.sop_class_uid)
    body += element(0x0003, b"UI", incoming.sop_instance_uid)
    body += element(0x0010, b"UI", incoming.transfer_syntax_uid)
    body += element(0x0012, b"UI", IMPLEMENTATION_CLASS_UID)
    body += element(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME)
    body += element(0x0016, b"AE", incoming.calling_ae)
    body += element(0x0018, b"AE", incoming.called_ae)
    return struct.pack("<HH2sHL", 2, 0, b"UL", 4, len(body)) + body


def _write_part(folder: Path, header: bytes, data: memoryview) -> Path:
    part = folder / f"{uuid.uuid4().hex}{PART_SUFFIX}"
    try:
        write_durably(part, (header, data))
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return part


def _put_in_place(part: Path, path: Path) -> None:
    try:
        part.rename(path)
    except OSError:  # a new name needs space too
        part.unlink()
        raise
    sync_folder(path.parent)


def write_durably(path: Path, parts: Sequence[bytes | memoryview]) -> None:
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


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
