"""A PACS for the demo: Orthanc if it is installed, else a small storage SCP of our own (``python -m demo.pacs``)."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from io import BytesIO
from pathlib import Path
from typing import Protocol

from pydicom import Dataset, dcmread
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.events import Event
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # made at import time

from demo.processes import HOST, DemoFailed, Program, free_port, listening
from dicomnode.errors import BadIdentifier
from dicomnode.scp import CANNOT_UNDERSTAND, DOES_NOT_MATCH, SUCCESS, transfer_syntaxes
from dicomnode.spool import valid_uid

AE_TITLE = "DEMOPACS"
_HTTP_TIMEOUT_S = 20.0


class Pacs(Protocol):
    """What the demo asks of a PACS."""

    name: str
    port: int
    program: Program
    start_command: str
    """What a user types to have it again later."""

    def count(self, series_uid: str) -> int:
        """Number of instances that it holds of a series."""
        ...

    def instances(self, series_uid: str) -> Iterator[Dataset]:
        """The instances of a series as it holds them."""
        ...


def make(folder: Path) -> Pacs:
    """A PACS with its storage in `folder`; its `Program` is not started yet."""
    folder.mkdir(parents=True)
    found = shutil.which("Orthanc") or shutil.which("orthanc")
    return Orthanc(folder, found) if found else OwnScp(folder)


class Orthanc:
    """Orthanc (orthanc-server.com): DICOM on one port, REST and its web page on another."""

    name = "Orthanc"

    def __init__(self, folder: Path, executable: str) -> None:
        self.port = free_port()
        self.http_port = free_port()
        configuration = folder / "orthanc.json"
        settings = {
            "Name": "Demo",
            "StorageDirectory": str((folder / "storage").resolve()),
            "IndexDirectory": str((folder / "storage").resolve()),
            "Plugins": [],
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomAet": AE_TITLE,
            "DicomPort": self.port,
            "DicomAlwaysAllowStore": True,
        }
        configuration.write_text(json.dumps(settings, indent=2) + "\n")
        self.start_command = f"{executable} {configuration}   (web page: http://{HOST}:{self.http_port})"
        self.program = Program(
            self.name,
            [executable, str(configuration)],
            folder / "pacs.log",
            lambda: self._answers() and listening(self.port),
        )

    def count(self, series_uid: str) -> int:
        """Number of instances that it holds of a series."""
        return len(self._ids(series_uid))

    def instances(self, series_uid: str) -> Iterator[Dataset]:
        """The instances of a series as it holds them."""
        for identity in self._ids(series_uid):
            yield dcmread(BytesIO(self._ask(f"/instances/{identity}/file")))

    def _ids(self, series_uid: str) -> list[str]:
        found = json.loads(self._ask("/tools/lookup", series_uid.encode()))
        series = [one["ID"] for one in found if one["Type"] == "Series"]
        return [identity for one in series for identity in json.loads(self._ask(f"/series/{one}"))["Instances"]]

    def _answers(self) -> bool:
        try:
            self._ask("/system")
        except (OSError, HTTPException):
            return False
        return True

    def _ask(self, path: str, data: bytes | None = None) -> bytes:
        """Body of the answer to GET, or to POST where there are `data`."""
        connection = HTTPConnection(HOST, self.http_port, timeout=_HTTP_TIMEOUT_S)
        try:
            connection.request("GET" if data is None else "POST", path, data)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status != HTTPStatus.OK:
            raise DemoFailed(f"Orthanc answered {answer.status} to {path}")
        return body


class OwnScp:
    """A storage SCP that writes each object to ``<folder>/storage/<SeriesInstanceUID>/<SOPInstanceUID>.dcm``."""

    name = "our own small storage SCP (Orthanc is not installed)"

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._storage = folder / "storage"
        command = [sys.executable, "-m", "demo.pacs", "--port", str(self.port), "--folder", str(self._storage)]
        self.start_command = " ".join(command)
        self.program = Program("the storage SCP", command, folder / "pacs.log", lambda: listening(self.port))

    def count(self, series_uid: str) -> int:
        """Number of instances that it holds of a series."""
        return len(self._paths(series_uid))

    def instances(self, series_uid: str) -> Iterator[Dataset]:
        """The instances of a series as it holds them."""
        for path in self._paths(series_uid):
            yield dcmread(path)

    def _paths(self, series_uid: str) -> list[Path]:
        return sorted((self._storage / valid_uid(series_uid)).glob("*.dcm"))


def serve(port: int, folder: Path) -> None:
    """Store on 127.0.0.1 what comes, until SIGTERM or Ctrl-C."""

    def store(event: Event) -> int:
        try:
            header = event.dataset
            series = folder / valid_uid(str(header.SeriesInstanceUID))
            uid = valid_uid(str(header.SOPInstanceUID))
        except BadIdentifier:
            return DOES_NOT_MATCH
        except Exception:  # whatever the parser stumbles over, the sender learns that we cannot read it
            return CANNOT_UNDERSTAND
        series.mkdir(parents=True, exist_ok=True)
        part = series / f"{uid}.part"
        part.write_bytes(event.encoded_dataset())
        part.rename(series / f"{uid}.dcm")
        return SUCCESS

    entity = AE(AE_TITLE)
    for context in AllStoragePresentationContexts:
        entity.add_supported_context(str(context.abstract_syntax), transfer_syntaxes())
    entity.add_supported_context(Verification, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    server = entity.start_server((HOST, port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    print(f"{AE_TITLE} stores to {folder}, listening on {HOST}:{port}", flush=True)
    over.wait()
    if server is not None:
        server.shutdown()


def main() -> None:
    """Entry of ``python -m demo.pacs``."""
    parser = argparse.ArgumentParser(prog="python -m demo.pacs", description=serve.__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    serve(arguments.port, arguments.folder)


if __name__ == "__main__":
    main()
