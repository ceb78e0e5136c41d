"""TLS in and out: with DCMTK, with certificates that are not accepted, and with peers that are silent or speak none."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from caller import Caller, whole
from certificates import Certificates
from conftest import require_peer
from oracle import StorageOracle
from peers import HOST, free_port, storescp, storescu, wait_for
from scanner import data_set_of, image
from sender import COUNT, PROMPT, Sender
from tables import config_of

from dicomnode.config_tls import TlsOut
from dicomnode.connection import connect
from dicomnode.delivery import Delivery
from dicomnode.errors import AssociationRejected, PeerError, PeerTimedOut, PeerUnreachable, TlsFailed
from dicomnode.requestor import Peer
from dicomnode.scp import StorageServer
from dicomnode.scu import Answer, Outgoing, echo, store
from dicomnode.spool import Spool
from dicomnode.tls import client_context


def out(certificates: Certificates, shown: str | None = "node", **changes: Any) -> TlsOut:
    """What the node needs to call a peer, to which it shows the certificate of that name."""
    pair = {} if shown is None else certificates.pair(shown)
    return TlsOut.model_validate({"ca_file": str(certificates.authority), **pair, **changes})


def peer_at(port: int, tls: TlsOut | None, calling: str = "NODE") -> Peer:
    return Peer(
        "pacs", "ANY", HOST, port, calling, connect_timeout_s=10, acse_timeout_s=10, dimse_timeout_s=10, tls=tls
    )


# ── out ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def items(sent_series: list[Path]) -> list[Outgoing]:
    images = [image(path) for path in sent_series]
    return [
        Outgoing(one.sop_instance_uid, one.sop_class_uid, one.syntax, path, one.sha256)
        for one, path in zip(images, sent_series, strict=True)
    ]


@pytest.mark.peer
@pytest.mark.parametrize("max_pdu", [4096, 131072])
def test_dcmtk_receives_over_tls(
    certificates: Certificates, items: list[Outgoing], tmp_path: Path, max_pdu: int
) -> None:
    """It demands our certificate, and gets every bit."""
    require_peer("storescp")
    answers: list[Any] = []
    with storescp(tmp_path, max_pdu=max_pdu, options=certificates.dcmtk("pacs")) as scp:
        store(peer_at(scp.port, out(certificates)), items, answers.append, lambda: False)
        assert answers == [Answer(item.sop_instance_uid, 0) for item in items]
        held = sorted(data_set_of(path.read_bytes()) for path in scp.files())
    assert held == sorted(data_set_of(item.path.read_bytes()) for item in items)


def test_what_is_decrypted_already_is_there_to_be_read(certificates: Certificates) -> None:
    """Two PDUs in one record, of which the first fills the buffer: the second is in the TLS library, not the socket."""
    first, second = whole(4, bytes(8192 - 6)), whole(4, bytes(4))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.certificate("pacs"), certificates.key("pacs"))
    over = threading.Event()

    def answer(listening: socket.socket) -> None:
        connected, _ = listening.accept()
        with context.wrap_socket(connected, server_side=True) as encrypted:
            encrypted.sendall(first + second)
            over.wait(20)

    with socket.create_server((HOST, 0)) as listening:
        peer = threading.Thread(target=answer, args=(listening,))
        peer.start()
        ours = client_context(certificates.authority, None, None)
        times = {"connect_timeout_s": 10.0, "stall_timeout_s": 10.0}
        connection = connect("pacs", HOST, listening.getsockname()[1], context=ours, server_name=HOST, **times)
        with closing(connection):
            assert connection.receive(time.monotonic() + 10, 10_000, "the first")[1] == first
            assert connection.readable(0)
            assert connection.receive(time.monotonic() + 10, 10_000, "the second")[1] == second
            assert not connection.readable(0)
            over.set()
        peer.join(20)


@pytest.mark.peer
def test_a_peer_that_demands_a_certificate_and_gets_none(
    certificates: Certificates, items: list[Outgoing], tmp_path: Path
) -> None:
    require_peer("storescp")
    with storescp(tmp_path, options=certificates.dcmtk("pacs")) as scp, pytest.raises(PeerError):
        store(peer_at(scp.port, out(certificates, None)), items, print, lambda: False)
    assert scp.files() == []


@contextmanager
def tls_server(certificates: Certificates, name: str, **changes: Any) -> Iterator[int]:
    """Port of a server that shakes hands by Python's own means, reads, and says nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.certificate(name), certificates.key(name))
    for key, value in changes.items():
        setattr(context, key, value)
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            connection.settimeout(10)
            try:
                with context.wrap_socket(connection, server_side=True) as encrypted:
                    encrypted.recv(1)
            except OSError:
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(15)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("shown", "changes", "words"),
    [
        ("stranger", {}, "self-signed certificate"),
        ("pacs", {"name": "other.hospital"}, "Hostname mismatch"),
    ],
)
def test_a_certificate_that_is_not_accepted(
    certificates: Certificates, shown: str, changes: dict[str, Any], words: str
) -> None:
    with (
        tls_server(certificates, shown) as port,
        pytest.raises(TlsFailed, match=f"pacs .*its certificate is not accepted: {words}") as caught,
    ):
        echo(peer_at(port, out(certificates, **changes)))
    assert caught.value.permanent


@pytest.mark.parametrize("changes", [{"name": "pacs.hospital"}, {}])
def test_the_name_in_the_certificate_may_be_another_than_the_host(
    certificates: Certificates, changes: dict[str, Any]
) -> None:
    with tls_server(certificates, "pacs") as port, pytest.raises(PeerError) as caught:
        echo(replace(peer_at(port, out(certificates, **changes)), acse_timeout_s=0.5))
    assert not isinstance(caught.value, TlsFailed), "it got as far as the association"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_versions_out(certificates: Certificates, version: ssl.TLSVersion) -> None:
    """Of a peer that speaks one version alone, and no DICOM: only that ends the call."""
    only = {"minimum_version": version, "maximum_version": version}
    with tls_server(certificates, "pacs", **only) as port, pytest.raises(PeerError, match="answer to the association"):
        echo(peer_at(port, out(certificates)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nothing_older_than_tls_1_2(certificates: Certificates) -> None:
    old = {"minimum_version": ssl.TLSVersion.TLSv1, "maximum_version": ssl.TLSVersion.TLSv1_1}
    with tls_server(certificates, "pacs", **old) as port, pytest.raises(TlsFailed):
        echo(peer_at(port, out(certificates)))


def test_a_peer_without_tls(certificates: Certificates) -> None:
    refused = pytest.raises(PeerError, match=r"does not speak TLS|closed the connection")
    with StorageOracle(acse_timeout_s=0.5) as oracle, refused:
        echo(peer_at(oracle.port, out(certificates)))


def test_a_peer_that_does_not_shake_hands_delays_nobody_for_long(certificates: Certificates) -> None:
    with socket.create_server((HOST, 0)) as silent:
        begun = time.monotonic()
        with pytest.raises(PeerTimedOut, match="TLS handshake"):
            echo(replace(peer_at(silent.getsockname()[1], out(certificates)), connect_timeout_s=0.5))
        assert time.monotonic() - begun < 2.5


def test_files_that_are_gone_are_named(certificates: Certificates, tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_bytes(certificates.authority.read_bytes())
    tls = out(certificates, ca_file=str(authority))
    authority.unlink()
    with pytest.raises(TlsFailed, match=f"{authority} cannot be read"):
        echo(peer_at(1, tls))


def test_a_delivery_without_trust_fails_after_some_tries(
    certificates: Certificates, database: sa.Engine, sent_series: list[Path]
) -> None:
    states = []
    sender = Sender(database, sent_series, {"pacs": 1})
    for _ in range(PROMPT["failure_status_tries"]):
        with tls_server(certificates, "stranger") as port:
            destination = sender.config.destinations["pacs"].model_copy(update={"port": port, "tls": out(certificates)})
            config = sender.config.model_copy(update={"destinations": {"pacs": destination}})
            sender.delivery = Delivery(config, database, sender.spool)
            states.append(sender.attempt()["state"])
    assert states == ["WAITING", "WAITING", "FAILED"]
    assert "its certificate is not accepted" in sender.job["reason"]


# ── in ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def listener(certificates: Certificates, tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Start a receiver with TLS; its port."""
    with ExitStack() as stack:

        def start(reception: dict[str, Any] | None = None, **changes: Any) -> int:
            config = config_of(
                node={"port": free_port()},
                reception={"min_free_mb": 0, "called_ae_titles": ["ANY"], **(reception or {})},
                tls={**certificates.pair("node"), **changes},
            )
            spool = Spool(tmp_path / "spool")
            server = StorageServer(config, spool, [], lambda *_: None)
            server.start()
            stack.callback(spool.close)
            stack.callback(server.stop, 0)
            return server.port

        yield start


def received(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "spool").rglob("*.dcm"))


@pytest.mark.peer
def test_dcmtk_sends_over_tls(
    certificates: Certificates, listener: Callable[..., int], sent_series: list[Path], tmp_path: Path
) -> None:
    require_peer("storescu")
    port = listener(client_ca_file=str(certificates.authority))
    done = storescu(port, sent_series, options=certificates.dcmtk("ct1"))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(received(tmp_path)) == COUNT
    sent = sorted(data_set_of(path.read_bytes()) for path in sent_series)
    assert sorted(data_set_of(path.read_bytes()) for path in received(tmp_path)) == sent


@pytest.mark.peer
def test_dcmtk_without_a_certificate_that_is_accepted(
    certificates: Certificates, listener: Callable[..., int], sent_series: list[Path], tmp_path: Path
) -> None:
    require_peer("storescu")
    port = listener(client_ca_file=str(certificates.authority))
    trusting = ["+cf", str(certificates.authority)]
    strange = ["+tls", str(certificates.key("stranger")), str(certificates.certificate("stranger")), *trusting]
    for options in (strange, []):
        assert storescu(port, sent_series, options=options).returncode != 0
    assert received(tmp_path) == []
    assert echo(peer_at(port, out(certificates))) > 0


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_versions(certificates: Certificates, listener: Callable[..., int], version: ssl.TLSVersion) -> None:
    port = listener()
    context = ssl.create_default_context(cafile=certificates.authority)
    context.minimum_version = context.maximum_version = version
    with socket.create_connection((HOST, port)) as plain, context.wrap_socket(plain, server_hostname=HOST) as client:
        assert client.version() == {ssl.TLSVersion.TLSv1_2: "TLSv1.2", ssl.TLSVersion.TLSv1_3: "TLSv1.3"}[version]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_older_version(certificates: Certificates, listener: Callable[..., int]) -> None:
    context = ssl.create_default_context(cafile=certificates.authority)
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_connection((HOST, listener())) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname=HOST)


def test_without_an_authority_senders_need_no_certificate(
    certificates: Certificates, listener: Callable[..., int]
) -> None:
    assert echo(peer_at(listener(), out(certificates, None))) > 0


@pytest.mark.parametrize("who", [None, "stranger"])
def test_a_certificate_is_demanded(
    certificates: Certificates, listener: Callable[..., int], who: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    port = listener(client_ca_file=str(certificates.authority))
    with pytest.raises(PeerError):
        echo(peer_at(port, out(certificates, who)))
    wait_for(lambda: f"connection from {HOST} closed: {HOST}: " in caplog.text)
    assert echo(peer_at(port, out(certificates))) > 0


def test_an_ae_title_belongs_to_a_certificate(
    certificates: Certificates, listener: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    port = listener(client_ca_file=str(certificates.authority), subjects={"CT1": "ct1.hospital"})
    assert echo(peer_at(port, out(certificates, "ct1"), "CT1")) > 0
    assert echo(peer_at(port, out(certificates, "pacs"), "OTHER")) > 0
    with pytest.raises(AssociationRejected) as rejected:
        echo(peer_at(port, out(certificates, "pacs"), "CT1"))
    assert (rejected.value.result, rejected.value.source, rejected.value.reason) == (1, 1, 3)
    assert "its certificate is that of 'pacs.hospital', not as tls.subjects says" in caplog.text


@pytest.mark.parametrize("says", [b"", b"\x16\x03\x01"], ids=["nothing", "half a hello"])
def test_silent_clients_block_nobody_and_are_closed(
    certificates: Certificates, listener: Callable[..., int], says: bytes
) -> None:
    port = listener({"acse_timeout_s": 1.5})
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection((HOST, port))) for _ in range(20)]
        for one in silent:
            one.sendall(says)
        begun = time.monotonic()
        for one in silent:
            one.settimeout(10)
        assert echo(peer_at(port, out(certificates))) > 0
        assert all(one.recv(100) in (b"", b"\x15\x03\x01\0\2\2\x28") for one in silent)
        assert time.monotonic() - begun < 1.5 + 5


def test_silent_clients_who_are_too_many_are_closed_at_once(
    certificates: Certificates, listener: Callable[..., int]
) -> None:
    """They wait in their handshake, and make room as they would without TLS."""
    port = listener({"max_associations_per_peer": 2})
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection((HOST, port), timeout=10)) for _ in range(12)]
        assert all(one.recv(1) in (b"", b"\x15") for one in silent[:10]), "closed, or told so before"


def test_who_is_one_too_many_has_no_more_time_for_tls(certificates: Certificates, listener: Callable[..., int]) -> None:
    port = listener({"max_associations_per_peer": 1})
    context = ssl.create_default_context(cafile=certificates.authority)
    with Caller(port, tls=context) as first:
        first.associate(called="ANY")
        begun = time.monotonic()
        with socket.create_connection((HOST, port), timeout=10) as second:
            assert second.recv(1) == b""
        assert time.monotonic() - begun < 3 + 1


def test_who_speaks_no_tls_is_closed(
    certificates: Certificates, listener: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    port = listener()
    with pytest.raises(PeerError):
        echo(peer_at(port, None))
    wait_for(lambda: "it does not speak TLS" in caplog.text)
    assert echo(peer_at(port, out(certificates))) > 0


def test_an_open_association_is_aborted_at_stop(certificates: Certificates, tmp_path: Path) -> None:
    config = config_of(node={"port": free_port()}, tls=certificates.pair("node"))
    server = StorageServer(config, Spool(tmp_path / "spool"), [], lambda *_: None)
    server.start()
    context = ssl.create_default_context(cafile=certificates.authority)
    with (
        socket.create_connection((HOST, server.port)) as plain,
        context.wrap_socket(plain, server_hostname=HOST),
    ):
        begun = time.monotonic()
        server.stop(0)
        assert time.monotonic() - begun < 3


def test_a_port_that_nobody_listens_on_is_not_a_matter_of_tls(certificates: Certificates) -> None:
    with pytest.raises(PeerUnreachable):
        echo(peer_at(free_port(), out(certificates)))
