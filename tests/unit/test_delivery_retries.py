"""When a delivery is attempted again, and what becomes of its plan while the series grows."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from oracle import Script, StorageOracle
from peers import free_port, wait_for
from sender import COUNT, PROMPT, Sender, outgoing
from tables import events, rows

from dicomnode import delivery as module
from dicomnode.db import DeliveryState, JobState, deliveries, jobs, now, transfers
from dicomnode.delivery import Delivery, plan, put_back

# ── when again ─────────────────────────────────────────────────────────────────────────────────────────────────────


def pauses(sender: Sender, attempts: int) -> list[float]:
    """Seconds between the end of each of so many attempts and the next."""
    found = []
    for _ in range(attempts):
        failed = sender.attempt()
        found.append((failed["next_try_at"] - failed["updated_at"]).total_seconds())
    return found


def test_pauses_grow_and_are_capped(
    database: sa.Engine, sent_series: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.random, "uniform", lambda low, high: high)
    sender = Sender(database, sent_series, {"pacs": free_port()}, retry_first_s=10.0, retry_max_s=60.0)
    assert pauses(sender, 6) == pytest.approx([10, 20, 40, 60, 60, 60], abs=0.5)
    assert sender.row()["failures"] == 6
    assert "next try in 60 s" in events(database)[-1][1]
    # The row holds it: a new process takes it from there.
    sender.delivery = Delivery(sender.config, database, sender.spool)
    assert pauses(sender, 1) == pytest.approx([60], abs=0.5)


def test_pauses_are_spread(database: sa.Engine, sent_series: list[Path]) -> None:
    sender = Sender(database, sent_series, {"pacs": free_port()}, retry_first_s=10.0, retry_max_s=10.0)
    found = pauses(sender, 8)
    assert all(4.9 < pause < 10.1 for pause in found)
    assert len({round(pause, 3) for pause in found}) > 1


def test_an_enormous_number_of_failures_overflows_nothing(sender: Sender) -> None:
    with sender.database.begin() as connection:
        connection.execute(sa.update(deliveries).values(failures=100_000))
    assert module.pause(sender.config.delivery, 100_001) <= timedelta(seconds=PROMPT["retry_max_s"])


def test_progress_starts_the_pauses_anew(sender: Sender, oracle: StorageOracle) -> None:
    with sender.database.begin() as connection:
        connection.execute(sa.update(deliveries).values(failures=9))
    oracle.script = Script(drop_at={2})
    assert sender.attempt()["failures"] == 0


@pytest.mark.parametrize("trouble", ["down", "transient", "abort"])
def test_trouble_that_passes_is_tried_until_the_configured_age(
    database: sa.Engine, sent_series: list[Path], oracle: StorageOracle, trouble: str
) -> None:
    sender = Sender(database, sent_series, {"pacs": free_port() if trouble == "down" else oracle.port})
    oracle.script = Script(reject="transient") if trouble == "transient" else Script(abort_at=range(1, 99))
    for _ in range(PROMPT["failure_status_tries"] + 3):
        assert sender.attempt()["state"] == DeliveryState.WAITING
    days = sender.config.delivery.give_up_after_days
    with database.begin() as connection:
        connection.execute(sa.update(deliveries).values(created_at=now() - timedelta(days=days, seconds=-60)))
    assert sender.attempt()["state"] == DeliveryState.WAITING
    with database.begin() as connection:
        connection.execute(sa.update(deliveries).values(created_at=now() - timedelta(days=days, seconds=1)))
    failed = sender.attempt()
    assert failed["state"] == DeliveryState.FAILED
    assert failed["reason"].startswith("gave up: ")
    assert "4 of 4 not accepted" in failed["reason"]
    assert sender.job["state"] == JobState.FAILED


def test_the_age_counts_from_the_last_image_that_got_through(sender: Sender, oracle: StorageOracle) -> None:
    """The PACS comes back after too long, takes a part, and breaks off twice: it is there, so nobody gives up."""
    old = now() - timedelta(days=sender.config.delivery.give_up_after_days, seconds=1)
    with sender.database.begin() as connection:
        connection.execute(sa.update(deliveries).values(created_at=old))
    oracle.script = Script(drop_at={2})
    assert sender.attempt()["state"] == DeliveryState.WAITING
    assert sender.states() == ["ACCEPTED", "WAITING", "WAITING", "WAITING"]
    oracle.script = Script(reject="transient")
    assert sender.attempt()["state"] == DeliveryState.WAITING
    with sender.database.begin() as connection:
        connection.execute(sa.update(transfers).values(updated_at=old))
    assert sender.attempt()["state"] == DeliveryState.FAILED
    assert "gave up: " in sender.job["reason"]
    assert "3 of 4 not accepted" in sender.job["reason"]


def test_a_permanent_rejection_after_many_passing_troubles_has_its_own_count(
    sender: Sender, oracle: StorageOracle
) -> None:
    with sender.database.begin() as connection:
        connection.execute(sa.update(deliveries).values(failures=50))
    oracle.script = Script(reject="permanent")
    row = sender.attempt()
    assert (row["state"], row["rejections"]) == (DeliveryState.WAITING, 1)


def test_a_permanent_rejection_is_tried_a_few_times(sender: Sender, oracle: StorageOracle) -> None:
    oracle.script = Script(reject="permanent")
    assert [sender.attempt()["state"] for _ in range(3)] == ["WAITING", "WAITING", "FAILED"]
    assert "does not know the called AE title" in sender.job["reason"]


# ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_planning_again_changes_nothing(sender: Sender) -> None:
    before = rows(sender.database, "deliveries"), rows(sender.database, "transfers")
    with sender.database.begin() as connection:
        plan(connection, "job", ["pacs"], sender.items, sender.spool)
    assert (rows(sender.database, "deliveries"), rows(sender.database, "transfers")) == before
    assert {one["path"] for one in before[1]} == {item.path.name for item in sender.items}


def _let_it_grow(connection: sa.Connection) -> None:
    """Make the job one of originals whose series is still open."""
    connection.execute(sa.update(jobs).values(kind="ORIGINALS"))
    connection.execute(sa.text("UPDATE series SET state = 'OPEN'"))


def test_an_image_that_comes_later_reopens_its_delivery(
    database: sa.Engine, sent_series: list[Path], oracle: StorageOracle
) -> None:
    sender = Sender(database, sent_series[:3], {"pacs": oracle.port})
    with database.begin() as connection:
        _let_it_grow(connection)
    assert sender.attempt()["state"] == DeliveryState.SENT
    assert sender.job["state"] == JobState.DISPATCHING
    with database.begin() as connection:
        plan(connection, "job", ["pacs"], [outgoing(3, sent_series[3])], sender.spool)
    assert (sender.row()["state"], sender.row()["next_try_at"]) == (DeliveryState.WAITING, None)
    assert sender.attempt()["state"] == DeliveryState.SENT
    assert oracle.images == COUNT


def test_a_failed_delivery_that_an_image_reopens_begins_anew(
    database: sa.Engine, sent_series: list[Path], oracle: StorageOracle
) -> None:
    sender = Sender(database, sent_series[:3], {"pacs": oracle.port})
    with database.begin() as connection:
        _let_it_grow(connection)
        old = now() - timedelta(days=sender.config.delivery.give_up_after_days, seconds=1)
        connection.execute(sa.update(deliveries).values(created_at=old))
    oracle.script = Script(reject="permanent")
    assert sender.attempt()["state"] == DeliveryState.FAILED
    with database.begin() as connection:
        plan(connection, "job", ["pacs"], [outgoing(3, sent_series[3])], sender.spool)
    tries = [sender.attempt() for _ in range(PROMPT["failure_status_tries"])]
    assert [one["state"] for one in tries] == ["WAITING", "WAITING", "FAILED"]
    assert [one["failures"] for one in tries] == [1, 2, 3]


def test_an_image_that_comes_during_an_attempt_is_due_at_once(
    database: sa.Engine, sent_series: list[Path], oracle: StorageOracle
) -> None:
    sender = Sender(database, sent_series[:3], {"pacs": oracle.port})
    oracle.script = Script(delay_s=0.1)
    thread = threading.Thread(target=sender.delivery.deliver, args=("job", "pacs", 0))
    thread.start()
    wait_for(lambda: oracle.images >= 1)
    with database.begin() as connection:
        plan(connection, "job", ["pacs"], [outgoing(3, sent_series[3])], sender.spool)
    thread.join(10)
    waiting = sender.row()
    assert waiting["state"] == DeliveryState.WAITING
    assert waiting["next_try_at"] <= waiting["updated_at"]
    assert sender.attempt()["state"] == DeliveryState.SENT


def test_an_attempt_without_a_trace_is_put_back(sender: Sender) -> None:
    with sender.database.begin() as connection:
        connection.execute(sa.update(deliveries).values(state=DeliveryState.SENDING, attempts=1))
        put_back(connection, "job", "pacs", 0)
        assert connection.execute(sa.select(deliveries.c.state)).scalar_one() == DeliveryState.SENDING
        put_back(connection, "job", "pacs", 1)
    assert (sender.row()["state"], sender.row()["enqueued"]) == (DeliveryState.WAITING, 1)
    assert sender.attempt()["state"] == DeliveryState.SENT
    with sender.database.begin() as connection:
        put_back(connection, "job", "pacs", 2)
    assert sender.row()["state"] == DeliveryState.SENT
