"""C-STORE, C-ECHO and requests for storage commitment as SCU (PS3.4 annexes A, B, J, PS3.7 sections 9.1 and 10.1).

The association itself is in `requestor`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydicom import Dataset
from pydicom.uid import UID
from pynetdicom.dsutils import encode

from dicomnode import pdu
from dicomnode.encoding import UNCOMPRESSED, data_set
from dicomnode.errors import NoStorageCommitment, UnreadableFile, UnsendableFile, VerificationFailed
from dicomnode.message import Message
from dicomnode.pdu import Element
from dicomnode.requestor import Association, Peer

_SUCCESS = 0x0000
_STORAGE_COMMITMENT = "1.2.840.10008.1.20.1"
_STORAGE_COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1.1"
"""Well-known SOP instance (PS3.4 J.3.5)."""
_REQUEST_COMMITMENT = 1
"""Action type (PS3.4 table J.3-1)."""
_REPORT_WAIT_S = 3.0
"""For a report on the association of its request; afterwards it has to come on another one."""


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
        Called once for each item that can be read, in this thread, as soon as it is answered or found unsendable.
    should_stop
        Asked before every item; True releases the association and returns.
    on_request
        Called with the SOP Instance UID of an item right before its request is sent: from here until `on_answer`
        nobody knows whether the peer has it.

    Raises
    ------
    PeerError
        Of the items for which `on_answer` was not called, only the last of `on_request` may have arrived.
    UnreadableFile
        Of the first file that could not be read now, after all others were sent.
    """
    unreadable: UnreadableFile | None = None
    for contexts, batch in _plan(items):
        if should_stop():
            return
        with Association(peer, contexts) as association:
            for item in batch:
                if should_stop():
                    return
                try:
                    answer = _store_one(association, peer, item, on_request)
                except UnreadableFile as error:  # perhaps a bad place of the disk: it must not hold up the others
                    unreadable = unreadable or error
                else:
                    on_answer(answer)
    if unreadable is not None:
        raise unreadable


def echo(peer: Peer) -> float:
    """Seconds from connecting to the answer of a C-ECHO.

    Raises
    ------
    PeerError
        `VerificationFailed` if the peer can be reached and does not do it.
    """
    begun = time.monotonic()
    with Association(peer, [(pdu.VERIFICATION, (UNCOMPRESSED[1],))]) as association:
        context_id = association.accepted.get((pdu.VERIFICATION, UNCOMPRESSED[1]))
        if context_id is None:
            raise VerificationFailed(f"{peer} accepts associations but does not offer C-ECHO (Verification)")
        message_id = association.next_message_id()
        status = association.request(context_id, pdu.C_ECHO_RQ, message_id, pdu.c_echo_rq(message_id), None)
        seconds = time.monotonic() - begun
    if status != _SUCCESS:
        raise VerificationFailed(f"{peer} answered C-ECHO with status 0x{status:04X}")
    return seconds


def request_commitment(
    peer: Peer,
    transaction_uid: str,
    instances: Sequence[tuple[str, str]],
    *,
    on_answer: Callable[[int], None],
    on_report: Callable[[int, bytes, UID], int],
    enough: Callable[[], bool],
) -> None:
    """Ask a peer to commit to the storage of instances (N-ACTION, PS3.4 J.3.2), and wait a moment for its report.

    Parameters
    ----------
    peer
    transaction_uid
        By which the report will name the request.
    instances
        (SOP class UID, SOP instance UID).
    on_answer
        Called with the status that answers the request.
    on_report
        Called with event type, encoded Event Information and its transfer syntax of each report on this association
        (N-EVENT-REPORT, PS3.4 J.3.3); returns the status that answers it.
    enough
        Asked again and again; True if no report needs to be waited for.

    Raises
    ------
    PeerError
        `NoStorageCommitment` if the peer does not offer it. After `on_answer` was called, nothing is lost by an error.
    """
    syntax = ""

    def take(event: Message) -> int:
        return on_report(pdu.read_us(event.elements, Element.EVENT_TYPE_ID), bytes(event.data), UID(syntax))

    with Association(peer, [(_STORAGE_COMMITMENT, UNCOMPRESSED)], take) as association:
        if not association.accepted:
            raise NoStorageCommitment(
                f"{peer} accepts associations but does not offer Storage Commitment (Push Model); enable it there, or "
                "remove commitment_timeout_s from this destination"
            )
        ((_, syntax), context_id), *_ = association.accepted.items()
        message_id = association.next_message_id()
        command = pdu.n_action_rq(message_id, _STORAGE_COMMITMENT, _STORAGE_COMMITMENT_INSTANCE, _REQUEST_COMMITMENT)
        data = encode(_action_information(transaction_uid, instances), UID(syntax).is_implicit_VR, True)
        assert data is not None
        status = association.request(context_id, pdu.N_ACTION_RQ, message_id, command, data)
        on_answer(status)
        if status == _SUCCESS:
            association.serve_events(context_id, _REPORT_WAIT_S, enough)


def _action_information(transaction_uid: str, instances: Sequence[tuple[str, str]]) -> Dataset:
    """PS3.4 table J.3-1."""
    information = Dataset()
    information.TransactionUID = transaction_uid
    information.ReferencedSOPSequence = []
    for sop_class_uid, sop_instance_uid in instances:
        item = Dataset()
        item.ReferencedSOPClassUID = sop_class_uid
        item.ReferencedSOPInstanceUID = sop_instance_uid
        information.ReferencedSOPSequence.append(item)
    return information


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


def _store_one(
    association: Association, peer: Peer, item: Outgoing, on_request: Callable[[str], None]
) -> Answer | Refused:
    """Send one instance and wait for the answer to it."""
    uid = item.sop_instance_uid
    for syntax in (item.transfer_syntax_uid, *UNCOMPRESSED):
        if (context_id := association.accepted.get((item.sop_class_uid, syntax))) is not None:
            break
    else:
        return Refused(uid, _no_context(association, peer, item))
    try:
        data = data_set(item.path, uid, item.transfer_syntax_uid, syntax, item.sha256)
    except UnsendableFile as error:
        return Refused(uid, f"not sent to {peer.name}: {error}")
    message_id = association.next_message_id()
    on_request(uid)
    command = pdu.c_store_rq(message_id, item.sop_class_uid, uid)
    return Answer(uid, association.request(context_id, pdu.C_STORE_RQ, message_id, command, data))


def _no_context(association: Association, peer: Peer, item: Outgoing) -> str:
    sop_class, syntax = UID(item.sop_class_uid), UID(item.transfer_syntax_uid)
    if item.sop_class_uid in association.unknown_classes:
        return f"{peer} accepts no presentation context: it does not know {sop_class.name} ({sop_class})"
    return (
        f"{peer} accepts no presentation context for SOP class {sop_class.name} ({sop_class}): "
        f"neither {syntax.name} ({syntax}) nor Explicit or Implicit VR Little Endian; enable one of them there"
    )
