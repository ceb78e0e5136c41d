"""Peers that break off, say nothing, say too much, or are too many: answered or closed in time, nothing left behind."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from caller import CT, ECHO, Caller, Reception, command, p_data, reception, request, seconds_until_closed, whole
from ct_builder import phantom, write_series
from hostility import NO_REQUEST
from peers import HOST, wait_for
from scanner import image

from dicomnode import pdu
from dicomnode.association import MAX_PDU_BYTES
from dicomnode.pdu import AbortReason
from dicomnode.received_header import MAX_REPORT_BYTES
from dicomnode.scp import CANNOT_UNDERSTAND

TIMEOUT_S = 1.0
SOON_S = TIMEOUT_S + 1
"""Every hostile peer is answered or closed by then."""
TIMES = {"acse_timeout_s": TIMEOUT_S, "dimse_timeout_s": TIMEOUT_S, "network_timeout_s": TIMEOUT_S}
PATIENT = dict.fromkeys(TIMES, 60.0)
INVALID = AbortReason.INVALID_PARAMETER


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Reception]:
    """Patient: what it ends at once, it ends for what came."""
    with reception(tmp_path / "spool", max_object_mb=1, **PATIENT) as made:
        yield made


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Reception]:
    with reception(tmp_path / "spool", **TIMES) as made:
        yield made


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ── before an association ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("said", "reason"), NO_REQUEST.values(), ids=NO_REQUEST)
def test_what_is_no_association_request_is_aborted_at_once(node: Reception, said: bytes, reason: AbortReason) -> None:
    with Caller(node.port) as caller:
        caller.send(said)
        assert caller.aborted() == reason


def test_another_protocol_version_is_rejected(node: Reception, caplog: pytest.LogCaptureFixture) -> None:
    with Caller(node.port) as caller:
        caller.send(request()[:6] + b"\0\2" + request()[8:])
        assert caller.receive() == (pdu.PduType.ASSOCIATE_RJ, b"\0\1\2\2")
        assert caller.receive() is None
    assert f"association of 'CALLER' at {HOST} rejected: it speaks another version of the protocol" in caplog.text


@pytest.mark.parametrize("name", [b"1.2.840.10008.3.1.1.2", b"1.2.840.10008.3.1.1", b"", None])
def test_another_application_context_is_rejected(
    node: Reception, name: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    """PS3.8 section 9.3.4; without an item of the kind nothing names ours either."""
    named = struct.pack(">BxH", 0x10, len(pdu.APPLICATION_CONTEXT)) + pdu.APPLICATION_CONTEXT.encode()
    items = b"" if name is None else struct.pack(">BxH", 0x10, len(name)) + name
    asked = request().replace(named, items)
    with Caller(node.port) as caller:
        caller.send(whole(pdu.PduType.ASSOCIATE_RQ, asked[pdu.HEADER_BYTES :]))
        assert caller.receive() == (pdu.PduType.ASSOCIATE_RJ, b"\0\1\1\2")
        assert caller.receive() is None
    assert f"association of 'CALLER' at {HOST} rejected: its application context is not that of DICOM" in caplog.text


def test_a_requestor_of_several_protocol_versions_is_served(node: Reception) -> None:
    with Caller(node.port) as caller:
        caller.send(request()[:6] + b"\0\3" + request()[8:])
        answer = caller.receive()
        assert answer is not None
        assert answer[0] == pdu.PduType.ASSOCIATE_AC
        assert caller.echo() == 0


def test_who_says_abort_first_is_just_gone(node: Reception) -> None:
    with Caller(node.port) as caller:
        caller.send(pdu.ABORT)
        assert caller.receive() is None


@pytest.mark.parametrize("part", [0, 3, 6, 40, 200])
def test_half_a_request_is_closed_in_time(hasty: Reception, part: int) -> None:
    with Caller(hasty.port) as caller:
        caller.send(request()[:part])
        assert seconds_until_closed(caller) < SOON_S


def test_a_request_byte_by_byte_is_closed_in_time(hasty: Reception) -> None:
    with Caller(hasty.port) as caller:
        begun = time.monotonic()
        caller.trickle(request(), pause_s=0.05)
        assert time.monotonic() - begun < SOON_S


# ── within an association ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", [0xFFFFFFF0, MAX_PDU_BYTES + 1025])
def test_a_pdu_over_the_negotiated_length_is_aborted_at_once(node: Reception, length: int) -> None:
    with Caller(node.port) as caller:
        caller.associate().send(struct.pack(">BxL", 4, length))
        assert caller.aborted() == INVALID


def test_the_length_that_was_announced_is_the_one_that_is_taken(node: Reception) -> None:
    with Caller(node.port) as caller:
        caller.send(request())
        answer = caller.receive()
        assert answer is not None
        assert pdu.read_associate_ac(whole(*answer)).max_pdu == MAX_PDU_BYTES
        caller.send(p_data(CT, 3, command()) + p_data(CT, 2, bytes(MAX_PDU_BYTES - 6)))
        assert caller.status() == 0xC000


def test_an_announced_length_takes_no_memory(node: Reception) -> None:
    """What comes behind it is not kept, and what is announced is not reserved."""
    with Caller(node.port) as warm:
        warm.associate().echo()
        warm.release()
    before = resident_bytes()
    with ExitStack() as stack:
        callers = [stack.enter_context(Caller(node.port)).associate() for _ in range(20)]
        for caller in callers:
            caller.send(struct.pack(">BxL", 4, MAX_PDU_BYTES) + bytes(1000))
        with Caller(node.port) as liar:
            liar.associate().send(struct.pack(">BxL", 4, 0xFFFFFFF0))
            for _ in range(200):  # in pieces: this process is measured, too
                if not liar.push(bytes(1_000_000)):
                    break
        assert resident_bytes() - before < 20 * 2**20


@pytest.mark.parametrize("said", [b"", struct.pack(">BxL", 4, 4096) + b"abc", p_data(CT, 3, command())])
def test_silence_is_aborted_in_time(hasty: Reception, said: bytes) -> None:
    """With nothing said, within a PDU, and between a command and its data set."""
    with Caller(hasty.port) as caller:
        caller.associate().send(said)
        begun = time.monotonic()
        assert caller.aborted() == AbortReason.NOT_SPECIFIED
        assert time.monotonic() - begun < SOON_S


def test_a_pdu_byte_by_byte_is_closed_in_time(hasty: Reception) -> None:
    with Caller(hasty.port) as caller:
        caller.associate()
        begun = time.monotonic()
        caller.trickle(p_data(CT, 3, command()), pause_s=0.05)
        assert time.monotonic() - begun < SOON_S


@pytest.mark.parametrize("data", [b"", b"x"], ids=["of-nothing", "of-a-byte"])
def test_a_message_in_crumbs_is_closed_in_time(hasty: Reception, data: bytes) -> None:
    """Every PDU is whole and in time, and the message would never be."""
    with Caller(hasty.port) as caller:
        caller.associate().send(p_data(CT, 3, command()))
        begun = time.monotonic()
        crumb = p_data(CT, 0, data)
        wait_for(lambda: not caller.push(crumb), 20, "the end of it")
        assert time.monotonic() - begun < SOON_S


def test_a_peer_that_never_reads_its_answers_is_closed_in_time(hasty: Reception) -> None:
    with Caller(hasty.port, receive_buffer=4096) as caller:
        caller.associate()
        many = p_data(ECHO, 3, pdu.c_echo_rq(1)) * 100
        wait_for(lambda: not caller.push(many), 60, "the end of it")


@pytest.mark.parametrize("farewell", [b"", pdu.ABORT])
def test_half_an_image_is_not_kept(node: Reception, farewell: bytes) -> None:
    with Caller(node.port) as caller:
        caller.associate().send(p_data(CT, 3, command()) + p_data(CT, 0, bytes(1000)) + farewell)
    wait_for(lambda: node.associations() == 0)
    assert node.files() == []


def test_an_object_is_measured_while_it_comes(node: Reception, caplog: pytest.LogCaptureFixture) -> None:
    """1 MB are allowed: at 1.07 MB the association ends, and the rest is never waited for."""
    with Caller(node.port) as caller:
        caller.associate().send(p_data(CT, 3, command()) + p_data(CT, 0, bytes(100_000)) * 11)
        assert caller.aborted() == AbortReason.NOT_SPECIFIED
    wait_for(lambda: node.associations() == 0)
    assert f"association of {HOST} aborted: its message is larger than reception.max_object_mb" in caplog.text


def test_what_is_no_object_is_no_longer_than_a_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reported = p_data(ECHO, 3, command(e0100=pdu.us(pdu.N_EVENT_REPORT_RQ)))
    with reception(tmp_path / "spool", max_object_mb=100, **PATIENT) as node, Caller(node.port) as caller:
        caller.associate().send(reported)
        pieces, rest = divmod(MAX_REPORT_BYTES, 100_000)
        caller.send(p_data(ECHO, 0, bytes(100_000)) * pieces + p_data(ECHO, 0, bytes(rest)))
        wait_for(lambda: node.memory_left() == 200_000_000 - MAX_REPORT_BYTES)
        caller.send(p_data(ECHO, 0, bytes(1)))
        assert caller.aborted() == AbortReason.NOT_SPECIFIED
    assert "its message is larger than the longest report" in caplog.text


def test_all_objects_on_their_way_are_measured_together(node: Reception, caplog: pytest.LogCaptureFixture) -> None:
    """1 MB are allowed, so 2 MB at once: the third of 0.9 MB finds no room until one of the others is gone."""
    most = p_data(CT, 3, command()) + p_data(CT, 0, bytes(100_000)) * 9
    with Caller(node.port) as first, Caller(node.port) as second, Caller(node.port) as third:
        for caller in (first, second):
            caller.associate().send(most + p_data(CT, 0, b""))
        third.associate()
        wait_for(lambda: node.memory_left() == 200_000)
        third.send(most)
        assert third.aborted() == AbortReason.NOT_SPECIFIED
        first.close()
        wait_for(lambda: node.memory_left() == 1_100_000)
        with Caller(node.port) as fourth:
            fourth.associate().send(most + p_data(CT, 2, bytes(2)))
            assert fourth.status() == CANNOT_UNDERSTAND
    wait_for(lambda: node.memory_left() == 2_000_000)
    assert "there is no memory for more objects on their way" in caplog.text


# ── how many ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_200_silent_connections_keep_nobody_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with reception(tmp_path / "spool") as node:
        before = resident_bytes()
        with ExitStack() as stack:
            silent = [stack.enter_context(Caller(node.port)) for _ in range(200)]
            begun = time.monotonic()
            with Caller(node.port) as caller:
                assert caller.associate().echo() == 0
                assert time.monotonic() - begun < SOON_S
                # All but those that a peer may have are closed.
                for one in silent[: 200 - 31]:
                    assert one.receive() is None
                caller.release()
            assert resident_bytes() - before < 20 * 2**20
        assert f"connection from {HOST} closed: no association yet, and others call" in caplog.text


def test_a_peer_with_all_its_associations_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with reception(tmp_path / "spool", max_associations_per_peer=2) as node, ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(Caller(node.port)).associate()
        with Caller(node.port) as third:
            assert third.receive() is None
        assert f"connection from {HOST} refused: it has 2 already" in caplog.text
        with Caller(node.port, source="127.0.0.2") as other:
            assert other.associate().echo() == 0


def test_one_association_too_many_is_told_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with reception(tmp_path / "spool", max_associations=2) as node, ExitStack() as stack:
        silent = stack.enter_context(Caller(node.port))
        established = [stack.enter_context(Caller(node.port)).associate() for _ in range(2)]
        with Caller(node.port) as third:
            third.send(request())
            assert third.receive() == (pdu.PduType.ASSOCIATE_RJ, b"\0\2\3\2")
        assert "2 associations are open (reception.max_associations)" in caplog.text
        for _ in range(2):  # four connections are the limit in all, however many peers there are
            stack.enter_context(Caller(node.port, source="127.0.0.2"))
        assert silent.receive() is None
        assert [caller.echo() for caller in established] == [0, 0]


def test_a_stranger_never_gets_a_thread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    networks = (ipaddress.ip_network("127.0.0.1/32"),)
    with reception(tmp_path / "spool") as node:
        node.server._listener._limits = node.server._reception.model_copy(update={"networks": networks})  # type: ignore[union-attr]  # it listens
        with Caller(node.port, source="127.0.0.2") as stranger:
            assert stranger.receive() is None
    assert "connection from 127.0.0.2 refused: not in reception.networks" in caplog.text


def test_a_bare_connection_is_nothing_to_report(node: Reception, caplog: pytest.LogCaptureFixture) -> None:
    """Load balancers look every few seconds whether somebody listens."""
    caplog.set_level(logging.INFO)
    for _ in range(20):
        Caller(node.port).close()
    with Caller(node.port) as caller:
        caller.associate().release()
    assert caplog.text == ""


def test_a_system_without_descriptors_or_threads_keeps_the_port_open(
    node: Reception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accept, start = socket.socket.accept, threading.Thread.start
    lacking = {"descriptors", "threads"}

    def accept_later(listening: socket.socket) -> object:
        if "descriptors" in lacking:
            lacking.remove("descriptors")
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listening)

    def start_later(thread: threading.Thread) -> None:
        if "threads" in lacking:
            lacking.remove("threads")
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(socket.socket, "accept", accept_later)
    monkeypatch.setattr(threading.Thread, "start", start_later)
    with Caller(node.port) as unlucky:
        assert unlucky.receive() is None
    with Caller(node.port) as caller:
        assert caller.associate().echo() == 0
    assert "no connection can be accepted now: [Errno 24] Too many open files" in caplog.text
    assert f"connection from {HOST} refused: can't start new thread; lower reception.max_associations" in caplog.text


# ── stop ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stop_closes_the_port_and_aborts_who_is_left(node: Reception) -> None:
    with Caller(node.port) as idle, Caller(node.port) as silent:
        idle.associate()
        node.server.stop(0.1)
        assert idle.receive() == (pdu.PduType.ABORT, bytes(4))
        assert silent.receive() in (None, (pdu.PduType.ABORT, bytes(4)))
    with pytest.raises(ConnectionRefusedError):
        Caller(node.port)


def test_stop_lets_an_image_that_comes_be_finished(node: Reception, tmp_path: Path) -> None:
    one = image(*write_series(tmp_path, phantom(1, 16)))
    with Caller(node.port) as caller:
        caller.associate().send(p_data(CT, 3, command(e1000=pdu.ui(one.sop_instance_uid))))
        stopping = threading.Thread(target=node.server.stop, args=(20,))
        stopping.start()
        wait_for(lambda: not _listening(node.port))
        caller.send(p_data(CT, 2, one.data))
        assert caller.status() == 0
        caller.release()
        stopping.join(20)
    assert [instance.sha256 for instance in node.stored] == [one.sha256]


def _listening(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), 1).close()
    except OSError:
        return False
    return True
