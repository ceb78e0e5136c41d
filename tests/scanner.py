"""A storage SCU under the hand of the test: its association stays open between images, breaks off, or tells lies."""

from __future__ import annotations

import hashlib
import socket
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Self

from oracle import VERIFICATION
from peers import HOST
from pydicom import Dataset, dcmread
from pydicom.filereader import _read_file_meta_info, read_dataset, read_preamble
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicomnode import pdu

_TIMEOUT_S = 60.0


class Rejected(Exception):
    """A-ASSOCIATE-RJ; `args` are result, source and reason (PS3.8 table 9-21)."""


class Gone(Exception):
    """The node aborted the association or closed the connection."""


@dataclass(frozen=True, slots=True)
class Image:
    """One object to send: the bytes of its data set as they are in the file."""

    sop_class_uid: str
    sop_instance_uid: str
    series_uid: str
    syntax: str
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def data_set_of(content: bytes) -> bytes:
    """What follows the file meta information in a DICOM file, as pydicom delimits it; all of it if there is none."""
    file = BytesIO(content)
    if read_preamble(file, force=True) is None:
        return content
    _read_file_meta_info(file)
    return file.read()


def image(path: Path) -> Image:
    """What `path` holds; Implicit VR Little Endian where it does not say."""
    ds = dcmread(path, stop_before_pixels=True, force=True)
    return Image(
        str(ds.get("SOPClassUID", "")),
        str(ds.get("SOPInstanceUID", "")),
        str(ds.get("SeriesInstanceUID", "")),
        str(ds.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian)),
        data_set_of(path.read_bytes()),
    )


def header(data: bytes, syntax: str = ExplicitVRLittleEndian) -> Dataset:
    """A data set that came over the wire."""
    return read_dataset(BytesIO(data), UID(syntax).is_implicit_VR, UID(syntax).is_little_endian)


class Scanner:
    """An association with the node; released at the end of its block.

    Parameters
    ----------
    port
    images
        What may be sent; decides the presentation contexts.
    contexts
        More of them: (abstract syntax, transfer syntaxes).
    source
        Address to call from.

    Raises
    ------
    Rejected, Gone
        From ``__enter__``.
    """

    def __init__(
        self,
        port: int,
        images: Sequence[Image] = (),
        *,
        contexts: Sequence[pdu.Context] = (),
        calling: str = "SCANNER",
        called: str = "ANY",
        source: str = HOST,
    ) -> None:
        wanted: list[pdu.Context] = [(one.sop_class_uid, (one.syntax,)) for one in images]
        self._contexts = list(dict.fromkeys([*wanted, *contexts, (VERIFICATION, (ImplicitVRLittleEndian,))]))
        self._calling, self._called = calling, called
        self._port, self._source = port, source
        self._message_id = 0
        self.accepted: pdu.Accepted

    def __enter__(self) -> Self:
        self._socket = socket.create_connection((HOST, self._port), _TIMEOUT_S, (self._source, 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._send(
                pdu.associate_rq(
                    self._calling,
                    self._called,
                    self._contexts,
                    max_pdu=16384,
                    implementation_class_uid="2.25.1",
                    implementation_version_name="SCANNER",
                )
            )
            kind, answer = self._receive()
            if kind == pdu.PduType.ASSOCIATE_RJ:
                raise Rejected(*answer[-3:])
            assert kind == pdu.PduType.ASSOCIATE_AC
            self.accepted = pdu.read_associate_ac(answer)
        except BaseException:  # nobody else holds the socket yet
            self._socket.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._socket.fileno() < 0:
            return
        if kind is not None:
            self.abort()
            return
        with self._socket:
            self._send(pdu.RELEASE_RQ)
            assert self._receive()[0] == pdu.PduType.RELEASE_RP

    def store(self, one: Image, *, sop_class: str | None = None, sop_instance: str | None = None) -> int:
        """Send one image, the command naming other UIDs if told so; the status that the node answered."""
        command = self._command(one, sop_class, sop_instance)
        context = self._context(sop_class or one.sop_class_uid, one.syntax)
        pieces = list(pdu.p_data(context, command, command=True, max_pdu=self.accepted.max_pdu))
        pieces += pdu.p_data(context, one.data, command=False, max_pdu=self.accepted.max_pdu)
        if not one.data:
            pieces.append(struct.pack(">BxLLBB", pdu.PduType.P_DATA, 6, 2, context, 2))
        self._send(b"".join(pieces))
        return self._status()

    def begin(self, one: Image) -> None:
        """Send the command and half of the data set; only `abort` makes sense then."""
        context = self._context(one.sop_class_uid, one.syntax)
        whole = b"".join(pdu.p_data(context, self._command(one), command=True, max_pdu=self.accepted.max_pdu))
        half = b"".join(pdu.p_data(context, one.data, command=False, max_pdu=4096))
        self._send(whole + half[: len(half) // 2])

    def accepts(self, one: Image) -> bool:
        """Was the context of this image accepted?"""
        return pdu.context_id(self._contexts.index((one.sop_class_uid, (one.syntax,)))) in self.accepted.syntaxes

    def echo(self) -> int:
        """Status of a C-ECHO."""
        context = self._context(VERIFICATION, ImplicitVRLittleEndian)
        self._message_id += 1
        self._send(b"".join(pdu.p_data(context, pdu.c_echo_rq(self._message_id), command=True, max_pdu=0)))
        return self._status()

    def abort(self) -> None:
        """A-ABORT, and close; also where nobody listens any more."""
        with self._socket, suppress(Gone):
            self._send(pdu.ABORT)

    def _context(self, sop_class: str, syntax: str) -> int:
        return pdu.context_id(self._contexts.index((sop_class, (syntax,))))

    def _command(self, one: Image, sop_class: str | None = None, sop_instance: str | None = None) -> bytes:
        self._message_id += 1
        return pdu.c_store_rq(self._message_id, sop_class or one.sop_class_uid, sop_instance or one.sop_instance_uid)

    def _status(self) -> int:
        kind, answer = self._receive()
        if kind != pdu.PduType.P_DATA:
            raise Gone(f"the node answered with a PDU of type {kind}")
        (item,) = pdu.pdvs(answer[pdu.HEADER_BYTES :])
        elements = pdu.read_command_set(item.data)
        assert pdu.read_us(elements, pdu.Element.MESSAGE_ID_RESPONDED_TO) == self._message_id
        return pdu.read_us(elements, pdu.Element.STATUS)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise Gone(str(error)) from error

    def _receive(self) -> tuple[int, bytes]:
        start = self._exactly(pdu.HEADER_BYTES)
        kind, length = pdu.read_header(start)
        return kind, start + self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        got = b""
        while len(got) < count:
            try:
                more = self._socket.recv(count - len(got))
            except ConnectionError as error:
                raise Gone(str(error)) from error
            if not more:
                raise Gone("the node closed the connection")
            got += more
        return got


def send(port: int, images: Sequence[Image], *, calling: str = "SCANNER") -> None:
    """All images over one association, each answered 0x0000."""
    with Scanner(port, images, calling=calling) as scanner:
        for one in images:
            status = scanner.store(one)
            assert status == 0x0000, f"{one.sop_instance_uid}: 0x{status:04X}"


def renamed(one: Image, what: str) -> Image:
    """The same image under SOP Instance and Series Instance UIDs of its own, of the same length; all else as it is."""
    data = zlib.decompress(one.data, -zlib.MAX_WBITS) if UID(one.syntax).is_deflated else one.data
    digits = str(int.from_bytes(hashlib.sha256(what.encode()).digest()))
    uids = []
    for old in (one.sop_instance_uid, one.series_uid):
        new = f"{old[:-8].rstrip('.')}.{digits}"[: len(old)] if len(old) > 16 else old
        data = data.replace(old.encode(), new.encode())
        uids.append(new)
    if UID(one.syntax).is_deflated:
        packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        data = packer.compress(data) + packer.flush()
        data += b"\0" * (len(data) % 2)
    return replace(one, sop_instance_uid=uids[0], series_uid=uids[1], data=data)
