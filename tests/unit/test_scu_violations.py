"""The SCU against raw sockets that break the rules of PS3.7 and PS3.8: always an error that names the peer, in time."""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from ct_builder import phantom, write_series
from peers import HOST
from pydicom.uid import CTImageStorage, JPEGLSLossless
from test_scu import accepted, outgoing, peer_at, send

from dicomnode import pdu
from dicomnode.errors import PeerAborted, PeerError, PeerTimedOut, ProtocolViolation, VerificationFailed
from dicomnode.scu import Answer, Outgoing, Refused, echo, store


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> list[Outgoing]:
    """Two small slices."""
    return [outgoing(path) for path in write_series(tmp_path_factory.mktemp("ct"), phantom(2, 32), name="broken")]


class RawPeer:
    """The acceptor's end of one connection, byte by byte."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")

    def read(self) -> tuple[int, bytes]:
        header = self._file.read(6)
        return header[0], self._file.read(struct.unpack(">L", header[2:])[0])

    def read_part(self, count: int) -> bytes:
        """So many bytes of the next PDU."""
        return self._file.read(count)

    def write(self, data: bytes) -> None:
        self._connection.sendall(data)

    def until_closed(self) -> bytes:
        """What the SCU still says."""
        return self._file.read()

    def read_to_release(self) -> bool:
        """Is the next PDU, if there is one, a release request?"""
        return self._file.read(10)[:1] == b"\5"

    def accept(self, *, syntax: bytes | None = None) -> None:
        """Answer the association request: every context accepted, with `syntax` or the first that was proposed."""
        kind, request = self.read()
        assert kind == 1
        items, offset = b"", 68
        while offset < len(request):
            item, length = struct.unpack_from(">BxH", request, offset)
            body = request[offset + 4 : offset + 4 + length]
            if item == 0x20:
                at = 4
                while body[at] != 0x40:
                    at += 4 + struct.unpack_from(">H", body, at + 2)[0]
                proposed = body[at + 4 : at + 4 + struct.unpack_from(">H", body, at + 2)[0]]
                granted = syntax or proposed
                result = body[:1] + b"\0\0\0" + struct.pack(">BxH", 0x40, len(granted)) + granted
                items += struct.pack(">BxH", 0x21, len(result)) + result
            offset += 4 + length
        application = b"1.2.840.10008.3.1.1.1"
        user = struct.pack(">BxHL", 0x51, 4, 16384) + struct.pack(">BxH", 0x52, 5) + b"1.2.3"
        answer = (
            request[:68]
            + struct.pack(">BxH", 0x10, len(application))
            + application
            + items
            + struct.pack(">BxH", 0x50, len(user))
            + user
        )
        self.write(struct.pack(">BxL", 2, len(answer)) + answer)

    def request(self) -> tuple[int, int]:
        """Read a whole C-STORE or C-ECHO request; its context and message ID."""
        command, lasts, context = b"", 0, 0
        while True:
            kind, body = self.read()
            assert kind == 4
            for item in pdu.pdvs(body):
                context = item.context_id
                command += bytes(item.data) if item.command else b""
                lasts += item.last
            elements = pdu.read_command_set(command) if lasts else {}
            if lasts == (1 if elements.get(0x0800) == b"\1\1" else 2):
                return context, int.from_bytes(elements[0x0110], "little")


def response(context: int, message_id: int, **changes: bytes | None) -> bytes:
    """A C-STORE response PDU; `changes` by element number as ``e0900=b"..."``, None leaves it out."""
    elements: dict[int, bytes | None] = {
        0x0002: pdu.ui(CTImageStorage),
        0x0100: pdu.us(0x8001),
        0x0120: pdu.us(message_id),
        0x0800: pdu.us(0x0101),
        0x0900: pdu.us(0),
    }
    elements.update({int(name[1:], 16): value for name, value in changes.items()})
    whole = pdu.command_set({number: value for number, value in elements.items() if value is not None})
    return b"".join(pdu.p_data(context, whole, command=True, max_pdu=16384))


@contextmanager
def raw_peer(behave: Callable[[RawPeer], None]) -> Iterator[int]:
    """Port of a peer that runs `behave` on its one connection; what it raises fails the test."""
    failures: list[BaseException] = []
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(10)
                try:
                    behave(RawPeer(connection))
                except BaseException as error:  # handed to the test
                    failures.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            thread.join(15)
    assert not failures, failures
    assert not thread.is_alive()


def answering(reply: Callable[[int, int], bytes]) -> Callable[[RawPeer], None]:
    """Accept, read one request, write the reply to (context ID, message ID), let go."""

    def behave(raw: RawPeer) -> None:
        raw.accept()
        raw.write(reply(*raw.request()))
        if raw.read_to_release():
            raw.write(b"\6\0\0\0\0\4\0\0\0\0")

    return behave


ABORT = b"\7\0\0\0\0\4\0\0\0\0"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (lambda c, m: response(c, m + 1), f"message {2} while {1} is outstanding"),
        (lambda c, m: response(c + 2, m), "no part of the response"),
        (lambda c, m: response(c, m, e0100=pdu.us(0x8030)), "not the response"),
        (lambda c, m: response(c, m, e0800=pdu.us(0)), "announces a data set"),
        (lambda c, m: response(c, m, e0900=None), "STATUS"),
        (lambda c, m: response(c, m, e0120=b"\1"), "MESSAGE_ID_RESPONDED_TO"),
        (lambda c, m: b"\4\0\0\0\0\5\0\0\0\2\1", "ends inside"),
        (lambda c, m: b"\4\0\xff\xff\xff\xff", "4294967295 bytes"),
        (lambda c, m: b"\x09\0\0\0\0\0", "type 9"),
        (lambda c, m: b"\2\0\0\0\0\0", "type 2"),
        (lambda c, m: struct.pack(">BxLLBB", 4, 16006, 16002, c, 1) + bytes(16000), "command set|end"),
    ],
)
def test_answers_that_are_none_are_violations(
    ct: list[Outgoing], reply: Callable[[int, int], bytes], words: str
) -> None:
    farewell = []

    def behave(raw: RawPeer) -> None:
        raw.accept()
        context, message_id = raw.request()
        raw.write(reply(context, message_id) * (2 if "end" in words else 1))
        farewell.append(raw.until_closed())

    answers: list[Answer | Refused] = []
    with raw_peer(behave) as port, pytest.raises(ProtocolViolation, match=words) as caught:
        store(peer_at(port), ct[:2], answers.append, lambda: False)
    assert "pacs (ANY at 127.0.0.1" in str(caught.value)
    assert answers == []
    assert farewell == [ABORT]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (lambda c, m: b"\7\0\0\0\0\4\0\0\2\6", "source 2, reason 6"),
        (lambda c, m: b"\5\0\0\0\0\4\0\0\0\0", "released the association before"),
    ],
)
def test_an_orderly_end_instead_of_an_answer_is_an_abort(
    ct: list[Outgoing], reply: Callable[[int, int], bytes], words: str
) -> None:
    with raw_peer(answering(reply)) as port, pytest.raises(PeerAborted, match=words):
        send(port, ct)


def test_half_a_response_is_no_response(ct: list[Outgoing]) -> None:
    def behave(raw: RawPeer) -> None:
        raw.accept()
        raw.write(response(*raw.request())[:40])

    with raw_peer(behave) as port, pytest.raises(PeerAborted, match="closed the connection"):
        send(port, ct)


def test_a_dribbled_response_does_not_move_the_deadline(ct: list[Outgoing]) -> None:
    closed = threading.Event()

    def behave(raw: RawPeer) -> None:
        raw.accept()
        for byte in response(*raw.request()):
            if closed.wait(0.1):
                return
            raw.write(bytes([byte]))

    begun = time.monotonic()
    with raw_peer(behave) as port:
        with pytest.raises(PeerTimedOut):
            send(port, ct, dimse_timeout_s=0.5)
        assert time.monotonic() - begun < 1.5
        closed.set()


def test_a_response_in_many_pieces_is_read(ct: list[Outgoing]) -> None:
    def behave(raw: RawPeer) -> None:
        raw.accept()
        context, message_id = raw.request()
        whole = pdu.command_set(
            {0x0100: pdu.us(0x8001), 0x0120: pdu.us(message_id), 0x0800: pdu.us(0x0101), 0x0900: pdu.us(0xB007)}
        )
        raw.write(b"".join(pdu.p_data(context, whole, command=True, max_pdu=16)))
        assert raw.read()[0] == 5
        raw.write(b"\5\0\0\0\0\4\0\0\0\0")  # both ask at once
        assert raw.read()[0] == 6
        raw.write(b"\6\0\0\0\0\4\0\0\0\0")
        assert raw.until_closed() == b""

    with raw_peer(behave) as port:
        assert send(port, ct[:1]) == [Answer(ct[0].sop_instance_uid, 0xB007)]


def test_a_missing_goodbye_is_logged_and_changes_nothing(ct: list[Outgoing], caplog: pytest.LogCaptureFixture) -> None:
    def behave(raw: RawPeer) -> None:
        raw.accept()
        raw.write(response(*raw.request()))
        raw.read()

    with caplog.at_level(logging.WARNING), raw_peer(behave) as port:
        assert send(port, ct[:1]) == accepted(ct[:1])
    assert "not released in order" in caplog.text


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", PeerAborted),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolViolation),
        (b"\2\0\0\0\0\4abcd", ProtocolViolation),
        (b"\2\0\xff\xff\xff\xff", ProtocolViolation),
        (b"\3\0\0\0\0\2\0\1", ProtocolViolation),
        (b"\7\0\0\0\0\4\0\0\2\1", PeerAborted),
        (b"\2\0\0", PeerAborted),
    ],
)
def test_answers_to_the_association_request_that_are_none(
    ct: list[Outgoing], answer: bytes, error: type[PeerError]
) -> None:
    def behave(raw: RawPeer) -> None:
        raw.read()
        raw.write(answer)

    with raw_peer(behave) as port, pytest.raises(error) as caught:
        send(port, ct)
    assert not caught.value.permanent


def test_a_silent_listener_ends_in_time(ct: list[Outgoing]) -> None:
    with raw_peer(lambda raw: raw.until_closed() and None) as port:
        begun = time.monotonic()
        with pytest.raises(PeerTimedOut, match="association request"):
            send(port, ct, acse_timeout_s=0.3)
        assert time.monotonic() - begun < 1.5


def test_a_syntax_that_was_not_proposed_is_not_used(ct: list[Outgoing]) -> None:
    def behave(raw: RawPeer) -> None:
        raw.accept(syntax=JPEGLSLossless.encode())
        assert raw.read()[0] == 5
        raw.write(b"\6\0\0\0\0\4\0\0\0\0")

    with raw_peer(behave) as port:
        (answer,) = send(port, ct[:1])
    assert isinstance(answer, Refused)


def test_echo_without_verification_is_said(ct: list[Outgoing]) -> None:
    def refuse(raw: RawPeer) -> None:
        raw.accept(syntax=JPEGLSLossless.encode())

    def fail(context: int, message_id: int) -> bytes:
        return response(context, message_id, e0100=pdu.us(0x8030), e0900=pdu.us(0x0122))

    with raw_peer(refuse) as port, pytest.raises(VerificationFailed, match="C-ECHO"):
        echo(peer_at(port))
    with raw_peer(answering(fail)) as port, pytest.raises(VerificationFailed, match="0x0122"):
        echo(peer_at(port))
