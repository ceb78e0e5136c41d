"""Messages of an association: every legal way to send one, and those that break a rule."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from caller import CONTEXTS, CT, ECHO, Caller, Reception, command, p_data, pdv, reception, store_rq, whole
from conftest import require_peer
from ct_builder import phantom, uid, write_series
from hostility import BROKEN, REFUSED
from peers import HOST, dcmsend, storescu
from pydicom.uid import CTImageStorage
from scanner import Image, image

from dicomnode import pdu
from dicomnode.connection import connect
from dicomnode.errors import PeerTimedOut

ECHO_RQ = pdu.c_echo_rq(1)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Reception]:
    with reception(tmp_path / "spool", max_object_mb=1) as made:
        yield made


@pytest.fixture
def one(tmp_path: Path) -> Image:
    return image(*write_series(tmp_path / "ct", phantom(1, 64)))


# ── as the standard allows it ──────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_names_what_it_answers(node: Reception, one: Image) -> None:
    with Caller(node.port) as caller:
        caller.associate().send(store_rq(one, e0110=pdu.us(0xFFFF)))
        answer = caller.elements()
        del answer[0x0000]
        assert answer == {
            0x0002: pdu.ui(CTImageStorage),
            0x0100: pdu.us(0x8001),
            0x0120: pdu.us(0xFFFF),
            0x0800: pdu.us(0x0101),
            0x0900: pdu.us(0),
            0x1000: pdu.ui(one.sop_instance_uid),
        }
        caller.release()
    assert [instance.sha256 for instance in node.stored] == [one.sha256]
    assert image(node.files()[0]) == one


@pytest.mark.parametrize("seed", range(3))
def test_a_message_in_any_pieces_is_the_same_message(node: Reception, one: Image, seed: int) -> None:
    """Fragments of any length, several in one PDU, command and data in one, TCP cut anywhere."""
    chance = random.Random(seed)
    items = []
    for control, data in ((1, command(e1000=pdu.ui(one.sop_instance_uid))), (0, one.data)):
        at = 0
        while at < len(data):
            size = chance.choice([0, 1, 2, 7, 100, 5000])
            last = at + size >= len(data)
            items.append(pdv(CT, control | (2 if last else 0), data[at : at + size]))
            at += size
    stream = b""
    while items:
        count = chance.randrange(1, 5)
        stream += whole(pdu.PduType.P_DATA, b"".join(items[:count]))
        del items[:count]
    with Caller(node.port) as caller:
        caller.associate()
        while stream:
            size = chance.choice([1, 5, 6, 100, 4096, 70_000])
            caller.send(stream[:size])
            stream = stream[size:]
        assert caller.status() == 0
    assert [instance.sha256 for instance in node.stored] == [one.sha256]


def test_requests_that_do_not_wait_are_answered_in_order(node: Reception, tmp_path: Path) -> None:
    images = [image(path) for path in write_series(tmp_path / "many", phantom(5, 128))]
    with Caller(node.port) as caller:
        caller.associate()
        caller.send(b"".join(store_rq(one, e0110=pdu.us(k)) for k, one in enumerate(images)) + pdu.RELEASE_RQ)
        answers = [caller.elements() for _ in images]
        assert caller.receive() == (pdu.PduType.RELEASE_RP, bytes(4))
    assert [pdu.read_us(answer, pdu.Element.MESSAGE_ID_RESPONDED_TO) for answer in answers] == list(range(5))
    assert [instance.sha256 for instance in node.stored] == [one.sha256 for one in images]


def test_an_answer_keeps_to_the_length_that_the_peer_takes(node: Reception) -> None:
    asked = pdu.associate_rq(
        "A", "DICOMNODE", CONTEXTS, max_pdu=16, implementation_class_uid="1.2", implementation_version_name="X"
    )
    with Caller(node.port) as caller:
        caller.send(asked)
        assert caller.receive() is not None
        caller.send(p_data(ECHO, 3, ECHO_RQ))
        said, last = b"", False
        while not last:
            answer = caller.receive()
            assert answer is not None
            assert len(answer[1]) <= 16
            (item,) = pdu.pdvs(answer[1])
            said, last = said + item.data, item.last
    assert pdu.read_us(pdu.read_command_set(said), pdu.Element.STATUS) == 0


def test_a_release_within_a_message_is_a_release(node: Reception) -> None:
    with Caller(node.port) as caller:
        caller.associate().send(p_data(CT, 3, command()) + p_data(CT, 0, bytes(100)))
        caller.release()
    assert node.files() == []


# ── what is answered with a status, and the association lives on ───────────────────────────────────────────────────


@pytest.mark.parametrize(("said", "status"), REFUSED.values(), ids=REFUSED)
def test_an_object_that_is_refused(
    node: Reception, said: bytes, status: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Caller(node.port) as caller:
        caller.associate().send(said)
        assert caller.status() == status
        assert caller.echo() == 0
        caller.release()
    assert node.files() == []
    assert not list(tmp_path.rglob("*evil*"))
    (refusal,) = [record.getMessage() for record in caplog.records if record.name.startswith("dicomnode")]
    assert re.fullmatch(rf"0x{status:04X} to 127\.0\.0\.1: [^\n]{{5,}} \(SOP instance '.{{0,64}}\)", refusal)


def test_a_data_set_of_another_uid_is_refused(node: Reception, one: Image) -> None:
    with Caller(node.port) as caller:
        caller.associate().send(store_rq(replace(one, sop_instance_uid=uid("another"))))
        assert caller.status() == 0xA900
        caller.release()
    assert node.files() == []


# ── what ends the association ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", BROKEN)
def test_what_breaks_the_protocol_is_aborted(node: Reception, case: str, caplog: pytest.LogCaptureFixture) -> None:
    said, reason = BROKEN[case]
    with Caller(node.port) as caller:
        caller.associate().send(said)
        assert caller.aborted() == reason
    assert node.files() == []
    assert "association of 127.0.0.1 aborted: " in caplog.text
    assert "at _" not in caplog.text, "that is how a fault of ours is reported"


def test_a_message_that_comes_fast_and_brings_nothing_is_aborted(tmp_path: Path) -> None:
    """There is always something to read, so that nobody ever waits for the peer."""
    nothing = p_data(CT, 0, b"") * 100_000
    with reception(tmp_path / "spool", network_timeout_s=0.5) as node, Caller(node.port) as caller:
        caller.associate().send(p_data(CT, 3, command()))
        until = time.monotonic() + 8
        while (taken := caller.push(nothing)) and time.monotonic() < until:
            pass
        assert not taken, "it is taken for ever"


def test_nothing_is_sent_after_its_deadline(node: Reception) -> None:
    connection = connect("node", HOST, node.port, connect_timeout_s=10, stall_timeout_s=10)
    with closing(connection), pytest.raises(PeerTimedOut, match="took too long with taking it"):
        connection.send([ECHO_RQ], time.monotonic(), "taking it")


def test_a_fault_of_ours_ends_its_association_only(
    node: Reception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(association: object, request: object) -> int:
        raise ZeroDivisionError("words that may quote a header")

    with Caller(node.port) as caller, Caller(node.port) as other:
        other.associate()
        monkeypatch.setattr(node.server, "store", broken)
        caller.associate().send(p_data(CT, 3, command()) + p_data(CT, 2, bytes(8)))
        assert caller.receive() == (pdu.PduType.ABORT, bytes(4))
        assert other.echo() == 0
    assert "aborted: a fault of the node: ZeroDivisionError at broken:" in caplog.text
    assert "quote" not in caplog.text


def test_a_fault_of_ours_before_an_association_closes_the_connection(
    node: Reception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*connected: object, **times: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("dicomnode.association.Connection", broken)
    with Caller(node.port) as caller:
        assert caller.receive() is None
    monkeypatch.undo()
    with Caller(node.port) as other:
        assert other.associate().echo() == 0
    assert "aborted: a fault of the node: ZeroDivisionError at broken:" in caplog.text


# ── real senders ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.peer
@pytest.mark.parametrize("nodelay", ["1", "0"], ids=["nodelay", "nagle"])
@pytest.mark.parametrize("program", ["dcmsend", "storescu"])
def test_dcmtk_sends_a_series(
    node: Reception, tmp_path: Path, program: str, nodelay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_peer(program)
    monkeypatch.setattr("peers._environment", lambda: {"TCP_NODELAY": nodelay})
    paths = write_series(tmp_path / "series", phantom(6, 256))
    send = {"dcmsend": dcmsend, "storescu": storescu}[program]
    # A small PDU of theirs cuts an image into 32 pieces.
    options = ["--max-send-pdu", "4096"]
    assert send(node.port, paths, called="DICOMNODE", options=options).returncode == 0
    assert sorted(instance.sha256 for instance in node.stored) == sorted(image(path).sha256 for path in paths)
    assert {instance.calling_ae for instance in node.stored} == {program.upper()}
