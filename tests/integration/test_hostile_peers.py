"""The whole node under hostile peers, many at once: what they cost it, and that the others do not notice.

What each of them is answered is the matter of tests/unit/test_association.py and test_transport.py.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from caller import CT, Caller, command, p_data, request, store_rq
from costs import Costs
from ct_builder import phantom, uid, write_series
from holdings import check_kept
from hostility import BROKEN, NO_REQUEST, REFUSED, Act, at_once
from node_process import NodeProcess
from oracle import StorageOracle
from peers import wait_for
from scanner import Image, image

from dicomnode.association import MAX_PDU_BYTES

TIMEOUT_S = 2.0
ROUNDS = 5
MR = "1.2.840.10008.5.1.4.1.1.4"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node that has had a job, so that it holds all the threads and descriptors that it ever needs."""
    folder = tmp_path_factory.mktemp("hostile")
    times = {"acse_timeout_s": TIMEOUT_S, "dimse_timeout_s": TIMEOUT_S, "network_timeout_s": TIMEOUT_S}
    settings = {"reception": {**times, "max_object_mb": 1, "called_ae_titles": ["DICOMNODE"]}}
    with (
        StorageOracle(ae_title="PACS") as pacs,
        NodeProcess(folder, pacs.port, settings) as process,
    ):
        first = image(*write_series(folder / "first", phantom(1, 64)))
        with Caller(process.port) as caller:
            caller.associate().send(store_rq(first))
            assert caller.status() == 0
            caller.release()
        process.wait_jobs("DONE")
        yield process


@pytest.fixture
def one(tmp_path: Path, request: pytest.FixtureRequest) -> Image:
    """A CT image of its own for each test."""
    return image(*write_series(tmp_path, phantom(1, 64), name=request.node.name))


@pytest.fixture
def costs(node: NodeProcess) -> Iterator[Costs]:
    made = Costs(node)
    yield made
    made.check_all()
    assert b" at _" not in node.log.read_bytes(), "that is how a fault of ours is reported"


def hear_out(port: int) -> None:
    """Every hostile peer once; each is answered or closed at once."""
    for said, reason in NO_REQUEST.values():
        with Caller(port) as caller:
            caller.send(said)
            assert caller.aborted() == reason
    for said, reason in BROKEN.values():
        with Caller(port) as caller:
            caller.associate().send(said)
            assert caller.aborted() == reason
    with Caller(port) as caller:
        caller.associate()
        for said, status in REFUSED.values():
            caller.send(said)
            assert caller.status() == status
        caller.release()


def test_what_they_say_leaves_nothing_behind(node: NodeProcess, costs: Costs) -> None:
    spooled = sorted(node.spool.rglob("*"))
    for _ in range(ROUNDS):
        hear_out(node.port)
        costs.check_memory()
    assert sorted(node.spool.rglob("*")) == spooled


def test_what_differs_from_its_command_is_not_kept(node: NodeProcess, costs: Costs, one: Image) -> None:
    """SOP instance, SOP class; a path instead of a UID in the data set itself."""
    path = b"../" * 4 + b"evil"
    uids = [one.sop_instance_uid.encode(), one.series_uid.encode()]
    with Caller(node.port) as caller:
        caller.associate()
        caller.send(store_rq(replace(one, sop_instance_uid=uid("another"))))
        assert caller.status() == 0xA900
        caller.send(store_rq(replace(one, data=one.data.replace(one.sop_class_uid.encode(), MR.ljust(25).encode()))))
        assert caller.status() == 0xA900
        for old in uids:
            caller.send(store_rq(replace(one, data=one.data.replace(old, path.ljust(len(old), b"\0")))))
            assert caller.status() == 0xA900
        caller.release()
    assert not node.series(one.series_uid)
    assert not list(node.folder.rglob("*evil*"))


def test_the_slow_and_the_silent_are_closed_in_time_and_keep_nobody_out(
    node: NodeProcess, costs: Costs, one: Image
) -> None:
    def call() -> Caller:
        return Caller(node.port, source="127.0.0.2")

    def associate() -> Caller:
        return call().associate()

    whole_pdu = p_data(CT, 3, command())
    peers: dict[str, Act] = {
        "silent": (call, lambda caller: None),
        "half a request": (call, lambda caller: caller.send(request()[:60])),
        "request byte by byte": (call, lambda caller: caller.trickle(request(), 0.05)),
        "silent associated": (associate, lambda caller: None),
        "half a PDU": (associate, lambda caller: caller.send(whole_pdu[:30])),
        "PDU byte by byte": (associate, lambda caller: caller.trickle(whole_pdu, 0.05)),
        "command without data set": (associate, lambda caller: caller.send(whole_pdu)),
        "half an image": (associate, lambda caller: caller.send(store_rq(one)[:5000])),
        "announces a PDU": (associate, lambda caller: caller.send(struct.pack(">BxL", 4, MAX_PDU_BYTES))),
    }
    with at_once(peers, TIMEOUT_S + 1) as late:
        for _ in range(5):
            begun = time.monotonic()
            with Caller(node.port) as caller:
                caller.associate()
                assert caller.echo() == 0
                caller.send(store_rq(one))
                assert caller.status() == 0
                caller.release()
            assert time.monotonic() - begun < TIMEOUT_S
            costs.check_memory()
    assert late == []
    wait_for(lambda: node.series(one.series_uid), what="the index")
    check_kept(node, [one])


def test_200_silent_connections_while_c_echo_answers(node: NodeProcess, costs: Costs) -> None:
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(Caller(node.port))
        begun = time.monotonic()
        with Caller(node.port) as caller:
            assert caller.associate().echo() == 0
            caller.release()
        assert time.monotonic() - begun < TIMEOUT_S
        costs.check_memory()


def test_what_is_announced_or_poured_is_not_kept(node: NodeProcess, costs: Costs) -> None:
    """A PDU of 4 GiB, before and in an association, and a message without end: the node stops listening."""
    endless = p_data(CT, 0, bytes(MAX_PDU_BYTES - 6))
    for greeting, start in ((b"", struct.pack(">BxL", 1, 0xFFFFFFFF)), (request(), struct.pack(">BxL", 4, 0xFFFFFFFF))):
        with Caller(node.port) as caller:
            caller.send(greeting + start)
            for _ in range(100):
                if not caller.push(bytes(1_000_000)):
                    break
            costs.check_memory()
    with Caller(node.port) as caller:
        caller.associate().send(p_data(CT, 3, command()))
        for _ in range(1000):
            if not caller.push(endless):
                break
        else:
            pytest.fail("131 MB were taken, 1 MB is allowed")
        costs.check_memory()
        with Caller(node.port) as other:
            assert other.associate().echo() == 0
