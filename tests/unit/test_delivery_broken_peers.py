"""What a delivery becomes when its peer breaks off within a PDU, reads no further, or answers too late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from ct_builder import phantom, write_series
from oracle import Script, StorageOracle
from sender import COUNT, UIDS, Sender
from tables import rows
from test_scu_violations import RawPeer, raw_peer, response

from dicomnode.db import DeliveryState, JobState
from dicomnode.delivery import Delivery

TIMEOUT_S = 0.5
CUT_OFF = 10
"""Bytes of a PDU, its header included."""


def call(sender: Sender, port: int) -> None:
    """Attempt at this port from now on, without much patience."""
    changes = {"port": port, "dimse_timeout_s": TIMEOUT_S}
    destination = sender.config.destinations["pacs"].model_copy(update=changes)
    config = sender.config.model_copy(update={"destinations": {"pacs": destination}})
    sender.delivery = Delivery(config, sender.database, sender.spool)


def within_a_request(raw: RawPeer) -> None:
    """Takes the first image, and of the second one a part of the PDU that holds its data."""
    raw.accept()
    raw.write(response(*raw.request()))
    raw.read()  # its command
    assert raw.read_part(CUT_OFF)[:1] == b"\4"


def within_an_answer(raw: RawPeer) -> None:
    """Takes two images, and says of the second a part of its answer."""
    raw.accept()
    raw.write(response(*raw.request()))
    raw.write(response(*raw.request())[:CUT_OFF])


@pytest.mark.parametrize("behave", [within_a_request, within_an_answer])
def test_a_peer_that_breaks_off_within_a_pdu(
    sender: Sender, oracle: StorageOracle, behave: Callable[[RawPeer], None]
) -> None:
    with raw_peer(behave) as port:
        call(sender, port)
        waiting = sender.attempt()
    assert (waiting["state"], waiting["failures"]) == (DeliveryState.WAITING, 0)
    assert waiting["next_try_at"] > waiting["updated_at"]
    assert sender.states() == ["ACCEPTED", "WAITING", "WAITING", "WAITING"]
    assert {one["sop_instance_uid"] for one in rows(sender.database, "transfers") if one["unanswered"]} == {UIDS[1]}
    assert sender.job["state"] == JobState.DISPATCHING
    call(sender, oracle.port)
    assert sender.attempt()["state"] == DeliveryState.SENT
    assert oracle.sop_instance_uids() == sorted(UIDS[1:]), "what was accepted is not sent again"


def test_a_peer_that_reads_no_further(database: sa.Engine, tmp_path: Path, oracle: StorageOracle) -> None:
    files = write_series(tmp_path / "ct", phantom(1, 2048))  # 8 MB, which no buffer holds
    over = threading.Event()
    sender = Sender(database, files, {"pacs": oracle.port})

    def behave(raw: RawPeer) -> None:
        raw.accept()
        raw.read()
        over.wait(10)

    begun = time.monotonic()
    with raw_peer(behave) as port:
        call(sender, port)
        waiting = sender.attempt()
        assert time.monotonic() - begun < TIMEOUT_S + 1
        over.set()
    assert waiting["state"] == DeliveryState.WAITING
    assert "taking the request" in waiting["reason"]
    call(sender, oracle.port)
    assert sender.attempt()["state"] == DeliveryState.SENT
    assert oracle.sop_instance_uids() == UIDS[:1]


def test_a_peer_that_answers_late(sender: Sender, oracle: StorageOracle) -> None:
    """In time, all is accepted; too late, the image that it has is sent again, and that it has it is no refusal."""
    call(sender, oracle.port)
    oracle.script = Script(delay_s=4 * TIMEOUT_S)
    waiting = sender.attempt()
    assert waiting["state"] == DeliveryState.WAITING
    assert sender.states() == ["WAITING"] * COUNT
    assert oracle.sop_instance_uids() == [UIDS[0]]
    oracle.script = Script(delay_s=TIMEOUT_S / 5, status_of={UIDS[0]: 0x0111})
    assert sender.attempt()["state"] == DeliveryState.SENT
    assert oracle.sop_instance_uids() == sorted(UIDS)
    assert {one: len(copies) for one, copies in oracle.received.items()} == dict.fromkeys(UIDS, 1)
