"""Who may associate: networks, AE titles, and how many at once; who may not is told why, and so is the log."""

from __future__ import annotations

import ipaddress
import logging
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from caller import Caller, reception, request
from peers import HOST, wait_for

from dicomnode import pdu
from dicomnode.config import Config
from dicomnode.pdu import AbortReason
from dicomnode.transport import Listener, _plain

ACCEPTED, REJECTED = pdu.PduType.ASSOCIATE_AC, pdu.PduType.ASSOCIATE_RJ


def answer(port: int, *, source: str = HOST, **titles: str) -> tuple[int, bytes] | None:
    """What a request is answered with; a rejection is followed by the end of the connection."""
    with Caller(port, source) as caller:
        caller.push(request(**titles))
        said = caller.receive()
        if said is not None and said[0] == REJECTED:
            assert caller.receive() is None
        return said


# ── titles (PS3.8 table 9-21) ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("titles", "rejection", "why"),
    [
        ({}, None, ""),
        ({"calling": "CT2"}, None, ""),
        ({"called": "OLD NAME"}, None, ""),
        ({"calling": "CT3"}, b"\0\1\1\3", "association of 'CT3' at 127.0.0.1 rejected: its AE title is not in"),
        ({"calling": "ct1"}, b"\0\1\1\3", "association of 'ct1' at 127.0.0.1 rejected: its AE title is not in"),
        ({"calling": "CT1 X"}, b"\0\1\1\3", "association of 'CT1 X' at 127.0.0.1 rejected"),
        (
            {"called": "DICOMNODE2"},
            b"\0\1\1\7",
            "association of 'CT1' at 127.0.0.1 rejected: called 'DICOMNODE2', which",
        ),
        ({"called": "DICOMNODE"}, b"\0\1\1\7", "called 'DICOMNODE', which is not in reception.called_ae_titles"),
        # Of two reasons the one that the sender can be told first.
        ({"calling": "CT3", "called": "X"}, b"\0\1\1\7", "association of 'CT3' at 127.0.0.1 rejected: called 'X'"),
    ],
)
def test_titles(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, titles: dict[str, str], rejection: bytes | None, why: str
) -> None:
    settings = {"calling_ae_titles": ["CT1", "CT2"], "called_ae_titles": ["NODE", "OLD NAME"]}
    with reception(tmp_path / "spool", **settings) as node:
        said = answer(node.port, **{"calling": "CT1", "called": "NODE", **titles})
    assert said is not None
    if rejection is None:
        assert said[0] == ACCEPTED
    else:
        assert said == (REJECTED, rejection)
    refusals = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(refusals) == (rejection is not None)
    assert all(why in refusal and "\n" not in refusal for refusal in refusals)


@pytest.mark.parametrize("title", [b" " * 16, b"A\n2026 INFO good", b"\x1b[2J" + b" " * 12, b"\xff" * 16])
def test_a_title_that_is_none_is_aborted(tmp_path: Path, caplog: pytest.LogCaptureFixture, title: bytes) -> None:
    """And the log keeps its lines, whatever it holds."""
    said = request()
    with reception(tmp_path / "spool", calling_ae_titles=["CT1"]) as node, Caller(node.port) as caller:
        caller.send(said[:26] + title + said[42:])
        assert caller.aborted() == AbortReason.INVALID_PARAMETER
    (refusal,) = [record.getMessage() for record in caplog.records if record.name.startswith("dicomnode")]
    assert refusal == "association of 127.0.0.1 aborted: an A-ASSOCIATE-RQ that cannot be read (ValueError)"


# ── networks ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("127.0.1.7", False),
        ("127.0.1.8", True),
        ("127.0.1.15", True),
        ("127.0.1.16", False),
        ("127.0.2.1", True),
        ("127.0.2.2", False),
        ("127.0.0.1", False),
    ],
)
def test_networks_over_the_wire(tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str, allowed: bool) -> None:
    with reception(tmp_path / "spool", networks=["127.0.1.8/29", "127.0.2.1"]) as node:
        said = answer(node.port, source=source)
    assert (said is not None) == allowed
    assert (f"connection from {source} refused: not in reception.networks" in caplog.text) != allowed


HOSPITAL = {"networks": ["10.1.2.0/24", "192.168.7.9", "fd12:3::/32"], "calling_ae_titles": ["CT1"]}


@pytest.mark.parametrize(
    ("settings", "caller", "allowed"),
    [
        # As shipped: this machine, by whatever name, and nobody else.
        ({}, "127.0.0.1", True),
        ({}, "127.255.255.254", True),
        ({}, "::1", True),
        ({}, "::ffff:127.0.0.1", True),
        ({}, "10.1.2.3", False),
        ({}, "192.168.0.1", False),
        ({}, "0.0.0.0", False),
        ({}, "128.0.0.1", False),
        ({}, "126.255.255.255", False),
        ({}, "169.254.1.1", False),
        ({}, "fe80::1", False),
        ({}, "::2", False),
        ({}, "::ffff:10.1.2.3", False),
        # As a site may have it.
        (HOSPITAL, "10.1.2.0", True),
        (HOSPITAL, "10.1.2.255", True),
        (HOSPITAL, "10.1.3.0", False),
        (HOSPITAL, "10.1.1.255", False),
        (HOSPITAL, "::ffff:10.1.2.3", True),
        (HOSPITAL, "192.168.7.9", True),
        (HOSPITAL, "192.168.7.10", False),
        (HOSPITAL, "fd12:3::1", True),
        (HOSPITAL, "fd12:4::1", False),
        (HOSPITAL, "fe80::1%eth0", False),
        (HOSPITAL, "127.0.0.1", False),
        (HOSPITAL, "::1", False),
    ],
)
def test_networks_by_address(settings: dict[str, object], caller: str, allowed: bool) -> None:
    """Addresses that no test can call from: what is compared, and how an IPv4 caller of an IPv6 socket is read."""
    config = Config.model_validate({"node": {"address": "0.0.0.0"}, "reception": settings})
    listener = object.__new__(Listener)
    listener._limits = config.reception
    assert listener._allowed(_plain(caller)) == allowed


def test_the_default_is_this_machine() -> None:
    networks = Config().reception.networks
    assert networks == (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))


# ── how many from one address ──────────────────────────────────────────────────────────────────────────────────────


def test_one_association_too_many_from_one_address(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"networks": ["127.0.0.0/8"], "max_associations_per_peer": 2}
    with reception(tmp_path / "spool", **settings) as node, ExitStack() as stack:
        first, second = (stack.enter_context(Caller(node.port)).associate() for _ in range(2))
        for calling in ("CT1", "CT2"):
            # Transient, presentation, local limit exceeded: the sender tries again later.
            assert answer(node.port, calling=calling) == (REJECTED, b"\0\2\3\2")
        why = "it has 2 already (reception.max_associations_per_peer)"
        assert caplog.text.count(f"connection from {HOST} refused: {why}") == 2
        assert f"association of 'CT1' at {HOST} rejected: {why}" in caplog.text
        assert f"association of 'CT2' at {HOST} rejected: {why}" in caplog.text
        # Neither those that it has suffer, nor anybody else.
        assert [first.echo(), second.echo()] == [0, 0]
        assert stack.enter_context(Caller(node.port, "127.0.0.2")).associate().echo() == 0
        first.release()
        wait_for(lambda: node.associations() == 2)
        with Caller(node.port) as again:
            assert again.associate().echo() == 0


def test_who_is_one_too_many_and_silent_is_closed_soon_and_keeps_nobody_out(tmp_path: Path) -> None:
    settings = {"max_associations_per_peer": 1, "max_associations": 50, "acse_timeout_s": 60.0}
    with reception(tmp_path / "spool", **settings) as node, ExitStack() as stack:
        served = stack.enter_context(Caller(node.port)).associate()
        silent = [stack.enter_context(Caller(node.port)) for _ in range(5)]
        for one in silent[:-1]:
            assert one.receive() is None  # the next one took its place
        assert answer(node.port) == (REJECTED, b"\0\2\3\2")
        assert silent[-1].receive() is None
        assert served.echo() == 0


def test_the_last_one_too_many_is_given_three_seconds(tmp_path: Path) -> None:
    with reception(tmp_path / "spool", max_associations_per_peer=1, acse_timeout_s=60.0) as node, ExitStack() as stack:
        stack.enter_context(Caller(node.port)).associate()
        with socket.create_connection((HOST, node.port), 6) as silent:
            assert silent.recv(1) == b""
