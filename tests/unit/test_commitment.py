"""Storage commitment: a delivery is through when all is committed; what is not is sent again and asked for again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from committing import INSTANCE, NO_SUCH_OBJECT, TIMEOUT_S, CommittingOracle, Manner, Site
from oracle import Script
from peers import free_port, wait_for
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from sender import COUNT, PROMPT, UIDS
from tables import CT, events, row, rows

from dicomnode import jobs as job_table
from dicomnode.db import DeliveryState, JobState, commitments, deliveries

S = DeliveryState
TRIES = PROMPT["failure_status_tries"]


@pytest.fixture
def pacs() -> Iterator[CommittingOracle]:
    with CommittingOracle(free_port()) as made:
        yield made


@pytest.fixture
def site(database: sa.Engine, sent_series: list[Path], pacs: CommittingOracle, tmp_path: Path) -> Iterator[Site]:
    with Site(database, sent_series, pacs.port, pacs.report_to[0], tmp_path) as made:
        yield made


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a report on the association of its request."""
    monkeypatch.setattr("dicomnode.scu._REPORT_WAIT_S", 0.0)


@pytest.fixture
def waiting(site: Site, pacs: CommittingOracle, at_once: None) -> None:
    """The site asked once, and no report came."""
    pacs.manner.report = "never"
    site.sent()
    site.ask()


def distinct(states: list[str]) -> list[str]:
    return [state for k, state in enumerate(states) if k == 0 or state != states[k - 1]]


# ── reports ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["new", "same"])
def test_done_is_what_is_committed(site: Site, pacs: CommittingOracle, how: Any) -> None:
    pacs.manner.report = how
    site.sent()
    assert site.job["state"] == JobState.COMMITTING, "not before the report"
    assert site.ask()["state"] == S.COMMITTED
    assert site.row()["reason"] == "all 4 committed"
    assert site.states() == ["COMMITTED"] * COUNT
    assert (site.job["state"], site.job["reason"]) == (JobState.DONE, "every instance committed by pacs")
    (asked,) = pacs.asked
    assert asked.instances == dict.fromkeys(UIDS, CT)
    assert (asked.requested_instance, asked.action_type) == (INSTANCE, 1)
    kept = row(site.database, "commitments")
    assert (kept["transaction_uid"], kept["status"]) == (asked.transaction_uid, 0)
    assert kept["reported_at"] is not None
    assert distinct(site.history()) == ["DISPATCHING", "COMMITTING", "DONE"]
    if how == "new":
        wait_for(lambda: pacs.statuses == [0])
    wait_for(lambda: pacs.released == 2, what="the release of both associations")


def test_only_what_failed_is_sent_and_asked_for_again(site: Site, pacs: CommittingOracle) -> None:
    site.sent()
    pacs.forget(UIDS[2])
    again = site.ask()
    assert again["state"] == S.WAITING
    assert again["reason"].startswith("1 of 4 accepted but not committed")
    assert f"{UIDS[2]}: failure reason 0x0112" in again["reason"]
    assert again["next_try_at"] > again["updated_at"]
    assert site.states() == ["COMMITTED", "COMMITTED", "WAITING", "COMMITTED"]
    assert site.job["state"] == JobState.DISPATCHING
    assert pacs.images == COUNT
    site.sent()
    assert pacs.images == COUNT + 1
    assert site.ask()["state"] == S.COMMITTED
    assert [list(asked.instances) for asked in pacs.asked] == [sorted(UIDS), [UIDS[2]]]
    assert len({asked.transaction_uid for asked in pacs.asked}) == 2
    assert distinct(site.history()) == ["DISPATCHING", "COMMITTING", "DISPATCHING", "COMMITTING", "DONE"]


def test_what_is_sent_again_may_be_there(site: Site, pacs: CommittingOracle) -> None:
    """Processing failed for an image that it keeps; that it is a duplicate is then no surprise."""
    site.sent()
    pacs.manner.failing = {UIDS[0]: 0x0110}
    site.ask()
    pacs.manner, pacs.script = Manner(), Script(status=0x0111)
    site.sent()
    assert site.ask()["state"] == S.COMMITTED


def test_what_a_report_leaves_out_is_not_committed(site: Site, pacs: CommittingOracle) -> None:
    site.sent()
    pacs.manner.leave_out = {UIDS[1]}
    assert site.ask()["state"] == S.WAITING
    assert site.states() == ["COMMITTED", "WAITING", "COMMITTED", "COMMITTED"]


def test_an_image_that_is_never_committed_is_refused_after_some_tries(site: Site, pacs: CommittingOracle) -> None:
    pacs.manner.failing = {UIDS[3]: 0x0110}
    for _ in range(TRIES - 1):
        site.sent()
        assert site.ask()["state"] == S.WAITING
    site.sent()
    failed = site.ask()
    assert failed["state"] == S.FAILED
    assert failed["reason"] == (f"1 of 4 refused, e.g. {UIDS[3]}: accepted but not committed, failure reason 0x0110")
    assert site.job["state"] == JobState.FAILED
    assert failed["reason"] in site.job["reason"]


@pytest.mark.parametrize("reason", [0x0119, 0x0122])
def test_what_can_never_be_committed_fails_at_once(site: Site, pacs: CommittingOracle, reason: int) -> None:
    site.sent()
    pacs.manner.failing = {UIDS[3]: reason}
    assert site.ask()["state"] == S.FAILED
    assert site.states() == ["COMMITTED", "COMMITTED", "COMMITTED", "REFUSED"]


def test_a_peer_without_room_is_tried_without_a_count(site: Site, pacs: CommittingOracle) -> None:
    pacs.manner.failing = dict.fromkeys(UIDS, 0x0213)
    for _ in range(TRIES + 1):
        site.sent()
        assert site.ask()["state"] == S.WAITING
    pacs.manner = Manner()
    site.sent()
    assert site.ask()["state"] == S.COMMITTED


# ── no report ──────────────────────────────────────────────────────────────────────────────────────────────────────


def seconds_to_next(found: dict[str, Any]) -> float:
    return float((found["next_try_at"] - found["updated_at"]).total_seconds())


@pytest.mark.usefixtures("at_once")
def test_without_a_report_it_is_asked_again_with_growing_pauses_until_it_fails(
    site: Site, pacs: CommittingOracle
) -> None:
    pacs.manner.report = "never"
    site.sent()
    waits = []
    for number in range(1, TRIES + 1):
        waiting = site.ask()
        assert waiting["state"] == S.COMMITTING
        assert f"transaction {pacs.asked[-1].transaction_uid}" in waiting["reason"]
        assert len(pacs.asked) == number
        waits.append(seconds_to_next(waiting))
    assert waits == pytest.approx([TIMEOUT_S * 2**n for n in range(TRIES)], abs=1)
    assert len({asked.transaction_uid for asked in pacs.asked}) == TRIES
    failed = site.ask()
    assert (failed["state"], len(pacs.asked)) == (S.FAILED, TRIES)
    assert failed["reason"].startswith(f"gave up: asked {TRIES} times for storage commitment without a report")
    assert site.job["state"] == JobState.FAILED
    assert pacs.images == COUNT, "nothing was sent again"
    with site.database.begin() as connection:
        job_table.retry(connection, "job")
    pacs.manner.report = "same"
    site.sent()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dicomnode.scu._REPORT_WAIT_S", 3.0)
        assert site.ask()["state"] == S.COMMITTED
    assert (site.job["state"], pacs.images) == (JobState.DONE, COUNT)


@pytest.mark.usefixtures("at_once")
def test_a_day_is_the_longest_wait_for_a_report_unless_the_first_is_longer(site: Site, pacs: CommittingOracle) -> None:
    pacs.manner.report = "never"
    site.use(commitment_timeout_s=60_000.0)
    site.sent()
    assert [round(seconds_to_next(site.ask()), -1) for _ in range(2)] == [60_000, 86_400]
    site.use(commitment_timeout_s=100_000.0)
    assert round(seconds_to_next(site.ask()), -1) == 100_000


@pytest.mark.usefixtures("waiting")
def test_a_late_report_counts(site: Site, pacs: CommittingOracle) -> None:
    """On the first of two requests: all that it names is committed."""
    site.ask()
    first, second = pacs.asked
    pacs.manner.leave_out = {UIDS[0]}
    assert pacs.report(first) == 0
    assert (site.row()["state"], site.states()) == (S.COMMITTING, ["ACCEPTED", *["COMMITTED"] * 3])
    pacs.manner.leave_out = ()
    assert pacs.report(second) == 0
    assert (site.row()["state"], site.job["state"]) == (S.COMMITTED, JobState.DONE)


@pytest.mark.usefixtures("waiting")
def test_the_same_report_again_changes_nothing(site: Site, pacs: CommittingOracle) -> None:
    assert pacs.report(pacs.asked[0]) == 0
    before = rows(site.database, "transfers"), rows(site.database, "deliveries"), events(site.database)
    pacs.manner.failing = dict.fromkeys(UIDS, NO_SUCH_OBJECT)
    assert pacs.report(pacs.asked[0]) == 0
    assert (rows(site.database, "transfers"), rows(site.database, "deliveries"), events(site.database)) == before


@pytest.mark.usefixtures("waiting")
def test_a_report_finds_its_request_after_a_restart(site: Site, pacs: CommittingOracle) -> None:
    site.use()
    assert pacs.report(pacs.asked[0]) == 0
    assert site.job["state"] == JobState.DONE


@pytest.mark.usefixtures("at_once")
def test_a_request_whose_process_died_is_made_again(site: Site, pacs: CommittingOracle) -> None:
    """The rows as a kill -9 leaves them; the engine calls the same attempt again, the peer may know the first."""
    pacs.manner.report = "never"
    site.sent()
    attempts = site.row()["attempts"]
    site.ask()
    with site.database.begin() as connection:
        connection.execute(sa.update(deliveries).values(state=S.REQUESTING))
        connection.execute(sa.update(commitments).values(status=None))
    site.use()
    site.commitment.request("job", "pacs", attempts)
    assert len(pacs.asked) == 2
    assert (site.row()["state"], site.row()["attempts"]) == (S.COMMITTING, attempts + 1)
    assert seconds_to_next(site.row()) == pytest.approx(TIMEOUT_S, abs=1), "the first is not counted"
    assert pacs.report(pacs.asked[0]) == 0
    assert site.job["state"] == JobState.DONE


@pytest.mark.parametrize("attempt", [0, 2, 9])
def test_an_attempt_that_is_not_the_next_asks_nothing(site: Site, pacs: CommittingOracle, attempt: int) -> None:
    site.sent()
    site.commitment.request("job", "pacs", attempt)
    site.commitment.request("job", "nobody", 1)
    site.commitment.request("nothing", "pacs", 1)
    assert pacs.asked == []


# ── what is no report ──────────────────────────────────────────────────────────────────────────────────────────────


def unknown(information: Dataset) -> None:
    information.TransactionUID = "2.25.1"


def without_transaction(information: Dataset) -> None:
    del information.TransactionUID


def without_uid(information: Dataset) -> None:
    del information.ReferencedSOPSequence[0].ReferencedSOPInstanceUID


@pytest.mark.parametrize(
    ("change", "event_type", "status"),
    [
        (unknown, 1, 0x0115),
        (without_transaction, 1, 0x0115),
        (without_uid, 1, 0x0115),
        (lambda information: None, 3, 0x0113),
    ],
)
@pytest.mark.usefixtures("waiting")
def test_what_is_no_report_is_answered_so_and_changes_nothing(
    site: Site, pacs: CommittingOracle, change: Callable[[Dataset], None], event_type: int, status: int
) -> None:
    _, information = pacs.information(pacs.asked[0])
    change(information)
    assert pacs.say(event_type, information) == status
    assert (site.states(), site.row()["state"]) == (["ACCEPTED"] * COUNT, S.COMMITTING)


@pytest.mark.parametrize(
    "information",
    [b"", b"\x08\x00\x95", b"\x08\x00\x99\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00", b"\0" * 40],
)
def test_what_cannot_be_read_is_answered_so(site: Site, information: bytes) -> None:
    assert site.commitment.report(1, information, ExplicitVRLittleEndian) == 0x0115


@pytest.mark.usefixtures("waiting")
def test_a_database_that_fails_under_a_report_says_so(
    site: Site, pacs: CommittingOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> bool:
        raise sa.exc.OperationalError("UPDATE", {}, Exception("locked"))

    monkeypatch.setattr(site.commitment, "_take", failing)
    assert pacs.report(pacs.asked[0]) == 0x0110
    monkeypatch.undo()
    assert pacs.report(pacs.asked[0]) == 0


# ── cancel, stop ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("waiting")
def test_a_cancelled_job_stays_so(site: Site, pacs: CommittingOracle) -> None:
    with site.database.begin() as connection:
        assert job_table.cancel(connection, "job")
    assert site.row()["state"] == S.CANCELLED
    assert pacs.report(pacs.asked[0]) == 0
    assert (site.row()["state"], site.job["state"]) == (S.CANCELLED, JobState.CANCELLED)
    assert site.states() == ["COMMITTED"] * COUNT


def test_a_cancel_between_look_and_begin_wins(
    site: Site, pacs: CommittingOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.sent()
    site.cancel_after_look(monkeypatch)
    assert site.ask()["state"] == S.CANCELLED
    assert pacs.asked == []


def test_a_stopping_node_does_not_wait_for_a_report(
    site: Site, pacs: CommittingOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicomnode.scu._REPORT_WAIT_S", 60.0)
    pacs.manner.report = "never"
    site.sent()
    thread = threading.Thread(target=site.ask)
    thread.start()
    wait_for(lambda: pacs.asked)
    site.commitment.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert site.row()["state"] == S.COMMITTING
