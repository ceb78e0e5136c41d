"""Association requests, put together item by item, and what pynetdicom makes of them: the truth about negotiation."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, MRImageStorage
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_items import AbstractSyntaxSubItem, TransferSyntaxSubItem
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
)
from pynetdicom.presentation import PresentationContext, negotiate_as_acceptor

from dicomnode import pdu
from dicomnode.negotiation import Request
from dicomnode.spool import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

COMMITMENT = "1.2.840.10008.1.20.1"


def by_pynetdicom(associate_rq: bytes, supported: Sequence[PresentationContext], max_pdu: int) -> Request:
    """What pynetdicom makes of a request; any error if it cannot read it."""
    request = A_ASSOCIATE_RQ()
    request.decode(associate_rq)
    asked = request.to_primitive()
    for context in request.presentation_context:
        for sub_item in context.abstract_transfer_syntax_sub_items:
            if not isinstance(sub_item, AbstractSyntaxSubItem | TransferSyntaxSubItem):
                raise TypeError("no pynetdicom error: the node is stricter")
    roles = {
        UID(str(item.sop_class_uid)): (item.scu_role, item.scp_role)
        for item in asked.user_information
        if isinstance(item, SCP_SCU_RoleSelectionNegotiation)
    }
    results, granted = negotiate_as_acceptor(asked.presentation_context_definition_list, list(supported), roles)
    if not results:
        raise ValueError("no presentation context")
    answer = A_ASSOCIATE()
    answer.application_context_name = pdu.APPLICATION_CONTEXT
    answer.calling_ae_title, answer.called_ae_title = asked.calling_ae_title, asked.called_ae_title
    answer.presentation_context_definition_results_list = list(results)
    length = MaximumLengthNotification()
    length.maximum_length_received = max_pdu
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    answer.user_information = [length, implementation, version, *granted]
    return Request(
        request.protocol_version,
        str(asked.application_context_name or ""),
        asked.calling_ae_title.strip(),
        asked.called_ae_title.strip(),
        asked.maximum_length_received or 0,
        {
            context.context_id: pdu.AcceptedContext(
                context.context_id, str(context.abstract_syntax), str(*context.transfer_syntax)
            )
            for context in results
            if context.result == 0
        },
        A_ASSOCIATE_AC(answer).encode(),
    )


def item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(value)) + value


def proposal(context_id: int, sub_items: bytes) -> bytes:
    return item(0x20, bytes([context_id, 0, 0, 0]) + sub_items)


def fixed_part(version: int = 1, called: bytes = b"NODE", calling: bytes = b"SCANNER") -> bytes:
    return struct.pack(
        ">BxLHxx16s16s32x", 1, 0, version, called.ljust(16), calling.ljust(16)
    )  # nobody looks at a length


def abstract(uid: str) -> bytes:
    return item(0x30, uid.encode())


def transfer(uid: str) -> bytes:
    return item(0x40, uid.encode())


def role(uid: bytes, scu: int, scp: int) -> bytes:
    return item(0x54, struct.pack(">H", len(uid)) + uid + bytes([scu, scp]))


CLASS, SYNTAX = abstract(CTImageStorage), transfer(ImplicitVRLittleEndian)
OTHER_CLASS, OTHER_SYNTAX = abstract(MRImageStorage), transfer(ExplicitVRLittleEndian)
SOUND, APPLICATION = CLASS + SYNTAX, item(0x10, pdu.APPLICATION_CONTEXT.encode())
BOTH_ROLES = role(CTImageStorage.encode(), 1, 1) + role(COMMITMENT.encode(), 1, 1)
ODD = {
    "uid-with-null": proposal(1, abstract(CTImageStorage + "\0") + transfer(ImplicitVRLittleEndian + "\0")),
    "uid-with-nulls": proposal(1, abstract(CTImageStorage + "\0\0") + SYNTAX),
    "uid-with-space": proposal(1, abstract(CTImageStorage + " ") + transfer(" " + ImplicitVRLittleEndian)),
    "uid-with-separator": proposal(1, abstract(CTImageStorage + "\x1c") + SYNTAX),
    "uid-of-64": proposal(1, abstract("1" * 64) + SYNTAX),
    "uid-of-65": proposal(1, abstract("1" * 65) + SYNTAX),
    "uid-of-65-with-null": proposal(1, CLASS + transfer("1" * 64 + "\0") + SYNTAX),
    "uid-not-ascii": proposal(1, abstract("1.2.\xe4") + SYNTAX),
    "uid-of-letters": proposal(1, abstract("CT") + transfer("X")),
    "id-0": proposal(0, SOUND),
    "id-2": proposal(2, SOUND),
    "id-255": proposal(255, SOUND),
    "nothing-in-it": item(0x20, b""),
    "id-alone": item(0x20, b"\1"),
    "no-sub-items": proposal(1, b""),
    "no-abstract-syntax": proposal(1, SYNTAX),
    "abstract-syntax-empty": proposal(1, abstract("") + SYNTAX),
    "abstract-syntax-last": proposal(1, SYNTAX + OTHER_SYNTAX + CLASS),
    "abstract-syntax-between": proposal(1, transfer("1.2.4") + OTHER_CLASS + transfer("1.2.5")),
    "two-abstract-syntaxes": proposal(1, OTHER_CLASS + SYNTAX + CLASS),
    "no-transfer-syntax": proposal(1, CLASS),
    "transfer-syntax-empty": proposal(1, CLASS + transfer("")),
    "transfer-syntax-empty-first": proposal(1, OTHER_CLASS + transfer("") + SYNTAX),
    "transfer-syntax-twice": proposal(1, CLASS + SYNTAX + OTHER_SYNTAX + SYNTAX),
    "sub-item-too-long": proposal(1, SOUND[:-1]),
    "sub-item-header-cut": proposal(1, SOUND + b"\x40\0\0"),
    "sub-item-unknown": proposal(1, SOUND + item(0x41, b"")),
    "context-too-long": proposal(1, SOUND)[:-1],
    "context-in-order-of-ids": proposal(5, SOUND) + proposal(3, SOUND) + proposal(1, SOUND),
    "context-twice": proposal(1, CLASS + SYNTAX) + proposal(3, SOUND) + proposal(1, CLASS + OTHER_SYNTAX),
    "context-twice-once-without-syntax": proposal(1, CLASS) + proposal(1, SOUND),
    "id-twice": proposal(1, SOUND) + proposal(1, OTHER_CLASS + SYNTAX),
    "id-twice-accepted": proposal(1, SOUND) + proposal(1, abstract(COMMITMENT) + SYNTAX),
    "item-unknown": proposal(1, SOUND) + item(0x11, b""),
    "item-header-cut": proposal(1, SOUND) + b"\x50",
    "item-of-elsewhere": proposal(1, SOUND) + CLASS + item(0x21, b"\1\0\0\0"),
    "no-application-context": proposal(1, SOUND),
    "application-context-empty": proposal(1, SOUND) + item(0x10, b""),
    "application-context-twice": proposal(1, SOUND) + item(0x10, b"1.2\0") + APPLICATION,
    "two-roles-accepted": proposal(1, SOUND) + proposal(3, abstract(COMMITMENT) + SYNTAX) + item(0x50, BOTH_ROLES),
    "role-twice": proposal(1, SOUND) + item(0x50, BOTH_ROLES + role(CTImageStorage.encode() + b" ", 0, 1)),
    "role-of-2": proposal(1, SOUND) + item(0x50, role(b"1.2", 2, 0)),
    "role-of-nothing": proposal(1, SOUND) + item(0x50, role(b"", 1, 1)),
    "user-information-twice": proposal(1, SOUND) + item(0x50, item(0x51, b"\0\0\0\1")) + item(0x50, BOTH_ROLES),
    "limit-twice": proposal(1, SOUND) + item(0x50, item(0x51, b"\0\0\0\1") + item(0x51, b"\0\0\0\2")),
    "limit-too-short": proposal(1, SOUND) + item(0x50, item(0x51, b"\0\0\1")),
    "asynchronous": proposal(1, SOUND) + item(0x50, item(0x53, b"\0\2\0\2")),
    "extended": proposal(1, SOUND) + item(0x50, item(0x56, b"\0\51.2.3\1")),
    "user-identity": proposal(1, SOUND) + item(0x50, item(0x58, b"\2\1\0\4user\0\0")),
    "user-information-unknown": proposal(1, SOUND) + item(0x50, item(0x5A, b"")),
    "version-name-too-long": proposal(1, SOUND) + item(0x50, item(0x55, b"a" * 17)),
}
