"""Storage commitment that cannot be asked for: how often it is tried again, and when not."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from committing import CommittingOracle, Site
from oracle import Script
from peers import free_port
from sender import PROMPT

from dicomnode.db import DeliveryState, JobState, deliveries, now, transfers

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


def test_a_request_that_is_refused_is_made_again_a_few_times(site: Site, pacs: CommittingOracle) -> None:
    pacs.manner.action_status = 0x0213
    site.sent()
    for _ in range(TRIES - 1):
        waiting = site.ask()
        assert waiting["state"] == S.COMMITTING
        assert waiting["reason"] == "it answered the request for storage commitment with status 0x0213"
        assert waiting["next_try_at"] > waiting["updated_at"]
    assert site.ask()["state"] == S.FAILED
    assert "0x0213" in site.job["reason"]


def test_a_peer_that_offers_no_commitment_fails_the_job_at_once(
    database: sa.Engine, sent_series: list[Path], tmp_path: Path
) -> None:
    with CommittingOracle(free_port(), offered=False) as pacs:
        site = Site(database, sent_series, pacs.port, free_port(), tmp_path).sent()
        failed = site.ask()
    assert failed["state"] == S.FAILED
    assert "does not offer Storage Commitment" in failed["reason"]
    assert "remove commitment_timeout_s" in site.job["reason"]


@pytest.mark.parametrize("trouble", ["down", "transient"])
def test_trouble_that_passes_is_tried_until_the_configured_age(
    site: Site, pacs: CommittingOracle, trouble: str
) -> None:
    site.sent()
    if trouble == "down":
        pacs.stop()
    pacs.script = Script(reject=None if trouble == "down" else "transient")
    for failures in range(1, TRIES + 2):
        waiting = site.ask()
        assert (waiting["state"], waiting["failures"]) == (S.COMMITTING, failures)
        assert waiting["next_try_at"] > waiting["updated_at"]
    assert site.job["state"] == JobState.COMMITTING
    if trouble == "down":
        pacs.start()
    pacs.script = Script()
    assert site.ask()["state"] == S.COMMITTED
    with site.database.begin() as connection:
        connection.execute(sa.update(deliveries).values(state=S.COMMITTING))
        connection.execute(sa.text("UPDATE jobs SET state = 'COMMITTING'"))
        old = now() - timedelta(days=site.config.delivery.give_up_after_days, seconds=1)
        connection.execute(sa.update(deliveries).values(created_at=old))
    pacs.stop()
    assert site.ask()["state"] == S.COMMITTING, "it took the images a moment ago"
    with site.database.begin() as connection:
        connection.execute(sa.update(transfers).values(updated_at=old))
    assert site.ask()["state"] == S.FAILED
    assert site.job["reason"].startswith("pacs: gave up: no connection to pacs")


def test_a_permanent_rejection_is_tried_a_few_times(site: Site, pacs: CommittingOracle) -> None:
    site.sent()
    pacs.script = Script(reject="permanent")
    assert [site.ask()["state"] for _ in range(TRIES)] == [*[S.COMMITTING] * (TRIES - 1), S.FAILED]


def test_a_destination_that_left_the_configuration(site: Site, pacs: CommittingOracle) -> None:
    site.sent()
    site.use(site.config.model_copy(update={"destinations": {}}))
    site.commitment.request("job", "pacs", 1)
    assert site.row()["state"] == S.FAILED
    assert "no longer in config.yaml" in site.job["reason"]


def test_a_destination_that_is_no_longer_asked(site: Site, pacs: CommittingOracle) -> None:
    site.sent()
    site.use(commitment_timeout_s=None)
    assert site.ask()["state"] == S.SENT
    assert (site.job["state"], pacs.asked) == (JobState.DONE, [])
