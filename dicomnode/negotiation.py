"""The acceptor's side of association negotiation (PS3.8 section 7.1, PS3.7 annex D), by pynetdicom; no socket here.

pynetdicom reads the request, decides on contexts and roles, and writes the answer. What it does depends on nothing but
the request and what is supported, so an answer is kept: a scanner opens association after association with the same
request, and reading one with 128 contexts in all transfer syntaxes takes pynetdicom 50 to 200 ms.

What is used here of pynetdicom is pinned in tests/unit/test_negotiation.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pydicom.uid import UID
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
)
from pynetdicom.presentation import PresentationContext, negotiate_as_acceptor

from dicomnode.errors import MalformedPdu
from dicomnode.pdu import APPLICATION_CONTEXT
from dicomnode.spool import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

PROTOCOL_VERSION = 1
"""A bit: a requestor may offer several versions (PS3.8 table 9-11)."""
_KEPT_ANSWERS = 16
"""Requests whose answers are kept; each takes at most some 300 kB."""


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
    contexts: Mapping[int, PresentationContext]
    """Context ID → accepted context, with one transfer syntax. Shared between associations: to be read only."""
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

    def __init__(self, supported: Collection[PresentationContext], max_pdu: int) -> None:
        self._supported = list(supported)
        self._max_pdu = max_pdu
        self.read = lru_cache(_KEPT_ANSWERS)(self._read)
        """As `_read`."""

    def _read(self, associate_rq: bytes) -> Request:
        """Read a whole A-ASSOCIATE-RQ; MalformedPdu if pynetdicom cannot."""
        try:
            request = A_ASSOCIATE_RQ()
            request.decode(associate_rq)
            asked = request.to_primitive()
            roles = {
                UID(str(item.sop_class_uid)): (item.scu_role, item.scp_role)
                for item in asked.user_information
                if isinstance(item, SCP_SCU_RoleSelectionNegotiation)
            }
            results, granted = negotiate_as_acceptor(asked.presentation_context_definition_list, self._supported, roles)
            if not results:
                raise ValueError("no presentation context")
            return Request(
                request.protocol_version,
                str(asked.application_context_name or ""),
                asked.calling_ae_title.strip(),
                asked.called_ae_title.strip(),
                asked.maximum_length_received or 0,
                {int(str(context.context_id)): context for context in results if context.result == 0},
                self._acceptance(asked, results, granted),
            )
        except Exception as error:  # its decoder has no error of its own: what it raises depends on the garbage
            raise MalformedPdu(f"an A-ASSOCIATE-RQ that cannot be read ({type(error).__name__})") from error

    def _acceptance(
        self,
        asked: A_ASSOCIATE,
        results: Sequence[PresentationContext],
        granted: Sequence[SCP_SCU_RoleSelectionNegotiation],
    ) -> bytes:
        answer = A_ASSOCIATE()
        answer.application_context_name = APPLICATION_CONTEXT
        answer.calling_ae_title, answer.called_ae_title = asked.calling_ae_title, asked.called_ae_title
        answer.result, answer.result_source = 0, 1
        answer.presentation_context_definition_results_list = list(results)
        length = MaximumLengthNotification()
        length.maximum_length_received = self._max_pdu
        implementation = ImplementationClassUIDNotification()
        implementation.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
        version = ImplementationVersionNameNotification()
        version.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        answer.user_information = [length, implementation, version, *granted]
        pdu: bytes = A_ASSOCIATE_AC(answer).encode()
        return pdu
