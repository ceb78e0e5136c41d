"""Negotiation, held against pynetdicom's, and what is relied upon of pynetdicom."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pynetdicom
import pytest
from associating import APPLICATION, COMMITMENT, ODD, SOUND, by_pynetdicom, fixed_part, item, proposal, role
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import (
    AllTransferSyntaxes,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    MRImageStorage,
)
from pynetdicom import AllStoragePresentationContexts, build_context, build_role
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.presentation import PresentationContext

from dicomnode import pdu
from dicomnode.errors import MalformedPdu
from dicomnode.negotiation import Negotiator, Request

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
        f"was read in {READ}: A_ASSOCIATE_RQ.decode and to_primitive (which read each item for itself), what these "
        "and negotiate_as_acceptor make of presentation contexts, DIMSEMessage.decode_msg and message_to_primitive, "
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
    assert dict(request.contexts) == {
        1: pdu.AcceptedContext(1, CTImageStorage, ExplicitVRLittleEndian),
        3: pdu.AcceptedContext(3, CTImageStorage, ImplicitVRLittleEndian),
    }
    accepted = pdu.read_associate_ac(request.acceptance)
    assert accepted.max_pdu == 131072
    assert dict(accepted.syntaxes) == {1: ExplicitVRLittleEndian, 3: ImplicitVRLittleEndian}
    assert dict(accepted.refusals) == {5: 4, 7: 3}


def test_a_peer_without_limit() -> None:
    assert Negotiator(supported(), 1).read(asking((CTImageStorage, (ImplicitVRLittleEndian,)), max_pdu=0)).max_pdu == 0


def test_roles_are_negotiated() -> None:
    """A PACS that reports a commitment calls us, and keeps the role of the SCP."""
    request = A_ASSOCIATE_RQ()
    request.decode(asking((COMMITMENT, (ImplicitVRLittleEndian,))))
    primitive = request.to_primitive()
    primitive.user_information.append(build_role(COMMITMENT, scp_role=True))
    read = Negotiator(supported(), 16384).read(A_ASSOCIATE_RQ(primitive).encode())
    assert read.contexts.keys() == {1}
    answer = A_ASSOCIATE_AC()
    answer.decode(read.acceptance)
    granted = [item for item in answer.to_primitive().user_information if hasattr(item, "scp_role")]
    assert [(item.sop_class_uid, item.scu_role, item.scp_role) for item in granted] == [(COMMITMENT, False, True)]


def test_a_request_without_contexts_is_none() -> None:
    with pytest.raises(MalformedPdu):
        Negotiator(supported(), 16384).read(asking())


def test_what_has_no_place_in_a_presentation_context_is_refused() -> None:
    """pynetdicom takes it where it has a place elsewhere, and follows contexts in contexts until its stack ends."""
    for sub_item in (item(0x50, item(0x51, bytes(4))), proposal(3, SOUND)):
        request = fixed_part() + proposal(1, SOUND + sub_item)
        A_ASSOCIATE_RQ().decode(request)
        with pytest.raises(MalformedPdu):
            Negotiator(supported(), 16384).read(request)


def test_time_grows_with_contexts_and_with_transfer_syntaxes_but_not_with_their_product() -> None:
    """Counted in calls, as a clock would say something else each time."""
    classes = [str(context.abstract_syntax) for context in AllStoragePresentationContexts[: pdu.MAX_CONTEXTS]]
    negotiator = Negotiator([build_context(one, list(AllTransferSyntaxes)) for one in classes], 16384)

    def calls(syntaxes: Sequence[str]) -> int:
        request = asking(*((one, tuple(syntaxes)) for one in classes))
        count = 0

        def called(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event == "call"

        sys.setprofile(called)
        try:
            read = negotiator.read(request)
        finally:
            sys.setprofile(None)
        assert len(read.contexts) == len(classes)
        return count

    assert calls(AllTransferSyntaxes) - calls(AllTransferSyntaxes[:1]) <= 5 * len(AllTransferSyntaxes)


# ── as pynetdicom ──────────────────────────────────────────────────────────────────────────────────────────────────

ATTITUDES = [None, False, True]
CLASSES = [CTImageStorage, COMMITMENT, MRImageStorage, "1.2.3"]
SYNTAXES = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, JPEG2000Lossless, "1.2.4"]
of_odd_uids = pytest.mark.filterwarnings("ignore:.*VR UI")  # says pydicom


def compare(associate_rq: bytes, supported: Sequence[PresentationContext]) -> Request | None:
    """Both answers are the same, or both refuse: None."""
    try:
        expected = by_pynetdicom(associate_rq, supported, 131072)
    except Exception:
        with pytest.raises(MalformedPdu):
            Negotiator(supported, 131072).read(associate_rq)
        return None
    assert Negotiator(supported, 131072).read(associate_rq) == expected
    return expected


def supporting(uid: str, syntaxes: list[str], scu: bool | None, scp: bool | None) -> PresentationContext:
    context = build_context(uid, syntaxes)
    context.scu_role, context.scp_role = scu, scp
    return context


@of_odd_uids
@pytest.mark.parametrize("name", ODD)
def test_an_odd_request_is_read_as_pynetdicom_reads_it(name: str) -> None:
    syntaxes = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
    supported = [supporting(uid, syntaxes, True, True) for uid in (CTImageStorage, COMMITMENT)]
    for first, last in [(APPLICATION, b""), (b"", APPLICATION), (b"", b"")]:
        compare(fixed_part() + first + ODD[name] + last, supported)


@pytest.mark.parametrize("title", [b"NODE", b" NODE", b"\tNODE", b"", b"A\0", b"A\nB", b"\xe4", b"A\\B", b"A" * 16])
def test_titles_are_read_as_pynetdicom_reads_them(title: bytes) -> None:
    for titles in ({"called": title}, {"calling": title}):
        compare(fixed_part(version=3, **titles) + APPLICATION + proposal(1, SOUND), supported())


@pytest.mark.parametrize("scu", ATTITUDES)
@pytest.mark.parametrize("scp", ATTITUDES)
def test_all_roles_end_as_with_pynetdicom(scu: bool | None, scp: bool | None) -> None:
    supported = [supporting(CTImageStorage, [ImplicitVRLittleEndian], scu, scp)]
    for proposed in range(4):
        roles = item(0x50, role(CTImageStorage.encode(), proposed & 1, proposed >> 1))
        assert compare(fixed_part() + APPLICATION + proposal(1, SOUND) + roles, supported) is not None


def items(kind: int, values: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return values.map(lambda value: item(kind, value))


def several(parts: st.SearchStrategy[bytes], least: int = 0, most: int = 5) -> st.SearchStrategy[bytes]:
    return st.lists(parts, min_size=least, max_size=most).map(b"".join)


def joined(*parts: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.tuples(*parts).map(b"".join)


def uids(known: Sequence[str]) -> st.SearchStrategy[bytes]:
    """Of those that are known, padded as somebody might pad them."""
    padding = st.sampled_from([b""] * 6 + [b"\0", b" ", b" \0", b"\0 ", b"\0\0", b"\n", b"\x1c"])
    return joined(st.sampled_from(known).map(str.encode), padding)


few_ids = st.sampled_from([1, 3, 5, 255])
roles = st.builds(role, uids(CLASSES), st.integers(0, 1), st.integers(0, 1))
contexts = st.builds(
    proposal, few_ids, joined(items(0x30, uids(CLASSES)), several(items(0x40, uids(SYNTAXES)), least=1))
)
limits = items(0x51, st.binary(min_size=4, max_size=4))
requests = joined(
    st.just(fixed_part() + APPLICATION),
    several(contexts, least=1, most=8),
    items(0x50, joined(limits, several(roles))),
)


@st.composite
def acceptors(draw: st.DrawFn) -> list[PresentationContext]:
    """What a node supports, with any order of transfer syntaxes and any attitude to roles."""
    syntaxes, attitude = st.permutations(SYNTAXES), st.sampled_from(ATTITUDES)
    return [
        supporting(uid, draw(syntaxes)[: draw(st.integers(1, 4))], draw(attitude), draw(attitude))
        for uid in (CTImageStorage, COMMITMENT)
    ]


@of_odd_uids
@given(requests, acceptors())
def test_the_answer_is_that_of_pynetdicom(associate_rq: bytes, supported: list[PresentationContext]) -> None:
    assert compare(associate_rq, supported) is not None


@of_odd_uids
@given(st.data())
def test_garbage_is_read_as_pynetdicom_reads_it(data: st.DataObject) -> None:
    request = bytearray(data.draw(requests))
    for _ in range(data.draw(st.integers(1, 5))):
        request[data.draw(st.integers(6, len(request) - 1))] = data.draw(st.integers(0, 255))
    compare(bytes(request[: data.draw(st.just(len(request)) | st.integers(6, len(request)))]), supported())
