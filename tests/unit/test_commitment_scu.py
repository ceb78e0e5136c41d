"""The request for storage commitment against raw sockets: reports that overtake it, and peers that end or break it."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import pytest
from pydicom import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import UID, ExplicitVRLittleEndian
from test_scu import peer_at
from test_scu_violations import RawPeer, raw_peer

from dicomnode import pdu
from dicomnode.errors import PeerAborted, PeerError, ProtocolViolation
from dicomnode.scu import request_commitment

TRANSACTION = "2.25.77"
COMMITMENT, INSTANCE = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
INFORMATION = b"of a report, which is nobody's matter here"


def answer(context: int, message_id: int, status: int = 0) -> bytes:
    """N-ACTION-RSP."""
    elements = {0x0100: pdu.us(0x8130), 0x0120: pdu.us(message_id), 0x0800: pdu.us(0x0101), 0x0900: pdu.us(status)}
    return b"".join(pdu.p_data(context, pdu.command_set(elements), command=True, max_pdu=16384))


def report(context: int, *, field: int = 0x0100) -> bytes:
    """N-EVENT-REPORT-RQ of event type 1 and its data set, cut into small PDUs."""
    elements = {
        0x0002: pdu.ui(COMMITMENT),
        0x0100: pdu.us(field),
        0x0110: pdu.us(9),
        0x0800: pdu.us(1),
        0x1000: pdu.ui(INSTANCE),
        0x1002: pdu.us(1),
    }
    pieces = [
        *pdu.p_data(context, pdu.command_set(elements), command=True, max_pdu=40),
        *pdu.p_data(context, INFORMATION, command=False, max_pdu=20),
    ]
    return b"".join(pieces)


class Asker:
    """Asks, and notes what it is told."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.reports: list[tuple[int, bytes, str]] = []

    def ask(self, port: int) -> None:
        request_commitment(
            peer_at(port),
            TRANSACTION,
            [("1.2", "1.2.3")],
            on_answer=self.statuses.append,
            on_report=self.take,
            enough=lambda: bool(self.reports),
        )

    def take(self, event_type: int, information: bytes, syntax: UID) -> int:
        self.reports.append((event_type, information, syntax))
        return 0x0115


def response(raw: RawPeer) -> dict[int, bytes]:
    """Command set of the answer to a report."""
    kind, body = raw.read()
    assert kind == 4
    (item,) = pdu.pdvs(body)
    return pdu.read_command_set(bytes(item.data))


def check_answered(raw: RawPeer) -> None:
    elements = response(raw)
    assert (elements[0x0100], elements[0x0120], elements[0x0900]) == (pdu.us(0x8100), pdu.us(9), pdu.us(0x0115))
    assert elements[0x0002] == pdu.ui(COMMITMENT)


def goodbye(raw: RawPeer) -> None:
    assert raw.read_to_release()
    raw.write(pdu.RELEASE_RP)


def test_the_request_is_that_of_the_standard() -> None:
    """PS3.7 table 10.3-7, PS3.4 table J.3-1."""
    seen: list[tuple[dict[int, bytes], Dataset]] = []

    def behave(raw: RawPeer) -> None:
        raw.accept()
        command, data = b"", b""
        while not data:
            for item in pdu.pdvs(raw.read()[1]):
                command, data = command + bytes(item.data) * item.command, data + bytes(item.data) * (not item.command)
        elements = pdu.read_command_set(command)
        seen.append((elements, read_dataset(BytesIO(data), is_implicit_VR=False, is_little_endian=True)))
        raw.write(answer(1, int.from_bytes(elements[0x0110], "little"), 0x0110))
        goodbye(raw)

    asker = Asker()
    with raw_peer(behave) as port:
        asker.ask(port)
    assert asker.statuses == [0x0110], "and no report is waited for"
    ((elements, information),) = seen
    del elements[0x0000], elements[0x0110]
    assert elements == {
        0x0003: pdu.ui(COMMITMENT),
        0x0100: b"\x30\x01",
        0x0800: b"\x01\x00",
        0x1001: pdu.ui(INSTANCE),
        0x1008: b"\x01\x00",
    }
    assert information.TransactionUID == TRANSACTION
    (item,) = information.ReferencedSOPSequence
    assert (item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID) == ("1.2", "1.2.3")


@pytest.mark.parametrize("overtakes", [True, False])
def test_a_report_on_the_association_of_its_request(overtakes: bool) -> None:
    def behave(raw: RawPeer) -> None:
        raw.accept()
        context, message_id = raw.request()
        both = [report(context), answer(context, message_id)]
        for one in both if overtakes else reversed(both):
            raw.write(one)
        check_answered(raw)
        goodbye(raw)

    asker = Asker()
    with raw_peer(behave) as port:
        asker.ask(port)
    assert (asker.statuses, asker.reports) == ([0], [(1, INFORMATION, ExplicitVRLittleEndian)])


@pytest.mark.parametrize(
    ("last", "error"),
    [
        (lambda context: pdu.RELEASE_RQ, PeerAborted),
        (lambda context: pdu.ABORT, PeerAborted),
        (lambda context: b"", PeerAborted),
        (lambda context: report(context, field=0x0001), ProtocolViolation),
        (lambda context: report(context + 2), ProtocolViolation),
        (lambda context: b"\4\xff\xff\xff\xff\xff", ProtocolViolation),
    ],
    ids=["release", "abort", "close", "another message", "another context", "huge"],
)
def test_who_ends_the_association_after_the_answer_was_answered(
    last: Callable[[int], bytes], error: type[PeerError]
) -> None:
    def behave(raw: RawPeer) -> None:
        raw.accept()
        context, message_id = raw.request()
        raw.write(answer(context, message_id) + last(context))

    asker = Asker()
    with raw_peer(behave) as port, pytest.raises(error):
        asker.ask(port)
    assert (asker.statuses, asker.reports) == ([0], [])
