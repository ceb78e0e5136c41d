"""A storage SCP that does as it is told, and records what it got."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from peers import HOST, free_port, wait_for
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
    acse_timeout_s
        Longest wait for the request of somebody who connected; `stop` waits for its end, too.
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
        acse_timeout_s: float = 30.0,
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
        self._ae.acse_timeout = acse_timeout_s
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
        self._server = self._ae.make_server((HOST, self.port), evt_handlers=self._handlers())
        # As AE.start_server does it, but there a server takes half a second to notice that it shall end.
        self._ae._servers.append(self._server)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _handlers(self) -> list[Any]:
        return [
            (evt.EVT_CONN_OPEN, self._on_connection),
            (evt.EVT_REQUESTED, self._on_request),
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_DATA_RECV, self._on_data),
            (evt.EVT_RELEASED, self._on_released),
            (evt.EVT_ABORTED, self._on_aborted),
        ]

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
