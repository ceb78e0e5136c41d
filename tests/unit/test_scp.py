"""The receiver's book of open associations, which assembly and the limit on associations rely on."""

from __future__ import annotations

import errno
import struct
import threading
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ct_builder import phantom, uid, write_series
from peers import HOST, free_port, wait_for
from pydicom import dcmread
from pydicom.datadict import dictionary_VR, keyword_dict, keyword_for_tag, tag_for_keyword
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom import AE
from pynetdicom.association import Association
from scanner import image
from tables import config_of

from dicomnode.router import OWN_OUTPUT, header_values
from dicomnode.scp import StorageServer, _header, _parse, _Refusal
from dicomnode.series import KEYWORDS
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


def test_a_deflate_bomb_is_inflated_only_as_far_as_a_header_goes() -> None:
    bomb = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    start = struct.pack("<HH2sHL", 0x0008, 0x0005, b"UT", 0, 300_000_000)
    small = bomb.compress(start) + bomb.compress(bytes(300_000_000)) + bomb.flush()
    assert len(small) < 1_000_000
    tracemalloc.start()
    try:
        header = _parse(memoryview(small), DeflatedExplicitVRLittleEndian)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "SOPInstanceUID" not in header, "so it is refused as what cannot be understood"
    assert peak < 80_000_000


def compared(data: bytes, syntax: str) -> None:
    """What is asked of a header is the same whoever reads it."""
    try:
        slow = _parse(memoryview(data), UID(syntax))
    except _Refusal:
        with pytest.raises(_Refusal):
            _header(memoryview(data), UID(syntax), frozenset())
        return
    keywords = {keyword_for_tag(tag) for tag in slow.keys()} | KEYWORDS | {"Modality", OWN_OUTPUT}
    plain = {keyword for keyword in keywords if keyword not in SEQUENCES}
    for asked in (keywords, plain, KEYWORDS | {"SOPInstanceUID", "SeriesDescription"}):
        tags = {tag_for_keyword(keyword) for keyword in {*asked, "SpecificCharacterSet"}} - {None}
        read = _header(memoryview(data), UID(syntax), frozenset(tags))
        assert header_values(read, asked) == header_values(slow, asked)


SEQUENCES = {keyword for keyword in keyword_dict if dictionary_VR(keyword) == "SQ"}


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_the_index_and_pydicom_read_the_same_header(
    tmp_path: Path, syntax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"SpecificCharacterSet": "ISO_IR 192", "SeriesDescription": "Lungenübersicht ÄÖ"}
    (path,) = write_series(tmp_path, phantom(1, 16), **texts)
    ds = dcmread(path)
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(path)
    one = image(path)
    compared(one.data, syntax)
    for cut in range(0, len(one.data) - 512, 7):
        with warnings.catch_warnings(action="ignore"):  # pydicom's, on what is cut off
            compared(one.data[:cut], syntax)
    monkeypatch.setattr("dicomnode.scp._parse", None)
    tags = frozenset({0x00080005, 0x0008103E})
    assert header_values(_header(memoryview(one.data), UID(syntax), tags), {"SeriesDescription"}) == {
        "SeriesDescription": "Lungenübersicht ÄÖ"
    }, "and this one was found by the index"


@pytest.mark.data
def test_the_index_and_pydicom_read_the_same_odd_header(odd_dir: Path) -> None:
    for path in sorted(odd_dir.glob("*.dcm")):
        one = image(path)
        with warnings.catch_warnings(action="ignore"):
            compared(one.data, one.syntax)


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
    assert "OSError at free_bytes" in caplog.text


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
