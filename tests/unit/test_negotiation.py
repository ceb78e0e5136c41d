"""Negotiation by pynetdicom, and what is relied upon of it."""

from __future__ import annotations

import struct

import pynetdicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, MRImageStorage
from pynetdicom import build_context, build_role
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.presentation import PresentationContext

from dicomnode import pdu
from dicomnode.errors import MalformedPdu
from dicomnode.negotiation import Negotiator

COMMITMENT = "1.2.840.10008.1.20.1"
READ = "3.0.4"


def supported() -> list[PresentationContext]:
    commitment = build_context(COMMITMENT, [ImplicitVRLittleEndian])
    commitment.scu_role = commitment.scp_role = True
    return [build_context(CTImageStorage, [ExplicitVRLittleEndian, ImplicitVRLittleEndian]), commitment]


def asking(*contexts: pdu.Context, max_pdu: int = 16384) -> bytes:
    return pdu.associate_rq(
        "SCANNER", "NODE", contexts, max_pdu=max_pdu, implementation_class_uid="1.2", implementation_version_name="X"
    )


def test_pynetdicom_is_the_version_that_was_read() -> None:
    assert pynetdicom.__version__ == READ, (
        f"pynetdicom is {pynetdicom.__version__}, and dicomnode/negotiation.py and dicomnode/services.py rely on what "
        f"was read in {READ}: A_ASSOCIATE_RQ.decode and to_primitive, negotiate_as_acceptor (which must not change the "
        "contexts that it is given), A_ASSOCIATE_AC.encode, DIMSEMessage.decode_msg and message_to_primitive, "
        "DIMSEServiceProvider.send_msg, evt.trigger, and what service classes use of their association. Read these "
        "again, run tests/unit/test_{negotiation,services,association,transport}.py, then change READ here and the "
        "pin in pyproject.toml"
    )


def test_the_order_of_the_acceptor_decides() -> None:
    negotiator = Negotiator(supported(), 131072)
    request = negotiator.read(
        asking(
            (CTImageStorage, (ImplicitVRLittleEndian, ExplicitVRLittleEndian)),
            (CTImageStorage, (ImplicitVRLittleEndian,)),
            (CTImageStorage, ("1.2.840.10008.1.2.4.50",)),
            (MRImageStorage, (ImplicitVRLittleEndian,)),
        )
    )
    assert (request.protocol_version, request.calling_ae_title, request.called_ae_title) == (1, "SCANNER", "NODE")
    assert request.max_pdu == 16384
    assert {key: [str(one) for one in context.transfer_syntax] for key, context in request.contexts.items()} == {
        1: [ExplicitVRLittleEndian],
        3: [ImplicitVRLittleEndian],
    }
    accepted = pdu.read_associate_ac(request.acceptance)
    assert accepted.max_pdu == 131072
    assert dict(accepted.syntaxes) == {1: ExplicitVRLittleEndian, 3: ImplicitVRLittleEndian}
    assert dict(accepted.refusals) == {5: 4, 7: 3}


def test_an_answer_is_kept_and_depends_on_nothing_but_the_request() -> None:
    negotiator = Negotiator(supported(), 131072)
    first = negotiator.read(asking((CTImageStorage, (ImplicitVRLittleEndian,))))
    other = negotiator.read(asking((CTImageStorage, (ExplicitVRLittleEndian,))))
    assert negotiator.read(asking((CTImageStorage, (ImplicitVRLittleEndian,)))) is first
    assert first.contexts[1].transfer_syntax != other.contexts[1].transfer_syntax
    assert [context.transfer_syntax for context in negotiator._supported] == [
        context.transfer_syntax for context in supported()
    ]


def test_a_peer_without_limit() -> None:
    assert Negotiator(supported(), 1).read(asking((CTImageStorage, (ImplicitVRLittleEndian,)), max_pdu=0)).max_pdu == 0


def test_roles_are_negotiated() -> None:
    """A PACS that reports a commitment calls us, and keeps the role of the SCP."""
    request = A_ASSOCIATE_RQ()
    request.decode(asking((COMMITMENT, (ImplicitVRLittleEndian,))))
    primitive = request.to_primitive()
    primitive.user_information.append(build_role(COMMITMENT, scp_role=True))
    read = Negotiator(supported(), 16384).read(A_ASSOCIATE_RQ(primitive).encode())
    assert read.contexts[1].as_scu
    answer = A_ASSOCIATE_AC()
    answer.decode(read.acceptance)
    granted = [item for item in answer.to_primitive().user_information if hasattr(item, "scp_role")]
    assert [(item.sop_class_uid, item.scu_role, item.scp_role) for item in granted] == [(COMMITMENT, False, True)]


def test_a_request_without_contexts_is_none() -> None:
    with pytest.raises(MalformedPdu):
        Negotiator(supported(), 16384).read(asking())


@given(st.data())
def test_garbage_is_refused_or_read_but_never_breaks_the_reader(data: st.DataObject) -> None:
    request = bytearray(asking((CTImageStorage, (ImplicitVRLittleEndian, ExplicitVRLittleEndian))))
    for _ in range(data.draw(st.integers(1, 5))):
        request[data.draw(st.integers(6, len(request) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(request[: data.draw(st.integers(6, len(request)))])
    try:
        read = Negotiator(supported(), 16384).read(struct.pack(">BxL", 1, len(cut) - 6) + cut[6:])
    except MalformedPdu:
        return
    assert pdu.read_associate_ac(read.acceptance).syntaxes.keys() == read.contexts.keys()
