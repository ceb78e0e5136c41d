"""The bytes on the wire, against pynetdicom's own encoder and decoder."""

from __future__ import annotations

import struct
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import CTImageStorage
from pynetdicom.dimse_messages import C_ECHO_RQ, C_STORE_RQ
from pynetdicom.dimse_primitives import C_ECHO, C_STORE
from pynetdicom.pdu import P_DATA_TF

from dicomnode import pdu
from dicomnode.errors import MalformedPdu


def theirs(message: C_STORE_RQ | C_ECHO_RQ, primitive: C_STORE | C_ECHO) -> bytes:
    message.primitive_to_message(primitive)
    whole = b"".join(
        value for p in message.encode_msg(1, 0) for _, value in p.presentation_data_value_list if value[0] & 1
    )
    return whole[1:]


@pytest.mark.parametrize("uid", ["1.2.3", "1.2.34", "2.25." + "9" * 38])
def test_c_store_rq_is_what_pynetdicom_writes(uid: str) -> None:
    primitive = C_STORE()
    primitive.MessageID = 7
    primitive.Priority = 0
    primitive.AffectedSOPClassUID = CTImageStorage
    primitive.AffectedSOPInstanceUID = uid
    primitive.DataSet = BytesIO(b"\0\0")
    ours = pdu.c_store_rq(7, CTImageStorage, uid)
    # Both values say "a data set follows"; only 0x0101 says that none does (PS3.7 table E.1-1).
    assert pdu.read_command_set(ours) == pdu.read_command_set(theirs(C_STORE_RQ(), primitive))
    assert ours == theirs(C_STORE_RQ(), primitive)


def test_c_echo_rq_is_what_pynetdicom_writes() -> None:
    primitive = C_ECHO()
    primitive.MessageID = 65535
    primitive.AffectedSOPClassUID = pdu.VERIFICATION
    assert pdu.c_echo_rq(65535) == theirs(C_ECHO_RQ(), primitive)


@given(st.binary(min_size=1, max_size=600), st.integers(8, 300), st.booleans())
def test_p_data_is_what_pynetdicom_reads(message: bytes, max_pdu: int, command: bool) -> None:
    stream = b"".join(pdu.p_data(3, message, command=command, max_pdu=max_pdu))
    rebuilt, lasts = b"", []
    while stream:
        _, length = pdu.read_header(stream[:6])
        assert length <= max_pdu
        decoded = P_DATA_TF()
        decoded.decode(stream[: 6 + length])
        (item,) = decoded.presentation_data_value_items
        assert item.presentation_context_id == 3
        value = item.presentation_data_value
        assert bool(value[0] & 1) == command
        lasts.append(bool(value[0] & 2))
        rebuilt += value[1:]
        ours = list(pdu.pdvs(stream[6 : 6 + length]))
        assert [(i.context_id, i.command, i.last, bytes(i.data)) for i in ours] == [(3, command, lasts[-1], value[1:])]
        stream = stream[6 + length :]
    assert rebuilt == message
    assert lasts == [False] * (len(lasts) - 1) + [True]


def test_no_limit_still_means_bounded_pdus_and_no_copy() -> None:
    message = bytes(1_000_000)
    pieces = list(pdu.p_data(1, message, command=False, max_pdu=0))
    assert max(len(piece) for piece in pieces) == pdu.NO_LIMIT_PDU - 6
    assert all(piece.obj is message for piece in pieces[1::2] if isinstance(piece, memoryview))
    assert sum(map(len, pieces[1::2])) == len(message)


@pytest.mark.parametrize("max_pdu", [1, 6, 7])
def test_a_limit_without_room_is_refused(max_pdu: int) -> None:
    with pytest.raises(MalformedPdu, match="no room"):
        list(pdu.p_data(1, b"xx", command=True, max_pdu=max_pdu))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0\t\2\0\0", "inside an element header"),
        (struct.pack("<HHL", 0, 0x900, 4) + b"\0\0", "longer than"),
        (struct.pack("<HHL", 8, 0x900, 2) + b"\0\0", "group 0008"),
    ],
)
def test_broken_command_sets_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(MalformedPdu, match=message):
        pdu.read_command_set(data)


@pytest.mark.parametrize(
    "body", [b"\0\0\0\2\1", struct.pack(">LBB", 1, 1, 3), struct.pack(">LBB", 100, 1, 3), struct.pack(">LBB", 0, 1, 3)]
)
def test_broken_p_data_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedPdu):
        list(pdu.pdvs(body))


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_read_but_never_breaks_a_reader(data: bytes) -> None:
    for read in (
        pdu.read_command_set,
        lambda d: list(pdu.pdvs(d)),
        lambda d: pdu.read_associate_ac(struct.pack(">BxL", 2, len(d)) + d),
    ):
        try:
            read(data)
        except MalformedPdu:
            continue


def test_too_many_contexts_are_refused() -> None:
    contexts = [(f"1.2.{n}", ("1.2.840.10008.1.2",)) for n in range(129)]
    with pytest.raises(ValueError, match="128"):
        pdu.associate_rq(
            "A", "B", contexts, max_pdu=16384, implementation_class_uid="1.2.3", implementation_version_name="X"
        )
