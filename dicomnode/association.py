"""One association as its acceptor, in a thread of its own: PDUs in, messages out of them, an answer to each.

`negotiation` reads the request; C-ECHO is answered here, C-STORE by what stands behind it (`Node`), and what is left by
pynetdicom (`services`). Whatever comes is hostile until it is understood, so every wait has a deadline and everything
that grows has a limit:

===================== ======================================= ======================================================
                      at most                                 time
===================== ======================================= ======================================================
association request   144 KiB                                 whole within `acse_timeout_s` of the connection
next message                                                  its first PDU within `dimse_timeout_s`
each PDU              what we announced, and a little         whole within `network_timeout_s` of the one before
message                                                       1 kB/s, after the first `network_timeout_s`
command set           64 KiB, counted while it comes
data set of a C-STORE `max_object_mb`, counted while it comes
any other data set    5.8 MB: a report on 20,000 instances
all data sets         twice that, over all associations
===================== ======================================= ======================================================

Who breaks a rule is aborted, and the log says why.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from dicomnode import pdu, tls
from dicomnode.config import Reception
from dicomnode.connection import Connection, begin_tls, shake_hands
from dicomnode.errors import MalformedPdu, PeerAborted, PeerError, PeerTimedOut, TlsFailed, fault
from dicomnode.message import Message
from dicomnode.negotiation import PROTOCOL_VERSION, Negotiator, Rejection, Request
from dicomnode.pdu import AbortReason, Element, PduType
from dicomnode.received_header import MAX_REPORT_BYTES
from dicomnode.services import Services

log = logging.getLogger(__name__)

MAX_PDU_BYTES = 131_072
"""Announced to peers: largest P-DATA-TF."""
_PDU_SLACK_BYTES = 1024
"""A PDU may be longer than announced by so much: some senders leave headers out of their count."""
_MAX_REQUEST_BYTES = 147_456
"""128 contexts with the 39 transfer syntaxes that pydicom knows take 137,428."""
_MAX_COMMAND_BYTES = 65_536
_SLOWEST_BYTES_PER_S = 1000
"""Of a message: a line of 9600 baud. Who sends a byte in each PDU would keep an association for ever."""
_MEGABYTE = 1_000_000
_SUCCESS = 0x0000
_UNSUPPORTED_VERSION = Rejection(1, 2, 2, "it speaks another version of the protocol")
_UNSUPPORTED_APPLICATION_CONTEXT = Rejection(1, 1, 2, "its application context is not that of DICOM")
_LOCAL_LIMIT = (2, 3, 2)
"""Of a rejection: transient, presentation, local limit exceeded."""
_DECLINED_WITHIN_S = 3.0
"""So long a caller who is one too many is listened to, as only who asked for an association can be rejected."""


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """A C-STORE-RQ that came whole; nothing it says is checked."""

    sop_class_uid: str
    sop_instance_uid: str
    context_class_uid: str
    """Abstract syntax of the presentation context that it came in."""
    transfer_syntax_uid: str
    data: memoryview
    """Empty if no data set came."""


class Memory:
    """What objects that are on their way may take, over all associations.

    Each may be as large as `max_object_mb`: a few that come at once would else take all memory of the machine, and the
    node with it.
    """

    def __init__(self, most_bytes: int) -> None:
        self.left_bytes = most_bytes
        self._lock = threading.Lock()

    def take(self, count: int) -> bool:
        """Take `count` bytes; False, and nothing is taken, if there are not so many left."""
        with self._lock:
            enough = count <= self.left_bytes
            if enough:
                self.left_bytes -= count
        return enough

    def give_back(self, count: int) -> None:
        """Give `count` taken bytes back."""
        with self._lock:
            self.left_bytes += count


class Node(Protocol):
    """What stands behind an association; called in its thread."""

    def admit(self, association: Association, request: Request) -> Rejection | None:
        """May it be? Who is admitted is reported `ended` later."""

    def store(self, association: Association, request: StoreRequest) -> int:
        """Status that answers a C-STORE."""

    def ended(self, association: Association) -> None:
        """One that was admitted is over."""


class Association:
    """A connection and, once it is admitted, the association on it; begins with its `thread`."""

    def __init__(
        self,
        connected: socket.socket,
        address: str,
        limits: Reception,
        negotiator: Negotiator,
        services: Services,
        node: Node,
        memory: Memory,
        tls_context: ssl.SSLContext | None = None,
    ) -> None:
        self.address = address
        self.common_name: str | None = None
        """In the certificate that the peer showed; set before it is admitted."""
        self.admitted = False
        self.over = False
        """Its association ended; what is left is to close the connection."""
        self.request: Request
        """Set before it is admitted."""
        self.thread = threading.Thread(target=self._run, name=f"association of {address}", daemon=True)
        self._socket = connected
        self._limits = limits
        self._negotiator = negotiator
        self._services = services
        self._node = node
        self._memory = memory
        self._taken_bytes = 0
        self._tls_context = tls_context
        self._closed: Callable[[Association], None] = lambda association: None
        self._ending = False
        self._declined: Rejection | None = None

    @property
    def declined(self) -> bool:
        """Is it one too many, whatever it asks for?"""
        return self._declined is not None

    def decline(self, why: str) -> None:
        """Reject it for `why`, once it said who it is; to be said before the thread starts."""
        self._declined = Rejection(*_LOCAL_LIMIT, why)

    def when_closed(self, told: Callable[[Association], None]) -> None:
        """Call `told` when the connection is closed; to be said before the thread starts."""
        self._closed = told

    def end(self) -> None:
        """Abort it once it waits for its peer; from any thread."""
        self._ending = True
        with suppress(OSError):  # it is closed already
            socket.socket.shutdown(self._socket, socket.SHUT_RD)  # that of SSLSocket would go on without TLS

    def _run(self) -> None:
        try:
            farewell = self._live()
            if self.admitted:
                self._node.ended(self)
            self.over = True
            if farewell:
                self._wire.part(farewell, deaf=self._ending)
        finally:
            self._forget_message()
            self._socket.close()
            self._closed(self)

    def _live(self) -> bytes:
        """From the first byte to the end, whatever brings it; what is to be said last."""
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            patience_s = self._limits.acse_timeout_s
            deadline = time.monotonic() + (min(patience_s, _DECLINED_WITHIN_S) if self.declined else patience_s)
            if self._tls_context is not None and not self._encrypt(self._tls_context, deadline):
                return b""
            self._wire = Connection(self._socket, self.address, stall_timeout_s=self._limits.network_timeout_s)
            return self._converse(deadline)
        except PeerTimedOut as error:
            log.warning("%s", error)
            return pdu.provider_abort(AbortReason.NOT_SPECIFIED) if self.admitted else b""
        except PeerAborted as error:
            # Who connects and says nothing looks whether somebody listens, which is nothing to write home about.
            log.log(logging.INFO if self.admitted else logging.DEBUG, "%s", error)
            return pdu.ABORT if self._ending and self.admitted else b""
        except _Abort as error:
            log.warning("association of %s aborted: %s", self.address, error)
            return pdu.provider_abort(error.reason)
        except (PeerError, MalformedPdu) as error:
            log.warning("association of %s aborted: %s", self.address, error)
            return pdu.provider_abort(AbortReason.INVALID_PARAMETER)
        except Exception as error:  # a fault of ours: this association ends, and the log says where to look
            log.error("association of %s aborted: a fault of the node: %s", self.address, fault(error))
            return pdu.ABORT if self.admitted else b""  # there may be no connection to say it on

    def _encrypt(self, context: ssl.SSLContext, deadline: float) -> bool:
        """Go over to TLS, in this thread, so that a client who is silent holds nobody else; False if it cannot be."""
        try:
            self._socket = encrypted = begin_tls(self._socket, self.address, context)
            if self._ending:  # who asked for it meanwhile may have missed the new socket
                return False
            shake_hands(encrypted, self.address, max(deadline - time.monotonic(), 0.001))
        except (TlsFailed, PeerTimedOut) as error:
            log.warning("connection from %s closed: %s", self.address, error)
            return False
        except PeerAborted as error:
            log.debug("%s", error)
            return False
        self.common_name = tls.common_name(encrypted)
        return True

    def _converse(self, deadline: float) -> bytes:
        """From the request, whole by `deadline`, to the release; what is to be said last."""
        kind, whole = self._wire.receive(deadline, _MAX_REQUEST_BYTES, "its association request")
        if kind != PduType.ASSOCIATE_RQ:
            raise self._unexpected(kind)
        self.request = self._negotiator.read(bytes(whole))
        if (rejection := self._rejection()) is not None:
            log.warning(
                "association of %r at %s rejected: %s", self.request.calling_ae_title, self.address, rejection.why
            )
            return pdu.associate_rj(rejection.result, rejection.source, rejection.reason)
        self.admitted = True
        self._wire.send([self.request.acceptance], deadline, "taking the answer to its association request")
        while self._serve_message():
            self._forget_message()
        return pdu.RELEASE_RP

    def _rejection(self) -> Rejection | None:
        if self._declined is not None:
            return self._declined
        if not self.request.protocol_version & PROTOCOL_VERSION:
            return _UNSUPPORTED_VERSION
        if self.request.application_context != pdu.APPLICATION_CONTEXT:
            return _UNSUPPORTED_APPLICATION_CONTEXT
        return self._node.admit(self, self.request)

    def _serve_message(self) -> bool:
        """Wait for a message and answer it; False for a release."""
        message = self._message()
        if message is None:
            return False
        context, elements = self.request.contexts[message.context_id], message.elements
        command = pdu.read_us(elements, Element.COMMAND_FIELD)
        pdu.read_us(elements, Element.MESSAGE_ID)  # nothing is done for who could not be answered
        if command == pdu.C_ECHO_RQ:
            self._send(self._response(message, _SUCCESS))
        elif command == pdu.C_STORE_RQ:
            request = StoreRequest(
                sop_class_uid=pdu.read_ui(elements, Element.AFFECTED_SOP_CLASS_UID),
                sop_instance_uid=pdu.read_ui(elements, Element.AFFECTED_SOP_INSTANCE_UID),
                context_class_uid=context.abstract_syntax,
                transfer_syntax_uid=context.transfer_syntax,
                data=memoryview(message.data),
            )
            self._send(self._response(message, self._node.store(self, request)))
        else:
            answer = self._services.answer(
                context,
                bytes(message.command),
                bytes(message.data) if message.has_data else None,
                calling_ae_title=self.request.calling_ae_title,
                address=self.address,
                max_pdu=self.request.max_pdu,
            )
            self._send([answer])
        return True

    def _response(self, message: Message, status: int) -> Iterable[pdu.Buffer]:
        command = pdu.response(message.elements, status)
        return pdu.p_data(message.context_id, command, command=True, max_pdu=self.request.max_pdu)

    def _send(self, answer: Iterable[pdu.Buffer]) -> None:
        self._wire.send(answer, time.monotonic() + self._limits.network_timeout_s, "taking an answer")

    def _message(self) -> Message | None:
        """The next message, whole; None for a release."""
        limits = self._limits
        message: Message | None = None
        deadline = time.monotonic() + min(limits.dimse_timeout_s, limits.network_timeout_s)
        fast_enough = 0.0
        """Until then the message may take with what came of it."""
        while True:
            kind, whole = self._wire.receive(deadline, MAX_PDU_BYTES + _PDU_SLACK_BYTES, "its next PDU")
            if self._ending:
                raise PeerAborted(f"{self.address} had to be aborted: the node stops")
            if kind == PduType.RELEASE_RQ:
                return None
            if kind != PduType.P_DATA:
                raise self._unexpected(kind)
            items = pdu.pdvs(whole[pdu.HEADER_BYTES :])
            for item in items:
                if message is None:
                    message = self._begin(item.context_id)
                    fast_enough = time.monotonic() + limits.network_timeout_s
                whole_message = message.add(item)
                self._remember(len(message.data))
                self._check_length(message)
                if whole_message:
                    if next(items, None) is not None:
                        raise MalformedPdu("data behind the end of a message")
                    return message
                fast_enough += len(item.data) / _SLOWEST_BYTES_PER_S
            deadline = min(time.monotonic() + limits.network_timeout_s, fast_enough)

    def _check_length(self, message: Message) -> None:
        if not message.data:
            return
        most, what = MAX_REPORT_BYTES, "the longest report"
        if pdu.read_us(message.elements, Element.COMMAND_FIELD) == pdu.C_STORE_RQ:
            # A little more is taken and answered with a status; without an end to come nothing can be answered.
            most, what = self._limits.max_object_mb * _MEGABYTE + _MAX_COMMAND_BYTES, "reception.max_object_mb"
        if len(message.data) > most:
            raise _Abort(AbortReason.NOT_SPECIFIED, f"its message is larger than {what}")

    def _remember(self, data_bytes: int) -> None:
        """Take memory for so much of a data set."""
        if not self._memory.take(data_bytes - self._taken_bytes):
            why = "there is no memory for more objects on their way: twice reception.max_object_mb"
            raise _Abort(AbortReason.NOT_SPECIFIED, why)
        self._taken_bytes = data_bytes

    def _forget_message(self) -> None:
        self._memory.give_back(self._taken_bytes)
        self._taken_bytes = 0

    def _begin(self, context_id: int) -> Message:
        if context_id not in self.request.contexts:
            raise MalformedPdu(f"a message in the presentation context {context_id}, which is not accepted")
        return Message(context_id, _MAX_COMMAND_BYTES)

    def _unexpected(self, kind: int) -> Exception:
        if kind == PduType.ABORT:
            return PeerAborted(f"{self.address} aborted its association")
        known = kind in set(PduType)
        reason = AbortReason.UNEXPECTED_PDU if known else AbortReason.UNRECOGNIZED_PDU
        return _Abort(reason, f"it sent a PDU of type {kind} where none may come")


class _Abort(Exception):
    def __init__(self, reason: AbortReason, why: str) -> None:
        super().__init__(why)
        self.reason = reason
