"""An association as its requestor, over a socket of our own (PS3.8 section 7, PS3.7 section 8).

pynetdicom encodes and decodes the association PDUs; the rest is read and written here, because its own SCU now and then
loses a response between two of its threads, and because an image need not be decoded to be sent.

One thread, one association, one outstanding request: what was answered is known, what was not is sent again.
Every wait has a deadline on the wall clock, and after a missed one the connection is dropped, never used again.
Only the look-up of a host name is timed by the resolver of the system.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from types import TracebackType
from typing import Self

from dicomnode import pdu
from dicomnode.config_tls import TlsOut
from dicomnode.connection import connect
from dicomnode.errors import AssociationRejected, MalformedPdu, PeerAborted, PeerError, ProtocolViolation, TlsFailed
from dicomnode.message import Message
from dicomnode.pdu import Element, PduType
from dicomnode.received_header import MAX_REPORT_BYTES
from dicomnode.spool import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicomnode.tls import TlsFileError

log = logging.getLogger(__name__)

MAX_RECEIVED_PDU = 16384
"""Announced to the peer, in bytes; it sends us responses, and reports of some 150 bytes for each instance."""
_MAX_ASSOCIATE_PDU = 131072
_MAX_COMMAND_SET = 16384
_RELEASE_TIMEOUT_S = 5.0
"""Everything is answered by then; a peer that is slow to say goodbye delays nobody."""
_EVENT_LOOK_S = 0.1
_SLOWEST_PEER_BYTES_PER_S = 50_000
"""A peer slower than that over a whole image is given up (a 512 x 512 slice then takes 10 s)."""
_ABSTRACT_SYNTAX_NOT_SUPPORTED = 3

_REJECTIONS = {
    (1, 1): "no reason given",
    (1, 2): "application context not supported",
    (1, 3): "it does not know our calling AE title; add it there",
    (1, 7): "it does not know the called AE title; correct it in config.yaml or there",
    (2, 1): "no reason given",
    (2, 2): "protocol version not supported",
    (3, 1): "temporary congestion",
    (3, 2): "its limit of associations is reached",
}
"""(source, reason) → words (PS3.8 table 9-21)."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom to call and how long to wait for it."""

    name: str
    ae_title: str
    host: str
    port: int
    calling_ae_title: str
    connect_timeout_s: float = 10.0
    acse_timeout_s: float = 30.0
    """For the answer to the association request."""
    dimse_timeout_s: float = 60.0
    """For each answer after its request was sent, and for any progress while sending."""
    tls: TlsOut | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.ae_title} at {self.host}:{self.port})"


class Association:
    """An established association; released at the end of its block, aborted if a request is left open.

    Parameters
    ----------
    peer
    contexts
        To propose.
    on_event
        Called with each N-EVENT-REPORT request of the peer; returns the status that answers it. Without it such a
        request is a violation.
    """

    def __init__(
        self, peer: Peer, contexts: Sequence[pdu.Context], on_event: Callable[[Message], int] | None = None
    ) -> None:
        self._peer = peer
        self._contexts = contexts
        self._on_event = on_event
        self._message_id = 0
        self._pending = False
        """A request is not answered yet: the association cannot be released now."""

    def __enter__(self) -> Self:
        peer = self._peer
        try:
            context = None if peer.tls is None else peer.tls.context()
        except TlsFileError as error:
            raise TlsFailed(f"no TLS with {peer}: {error}") from error
        self._wire = connect(
            str(peer),
            peer.host,
            peer.port,
            connect_timeout_s=peer.connect_timeout_s,
            stall_timeout_s=peer.dimse_timeout_s,
            context=context,
            server_name=None if peer.tls is None else peer.tls.name or peer.host,
        )
        try:
            accepted = self._negotiate()
        except BaseException as error:  # whatever ends the negotiation, the socket must not stay open
            self._drop(error)
            raise
        self._max_pdu = accepted.max_pdu
        self.accepted: dict[tuple[str, str], int] = {}
        """(Abstract syntax, transfer syntax) → context ID."""
        self.unknown_classes: set[str] = set()
        """Abstract syntaxes that the peer does not know."""
        for position, (abstract_syntax, transfer_syntaxes) in enumerate(self._contexts):
            context_id = pdu.context_id(position)
            # A syntax that was not proposed cannot be accepted; such a context is none.
            if (syntax := accepted.syntaxes.get(context_id)) in transfer_syntaxes:
                self.accepted.setdefault((abstract_syntax, syntax), context_id)
            elif accepted.refusals.get(context_id) == _ABSTRACT_SYNTAX_NOT_SUPPORTED:
                self.unknown_classes.add(abstract_syntax)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._pending:
            self._drop(error)
            return
        try:
            self._release()
        except PeerError as failure:
            log.warning("association not released in order, though all was answered: %s", failure)
        finally:
            self._wire.close()

    def _drop(self, error: BaseException | None) -> None:
        if not isinstance(error, PeerAborted | AssociationRejected):
            self._wire.send_last(pdu.ABORT)
        self._wire.close()

    def _negotiate(self) -> pdu.Accepted:
        peer = self._peer
        deadline = time.monotonic() + peer.acse_timeout_s
        request = pdu.associate_rq(
            peer.calling_ae_title,
            peer.ae_title,
            self._contexts,
            max_pdu=MAX_RECEIVED_PDU,
            implementation_class_uid=IMPLEMENTATION_CLASS_UID,
            implementation_version_name=IMPLEMENTATION_VERSION_NAME,
        )
        self._wire.send([request], deadline, "taking the association request")
        kind, answer = self._wire.receive(deadline, _MAX_ASSOCIATE_PDU, "its answer to the association request")
        if kind == PduType.ASSOCIATE_RJ:
            raise self._rejection(answer)
        if kind != PduType.ASSOCIATE_AC:
            raise self._unexpected(kind, answer)
        with _Naming(peer):
            return pdu.read_associate_ac(bytes(answer))

    def next_message_id(self) -> int:
        """Number of the next request."""
        self._message_id = self._message_id % 0xFFFF + 1
        return self._message_id

    def request(
        self, context_id: int, command_field: int, message_id: int, command: bytes, data: pdu.Buffer | None
    ) -> int:
        """Send a message; status of the response to it.

        Raises
        ------
        PeerError
        """
        size = 0 if data is None else len(data)
        limit = time.monotonic() + self._peer.dimse_timeout_s + size / _SLOWEST_PEER_BYTES_PER_S
        self._pending = True
        with _Naming(self._peer):
            pieces = pdu.p_data(context_id, command, command=True, max_pdu=self._max_pdu)
            if data is not None:
                pieces = chain(pieces, pdu.p_data(context_id, data, command=False, max_pdu=self._max_pdu))
            self._wire.send(pieces, limit, "taking the request")
            response = self._response(context_id, min(limit, time.monotonic() + self._peer.dimse_timeout_s))
            if pdu.read_us(response, Element.COMMAND_FIELD) != command_field | pdu.RESPONSE:
                raise MalformedPdu("a message that is not the response to the request")
            answered = pdu.read_us(response, Element.MESSAGE_ID_RESPONDED_TO)
            if answered != message_id:
                raise MalformedPdu(f"a response to message {answered} while {message_id} is outstanding")
            if pdu.read_us(response, Element.DATA_SET_TYPE) != pdu.NO_DATA_SET:
                raise MalformedPdu("a response that announces a data set")
            status = pdu.read_us(response, Element.STATUS)
        self._pending = False
        return status

    def serve_events(self, context_id: int, seconds: float, enough: Callable[[], bool]) -> None:
        """Take event reports of the peer until `enough` says so, for so many seconds at most.

        Raises
        ------
        PeerError
            If the peer ends the association meanwhile, too.
        """
        until = time.monotonic() + seconds
        while not enough() and (left := until - time.monotonic()) > 0:
            if not self._wire.readable(min(left, _EVENT_LOOK_S)):
                continue
            self._pending = True
            with _Naming(self._peer):
                message = self._message(context_id, time.monotonic() + self._peer.dimse_timeout_s)
                if not self._is_event(message):
                    raise MalformedPdu("a message that is no event report, without a request to it")
                self._answer(message)
            self._pending = False

    def _response(self, context_id: int, deadline: float) -> dict[int, bytes]:
        while True:
            message = self._message(context_id, deadline)
            if not self._is_event(message):
                return message.elements
            self._answer(message)  # a report may overtake the response to its request

    def _message(self, context_id: int, deadline: float) -> Message:
        """The next event report, whole, or the command set of the next response."""
        message = Message(context_id, _MAX_COMMAND_SET)
        while True:
            kind, answer = self._wire.receive(deadline, MAX_RECEIVED_PDU, "its answer")
            if kind != PduType.P_DATA:
                raise self._unexpected(kind, answer)
            for item in (items := pdu.pdvs(answer[pdu.HEADER_BYTES :])):
                if item.context_id != context_id:
                    raise MalformedPdu("P-DATA that is no part of the response")
                whole = message.add(item)
                if len(message.data) > MAX_REPORT_BYTES:
                    raise MalformedPdu("a data set without end")
                if whole or (message.elements and not self._is_event(message)):
                    if next(items, None) is not None:
                        raise MalformedPdu("data after the response")
                    return message

    def _is_event(self, message: Message) -> bool:
        if self._on_event is None:
            return False
        return pdu.read_us(message.elements, Element.COMMAND_FIELD) == pdu.N_EVENT_REPORT_RQ

    def _answer(self, event: Message) -> None:
        assert self._on_event is not None
        response = pdu.response(event.elements, self._on_event(event))
        pieces = pdu.p_data(event.context_id, response, command=True, max_pdu=self._max_pdu)
        self._wire.send(pieces, time.monotonic() + self._peer.dimse_timeout_s, "taking the answer to its report")

    def _release(self) -> None:
        deadline = time.monotonic() + _RELEASE_TIMEOUT_S
        self._wire.send([pdu.RELEASE_RQ], deadline, "taking the release request")
        while True:
            kind, answer = self._wire.receive(deadline, MAX_RECEIVED_PDU, "its answer to the release request")
            if kind == PduType.RELEASE_RP:
                return
            if kind != PduType.RELEASE_RQ:
                raise self._unexpected(kind, answer)
            # Both asked at once: the requestor of the association answers first (PS3.8 section 7.2.2.2).
            self._wire.send([pdu.RELEASE_RP], deadline, "taking the release response")

    def _unexpected(self, kind: int, answer: memoryview) -> PeerError:
        if kind == PduType.ABORT:
            by, reason = (answer[-2], answer[-1]) if len(answer) == pdu.HEADER_BYTES + 4 else (0, 0)
            return PeerAborted(f"{self._peer} aborted the association (A-ABORT, source {by}, reason {reason})")
        if kind == PduType.RELEASE_RQ:
            self._wire.send_last(pdu.RELEASE_RP)
            return PeerAborted(f"{self._peer} released the association before it answered")
        return ProtocolViolation(f"{self._peer} sent an unexpected PDU of type {kind}")

    def _rejection(self, answer: memoryview) -> PeerError:
        if len(answer) != pdu.HEADER_BYTES + 4:
            return ProtocolViolation(f"{self._peer} sent an A-ASSOCIATE-RJ of {len(answer)} bytes")
        result, source, reason = answer[-3:]
        words = _REJECTIONS.get((source, reason), "reason unknown to the standard")
        lasting = "permanently" if result == 1 else "for now"
        return AssociationRejected(
            f"{self._peer} rejected the association {lasting}: {words} ({result}/{source}/{reason})",
            result,
            source,
            reason,
        )


class _Naming:
    """Turns `MalformedPdu` raised in its block into a `ProtocolViolation` that names the peer."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(error, MalformedPdu):
            raise ProtocolViolation(f"{self._peer} sent {error}") from error
