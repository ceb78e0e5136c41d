"""The other side of the wire: the real programs Orthanc and DCMTK (a storage SCP on a script is in oracle.py).

Every peer listens on a free port of 127.0.0.1, is a context manager, and is gone when its block ends, however it
ends. The programs get ``TCP_NODELAY=1``: without it DCMTK waits some 40 ms per image for a delayed ACK.
"""

from __future__ import annotations

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import TypeVar

HOST = "127.0.0.1"

T = TypeVar("T")


def wait_for(condition: Callable[[], T], timeout_s: float = 10.0, what: str = "the condition") -> T:
    """First truthy value of `condition`, asked every 10 ms; AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not come true in {timeout_s} s"
        time.sleep(0.01)  # between two looks; the condition ends the wait


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
        except BaseException:  # Ctrl-C too: no program may be left behind
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

    def delete(self, sop_instance_uid: str) -> None:
        """Lose an instance."""
        (orthanc_id,) = self.instances()[sop_instance_uid]
        connection = HTTPConnection(HOST, self.http_port, timeout=20)
        connection.request("DELETE", f"/instances/{orthanc_id}")
        assert connection.getresponse().status == 200
        connection.close()

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
