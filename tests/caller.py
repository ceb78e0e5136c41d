"""A peer that calls the node byte by byte, and a reception to call: what no program would send, somebody will."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from peers import HOST, free_port, wait_for
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from scanner import Image
from tables import config_of

from dicomnode import pdu
from dicomnode.scp import StorageServer
from dicomnode.spool import Instance, Kept, Spool

CONTEXTS: list[pdu.Context] = [
    (CTImageStorage, (ExplicitVRLittleEndian,)),
    (pdu.VERIFICATION, (ImplicitVRLittleEndian,)),
    ("1.2.840.10008.5.1.4.31", (ImplicitVRLittleEndian,)),
]
CT, ECHO, WORKLIST = (pdu.context_id(k) for k in range(3))
"""Context IDs of `CONTEXTS`; the last one is not accepted."""
_GONE = (ConnectionError, ssl.SSLError)
"""The node closed the connection; over TLS without a word."""


def whole(kind: int, body: bytes = b"") -> bytes:
    """A PDU."""
    return struct.pack(">BxL", kind, len(body)) + body


def pdv(context: int, control: int, data: bytes) -> bytes:
    """A presentation data value item; bit 0 of `control` is a command, bit 1 the last fragment."""
    return struct.pack(">LBB", len(data) + 2, context, control) + data


def p_data(context: int, control: int, data: bytes) -> bytes:
    """A P-DATA-TF of one item."""
    return whole(pdu.PduType.P_DATA, pdv(context, control, data))


def request(calling: str = "CALLER", called: str = "DICOMNODE", contexts: Sequence[pdu.Context] = CONTEXTS) -> bytes:
    """An A-ASSOCIATE-RQ."""
    return pdu.associate_rq(
        calling, called, contexts, max_pdu=16384, implementation_class_uid="2.25.1", implementation_version_name="X"
    )


def command(**changes: bytes | None) -> bytes:
    """Command set of a C-STORE-RQ; `changes` by element number as ``e0100=b"..."``, None leaves it out."""
    elements: dict[int, bytes | None] = {
        0x0002: pdu.ui(CTImageStorage),
        0x0100: pdu.us(pdu.C_STORE_RQ),
        0x0110: pdu.us(1),
        0x0700: pdu.us(0),
        0x0800: pdu.us(pdu.DATA_SET_FOLLOWS),
        0x1000: pdu.ui("1.2.3.4"),
    }
    elements.update({int(name[1:], 16): value for name, value in changes.items()})
    return pdu.command_set({number: value for number, value in elements.items() if value is not None})


def store_rq(one: Image, **changes: bytes | None) -> bytes:
    """PDUs of a C-STORE of this image."""
    said = command(e1000=pdu.ui(one.sop_instance_uid), **changes)
    return p_data(CT, 3, said) + b"".join(pdu.p_data(CT, one.data, command=False, max_pdu=pdu.NO_LIMIT_PDU))


class Caller:
    """A TCP connection to the node, with `tls` encrypted.

    `receive_buffer` is the room for answers that nobody reads, in bytes.
    """

    def __init__(
        self, port: int, source: str = HOST, *, receive_buffer: int | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self._socket = socket.socket()
        self._socket.settimeout(20)
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.bind((source, 0))
        try:
            self._socket.connect((HOST, port))
            if tls is not None:
                self._socket = tls.wrap_socket(self._socket, server_hostname=HOST)
        except OSError:
            self._socket.close()
            raise
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def push(self, data: bytes) -> bool:
        """Send as long as the node takes it; False if it closed the connection before the end."""
        try:
            self._socket.sendall(data)
        except _GONE:
            return False
        return True

    def trickle(self, data: bytes, pause_s: float) -> None:
        """Send byte by byte until the node closes the connection."""
        over = threading.Event()
        try:
            for k in range(len(data)):
                self._socket.sendall(data[k : k + 1])
                over.wait(pause_s)
        except _GONE:
            return

    def receive(self) -> tuple[int, bytes] | None:
        """Type and body of the next PDU; None if the node closed the connection."""
        try:
            header = self._file.read(pdu.HEADER_BYTES)
            if len(header) < pdu.HEADER_BYTES:
                return None
            kind, length = pdu.read_header(header)
            return kind, self._file.read(length)
        except _GONE:
            return None

    def associate(self, **titles: str) -> Self:
        """Be accepted."""
        self.send(request(**titles))
        answer = self.receive()
        assert answer is not None
        assert answer[0] == pdu.PduType.ASSOCIATE_AC, answer
        return self

    def elements(self) -> dict[int, bytes]:
        """Command set of the next answer, which has no data set."""
        answer = self.receive()
        assert answer is not None
        assert answer[0] == pdu.PduType.P_DATA, answer
        (item,) = pdu.pdvs(answer[1])
        assert item.command
        assert item.last
        return pdu.read_command_set(item.data)

    def status(self) -> int:
        """Status of the next answer."""
        return pdu.read_us(self.elements(), pdu.Element.STATUS)

    def echo(self, message_id: int = 7) -> int:
        """Status of a C-ECHO."""
        self.send(p_data(ECHO, 3, pdu.c_echo_rq(message_id)))
        elements = self.elements()
        assert pdu.read_us(elements, pdu.Element.MESSAGE_ID_RESPONDED_TO) == message_id
        return pdu.read_us(elements, pdu.Element.STATUS)

    def aborted(self) -> int | None:
        """Reason of the A-ABORT by the provider that comes next, and the end of the connection; None if only that."""
        answer = self.receive()
        if answer is None:
            return None
        assert answer[0] == pdu.PduType.ABORT, answer
        assert answer[1][2] == 2
        assert self.receive() is None
        return answer[1][3]

    def release(self) -> None:
        """Be released, in order."""
        self.send(pdu.RELEASE_RQ)
        assert self.receive() == (pdu.PduType.RELEASE_RP, bytes(4))
        assert self.receive() is None


class Reception:
    """A receiver in this process, and what it kept."""

    def __init__(self, folder: Path, **reception: Any) -> None:
        self.spool = Spool(folder)
        self.stored: list[Instance] = []
        settings = {"min_free_mb": 0, "sop_classes": ["CTImageStorage"], **reception}
        config = config_of(node={"port": free_port()}, reception=settings)
        self.server = StorageServer(config, self.spool, [], self._on_stored)
        self.server.start()
        self.port = self.server.port

    def _on_stored(self, kept: Kept, instance: Instance, header: object) -> None:
        self.stored.append(instance)

    def files(self) -> list[Path]:
        """Everything below the spool but its lock."""
        return sorted(path for path in self.spool.root.rglob("*") if path.is_file() and path.name != "lock")

    def associations(self) -> int:
        """How many are open."""
        return len(self.server._series_of)

    def memory_left(self) -> int:
        """For objects that are on their way, in bytes."""
        return self.server._memory.left_bytes


def threads_and_descriptors() -> tuple[int, int]:
    """Of this process."""
    return threading.active_count(), sum(1 for _ in Path("/proc/self/fd").iterdir())


@contextmanager
def reception(folder: Path, **settings: Any) -> Iterator[Reception]:
    """A started receiver; afterwards no thread and no descriptor of its callers may be left."""
    made = Reception(folder, **settings)
    before = threads_and_descriptors()
    try:
        yield made
        wait_for(lambda: threads_and_descriptors() <= before, 15, f"threads and descriptors to be back at {before}")
        assert made.associations() == 0
    finally:
        made.server.stop(0)
        made.spool.close()


def seconds_until_closed(caller: Caller) -> float:
    """Time until the node closes the connection, whatever it says before."""
    begun = time.monotonic()
    while caller.receive() is not None:
        pass
    return time.monotonic() - begun
