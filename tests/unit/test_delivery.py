"""Delivery: exactly what is missing is sent again, to each destination by itself."""

from __future__ import annotations

import errno
import os
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from ct_builder import phantom, write_series
from oracle import Script, StorageOracle
from peers import free_port, wait_for
from pydicom.uid import ImplicitVRLittleEndian, JPEG2000Lossless
from sender import COUNT, PROMPT, UIDS, Sender
from tables import CT, EXPLICIT, config_of, events, rows

from dicomnode import answers
from dicomnode import delivery as module
from dicomnode import jobs as job_table
from dicomnode.db import DeliveryState, JobState, TransferState, deliveries, jobs, transfers
from dicomnode.delivery import Delivery, peer, plan
from dicomnode.errors import NodeError
from dicomnode.scu import Outgoing

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

# ── one attempt ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_accepted_is_done(sender: Sender, oracle: StorageOracle) -> None:
    sent = sender.attempt()
    assert (sent["state"], sent["reason"], sent["attempts"]) == (DeliveryState.SENT, "all 4 accepted", 1)
    assert sender.job["state"] == JobState.DONE
    assert oracle.sop_instance_uids() == sorted(UIDS)
    assert all(len(digests) == 1 for digests in oracle.received.values())
    assert oracle.released == 1


@pytest.mark.parametrize("status", [0xB000, 0xB006, 0xB007])
def test_a_warning_is_accepted_and_kept(sender: Sender, oracle: StorageOracle, status: int) -> None:
    oracle.script = Script(status=status)
    assert sender.attempt()["state"] == DeliveryState.SENT
    kept = rows(sender.database, "transfers")
    assert {(one["status"], one["detail"]) for one in kept} == {(status, f"status 0x{status:04X}")}


def test_warnings_are_told_once_for_each_attempt(
    sender: Sender, oracle: StorageOracle, caplog: pytest.LogCaptureFixture
) -> None:
    oracle.script = Script(status_of_nth={1: 0xB000, 2: 0xB007, 3: 0xB000, 4: 0xC000})
    told = "pacs: 2 accepted with warning 0xB000, 1 accepted with warning 0xB007"
    sender.attempt()
    sender.attempt()
    assert sender.row()["state"] == DeliveryState.SENT
    assert [what for _, what in events(sender.database) if "warning" in what] == [told]
    assert [record.levelname for record in caplog.records if told in record.getMessage()] == ["WARNING"]


def test_only_what_is_missing_is_sent_again(sender: Sender, oracle: StorageOracle) -> None:
    oracle.script = Script(status_of={UIDS[1]: 0xC000})
    again = sender.attempt()
    assert again["state"] == DeliveryState.WAITING
    assert sender.states() == ["ACCEPTED", "WAITING", "ACCEPTED", "ACCEPTED"]
    assert sender.job["state"] == JobState.DISPATCHING
    oracle.script = Script()
    assert sender.attempt()["state"] == DeliveryState.SENT
    assert oracle.images == COUNT + 1
    assert {one: len(digests) for one, digests in oracle.received.items()} == dict.fromkeys(UIDS, 1)
    assert sender.job["state"] == JobState.DONE


@pytest.mark.parametrize("status", [0xA900, 0x0111, 0x0117, 0x0122, 0x0124])
def test_a_refusal_is_final_at_the_first_try(sender: Sender, oracle: StorageOracle, status: int) -> None:
    oracle.script = Script(status_of={UIDS[2]: status})
    failed = sender.attempt()
    assert failed["state"] == DeliveryState.FAILED
    assert failed["reason"] == f"1 of 4 refused, e.g. {UIDS[2]}: status 0x{status:04X}"
    assert sender.states() == ["ACCEPTED", "ACCEPTED", "REFUSED", "ACCEPTED"]
    assert sender.job["state"] == JobState.FAILED
    assert failed["reason"] in sender.job["reason"]


@pytest.mark.parametrize("status", [0xC000, 0x0110])
def test_a_failure_that_may_pass_is_tried_a_few_times(sender: Sender, oracle: StorageOracle, status: int) -> None:
    oracle.script = Script(status_of={UIDS[0]: status})
    assert [sender.attempt()["state"] for _ in range(3)] == ["WAITING", "WAITING", "FAILED"]
    assert oracle.images == COUNT + 2
    assert sender.job["state"] == JobState.FAILED


def test_a_full_peer_is_left_alone_and_tried_without_a_count(sender: Sender, oracle: StorageOracle) -> None:
    oracle.script = Script(status=0xA700)
    for number in range(1, 8):
        assert sender.attempt()["state"] == DeliveryState.WAITING
        assert oracle.images == number, "after 0xA700 the peer gets a pause, not the next image"
    oracle.script = Script()
    assert sender.attempt()["state"] == DeliveryState.SENT


def test_a_duplicate_after_a_lost_answer_is_accepted(sender: Sender, oracle: StorageOracle) -> None:
    """The peer stored the third image and died; then it says of it that it has it."""
    oracle.script = Script(drop_stored_at={3})
    assert sender.attempt()["state"] == DeliveryState.WAITING
    assert sender.states() == ["ACCEPTED", "ACCEPTED", "WAITING", "WAITING"]
    oracle.script = Script(status_of={UIDS[2]: 0x0111})
    assert sender.attempt()["state"] == DeliveryState.SENT
    assert oracle.sop_instance_uids() == sorted(UIDS)


def test_a_duplicate_without_a_lost_answer_is_a_refusal(sender: Sender, oracle: StorageOracle) -> None:
    oracle.script = Script(status_of_nth={1: 0xC000})
    sender.attempt()
    oracle.script = Script(status_of={UIDS[0]: 0x0111})
    assert sender.attempt()["state"] == DeliveryState.FAILED


def unanswered(sender: Sender) -> set[str]:
    return {one["sop_instance_uid"] for one in rows(sender.database, "transfers") if one["unanswered"]}


@pytest.mark.parametrize("trouble", ["down", "transient", "permanent"])
def test_a_duplicate_after_trouble_without_a_request_is_a_refusal(
    sender: Sender, oracle: StorageOracle, trouble: str
) -> None:
    """No image was ever sent, so what the peer has under its UID is not ours."""
    if trouble == "down":
        oracle.stop()
    oracle.script = Script(reject=None if trouble == "down" else trouble)
    assert sender.attempt()["state"] == DeliveryState.WAITING
    assert unanswered(sender) == set()
    if trouble == "down":
        oracle.start()
    oracle.script = Script(status_of={UIDS[1]: 0x0111})
    assert sender.attempt()["state"] == DeliveryState.FAILED
    assert sender.states() == ["ACCEPTED", "REFUSED", "ACCEPTED", "ACCEPTED"]


@pytest.mark.parametrize("how", ["drop_at", "drop_stored_at", "abort_at"])
def test_only_the_image_on_the_wire_counts_as_unanswered(sender: Sender, oracle: StorageOracle, how: str) -> None:
    oracle.script = Script(**{how: {2}})
    assert sender.attempt()["state"] == DeliveryState.WAITING
    assert unanswered(sender) == {UIDS[1]}
    oracle.script = Script(status_of={UIDS[1]: 0x0111, UIDS[3]: 0x0111})
    assert sender.attempt()["state"] == DeliveryState.FAILED
    assert sender.states() == ["ACCEPTED", "ACCEPTED", "ACCEPTED", "REFUSED"]


def test_an_unanswered_image_stays_so_over_an_attempt_without_a_request(sender: Sender, oracle: StorageOracle) -> None:
    oracle.script = Script(drop_stored_at={3})
    sender.attempt()
    oracle.script = Script(reject="transient")
    sender.attempt()
    assert unanswered(sender) == {UIDS[2]}
    oracle.script = Script(status_of={UIDS[2]: 0x0111})
    assert sender.attempt()["state"] == DeliveryState.SENT


def test_an_attempt_whose_process_died_counts_as_unanswered(sender: Sender, oracle: StorageOracle) -> None:
    """The rows as a kill -9 leaves them: SENDING, OFFERED; the engine calls the same attempt again."""
    with sender.database.begin() as connection:
        connection.execute(sa.update(deliveries).values(state=DeliveryState.SENDING, attempts=1))
        connection.execute(sa.update(transfers).values(state=TransferState.OFFERED))
    oracle.script = Script(status=0x0111)
    sender.delivery.deliver("job", "pacs", 0)
    assert (sender.row()["state"], sender.row()["attempts"]) == (DeliveryState.SENT, 1)


@pytest.mark.parametrize("attempt", [1, 5])
def test_an_attempt_that_is_not_the_next_does_nothing(sender: Sender, oracle: StorageOracle, attempt: int) -> None:
    sender.delivery.deliver("job", "pacs", attempt)
    sender.delivery.deliver("job", "nobody", 0)
    sender.delivery.deliver("nothing", "pacs", 0)
    assert oracle.associations == 0
    assert sender.row()["state"] == DeliveryState.WAITING
    sender.attempt()
    sender.delivery.deliver("job", "pacs", 0)
    assert (oracle.associations, oracle.images) == (1, COUNT)


def test_a_cancel_between_look_and_begin_wins(sender: Sender, oracle: StorageOracle, monkeypatch: Any) -> None:
    sender.cancel_after_look(monkeypatch)
    sender.delivery.deliver("job", "pacs", 0)
    assert sender.row()["state"] == DeliveryState.CANCELLED
    assert oracle.images == 0


def test_a_cancelled_job_is_not_sent_on(sender: Sender, oracle: StorageOracle, monkeypatch: Any) -> None:
    monkeypatch.setattr(answers, "_CANCEL_LOOK_S", 0.0)
    oracle.script = Script(delay_s=0.2)
    thread = threading.Thread(target=sender.delivery.deliver, args=("job", "pacs", 0))
    thread.start()
    wait_for(lambda: oracle.images >= 1)
    with sender.database.begin() as connection:
        connection.execute(sa.update(jobs).values(cancel_requested=True))
        job_table.cancel(connection, "job")
    thread.join(10)
    assert oracle.images < COUNT
    assert oracle.released == 1
    assert (sender.row()["state"], sender.job["state"]) == (DeliveryState.CANCELLED, JobState.CANCELLED)


def test_a_stopping_node_ends_after_the_image_and_goes_on_at_the_next_start(
    sender: Sender, oracle: StorageOracle
) -> None:
    oracle.script = Script(delay_s=0.2)
    thread = threading.Thread(target=sender.delivery.deliver, args=("job", "pacs", 0))
    thread.start()
    wait_for(lambda: oracle.images >= 1)
    sender.delivery.stop()
    thread.join(10)
    assert 1 <= oracle.images < COUNT
    assert sender.row()["state"] == DeliveryState.WAITING
    assert {one["unanswered"] for one in rows(sender.database, "transfers")} == {False}
    sender.delivery = Delivery(sender.config, sender.database, sender.spool)
    oracle.script = Script()
    assert sender.attempt()["state"] == DeliveryState.SENT
    assert oracle.images == COUNT


def test_a_fault_of_ours_is_a_failed_attempt_with_a_pause(
    sender: Sender, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def faulty(*_: object) -> None:
        raise RuntimeError("Doe^Jane")

    monkeypatch.setattr(module, "store", faulty)
    waiting = sender.attempt()
    assert (waiting["state"], waiting["failures"]) == (DeliveryState.WAITING, 1)
    assert waiting["next_try_at"] > waiting["updated_at"]
    assert waiting["reason"].startswith("a fault of the node: RuntimeError at faulty:")
    assert waiting["reason"] in caplog.text
    assert "Doe" not in caplog.text


def test_a_database_that_fails_under_the_attempt_is_left_to_the_dispatcher(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise sa.exc.OperationalError("UPDATE", {}, Exception("locked"))

    monkeypatch.setattr(module, "store", failing)
    with pytest.raises(sa.exc.OperationalError):
        sender.attempt()
    assert sender.row()["state"] == DeliveryState.SENDING


# ── destinations ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_dead_destination_delays_no_other(
    database: sa.Engine, sent_series: list[Path], oracle: StorageOracle
) -> None:
    sender = Sender(database, sent_series, {"dead": free_port(), "pacs": oracle.port})
    dead = sender.attempt("dead")
    assert dead["state"] == DeliveryState.WAITING
    assert "dead (ORACLE at 127.0.0.1" in dead["reason"]
    assert sender.attempt("pacs")["state"] == DeliveryState.SENT
    assert sender.row("dead")["state"] == DeliveryState.WAITING
    assert sender.states("dead") == ["WAITING"] * COUNT
    assert sender.job["state"] == JobState.DISPATCHING, "never done before all of it is accepted"


def test_a_destination_that_left_the_configuration(sender: Sender, oracle: StorageOracle) -> None:
    sender.delivery = Delivery(config_of(delivery=PROMPT), sender.database, sender.spool)
    sender.delivery.deliver("job", "pacs", 0)
    assert sender.row()["state"] == DeliveryState.FAILED
    assert "no longer in config.yaml" in sender.row()["reason"]
    assert sender.job["state"] == JobState.FAILED
    sender.delivery = Delivery(sender.config, sender.database, sender.spool)
    with sender.database.begin() as connection:
        job_table.retry(connection, "job")
    assert sender.attempt()["state"] == DeliveryState.SENT
    assert sender.job["state"] == JobState.DONE


@pytest.mark.parametrize("damage", ["missing", "empty", "other", "cut off", "bit flipped"])
def test_an_item_that_cannot_be_sent_fails_alone(
    database: sa.Engine, tmp_path: Path, oracle: StorageOracle, damage: str
) -> None:
    files = write_series(tmp_path / "ct", phantom(COUNT, 16))
    sender = Sender(database, files, {"pacs": oracle.port})
    whole = files[1].read_bytes()
    if damage == "missing":
        files[1].unlink()
    else:
        damaged = {"empty": b"", "other": files[0].read_bytes(), "cut off": whole[:-100]}
        files[1].write_bytes(damaged.get(damage, whole[:-1] + bytes([whole[-1] ^ 1])))
    failed = sender.attempt()
    assert failed["state"] == DeliveryState.FAILED
    assert sender.states() == ["ACCEPTED", "REFUSED", "ACCEPTED", "ACCEPTED"]
    assert UIDS[1] in sender.job["reason"]
    assert sender.job["state"] == JobState.FAILED
    assert (oracle.images, UIDS[1] in oracle.received) == (COUNT - 1, False)
    files[1].write_bytes(whole)
    with database.begin() as connection:
        job_table.retry(connection, "job")
    assert sender.attempt()["state"] == DeliveryState.SENT


def test_a_file_that_cannot_be_read_now_is_sent_later(
    sender: Sender, oracle: StorageOracle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The others go at once; the one that cannot be read keeps its delivery waiting, with the pauses of any trouble."""
    read_bytes = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path == sender.items[1].path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_bytes(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", failing)
        for failures in range(PROMPT["failure_status_tries"] + 2):
            waiting = sender.attempt()
            assert (waiting["state"], waiting["failures"]) == (DeliveryState.WAITING, failures)
            assert waiting["next_try_at"] > waiting["updated_at"]
            assert waiting["reason"] == f"the file of {UIDS[1]} cannot be read now (Input/output error)"
            assert sender.states() == ["ACCEPTED", "WAITING", "ACCEPTED", "ACCEPTED"]
            assert unanswered(sender) == set()
    assert waiting["reason"] in caplog.text
    assert waiting["reason"] in events(sender.database)[-1][1]
    assert (oracle.images, oracle.aborted) == (COUNT - 1, 0)
    assert sender.attempt()["state"] == DeliveryState.SENT
    assert sender.job["state"] == JobState.DONE


def test_no_descriptor_left_is_no_refusal(sender: Sender, oracle: StorageOracle, monkeypatch: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    read_bytes = Path.read_bytes

    def starved(path: Path) -> bytes:
        """Reads as a process does that may open no further file: the kernel says so, not the test."""
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            return read_bytes(path)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", starved)
        waiting = sender.attempt()
    assert (waiting["state"], sender.states()) == (DeliveryState.WAITING, ["WAITING"] * COUNT)
    assert "Too many open files" in waiting["reason"]
    assert sender.attempt()["state"] == DeliveryState.SENT


def test_what_nobody_has_the_digest_of_is_not_planned(sender: Sender) -> None:
    item = Outgoing("1.2.3", CT, EXPLICIT, sender.items[0].path)
    with pytest.raises(sa.exc.IntegrityError, match="sha256"), sender.database.begin() as connection:
        plan(connection, "job", ["pacs"], [item], sender.spool)


@pytest.mark.parametrize(
    ("taken", "words"),
    [
        ({"sop_classes": [SECONDARY_CAPTURE]}, "it does not know CT Image Storage"),
        ({"syntaxes": [JPEG2000Lossless]}, "neither Explicit VR Little Endian (1.2.840.10008.1.2.1) nor"),
    ],
    ids=["class", "transfer syntax"],
)
def test_what_the_peer_does_not_take_is_named_at_once(
    database: sa.Engine, sent_series: list[Path], taken: dict[str, Any], words: str
) -> None:
    with StorageOracle(**taken) as oracle:
        sender = Sender(database, sent_series, {"pacs": oracle.port})
        failed = sender.attempt()
    assert (failed["state"], failed["attempts"], oracle.images) == (DeliveryState.FAILED, 1, 0)
    assert words in failed["reason"]
    assert sender.states() == ["REFUSED"] * COUNT
    assert sender.job["state"] == JobState.FAILED


def test_compressed_originals_are_decoded_for_a_peer_of_the_old_school(database: sa.Engine, tmp_path: Path) -> None:
    files = write_series(tmp_path / "ct", phantom(COUNT, 64), transfer_syntax=JPEG2000Lossless)
    with StorageOracle(syntaxes=[ImplicitVRLittleEndian]) as oracle:
        sender = Sender(database, files, {"pacs": oracle.port})
        with database.begin() as connection:
            connection.execute(sa.update(transfers).values(transfer_syntax_uid=JPEG2000Lossless))
        assert sender.attempt()["state"] == DeliveryState.SENT
        assert set(oracle.syntax_of.values()) == {ImplicitVRLittleEndian}


def test_how_to_call_a_destination() -> None:
    config = config_of(destinations={"pacs": 104})
    assert (peer(config, "pacs").port, peer(config, "pacs").calling_ae_title) == (104, config.node.ae_title)
    with pytest.raises(NodeError, match=r"no destination 'pax' in config.yaml; there are: pacs"):
        peer(config, "pax")
