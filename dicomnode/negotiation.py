"""The acceptor's side of association negotiation (PS3.8 section 7.1, PS3.7 annex D); no socket here.

Presentation contexts are read, decided and answered here. pynetdicom would do so too, but makes several objects of each
transfer syntax of each context: tens of milliseconds where 128 contexts propose all of them. What is the same in all
contexts is read once here. The rest of a request, its titles and user information, pynetdicom reads.

Contexts, roles and the answer are those of pynetdicom, byte for byte: tests/unit/test_negotiation.py compares. But an
item that has no place in a presentation context is refused here, while pynetdicom takes what has a place anywhere:
contexts in contexts, as deep as its stack goes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, SCP_SCU_RoleSelectionNegotiation
from pynetdicom.presentation import PresentationContext

from dicomnode.errors import MalformedPdu
from dicomnode.pdu import APPLICATION_CONTEXT, HEADER_BYTES, AcceptedContext, PduType
from dicomnode.spool import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

PROTOCOL_VERSION = 1
"""A bit: a requestor may offer several versions (PS3.8 table 9-11)."""
_FIXED = struct.Struct(">BxLH2x16s16s32x")
"""What precedes the items of an A-ASSOCIATE-RQ and -AC: type, length, protocol version, AE titles."""
_ITEM = struct.Struct(">BxH")
"""Type, length of the value."""
_CONTEXT = struct.Struct(">BxBx")
"""Context ID, and the result of an answer."""
_MAX_UID_LENGTH = 64


class _Item(IntEnum):
    """Types of items and sub-items (PS3.8 section 9.3, PS3.7 annex D.3.3)."""

    APPLICATION_CONTEXT = 0x10
    CONTEXT_RQ = 0x20
    CONTEXT_AC = 0x21
    ABSTRACT_SYNTAX = 0x30
    TRANSFER_SYNTAX = 0x40
    USER_INFORMATION = 0x50
    MAXIMUM_LENGTH = 0x51
    IMPLEMENTATION_CLASS_UID = 0x52
    ROLE = 0x54
    IMPLEMENTATION_VERSION_NAME = 0x55


class _Result(IntEnum):
    """Of a presentation context (PS3.8 table 9-18)."""

    ACCEPTED = 0
    USER_REJECTION = 1
    NO_ABSTRACT_SYNTAX = 3
    NO_TRANSFER_SYNTAX = 4


_Roles = tuple[bool, bool]
"""Is the requestor SCU, is it SCP."""
_Proposals = Mapping[tuple[int, str], Mapping[str, None]]
"""Context ID and abstract syntax → transfer syntaxes in their order, at least one."""


@dataclass(frozen=True, slots=True)
class Request:
    """An A-ASSOCIATE-RQ and the answer to it, should the association be accepted."""

    protocol_version: int
    application_context: str
    """Its name; empty if the request names none."""
    calling_ae_title: str
    called_ae_title: str
    max_pdu: int
    """Largest PDU that the requestor takes, in bytes; 0 is no limit."""
    contexts: Mapping[int, AcceptedContext]
    """By context ID."""
    acceptance: bytes
    """A-ASSOCIATE-AC."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why an association is rejected, for an A-ASSOCIATE-RJ (PS3.8 table 9-21), and in words."""

    result: int
    source: int
    reason: int
    why: str


class Negotiator:
    """Answers association requests.

    Parameters
    ----------
    supported
        Contexts with all transfer syntaxes that are supported, the preferred first: the acceptor's order decides.
    max_pdu
        Largest PDU that the peer may send, in bytes.
    """

    def __init__(self, supported: Iterable[PresentationContext], max_pdu: int) -> None:
        self._supported = {str(context.abstract_syntax): context for context in supported}
        self._max_pdu = max_pdu

    def read(self, associate_rq: bytes) -> Request:
        """Read a whole A-ASSOCIATE-RQ, and answer it; MalformedPdu if it cannot be read."""
        try:
            contexts, others = [], []
            for kind, value in _items(associate_rq[_FIXED.size :]):
                if kind == _Item.CONTEXT_RQ:
                    contexts.append(value)
                else:
                    others.append(_item(kind, value))
            request = A_ASSOCIATE_RQ()
            request.decode(associate_rq[: _FIXED.size] + b"".join(others))
            asked = request.to_primitive()
            proposals = _proposals(contexts)
        except Exception as error:  # pynetdicom has no error of its own: what it raises depends on the garbage
            raise MalformedPdu(f"an A-ASSOCIATE-RQ that cannot be read ({type(error).__name__})") from error
        accepted, answer = self._answer(proposals, _roles(asked))
        titles = [title.ljust(16).encode("ascii") for title in (asked.called_ae_title, asked.calling_ae_title)]
        length = _FIXED.size - HEADER_BYTES + len(answer)
        return Request(
            request.protocol_version,
            str(asked.application_context_name or ""),
            asked.calling_ae_title,
            asked.called_ae_title,
            asked.maximum_length_received or 0,
            accepted,
            _FIXED.pack(PduType.ASSOCIATE_AC, length, PROTOCOL_VERSION, *titles) + answer,
        )

    def _answer(self, proposals: _Proposals, roles: Mapping[str, _Roles]) -> tuple[dict[int, AcceptedContext], bytes]:
        """The accepted contexts, and the items of an A-ASSOCIATE-AC, in the order of the context IDs."""
        accepted: dict[int, AcceptedContext] = {}
        granted: dict[str, _Roles] = {}
        items = [_item(_Item.APPLICATION_CONTEXT, APPLICATION_CONTEXT.encode())]
        for (context_id, abstract_syntax), proposed in sorted(proposals.items(), key=lambda one: one[0][0]):
            result, syntax, role = self._decide(abstract_syntax, proposed, roles.get(abstract_syntax))
            if result == _Result.ACCEPTED:
                accepted[context_id] = AcceptedContext(context_id, abstract_syntax, syntax)
            if role is not None:
                granted[abstract_syntax] = role
            sub_item = _item(_Item.TRANSFER_SYNTAX, syntax.encode())
            items.append(_item(_Item.CONTEXT_AC, _CONTEXT.pack(context_id, result) + sub_item))
        information = [
            _item(_Item.MAXIMUM_LENGTH, struct.pack(">L", self._max_pdu)),
            _item(_Item.IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_CLASS_UID.encode()),
            _item(_Item.IMPLEMENTATION_VERSION_NAME, IMPLEMENTATION_VERSION_NAME.encode()),
            *(
                _item(_Item.ROLE, struct.pack(">H", len(uid)) + uid.encode() + bytes(role))
                for uid, role in sorted(granted.items())
            ),
        ]
        return accepted, b"".join([*items, _item(_Item.USER_INFORMATION, b"".join(information))])

    def _decide(
        self, abstract_syntax: str, proposed: Mapping[str, None], role: _Roles | None
    ) -> tuple[_Result, str, _Roles | None]:
        """What becomes of a context, the transfer syntax of its answer, and the roles, if the answer names any."""
        supported = self._supported.get(abstract_syntax)
        if supported is None:
            return _Result.NO_ABSTRACT_SYNTAX, next(iter(proposed)), None
        syntax = next((str(one) for one in supported.transfer_syntax if one in proposed), None)
        if syntax is None:
            return _Result.NO_TRANSFER_SYNTAX, next(iter(proposed)), None
        if role is None or supported.scu_role is None or supported.scp_role is None:
            return _Result.ACCEPTED, syntax, None
        granted = (role[0] and supported.scu_role, role[1] and supported.scp_role)
        return (_Result.ACCEPTED, syntax, granted) if any(granted) else (_Result.USER_REJECTION, syntax, None)


def _roles(asked: A_ASSOCIATE) -> dict[str, _Roles]:
    """SOP class → roles that the requestor proposes for itself."""
    return {
        str(item.sop_class_uid): (bool(item.scu_role), bool(item.scp_role))
        for item in asked.user_information
        if isinstance(item, SCP_SCU_RoleSelectionNegotiation)
    }


def _proposals(contexts: Iterable[bytes]) -> _Proposals:
    """From the values of the presentation context items; any error if they cannot be read, or there is none.

    Of the same abstract syntax under the same context ID the last counts.
    """
    syntaxes = cache(_syntaxes)
    """Without it the time would be that of each transfer syntax in each context."""
    proposals: dict[tuple[int, str], dict[str, None]] = {}
    for context in contexts:
        context_id, sub_items = context[0], context[_CONTEXT.size :]
        # Mostly the abstract syntax, which is another in each context, and then what is the same in all.
        first_bytes = _ITEM.size + _ITEM.unpack_from(sub_items)[1]
        abstract_syntax, first = syntaxes(sub_items[:first_bytes])
        later_abstract_syntax, others = syntaxes(sub_items[first_bytes:])
        if later_abstract_syntax is not None:
            abstract_syntax = later_abstract_syntax
        if context_id % 2 == 0 or abstract_syntax is None:
            raise ValueError("a presentation context without a valid ID or an abstract syntax")
        proposals[context_id, abstract_syntax] = first | others
    if not proposals or not all(proposals.values()):
        raise ValueError("no presentation context, or one without a transfer syntax")
    return proposals


def _syntaxes(sub_items: bytes) -> tuple[str | None, dict[str, None]]:
    """The last abstract syntax and all transfer syntaxes, in their order, of sub-items of a presentation context."""
    abstract_syntax: str | None = None
    transfer_syntaxes: dict[str, None] = {}
    for kind, value in _items(sub_items):
        if kind == _Item.ABSTRACT_SYNTAX:
            abstract_syntax = _uid(value)
        elif kind != _Item.TRANSFER_SYNTAX:
            raise ValueError(f"a sub-item of type {kind} in a presentation context")
        elif uid := _uid(value):
            transfer_syntaxes[uid] = None
    return abstract_syntax, transfer_syntaxes


def _uid(value: bytes) -> str:
    """A UID without its padding, which may be empty; of its characters nothing is asked but that they are ASCII."""
    uid = value.removesuffix(b"\0").decode("ascii").strip()
    if len(uid) > _MAX_UID_LENGTH:
        raise ValueError(f"a UID of {len(uid)} characters")
    return uid


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Types and values of items (PS3.8 section 9.3.1); any error if they do not fill `data`."""
    at = 0
    while at < len(data):
        kind, length = _ITEM.unpack_from(data, at)
        at += _ITEM.size + length
        if at > len(data):
            raise ValueError("an item that is longer than what holds it")
        yield kind, data[at - length : at]


def _item(kind: int, value: bytes) -> bytes:
    return _ITEM.pack(kind, len(value)) + value
