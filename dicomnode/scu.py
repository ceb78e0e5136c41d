"""C-STORE and C-ECHO as SCU over a socket of our own (PS3.4 annex B, PS3.7 sections 9.1.1 and 9.1.5).

pynetdicom encodes and decodes the association PDUs; the rest of the association is read and written here, because its
own SCU now and then loses a response between two of its threads, and because an image need not be decoded to be sent.

One thread, one association, one outstanding request: what was answered is known, what was not is sent again.
Every wait has a deadline on the wall clock, and after a missed one the connection is dropped, never used again.
Only the look-up of a host name is timed by the resolver of the system.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

from pydicom.uid import UID

from dicomnode import pdu
from dicomnode.connection import connect
from dicomnode.encoding import UNCOMPRESSED, data_set
from dicomnode.errors import (
    AssociationRejected,
    MalformedPdu,
    PeerAborted,
    PeerError,
    ProtocolViolation,
    UnsendableFile,
    VerificationFailed,
)
from dicomnode.pdu import Element, PduType
from dicomnode.spool import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

log = logging.getLogger(__name__)

MAX_RECEIVED_PDU = 16384
"""Announced to the peer, in bytes; it only ever has to send us responses."""
_MAX_ASSOCIATE_PDU = 131072
_MAX_COMMAND_SET = 16384
_RELEASE_TIMEOUT_S = 5.0
"""Everything is answered by then; a peer that is slow to say goodbye delays nobody."""
_SLOWEST_PEER_BYTES_PER_S = 50_000
"""A peer slower than that over a whole image is given up (a 512 x 512 slice then takes 10 s)."""
_SUCCESS = 0x0000
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

    def __str__(self) -> str:
        return f"{self.name} ({self.ae_title} at {self.host}:{self.port})"


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A DICOM Part 10 file to send, with what its file meta information says."""

    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    path: Path
    sha256: str | None = None
    """Of its data set, where somebody recorded it; a file that no longer has it is not sent."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the peer said to one instance: C-STORE status (PS3.4 table B.2-1).

    Its ErrorComment (0000,0902) is dropped: free text, in which a peer may name the patient.
    """

    sop_instance_uid: str
    status: int


@dataclass(frozen=True, slots=True)
class Refused:
    """One instance that was not sent, for a reason that another try does not change."""

    sop_instance_uid: str
    reason: str


def store(
    peer: Peer,
    items: Sequence[Outgoing],
    on_answer: Callable[[Answer | Refused], None],
    should_stop: Callable[[], bool],
    on_request: Callable[[str], None] = lambda sop_instance_uid: None,
) -> None:
    """Send every item, over one association unless they need more than 128 presentation contexts.

    Parameters
    ----------
    peer
    items
        Sent in their order within each association.
    on_answer
        Called once for each item, in this thread, as soon as it is answered or found unsendable.
    should_stop
        Asked before every item; True releases the association and returns.
    on_request
        Called with the SOP Instance UID of an item right before its request is sent: from here until `on_answer`
        nobody knows whether the peer has it.

    Raises
    ------
    PeerError
        Of the items for which `on_answer` was not called, only the last of `on_request` may have arrived.
    """
    for contexts, batch in _plan(items):
        if should_stop():
            return
        with _Association(peer, contexts) as association:
            for item in batch:
                if should_stop():
                    return
                on_answer(association.store(item, on_request))


def echo(peer: Peer) -> float:
    """Seconds from connecting to the answer of a C-ECHO.

    Raises
    ------
    PeerError
        `VerificationFailed` if the peer can be reached and does not do it.
    """
    begun = time.monotonic()
    with _Association(peer, [(pdu.VERIFICATION, (UNCOMPRESSED[1],))]) as association:
        status = association.echo()
        seconds = time.monotonic() - begun
    if status != _SUCCESS:
        raise VerificationFailed(f"{peer} answered C-ECHO with status 0x{status:04X}")
    return seconds


def _contexts(item: Outgoing) -> tuple[pdu.Context, pdu.Context]:
    # Two contexts: in one, the peer would choose the syntax and might not choose that of the file.
    return (item.sop_class_uid, (item.transfer_syntax_uid,)), (item.sop_class_uid, UNCOMPRESSED)


def _plan(items: Iterable[Outgoing]) -> list[tuple[list[pdu.Context], list[Outgoing]]]:
    """Contexts and items of each association: each item goes to the first that has its contexts or room for them."""
    associations: list[tuple[dict[pdu.Context, None], list[Outgoing]]] = []
    for item in items:
        wanted = dict.fromkeys(_contexts(item))
        for contexts, batch in associations:  # noqa: B007 - used after the loop
            if len(contexts | wanted) <= pdu.MAX_CONTEXTS:
                break
        else:
            contexts, batch = {}, []
            associations.append((contexts, batch))
        contexts.update(wanted)
        batch.append(item)
    return [(list(contexts), batch) for contexts, batch in associations]


class _Association:
    """An established association; released at the end of its block, aborted if a request is left open."""

    def __init__(self, peer: Peer, contexts: Sequence[pdu.Context]) -> None:
        self._peer = peer
        self._contexts = contexts
        self._message_id = 0
        self._pending = False
        """A request is not answered yet: the association cannot be released now."""

    def __enter__(self) -> Self:
        peer = self._peer
        self._wire = connect(
            str(peer),
            peer.host,
            peer.port,
            connect_timeout_s=peer.connect_timeout_s,
            stall_timeout_s=peer.dimse_timeout_s,
        )
        try:
            accepted = self._negotiate()
        except BaseException as error:  # whatever ends the negotiation, the socket must not stay open
            self._drop(error)
            raise
        self._max_pdu = accepted.max_pdu
        self._accepted: dict[tuple[str, str], int] = {}
        self._unknown_classes: set[str] = set()
        for position, (abstract_syntax, transfer_syntaxes) in enumerate(self._contexts):
            context_id = pdu.context_id(position)
            # A syntax that was not proposed cannot be accepted; such a context is none.
            if (syntax := accepted.syntaxes.get(context_id)) in transfer_syntaxes:
                self._accepted.setdefault((abstract_syntax, syntax), context_id)
            elif accepted.refusals.get(context_id) == _ABSTRACT_SYNTAX_NOT_SUPPORTED:
                self._unknown_classes.add(abstract_syntax)
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

    def store(self, item: Outgoing, on_request: Callable[[str], None]) -> Answer | Refused:
        """Send one instance and wait for the answer to it."""
        uid = item.sop_instance_uid
        for syntax in (item.transfer_syntax_uid, *UNCOMPRESSED):
            if (context_id := self._accepted.get((item.sop_class_uid, syntax))) is not None:
                break
        else:
            return Refused(uid, self._no_context(item))
        try:
            data = data_set(item.path, uid, item.transfer_syntax_uid, syntax, item.sha256)
        except UnsendableFile as error:
            return Refused(uid, f"not sent to {self._peer.name}: {error}")
        message_id = self._next_message_id()
        on_request(uid)
        command = pdu.c_store_rq(message_id, item.sop_class_uid, uid)
        return Answer(uid, self._request(context_id, pdu.C_STORE_RQ, message_id, command, data))

    def echo(self) -> int:
        """Status of a C-ECHO."""
        context_id = self._accepted.get((pdu.VERIFICATION, UNCOMPRESSED[1]))
        if context_id is None:
            raise VerificationFailed(f"{self._peer} accepts associations but does not offer C-ECHO (Verification)")
        message_id = self._next_message_id()
        return self._request(context_id, pdu.C_ECHO_RQ, message_id, pdu.c_echo_rq(message_id), None)

    def _next_message_id(self) -> int:
        self._message_id = self._message_id % 0xFFFF + 1
        return self._message_id

    def _request(
        self, context_id: int, command_field: int, message_id: int, command: bytes, data: memoryview | None
    ) -> int:
        """Send a message; status of the response to it."""
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

    def _response(self, context_id: int, deadline: float) -> dict[int, bytes]:
        command = bytearray()
        while True:
            kind, answer = self._wire.receive(deadline, MAX_RECEIVED_PDU, "its answer")
            if kind != PduType.P_DATA:
                raise self._unexpected(kind, answer)
            for item in (items := pdu.pdvs(answer[pdu.HEADER_BYTES :])):
                if item.context_id != context_id or not item.command:
                    raise MalformedPdu("P-DATA that is no part of the response")
                command += item.data
                if len(command) > _MAX_COMMAND_SET:
                    raise MalformedPdu("a command set without end")
                if item.last:
                    if next(items, None) is not None:
                        raise MalformedPdu("data after the response")
                    return pdu.read_command_set(bytes(command))

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

    def _no_context(self, item: Outgoing) -> str:
        sop_class, syntax = UID(item.sop_class_uid), UID(item.transfer_syntax_uid)
        if item.sop_class_uid in self._unknown_classes:
            return f"{self._peer} accepts no presentation context: it does not know {sop_class.name} ({sop_class})"
        return (
            f"{self._peer} accepts no presentation context for SOP class {sop_class.name} ({sop_class}): "
            f"neither {syntax.name} ({syntax}) nor Explicit or Implicit VR Little Endian; enable one of them there"
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
