"""The whole node with TLS under peers who break it off, abuse it, or have none: closed in time, and nobody waits."""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from caller import Caller, request
from certificates import Certificates
from costs import Costs, wait_until_still
from hostility import Act, at_once
from node_process import NodeProcess
from oracle import StorageOracle

TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def node(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    times = {"acse_timeout_s": TIMEOUT_S, "dimse_timeout_s": TIMEOUT_S, "network_timeout_s": TIMEOUT_S}
    settings = {"reception": {**times, "called_ae_titles": ["DICOMNODE"]}, "tls": certificates.pair("node")}
    with (
        StorageOracle(ae_title="PACS") as pacs,
        NodeProcess(tmp_path_factory.mktemp("hostile"), pacs.port, settings) as process,
    ):
        wait_until_still(process)
        yield process


@pytest.fixture(scope="module")
def tls(certificates: Certificates) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificates.authority)


@pytest.fixture
def costs(node: NodeProcess, tls: ssl.SSLContext) -> Iterator[Costs]:
    """Of a node that has spoken TLS before."""
    check_served(node, tls)
    made = Costs(node)
    yield made
    made.check_all()
    assert b"a fault of the node" not in node.log.read_bytes()


def check_served(node: NodeProcess, tls: ssl.SSLContext) -> None:
    """Who speaks TLS is served, and at once."""
    begun = time.monotonic()
    with Caller(node.port, tls=tls) as caller:
        assert caller.associate().echo() == 0
        caller.release()
    assert time.monotonic() - begun < TIMEOUT_S


def hello() -> bytes:
    """A whole ClientHello."""
    outgoing = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="node.hospital")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def broken_hello() -> bytes:
    """A ClientHello whose record says what it is, and whose content is noise."""
    said = bytearray(hello())
    said[9:] = random.Random(1).randbytes(len(said) - 9)
    return bytes(said)


def test_who_spoils_tls_is_closed_in_time_and_delays_nobody(
    node: NodeProcess, tls: ssl.SSLContext, costs: Costs
) -> None:
    def call() -> Caller:
        return Caller(node.port, source="127.0.0.2")

    def handshake() -> Caller:
        return Caller(node.port, source="127.0.0.2", tls=tls)

    peers: dict[str, Act] = {
        "silent": (call, lambda caller: None),
        "noise": (call, lambda caller: caller.push(random.Random(0).randbytes(3000))),
        "zeros": (call, lambda caller: caller.push(bytes(3000))),
        "http": (call, lambda caller: caller.push(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")),
        "request without TLS": (call, lambda caller: caller.push(request())),
        "half a hello": (call, lambda caller: caller.push(hello()[:100])),
        "hello byte by byte": (call, lambda caller: caller.trickle(hello(), 0.05)),
        "hello of noise": (call, lambda caller: caller.push(broken_hello())),
        "half a handshake": (call, lambda caller: caller.push(hello())),
        "handshake, then silence": (handshake, lambda caller: None),
        "handshake, then half a request": (handshake, lambda caller: caller.push(request()[:60])),
        "handshake, then a request byte by byte": (handshake, lambda caller: caller.trickle(request(), 0.05)),
        "silent associated": (lambda: handshake().associate(), lambda caller: None),
    }
    with at_once(peers, TIMEOUT_S + 1) as late:
        for _ in range(5):
            check_served(node, tls)
            costs.check_memory()
    assert late == []


def test_200_silent_connections_while_c_echo_answers(node: NodeProcess, tls: ssl.SSLContext, costs: Costs) -> None:
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(Caller(node.port))
        check_served(node, tls)
        costs.check_memory()


def test_who_leaves_in_the_middle_of_a_handshake(node: NodeProcess, tls: ssl.SSLContext, costs: Costs) -> None:
    """Each after another piece of it."""
    said = hello()
    for end in range(0, len(said), 40):
        with Caller(node.port) as caller:
            caller.push(said[:end])
    check_served(node, tls)
