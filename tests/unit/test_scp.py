"""The receiver's book of open associations, which assembly and the limit on associations rely on."""

from __future__ import annotations

import threading
from pathlib import Path

from ct_builder import phantom, uid, write_series
from peers import HOST, free_port, wait_for
from pydicom import dcmread
from pynetdicom import AE
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
    wait_for(lambda: not server._series_of, what="the end of the association to be noticed")
    spool.go.set()
    assert stored.wait(10)
    assert server._series_of == {}
    assert server.open_associations(uid("series")) == 0
    server.stop(1)
    spool.close()
