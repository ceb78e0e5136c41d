"""A series over TLS into the real node and out of it again, DCMTK at both ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from certificates import Certificates
from conftest import require_peer
from ct_builder import phantom, write_series
from node_process import NodeProcess
from peers import storescp, storescu, wait_for

SLICES = 6


@pytest.mark.peer
def test_certificates_are_demanded_at_both_ends(certificates: Certificates, tmp_path: Path) -> None:
    require_peer("storescp", "storescu")
    authority = str(certificates.authority)
    settings = {
        "tls": {**certificates.pair("node"), "client_ca_file": authority, "subjects": {"CT1": "ct1.hospital"}},
        "destinations": {"pacs": {"tls": {"ca_file": authority, **certificates.pair("node")}}},
    }
    sources = write_series(tmp_path / "ct", phantom(SLICES))
    with (
        storescp(tmp_path, options=certificates.dcmtk("pacs")) as scp,
        NodeProcess(tmp_path / "node", scp.port, settings) as node,
    ):
        assert storescu(node.port, sources, calling="CT1").returncode != 0
        assert storescu(node.port, sources, calling="CT1", options=certificates.dcmtk("pacs")).returncode != 0
        assert node.query("SELECT * FROM instances") == []
        assert storescu(node.port, sources, calling="CT1", options=certificates.dcmtk("ct1")).returncode == 0
        (job,) = node.wait_jobs("DONE")
        assert job["n_out"] == SLICES
        wait_for(lambda: len(scp.files()) == SLICES)
        assert node.command("echo", "pacs").returncode == 0
        assert "its certificate is that of 'pacs.hospital', not as tls.subjects says" in node.log.read_text()
