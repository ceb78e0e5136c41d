"""The other side of the wire: a storage SCP that does as it is told, and the real programs Orthanc and DCMTK.

Every peer listens on a free port of 127.0.0.1, is a context manager, and is gone when its block ends, however it
ends. The programs get ``TCP_NODELAY=1``: without it DCMTK waits some 40 ms per image for a delayed ACK.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from pydicom import Dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from pynetdicom import AE, AllStoragePresentationContexts, evt

HOST = "127.0.0.1"
VERIFICATION = "1.2.840.10008.1.1"
SYNTAXES: tuple[UID, ...] = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    JPEG2000Lossless,
    RLELossless,
)
"""What `StorageOracle` accepts unless told otherwise."""

T = TypeVar("T")


def wait_for(condition: Callable[[], T], timeout_s: float = 10.0, what: str = "the condition") -> T:
    """First truthy value of `condition`, asked every 10 ms; AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not come true in {timeout_s} s"
        time.sleep(0.01)


_handed_out: set[int] = set()
_handing_out = threading.Lock()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, never the same twice in one process.

    Taken below the range from which the kernel picks the local ports of outgoing connections, so that none of those
    grabs it before the peer does.
    """
    with _handing_out:
        for _ in range(1000):
            port = random.SystemRandom().randrange(11000, 32000)
            if port in _handed_out:
                continue
            with socket.socket() as probe:
                try:
                    probe.bind((HOST, port))
                except OSError:
                    continue
            _handed_out.add(port)
            return port
    raise RuntimeError("no free port between 11000 and 32000")


def listening(port: int) -> bool:
    """Does somebody accept TCP connections there?"""
    try:
        with socket.create_connection((HOST, port), timeout=1):
            return True
    except OSError:
        return False


# --- a storage SCP that does as it is told -----------------------------------------------------------------------


@dataclass(slots=True)
class Script:
    """How a `StorageOracle` misbehaves; may be changed while it runs. Images are counted from 1 over its whole life."""

    status: int = 0x0000
    """Answer to every image that nothing below mentions."""
    status_of: Mapping[str, int] = field(default_factory=dict)
    """Answer by SOP Instance UID."""
    status_of_nth: Mapping[int, int] = field(default_factory=dict)
    """Answer by the number of the image; goes before `status_of`."""
    comment: str = ""
    """ErrorComment of answers other than 0x0000."""
    reject: Literal["permanent", "transient"] | None = None
    """Refuse associations: called AE title not recognised, or local limit exceeded."""
    drop_at: Collection[int] = ()
    """Images after whose arrival the TCP connection is closed without an answer; they are not kept."""
    drop_stored_at: Collection[int] = ()
    """The same, but they are kept: stored, and nobody was told."""
    abort_at: Collection[int] = ()
    """Images answered with an A-ABORT; not kept."""
    silent_at: Collection[int] = ()
    """Images that never get an answer while the oracle lives; not kept."""
    delay_s: float = 0.0
    """Wait before every answer."""
    stop_reading_after: int | None = None
    """Bytes of P-DATA after which an association is read no further."""


class StorageOracle:
    """A storage and verification SCP in this process that records what it got and answers as its `script` says.

    Parameters
    ----------
    script
        May be replaced or changed at any time; read at every event.
    ae_title
    syntaxes
        Transfer syntaxes it accepts, the preferred first; ``[ImplicitVRLittleEndian]`` for a peer of the old school.
    sop_classes
        Storage SOP classes it accepts; every one that pynetdicom knows if None.
    max_pdu
        Largest PDU it takes, in bytes; 0 is no limit.
    port
        To come back at the same place after `stop`.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        ae_title: str = "ORACLE",
        syntaxes: Sequence[str] = SYNTAXES,
        sop_classes: Sequence[str] | None = None,
        max_pdu: int = 16382,
        port: int | None = None,
    ) -> None:
        self.script = script or Script()
        self.ae_title = ae_title
        self.host = HOST
        self.port = free_port() if port is None else port
        self.received: dict[str, list[str]] = defaultdict(list)
        """SOP Instance UID → SHA-256 of each data set kept under it, as it came, oldest first."""
        self.datasets: dict[str, bytes] = {}
        """SOP Instance UID → the data set kept last, encoded in `syntax_of`."""
        self.syntax_of: dict[str, str] = {}
        self.images = 0
        """C-STORE requests that arrived whole."""
        self.associations = 0
        """Association requests, refused ones included."""
        self.released = 0
        self.aborted = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._read: dict[int, int] = defaultdict(int)
        self._connections: list[socket.socket] = []
        self._server: Any = None
        self._ae = AE(ae_title)
        self._ae.maximum_pdu_size = max_pdu
        self._ae.maximum_associations = 1000
        self._ae.add_supported_context(VERIFICATION)
        classes = sop_classes or [str(context.abstract_syntax) for context in AllStoragePresentationContexts]
        for sop_class in classes:
            self._ae.add_supported_context(sop_class, list(syntaxes))

    def __enter__(self) -> StorageOracle:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Listen."""
        self._over.clear()
        handlers: list[Any] = [
            (evt.EVT_CONN_OPEN, self._on_connection),
            (evt.EVT_REQUESTED, self._on_request),
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_DATA_RECV, self._on_data),
            (evt.EVT_RELEASED, self._on_released),
            (evt.EVT_ABORTED, self._on_aborted),
        ]
        self._server = self._ae.make_server((HOST, self.port), evt_handlers=handlers)
        # As AE.start_server does it, but there a server takes half a second to notice that it shall end.
        self._ae._servers.append(self._server)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and every connection; what was received stays."""
        if self._server is None:
            return
        self._over.set()
        associations = self._server.active_associations
        self._server.shutdown()
        self._server = None
        for association in associations:
            association.join(timeout=5)
        # pynetdicom forgets to close a socket whose peer went first.
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def sop_instance_uids(self) -> list[str]:
        """SOP Instance UIDs of what it keeps, sorted."""
        with self._lock:
            return sorted(uid for uid, digests in self.received.items() if digests)

    def _on_connection(self, event: Any) -> None:
        self._connections.append(event.assoc.dul.socket.socket)

    def _on_request(self, event: Any) -> None:
        with self._lock:
            self.associations += 1
        if self.script.reject is not None:
            event.assoc.acse.send_reject(*((1, 1, 7) if self.script.reject == "permanent" else (2, 3, 2)))
            event.assoc.kill()

    def _on_released(self, event: Any) -> None:
        with self._lock:
            self.released += 1

    def _on_aborted(self, event: Any) -> None:
        with self._lock:
            self.aborted += 1

    def _on_data(self, event: Any) -> None:
        """Runs in the thread that reads the socket: to wait here is to stop reading."""
        if event.data[:1] != b"\x04":
            return
        self._read[id(event.assoc)] += len(event.data)
        limit = self.script.stop_reading_after
        if limit is not None and self._read[id(event.assoc)] > limit:
            self._over.wait()

    def _on_store(self, event: Any) -> Any:
        script = self.script
        with self._lock:
            self.images += 1
            n = self.images
        uid = str(event.request.AffectedSOPInstanceUID)
        if n in script.silent_at:
            self._over.wait()
            return 0x0110
        if n in script.abort_at:
            event.assoc.abort()
            return 0x0110
        if n in script.drop_at:
            self._drop(event)
            return 0x0110
        status = script.status_of_nth.get(n, script.status_of.get(uid, script.status))
        if status == 0x0000 or 0xB000 <= status <= 0xBFFF:
            data = event.request.DataSet.getvalue()
            with self._lock:
                self.received[uid].append(hashlib.sha256(data).hexdigest())
                self.datasets[uid] = data
                self.syntax_of[uid] = str(event.context.transfer_syntax)
        if n in script.drop_stored_at:
            self._drop(event)
            return 0x0110
        if script.delay_s:
            self._over.wait(script.delay_s)
        if status == 0x0000 or not script.comment:
            return status
        answer = Dataset()
        answer.Status = status
        answer.ErrorComment = script.comment
        return answer

    def _drop(self, event: Any) -> None:
        """Close the connection under the association; the oracle goes on listening."""
        event.assoc.dul.socket.socket.shutdown(socket.SHUT_RDWR)
        wait_for(lambda: event.assoc.acse.is_aborted() or not event.assoc.dul.is_alive(), what="the closed connection")


# --- real programs -----------------------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    return {**os.environ, "TCP_NODELAY": "1"}


class _Program:
    """A server program that runs in the background, with its log."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, command: Sequence[str], ready: Callable[[], bool], timeout_s: float, cwd: Path) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=_environment(), cwd=cwd
            )
        process = self.process
        try:
            wait_for(lambda: process.poll() is not None or ready(), timeout_s, f"{command[0]} listening")
            if process.poll() is not None:
                said = self.log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{command[0]} ended at once with {process.returncode}:\n{said}")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ask it to end, kill it after 10 s."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process = None

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self.process = None


class Orthanc:
    """A real PACS with its own storage folder; `start`, `stop` and `kill` may follow each other in any order.

    Parameters
    ----------
    folder
        Configuration, log and storage go here; a second `start` finds the same storage.
    overwrite_instances
        ``OverwriteInstances``: does an instance that comes again replace the first? (Orthanc's default is no.)
    modalities
        Name → (AE title, host, port) of peers it may send to; storage commitment reports need the requestor here.
    """

    def __init__(
        self,
        folder: Path,
        *,
        ae_title: str = "ORTHANC",
        overwrite_instances: bool = False,
        modalities: Mapping[str, tuple[str, str, int]] | None = None,
    ) -> None:
        self.folder = folder
        self.ae_title = ae_title
        self.host = HOST
        self.port = free_port()
        self.http_port = free_port()
        self._program = _Program(folder / "orthanc.log")
        self._configuration = {
            "Name": "test",
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "Plugins": [],
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomAet": ae_title,
            "DicomPort": self.port,
            "DicomCheckCalledAet": False,
            "DicomAlwaysAllowEcho": True,
            "DicomAlwaysAllowStore": True,
            "DicomCheckModalityHost": False,
            "UnknownSopClassAccepted": True,
            "DicomThreadsCount": 4,
            "ConcurrentJobs": 1,
            "SaveJobs": False,
            "OverwriteInstances": overwrite_instances,
            "DicomModalities": {name: list(where) for name, where in (modalities or {}).items()},
        }

    @property
    def url(self) -> str:
        """Base of its REST interface."""
        return f"http://{HOST}:{self.http_port}"

    def start(self) -> None:
        """Start on its storage; returns when REST and DICOM both answer (20 s at most)."""
        (self.folder / "storage").mkdir(parents=True, exist_ok=True)
        configuration = self.folder / "orthanc.json"
        configuration.write_text(json.dumps(self._configuration))
        program = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
        self._program.run([program, str(configuration)], self._ready, 20, self.folder)

    def stop(self) -> None:
        """Terminate it; kill it if it does not obey."""
        self._program.stop()

    def kill(self) -> None:
        """SIGKILL."""
        self._program.kill()

    def _ready(self) -> bool:
        try:
            self.get("/system")
        except OSError:
            return False
        return listening(self.port)

    def get(self, path: str) -> bytes:
        """Body of ``GET path``; OSError if Orthanc is away or says no."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url + path, timeout=20) as answer:
            body: bytes = answer.read()
            return body

    def instances(self) -> dict[str, list[str]]:
        """SOP Instance UID → Orthanc's ids of the instances it holds under it (one, unless something is wrong)."""
        held: dict[str, list[str]] = defaultdict(list)
        for one in json.loads(self.get("/instances?expand")):
            held[one["MainDicomTags"]["SOPInstanceUID"]].append(one["ID"])
        return dict(held)

    def sop_instance_uids(self) -> list[str]:
        """SOP Instance UIDs it holds, sorted, one entry per stored instance."""
        return sorted(uid for uid, ids in self.instances().items() for _ in ids)

    def series(self) -> dict[str, list[str]]:
        """Series Instance UID → SOP Instance UIDs, sorted."""
        held: dict[str, list[str]] = defaultdict(list)
        for one in json.loads(self.get("/series?expand")):
            for instance in json.loads(self.get(f"/series/{one['ID']}/instances")):
                held[one["MainDicomTags"]["SeriesInstanceUID"]].append(instance["MainDicomTags"]["SOPInstanceUID"])
        return {uid: sorted(instances) for uid, instances in held.items()}

    def count(self) -> int:
        """How many instances it holds."""
        return int(json.loads(self.get("/statistics"))["CountInstances"])

    def file(self, sop_instance_uid: str) -> bytes:
        """The stored DICOM file; KeyError if it holds none, AssertionError if more than one."""
        (orthanc_id,) = self.instances()[sop_instance_uid]
        return self.get(f"/instances/{orthanc_id}/file")


@contextmanager
def orthanc(
    folder: Path,
    *,
    ae_title: str = "ORTHANC",
    overwrite_instances: bool = False,
    modalities: Mapping[str, tuple[str, str, int]] | None = None,
) -> Iterator[Orthanc]:
    """A started `Orthanc` in a sub-folder of `folder`; stopped at the end. Say ``require_peer("Orthanc")`` first."""
    home = folder / f"orthanc-{ae_title}"
    home.mkdir(parents=True, exist_ok=True)
    peer = Orthanc(home, ae_title=ae_title, overwrite_instances=overwrite_instances, modalities=modalities)
    try:
        peer.start()
        yield peer
    finally:
        peer.stop()


@dataclass(frozen=True, slots=True)
class Storescp:
    """A running DCMTK storescp and the folder it writes to, one file per instance."""

    host: str
    port: int
    ae_title: str
    folder: Path

    def files(self) -> list[Path]:
        """What it has received, sorted by name (modality prefix and SOP Instance UID)."""
        return sorted(path for path in self.folder.iterdir() if path.is_file())


@contextmanager
def storescp(
    folder: Path, *, max_pdu: int = 131072, ae_title: str = "STORESCP", options: Sequence[str] = ()
) -> Iterator[Storescp]:
    """DCMTK's storage SCP, writing what it receives bit for bit into ``folder/storescp-PORT``."""
    port = free_port()
    received = folder / f"storescp-{port}"
    received.mkdir(parents=True)
    program = _Program(folder / f"storescp-{port}.log")
    command = ["storescp", "--bit-preserving", "-pdu", str(max_pdu), "-aet", ae_title, "-od", str(received)]
    try:
        program.run([*command, *options, str(port)], lambda: listening(port), 10, folder)
        yield Storescp(HOST, port, ae_title, received)
    finally:
        program.stop()


def storescu(
    port: int,
    files: Sequence[Path],
    *,
    called: str = "ANY",
    calling: str = "STORESCU",
    options: Sequence[str] = (),
    timeout_s: float = 120,
) -> subprocess.CompletedProcess[str]:
    """DCMTK storescu, one association; look at ``returncode``. ``options=["-xf", ...]`` and so on go first."""
    return _client(["storescu", "-aec", called, "-aet", calling, *options, HOST, str(port)], files, timeout_s)


def dcmsend(
    port: int,
    files: Sequence[Path],
    *,
    called: str = "ANY",
    calling: str = "DCMSEND",
    options: Sequence[str] = (),
    timeout_s: float = 120,
) -> subprocess.CompletedProcess[str]:
    """DCMTK dcmsend: negotiates each file's own syntax, one association if it can."""
    return _client(["dcmsend", "-aec", called, "-aet", calling, *options, HOST, str(port)], files, timeout_s)


def echoscu(
    port: int, *, called: str = "ANY", calling: str = "ECHOSCU", options: Sequence[str] = (), timeout_s: float = 30
) -> subprocess.CompletedProcess[str]:
    """DCMTK echoscu; ``returncode`` 0 is an answered C-ECHO."""
    return _client(["echoscu", "-aec", called, "-aet", calling, *options, HOST, str(port)], (), timeout_s)


def _client(command: list[str], files: Sequence[Path], timeout_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *map(str, files)],
        env=_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )
