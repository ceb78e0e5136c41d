"""Bytes of the DICOM upper layer (PS3.8 section 9.3) and of DIMSE command sets (PS3.7 section 6.3); no socket here.

pynetdicom's classes write A-ASSOCIATE-RQ and read A-ASSOCIATE-AC. What is sent once per image is written here, around
the image's own bytes and without a copy of them. What comes from the network is checked before it is believed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from pynetdicom import build_context
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
)

from dicomnode.errors import MalformedPdu

Buffer = bytes | memoryview
Context = tuple[str, tuple[str, ...]]
"""A presentation context to propose: abstract syntax (SOP class), transfer syntaxes."""


@dataclass(frozen=True, slots=True)
class AcceptedContext:
    """A presentation context that was negotiated."""

    context_id: int
    abstract_syntax: str
    transfer_syntax: str


APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
VERIFICATION = "1.2.840.10008.1.1"
MAX_CONTEXTS = 128
"""Presentation context IDs are odd and fit a byte (PS3.8 table 9-13)."""
NO_LIMIT_PDU = 131072
"""Size of our PDUs, in bytes, for a peer that sets no limit; larger ones were not faster."""

HEADER_BYTES = 6
_HEADER = struct.Struct(">BxL")
_PDV_OVERHEAD = 6  # length (4), context ID (1), message control header (1), inside the PDU length
_P_DATA_HEADER = struct.Struct(">BxLLBB")
_COMMAND_ELEMENT = struct.Struct("<HHL")


class PduType(IntEnum):
    """First byte of a PDU."""

    ASSOCIATE_RQ = 1
    ASSOCIATE_AC = 2
    ASSOCIATE_RJ = 3
    P_DATA = 4
    RELEASE_RQ = 5
    RELEASE_RP = 6
    ABORT = 7


RELEASE_RQ = struct.pack(">BxL4x", PduType.RELEASE_RQ, 4)
RELEASE_RP = struct.pack(">BxL4x", PduType.RELEASE_RP, 4)
ABORT = struct.pack(">BxL2xBB", PduType.ABORT, 4, 0, 0)
"""A-ABORT by the service user (PS3.8 section 9.3.8)."""


class AbortReason(IntEnum):
    """Why the service provider aborts (PS3.8 table 9-26)."""

    NOT_SPECIFIED = 0
    UNRECOGNIZED_PDU = 1
    UNEXPECTED_PDU = 2
    INVALID_PARAMETER = 6


def provider_abort(reason: AbortReason) -> bytes:
    """A-ABORT by the service provider."""
    return struct.pack(">BxL2xBB", PduType.ABORT, 4, 2, reason)


def associate_rj(result: int, source: int, reason: int) -> bytes:
    """A-ASSOCIATE-RJ (PS3.8 table 9-21)."""
    return struct.pack(">BxLxBBB", PduType.ASSOCIATE_RJ, 4, result, source, reason)


class Element(IntEnum):
    """Element numbers of command group 0000 (PS3.7 annex E)."""

    GROUP_LENGTH = 0x0000
    AFFECTED_SOP_CLASS_UID = 0x0002
    REQUESTED_SOP_CLASS_UID = 0x0003
    COMMAND_FIELD = 0x0100
    MESSAGE_ID = 0x0110
    MESSAGE_ID_RESPONDED_TO = 0x0120
    PRIORITY = 0x0700
    DATA_SET_TYPE = 0x0800
    STATUS = 0x0900
    AFFECTED_SOP_INSTANCE_UID = 0x1000
    REQUESTED_SOP_INSTANCE_UID = 0x1001
    EVENT_TYPE_ID = 0x1002
    ACTION_TYPE_ID = 0x1008


C_STORE_RQ = 0x0001
C_ECHO_RQ = 0x0030
N_EVENT_REPORT_RQ = 0x0100
N_ACTION_RQ = 0x0130
RESPONSE = 0x8000
"""Bit that makes a command field that of the response."""
_MAX_UID_BYTES = 64
NO_DATA_SET = 0x0101
DATA_SET_FOLLOWS = 0x0001


def us(value: int) -> bytes:
    """An unsigned short of a command set."""
    return struct.pack("<H", value)


def ui(uid: str) -> bytes:
    """A UID of a command set, padded to even length with a null (PS3.5 section 9.1)."""
    raw = uid.encode("ascii")
    return raw + b"\0" * (len(raw) % 2)


def command_set(elements: Mapping[int, bytes]) -> bytes:
    """Implicit VR little endian command set, with its group length, in the order of the tags (PS3.7 section 6.3.1)."""
    body = b"".join(_COMMAND_ELEMENT.pack(0, n, len(elements[n])) + elements[n] for n in sorted(elements))
    return _COMMAND_ELEMENT.pack(0, Element.GROUP_LENGTH, 4) + struct.pack("<L", len(body)) + body


def c_store_rq(message_id: int, sop_class_uid: str, sop_instance_uid: str) -> bytes:
    """Command set of a C-STORE request of medium priority (PS3.7 section 9.3.1.1)."""
    return command_set(
        {
            Element.AFFECTED_SOP_CLASS_UID: ui(sop_class_uid),
            Element.COMMAND_FIELD: us(C_STORE_RQ),
            Element.MESSAGE_ID: us(message_id),
            Element.PRIORITY: us(0),
            Element.DATA_SET_TYPE: us(DATA_SET_FOLLOWS),
            Element.AFFECTED_SOP_INSTANCE_UID: ui(sop_instance_uid),
        }
    )


def c_echo_rq(message_id: int) -> bytes:
    """Command set of a C-ECHO request (PS3.7 section 9.3.5.1)."""
    return command_set(
        {
            Element.AFFECTED_SOP_CLASS_UID: ui(VERIFICATION),
            Element.COMMAND_FIELD: us(C_ECHO_RQ),
            Element.MESSAGE_ID: us(message_id),
            Element.DATA_SET_TYPE: us(NO_DATA_SET),
        }
    )


def n_action_rq(message_id: int, sop_class_uid: str, sop_instance_uid: str, action_type: int) -> bytes:
    """Command set of an N-ACTION request with a data set (PS3.7 section 10.3.4.1)."""
    return command_set(
        {
            Element.REQUESTED_SOP_CLASS_UID: ui(sop_class_uid),
            Element.COMMAND_FIELD: us(N_ACTION_RQ),
            Element.MESSAGE_ID: us(message_id),
            Element.DATA_SET_TYPE: us(DATA_SET_FOLLOWS),
            Element.REQUESTED_SOP_INSTANCE_UID: ui(sop_instance_uid),
            Element.ACTION_TYPE_ID: us(action_type),
        }
    )


def response(request: Mapping[int, bytes], status: int) -> bytes:
    """Command set that answers a C-STORE, C-ECHO or N-EVENT-REPORT request with `status` (PS3.7 sections 9.3 and 10.3).

    It repeats the UIDs of the request, unless they are longer than any UID.

    Raises
    ------
    MalformedPdu
        If the request lacks what an answer has to name.
    """
    named = (Element.AFFECTED_SOP_CLASS_UID, Element.AFFECTED_SOP_INSTANCE_UID)
    uids = {number: request.get(number, b"") for number in named}
    return command_set(
        {
            **{number: uid for number, uid in uids.items() if 0 < len(uid) <= _MAX_UID_BYTES},
            Element.COMMAND_FIELD: us(read_us(request, Element.COMMAND_FIELD) | RESPONSE),
            Element.MESSAGE_ID_RESPONDED_TO: us(read_us(request, Element.MESSAGE_ID)),
            Element.DATA_SET_TYPE: us(NO_DATA_SET),
            Element.STATUS: us(status),
        }
    )


def read_command_set(data: Buffer) -> dict[int, bytes]:
    """Element number → value.

    Raises
    ------
    MalformedPdu
        If the elements do not fill `data` exactly, or one is not of group 0000.
    """
    elements: dict[int, bytes] = {}
    offset = 0
    while offset < len(data):
        if offset + _COMMAND_ELEMENT.size > len(data):
            raise MalformedPdu("command set ends inside an element header")
        group, number, length = _COMMAND_ELEMENT.unpack_from(data, offset)
        offset += _COMMAND_ELEMENT.size
        if group != 0:
            raise MalformedPdu(f"command set with an element of group {group:04X}")
        if offset + length > len(data):
            raise MalformedPdu(f"command element (0000,{number:04X}) is longer than its command set")
        elements[number] = bytes(data[offset : offset + length])
        offset += length
    return elements


def read_us(elements: Mapping[int, bytes], number: Element) -> int:
    """Value of an unsigned short; MalformedPdu if it is absent or not two bytes."""
    value = elements.get(number, b"")
    if len(value) != 2:
        raise MalformedPdu(f"command set without a valid {number.name} (0000,{number:04X})")
    return int.from_bytes(value, "little")


def read_ui(elements: Mapping[int, bytes], number: Element) -> str:
    """Value of a UID without its padding, whatever it is: empty if it is absent, U+FFFD for what is not ASCII."""
    return elements.get(number, b"").decode("ascii", "replace").rstrip("\0 ")


def p_data(context_id: int, message: Buffer, *, command: bool, max_pdu: int) -> Iterator[Buffer]:
    """Headers and slices of `message`, alternating: P-DATA-TF PDUs of one PDV each, ready for a gathering write.

    Parameters
    ----------
    context_id
    message
        Command set or data set; not copied, not empty.
    command
        Which of both it is.
    max_pdu
        Largest length of the PDU's variable part that the peer takes, in bytes (PS3.8 annex D.1); 0 is no limit.

    Raises
    ------
    MalformedPdu
        If the peer's limit leaves no room for two bytes.
    """
    room = ((max_pdu or NO_LIMIT_PDU) - _PDV_OVERHEAD) & ~1  # fragments have even length (PS3.8 annex E.2)
    room = min(room, NO_LIMIT_PDU - _PDV_OVERHEAD)
    if room < 2:
        raise MalformedPdu(f"maximum PDU length of {max_pdu} bytes leaves no room for data")
    view = memoryview(message)
    for start in range(0, len(view), room):
        piece = view[start : start + room]
        last = start + room >= len(view)
        control = (1 if command else 0) | (2 if last else 0)
        yield _P_DATA_HEADER.pack(PduType.P_DATA, len(piece) + _PDV_OVERHEAD, len(piece) + 2, context_id, control)
        yield piece


@dataclass(frozen=True, slots=True)
class Pdv:
    """One presentation data value item (PS3.8 table 9-23)."""

    context_id: int
    command: bool
    last: bool
    data: Buffer


def pdvs(body: Buffer) -> Iterator[Pdv]:
    """Items of a P-DATA-TF PDU from its variable part; MalformedPdu if they do not fill it, or there is none."""
    if not body:
        raise MalformedPdu("P-DATA without an item")
    offset = 0
    while offset < len(body):
        if offset + _PDV_OVERHEAD > len(body):
            raise MalformedPdu("P-DATA ends inside an item header")
        length, context_id, control = struct.unpack_from(">LBB", body, offset)
        end = offset + 4 + length
        if length < 2 or end > len(body):
            raise MalformedPdu(f"P-DATA item of {length} bytes in {len(body) - offset} bytes")
        yield Pdv(context_id, bool(control & 1), bool(control & 2), body[offset + _PDV_OVERHEAD : end])
        offset = end


def read_header(header: Buffer) -> tuple[int, int]:
    """Type (not checked) and length of the variable part, from the first `HEADER_BYTES` of a PDU."""
    kind, length = _HEADER.unpack(header)
    return kind, length


def context_id(position: int) -> int:
    """Presentation context ID of the context at that place of the proposal."""
    return 2 * position + 1


def associate_rq(
    calling_ae_title: str,
    called_ae_title: str,
    contexts: Sequence[Context],
    *,
    max_pdu: int,
    implementation_class_uid: str,
    implementation_version_name: str,
) -> bytes:
    """A-ASSOCIATE-RQ; the context at place *i* gets ``context_id(i)``.

    Raises
    ------
    ValueError
        For more than `MAX_CONTEXTS` contexts, or an AE title that is none.
    """
    request = A_ASSOCIATE()
    request.application_context_name = APPLICATION_CONTEXT
    request.calling_ae_title = calling_ae_title
    request.called_ae_title = called_ae_title
    if len(contexts) > MAX_CONTEXTS:
        raise ValueError(f"{len(contexts)} presentation contexts; an association has room for {MAX_CONTEXTS}")
    proposed = []
    for position, (abstract_syntax, transfer_syntaxes) in enumerate(contexts):
        context = build_context(abstract_syntax, list(transfer_syntaxes))
        context.context_id = context_id(position)
        proposed.append(context)
    request.presentation_context_definition_list = proposed
    length = MaximumLengthNotification()
    length.maximum_length_received = max_pdu
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = implementation_class_uid
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = implementation_version_name
    request.user_information = [length, implementation, version]
    pdu: bytes = A_ASSOCIATE_RQ(request).encode()
    return pdu


@dataclass(frozen=True, slots=True)
class Accepted:
    """What an A-ASSOCIATE-AC grants."""

    max_pdu: int
    """Largest PDU the acceptor takes, in bytes; 0 is no limit."""
    syntaxes: Mapping[int, str]
    """Context ID → transfer syntax, of the accepted contexts."""
    refusals: Mapping[int, int]
    """Context ID → result 1 to 4, of the others (PS3.8 table 9-18)."""


def read_associate_ac(pdu: bytes) -> Accepted:
    """Read a whole A-ASSOCIATE-AC; MalformedPdu if pynetdicom cannot."""
    try:
        answer = A_ASSOCIATE_AC()
        answer.decode(pdu)
        primitive = answer.to_primitive()
        syntaxes: dict[int, str] = {}
        refusals: dict[int, int] = {}
        for context in primitive.presentation_context_definition_results_list:
            if context.context_id is None or context.result is None:
                raise ValueError("a context without identity or result")
            if context.result == 0:
                (syntax,) = context.transfer_syntax
                syntaxes[context.context_id] = str(syntax)
            else:
                refusals[context.context_id] = context.result
    except Exception as error:  # its decoder has no error of its own: what it raises depends on the garbage
        raise MalformedPdu(f"an A-ASSOCIATE-AC that cannot be read ({type(error).__name__})") from error
    if not syntaxes and not refusals:
        # It reads a short PDU as one without any results, which would look like "accepts nothing we have".
        raise MalformedPdu("an A-ASSOCIATE-AC without a result for any presentation context")
    return Accepted(primitive.maximum_length_received or 0, syntaxes, refusals)
