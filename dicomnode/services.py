"""Services other than storage and verification, by pynetdicom's service classes over our own connection.

`Services` turns a message that came whole into pynetdicom's primitive, runs the service class of its presentation
context on it, and hands back the bytes of what that answers. The service classes see `_Host`, which is as much of
pynetdicom's `Association` as they look at; that is pinned in tests/unit/test_services.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

from pynetdicom import build_context, evt
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import DIMSEMessage
from pynetdicom.events import Event, EventType, InterventionEvent, get_default_handler
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.sop_class import uid_to_service_class

from dicomnode.errors import MalformedPdu
from dicomnode.pdu import AcceptedContext

Handlers = Mapping[InterventionEvent, Callable[[Event], Any]]
"""As pynetdicom's `evt_handlers`, e.g. ``{evt.EVT_N_EVENT_REPORT: handler}``; the event's `assoc` is the host below.

pynetdicom logs the words of an exception that a handler raises; one whose words may quote a header must not get there.
"""

_LAST_OF_COMMAND, _LAST_OF_DATA_SET = b"\3", b"\2"
"""Message control headers (PS3.8 annex E.2)."""


class Services:
    """Service classes with the handlers of the node; one for all associations."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers

    def answer(
        self,
        context: AcceptedContext,
        command: bytes,
        data_set: bytes | None,
        *,
        calling_ae_title: str,
        address: str,
        max_pdu: int,
    ) -> bytes:
        """P-DATA PDUs that answer a request, in the thread of its association.

        Parameters
        ----------
        context
            That the message came in.
        command, data_set
            As they came; `data_set` is None where the command announces none.
        calling_ae_title, address
            Of the peer; handlers find them as ``event.assoc.requestor.ae_title`` and ``.address``.
        max_pdu
            Largest PDU that the peer takes, in bytes; 0 is no limit.

        Raises
        ------
        MalformedPdu
            If the message is no request that the service class of the context serves.
        """
        host = _Host(
            self._handlers, SimpleNamespace(ae_title=calling_ae_title, address=address, maximum_length=max_pdu)
        )
        service = uid_to_service_class(context.abstract_syntax)(cast(Any, host))
        request = _primitive(context.context_id, command, data_set)
        theirs = build_context(context.abstract_syntax, context.transfer_syntax)
        theirs.context_id = context.context_id
        try:
            service.SCP(request, theirs)
        except Exception as error:  # what handlers raise it answers itself: this request is none of this service
            name = type(request).__name__
            raise MalformedPdu(f"{name} in a context of SOP class {context.abstract_syntax}") from error
        return b"".join(host.sent)


def _primitive(context_id: int, command: bytes, data_set: bytes | None) -> Any:
    whole = P_DATA()
    whole.presentation_data_value_list.append((context_id, _LAST_OF_COMMAND + command))
    if data_set is not None:
        whole.presentation_data_value_list.append((context_id, _LAST_OF_DATA_SET + data_set))
    try:
        message = DIMSEMessage()
        if not message.decode_msg(whole):
            raise ValueError("a data set is missing")
        primitive = message.message_to_primitive()
    except Exception as error:  # its decoder has no error of its own: what it raises depends on the garbage
        raise MalformedPdu(f"a command set that cannot be read ({type(error).__name__})") from error
    if not getattr(primitive, "is_valid_request", False):  # a C-CANCEL is none
        raise MalformedPdu(f"{type(primitive).__name__} that is no valid request")
    return primitive


class _Host:
    """What pynetdicom's service classes take for an association."""

    is_requestor = False
    is_acceptor = True
    is_established = True

    def __init__(self, handlers: Handlers, requestor: SimpleNamespace) -> None:
        self._handlers = handlers
        self.requestor = requestor
        self.sent: list[bytes] = []
        self.dul = self
        self.dimse = DIMSEServiceProvider(cast(Any, self))

    def send_pdu(self, primitive: P_DATA) -> None:
        """For `DIMSEServiceProvider`, which takes this object for its DUL too."""
        self.sent.append(P_DATA_TF(primitive).encode())

    def get_handlers(self, event: EventType) -> Any:
        """For `evt.trigger`; an intervention that has no handler here is answered with a failure."""
        if isinstance(event, evt.InterventionEvent):
            return self._handlers.get(event) or get_default_handler(event), None
        return []

    def _abort(self) -> None:
        raise NotImplementedError("a handler aborts by raising")

    abort = _abort_blocking = _abort_nonblocking = _abort
