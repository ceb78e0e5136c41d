"""The receiver's book of open associations, which assembly and the limit on associations rely on."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ct_builder import phantom, uid, write_series
from peers import HOST, free_port, wait_for
from pydicom import dcmread
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
)
from pynetdicom import AE
from pynetdicom.association import Association
from tables import config_of

from dicomnode.scp import StorageServer
from dicomnode.spool import Spool


class SlowSpool(Spool):
    """Waits where the receiver first asks for it, until it is let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.entered = threading.Event()
        self.go = threading.Event()

    def free_bytes(self) -> int:
        self.entered.set()
        self.go.wait(20)
        return super().free_bytes()


def test_an_association_that_ends_while_its_image_is_stored_is_not_open_for_ever(tmp_path: Path) -> None:
    """Every one of them would count against max_associations, and keep its series from closing early."""
    (path,) = write_series(tmp_path / "ct", phantom(1, 16))
    spool = SlowSpool(tmp_path / "spool")
    config = config_of(node={"port": free_port()}, reception={"min_free_mb": 0})
    stored = threading.Event()
    server = StorageServer(config, spool, [], lambda *_: stored.set())
    server.start()
    ds = dcmread(path)
    client = AE("SCANNER")
    client.dimse_timeout = 1
    client.add_requested_context(ds.SOPClassUID, ds.file_meta.TransferSyntaxUID)
    association = client.associate(HOST, config.node.port, ae_title=config.node.ae_title)
    assert association.is_established
    sender = threading.Thread(target=association.send_c_store, args=(ds,))
    sender.start()
    assert spool.entered.wait(10)
    assert len(server._series_of) == 1
    association.abort()
    sender.join(10)
    spool.go.set()
    assert stored.wait(10)
    wait_for(lambda: not server._series_of, what="the end of the association to be noticed")
    assert server.open_associations(uid("series")) == 0
    server.stop(1)
    spool.close()


@pytest.fixture
def receiving(tmp_path: Path) -> Iterator[Callable[..., tuple[StorageServer, Association]]]:
    """A started receiver with its own settings, and an association for CT that is established with it."""
    opened: list[tuple[StorageServer, Association, Spool]] = []

    def start(spool: Spool | None = None, syntax: str = ExplicitVRLittleEndian, **reception: Any) -> Any:
        spool = spool or Spool(tmp_path / "spool")
        config = config_of(node={"port": free_port()}, reception={"min_free_mb": 0, **reception})
        server = StorageServer(config, spool, [], lambda *_: None)
        server.start()
        client = AE("SCANNER")
        client.dimse_timeout = client.network_timeout = 10
        client.maximum_pdu_size = 0
        client.add_requested_context(CTImageStorage, syntax)
        association = client.associate(HOST, config.node.port, ae_title=config.node.ae_title)
        opened.append((server, association, spool))
        return server, association

    yield start
    for server, association, spool in opened:
        association.abort()
        server.stop(1)
        spool.close()


def test_a_message_without_end_is_not_kept_in_memory(receiving: Callable[..., Any], tmp_path: Path) -> None:
    """At the limit the association ends; what comes after it is never waited for."""
    server, association = receiving(max_object_mb=1)
    (path,) = write_series(tmp_path / "ct", phantom(1, 1024))  # 2 MB
    status = association.send_c_store(dcmread(path))
    assert "Status" not in status
    wait_for(lambda: association.is_aborted, what="the abort")
    wait_for(lambda: not server._series_of)
    assert list((tmp_path / "spool" / "instances").iterdir()) == []


def test_a_fault_of_ours_is_a_documented_status_and_a_line(
    receiving: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Spool):
        def free_bytes(self) -> int:
            raise OSError(errno.EIO, "Input/output error")

    _, association = receiving(Broken(tmp_path / "spool"))
    (path,) = write_series(tmp_path / "ct", phantom(1, 16))
    assert association.send_c_store(dcmread(path)).Status == 0x0110
    assert "0x0110" in caplog.text
    assert "OSError (Input/output error) at free_bytes" in caplog.text


def test_only_the_configured_classes_are_accepted(receiving: Callable[..., Any]) -> None:
    _, association = receiving(sop_classes=["MRImageStorage"])
    assert not association.is_established


def test_a_stop_waits_once_for_all_associations(receiving: Callable[..., Any]) -> None:
    server, first = receiving()
    client = AE("SCANNER")
    client.add_requested_context(CTImageStorage)
    others = [client.associate(HOST, server.port, ae_title="DICOMNODE") for _ in range(4)]
    assert all(other.is_established for other in (first, *others))
    begun = time.monotonic()
    server.stop(0.5)
    assert time.monotonic() - begun < 2.5, "five associations with a deadline each would take longer"
