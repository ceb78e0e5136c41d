"""One destination of three that hangs: the other two get their series as soon as they would without it."""

from __future__ import annotations

import socket
import statistics
from datetime import datetime
from pathlib import Path

from ct_builder import phantom, write_series
from node_process import NodeProcess
from oracle import StorageOracle
from peers import HOST, wait_for
from scanner import image, send

SLICES = 4
PAIRS = 5
HANGS_S = 30.0
"""Each attempt at the dead destination, which takes the connection and never answers."""
DELAYED_S = 1.0
LIVING = ("archive", "pacs")
UNDER_WAY = "SELECT 1 FROM deliveries WHERE destination = 'dead' AND state = 'SENDING'"
SENT = """
SELECT max(deliveries.updated_at) AS done, min(at) AS begun
FROM jobs JOIN deliveries ON deliveries.job_id = jobs.id JOIN job_events ON job_events.job_id = jobs.id
WHERE series_uid = ? AND job_events.state = 'DISPATCHING' AND destination = ? AND deliveries.state = 'SENT'
HAVING done IS NOT NULL
"""


def bring(node: NodeProcess, folder: Path, name: str) -> str:
    """A series; its UID."""
    images = [image(path) for path in write_series(folder, phantom(SLICES), name=name)]
    send(node.port, images)
    return images[0].series_uid


def waited_s(node: NodeProcess, series_uid: str) -> float:
    """From the moment in which the result of this series may be sent until both living destinations have it, s."""

    def spans() -> list[float]:
        rows = [row for one in LIVING for row in node.query(SENT, series_uid, one)]
        moments = [(datetime.fromisoformat(row["begun"]), datetime.fromisoformat(row["done"])) for row in rows]
        return [(done - begun).total_seconds() for begun, done in moments] if len(rows) == len(LIVING) else []

    return max(wait_for(spans, HANGS_S, "the series at both living destinations"))


def test_a_destination_that_hangs_delays_the_others_by_less_than_a_second(tmp_path: Path) -> None:
    delays_s = []
    lost = StorageOracle()
    with StorageOracle() as archive, StorageOracle(ae_title="PACS") as pacs:
        peer = {"ae_title": "ORACLE", "host": HOST, "acse_timeout_s": HANGS_S}
        settings = {
            "destinations": {"archive": {**peer, "port": archive.port}, "dead": {**peer, "port": lost.port}},
            "routes": [{"name": "ct", "pipeline": "identity", "send_to": ["dead", *LIVING]}],
        }
        with NodeProcess(tmp_path / "node", pacs.port, settings) as node:
            for pair in range(PAIRS):  # side by side in time, as other work of this machine slows both
                with lost:
                    alone_s = waited_s(node, bring(node, tmp_path / "ct", f"alone {pair}"))
                with socket.create_server((HOST, lost.port)):
                    bring(node, tmp_path / "ct", f"bait {pair}")
                    wait_for(lambda: node.query(UNDER_WAY), HANGS_S, "an attempt that hangs")
                    delays_s.append(waited_s(node, bring(node, tmp_path / "ct", f"beside {pair}")) - alone_s)
                    assert node.query(UNDER_WAY), "it was over before the others were served"
        assert len(archive.sop_instance_uids()) == len(pacs.sop_instance_uids()) == 3 * PAIRS * SLICES
    assert statistics.median(delays_s) < DELAYED_S, delays_s
    assert all(len(copies) == 1 for one in (archive, pacs) for copies in one.received.values())
