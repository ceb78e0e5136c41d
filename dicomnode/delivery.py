"""Delivery of one job to one destination: every instance's answer is kept, only what is missing is sent again.

What an answer means is said in answers.py.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Collection
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from dicomnode import jobs as job_table
from dicomnode.answers import Answers
from dicomnode.config import Config
from dicomnode.config import Delivery as DeliverySettings
from dicomnode.db import BEGUN, DeliveryState, JobState, TransferState, deliveries, jobs, now, transfers
from dicomnode.errors import NodeError, PeerError, UnreadableFile, fault
from dicomnode.requestor import Peer
from dicomnode.scu import Outgoing, store
from dicomnode.settlement import settle

log = logging.getLogger(__name__)


def peer(config: Config, name: str) -> Peer:
    """How to call a destination of config.yaml.

    Raises
    ------
    NodeError
        If there is none of that name.
    """
    if name not in config.destinations:
        raise NodeError(f"no destination {name!r} in config.yaml; there are: {', '.join(config.destinations)}")
    destination = config.destinations[name]
    return Peer(
        name=name,
        ae_title=destination.ae_title,
        host=destination.host,
        port=destination.port,
        calling_ae_title=destination.calling_ae_title or config.node.ae_title,
        connect_timeout_s=destination.connect_timeout_s,
        acse_timeout_s=destination.acse_timeout_s,
        dimse_timeout_s=destination.dimse_timeout_s,
        tls=destination.tls,
    )


def plan(
    connection: sa.Connection, job_id: str, destinations: Collection[str], items: Collection[Outgoing], spool: Path
) -> None:
    """Write down what has to go where; again is harmless, more items begin a delivery anew that was through.

    Every item must know the digest of its data set: it may wait for days before it is read again.
    """
    at = now()
    for destination in destinations:
        connection.execute(
            insert(deliveries)
            .values(job_id=job_id, destination=destination, state=DeliveryState.WAITING, created_at=at, updated_at=at)
            .on_conflict_do_nothing(index_elements=list(deliveries.primary_key))
        )
        if items:
            connection.execute(
                insert(transfers).on_conflict_do_nothing(index_elements=list(transfers.primary_key)),
                [
                    {
                        "job_id": job_id,
                        "destination": destination,
                        "sop_instance_uid": item.sop_instance_uid,
                        "sop_class_uid": item.sop_class_uid,
                        "transfer_syntax_uid": item.transfer_syntax_uid,
                        "path": str(item.path.relative_to(spool)),
                        "sha256": item.sha256,
                        "state": TransferState.WAITING,
                        "updated_at": at,
                    }
                    for item in items
                ],
            )
        connection.execute(
            sa.update(deliveries)
            .where(
                deliveries.c.job_id == job_id,
                deliveries.c.destination == destination,
                deliveries.c.state.in_(
                    [DeliveryState.SENT, DeliveryState.COMMITTING, DeliveryState.COMMITTED, DeliveryState.FAILED]
                ),
                sa.exists().where(
                    transfers.c.job_id == job_id,
                    transfers.c.destination == destination,
                    transfers.c.state == TransferState.WAITING,
                ),
            )
            .values(
                state=DeliveryState.WAITING,
                next_try_at=None,
                failures=0,
                rejections=0,
                enqueued=0,
                created_at=at,
                updated_at=at,
            )
        )


def put_back(connection: sa.Connection, job_id: str, destination: str, attempts: int) -> None:
    """Make an attempt due again that ended without a trace, unless its delivery moved on."""
    connection.execute(
        sa.update(deliveries)
        .where(
            deliveries.c.job_id == job_id,
            deliveries.c.destination == destination,
            deliveries.c.attempts == attempts,
            deliveries.c.state.in_([*BEGUN, *BEGUN.values()]),
        )
        .values(
            state=sa.case(BEGUN, value=deliveries.c.state, else_=deliveries.c.state),
            enqueued=deliveries.c.enqueued + 1,
            updated_at=now(),
        )
    )


def begin(
    connection: sa.Connection,
    config: Config,
    job_id: str,
    destination: str,
    attempt: int,
    state: Literal[DeliveryState.SENDING, DeliveryState.REQUESTING],
) -> sa.Row[Any] | None:
    """Begin attempt number `attempt` (from 0) of a delivery, which brings it into `state`; its row before.

    None if there is nothing to do: the attempt is over, its job does not send any more, or the destination is gone.
    """
    mine = (deliveries.c.job_id == job_id, deliveries.c.destination == destination)
    row = connection.execute(sa.select(deliveries).where(*mine)).one_or_none()
    job = job_table.get(connection, job_id)
    if row is None or job is None or job.cancel_requested or job.state not in job_table.SENDING:
        return None
    first = row.state == BEGUN[state] and row.attempts == attempt
    again = row.state == state and row.attempts == attempt + 1
    if not first and not again:
        return None
    begun = connection.execute(
        sa.update(deliveries)
        # Read before we had the lock: a cancel may have been faster.
        .where(*mine, deliveries.c.state == row.state, deliveries.c.attempts == row.attempts)
        .values(state=state, attempts=attempt + 1, updated_at=now())
    ).rowcount
    if not begun:
        return None
    if destination not in config.destinations:
        reason = f"destination {destination} is no longer in config.yaml; put it back and retry the job"
        connection.execute(sa.update(deliveries).where(*mine).values(state=DeliveryState.FAILED, reason=reason))
        job_table.add_event(connection, job_id, job.state, f"{destination}: {reason}")
        settle(connection, job_id)
        return None
    return row


def pause(settings: DeliverySettings, failures: int) -> timedelta:
    """Time until the next attempt after so many in a row without progress."""
    longest = min(settings.retry_first_s * 2.0 ** min(max(failures - 1, 0), 30), settings.retry_max_s)
    # Jitter, so that a hundred jobs do not knock all at once on a PACS that just came back.
    return timedelta(seconds=longest * random.uniform(0.5, 1.0))  # noqa: S311 - a pause, not a secret


def away_too_long(connection: sa.Connection, settings: DeliverySettings, row: sa.Row[Any]) -> bool:
    """Whether a delivery got nothing to its end for `give_up_after_days`.

    Counted from its last instance that did, not from its plan: a PACS that was away for long and just came back takes a
    large series in several attempts.
    """
    ended = sa.select(sa.func.max(transfers.c.updated_at)).where(
        transfers.c.job_id == row.job_id,
        transfers.c.destination == row.destination,
        transfers.c.state.not_in([TransferState.WAITING, TransferState.OFFERED]),
    )
    since: datetime = max(row.created_at, connection.execute(ended).scalar_one() or row.created_at)
    return now() - since > timedelta(days=settings.give_up_after_days)


def counts(connection: sa.Connection, job_id: str, destination: str) -> dict[str, int]:
    """Number of transfers of a delivery by their state."""
    counted = (
        sa.select(transfers.c.state, sa.func.count().label("n"))
        .where(transfers.c.job_id == job_id, transfers.c.destination == destination)
        .group_by(transfers.c.state)
    )
    return {row.state: row.n for row in connection.execute(counted)}


def refusals(connection: sa.Connection, job_id: str, destination: str) -> str:
    """What of a delivery is refused for good, in words."""
    refused = (
        sa.select(transfers.c.sop_instance_uid, transfers.c.detail)
        .where(
            transfers.c.job_id == job_id,
            transfers.c.destination == destination,
            transfers.c.state == TransferState.REFUSED,
        )
        .order_by(transfers.c.sop_instance_uid)
    )
    example, *others = connection.execute(refused).all()
    total = sum(counts(connection, job_id, destination).values())
    return f"{1 + len(others)} of {total} refused, e.g. {example.sop_instance_uid}: {example.detail}"


class Delivery:
    """Sends; made once per node. `deliver` is what the engine calls."""

    def __init__(self, config: Config, database: sa.Engine, spool: Path) -> None:
        self._config = config
        self._database = database
        self._spool = spool
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Let running associations end after their current image; the rest is sent at the next start."""
        self._stopping.set()

    def deliver(self, job_id: str, destination: str, attempt: int) -> None:
        """Attempt number `attempt` (from 0) to send what `destination` has not accepted yet."""
        begun = self._begin(job_id, destination, attempt)
        if begun is None:
            return
        answers = Answers(self._database, job_id, destination, self._config.delivery.failure_status_tries)
        trouble = ""
        rejected = False
        try:
            store(
                peer(self._config, destination),
                begun,
                answers.take,
                lambda: self._should_stop(answers, job_id),
                answers.expect,
            )
        except PeerError as error:
            trouble, rejected = str(error), error.permanent
        except UnreadableFile as error:
            trouble = str(error)
            log.error("job %s to %s: %s; it is tried again", job_id[:12], destination, trouble)
        except sa.exc.SQLAlchemyError:
            raise  # the dispatcher finds an attempt without a result and tries it again
        except Exception as error:  # a fault of ours is to be seen at the job, and gets the pauses of any other trouble
            trouble = f"a fault of the node: {fault(error)}"
            log.error("job %s to %s: %s", job_id[:12], destination, trouble)
        finally:
            answers.write()
        if warned := answers.warned():
            log.warning("job %s: %s: %s", job_id[:12], destination, warned)
        self._finish(job_id, destination, trouble, rejected, answers)

    def _begin(self, job_id: str, destination: str, attempt: int) -> list[Outgoing] | None:
        with self._database.begin() as connection:
            if begin(connection, self._config, job_id, destination, attempt, DeliveryState.SENDING) is None:
                return None
            ours = (transfers.c.job_id == job_id, transfers.c.destination == destination)
            # Of an attempt whose process died: nobody knows which of them was on the wire.
            connection.execute(
                sa.update(transfers)
                .where(*ours, transfers.c.state == TransferState.OFFERED)
                .values(state=TransferState.WAITING, unanswered=True)
            )
            rows = connection.execute(
                sa.select(transfers).where(*ours, transfers.c.state == TransferState.WAITING).order_by(transfers.c.path)
            ).all()
            connection.execute(
                sa.update(transfers)
                .where(*ours, transfers.c.state == TransferState.WAITING)
                .values(state=TransferState.OFFERED, updated_at=now())
            )
        return [
            Outgoing(
                item.sop_instance_uid,
                item.sop_class_uid,
                item.transfer_syntax_uid,
                self._spool / item.path,
                item.sha256,
            )
            for item in rows
        ]

    def _should_stop(self, answers: Answers, job_id: str) -> bool:
        if self._stopping.is_set() or answers.peer_is_full:
            return True
        if not answers.time_to_look():
            return False
        with self._database.connect() as connection:
            return bool(connection.execute(sa.select(jobs.c.cancel_requested).where(jobs.c.id == job_id)).scalar_one())

    def _finish(self, job_id: str, destination: str, trouble: str, rejected: bool, answers: Answers) -> None:
        mine = (deliveries.c.job_id == job_id, deliveries.c.destination == destination)
        ours = (transfers.c.job_id == job_id, transfers.c.destination == destination)
        with self._database.begin() as connection:
            # Not answered in this attempt: at most one was on the wire, the peer was never asked for the rest.
            was_on_the_wire = transfers.c.sop_instance_uid == answers.expected
            connection.execute(
                sa.update(transfers)
                .where(*ours, transfers.c.state == TransferState.OFFERED)
                .values(state=TransferState.WAITING, unanswered=sa.or_(transfers.c.unanswered, was_on_the_wire))
            )
            # Only now, with the lock: a cancel may have been faster.
            row = connection.execute(sa.select(deliveries).where(*mine)).one()
            if row.state != DeliveryState.SENDING:
                return
            if warned := answers.warned():
                job_table.add_event(connection, job_id, JobState.DISPATCHING, f"{destination}: {warned}")
            failures = 0 if answers.progressed else row.failures + 1
            rejections = row.rejections + 1 if rejected else 0
            state, reason, wait = self._conclude(connection, row, ours, trouble, failures, rejections)
            connection.execute(
                sa.update(deliveries)
                .where(*mine)
                .values(
                    state=state,
                    reason=reason,
                    failures=failures,
                    rejections=rejections,
                    enqueued=0,
                    next_try_at=now() + wait,
                    updated_at=now(),
                )
            )
            if state is not DeliveryState.WAITING:
                job_table.add_event(connection, job_id, JobState.DISPATCHING, f"{destination}: {reason}")
            elif wait:
                event = f"{destination}: {reason}; next try in {wait.total_seconds():.0f} s"
                job_table.add_event(connection, job_id, JobState.DISPATCHING, event)
            settle(connection, job_id)
        log.info("job %s: %s: %s, %s", job_id[:12], destination, state, reason)

    def _conclude(
        self,
        connection: sa.Connection,
        row: sa.Row[Any],
        ours: tuple[sa.ColumnElement[bool], ...],
        trouble: str,
        failures: int,
        rejections: int,
    ) -> tuple[DeliveryState, str, timedelta]:
        """Next state of a delivery whose attempt ended, why, and the pause before its next attempt."""
        settings = self._config.delivery
        states = counts(connection, row.job_id, row.destination)
        waiting, total = states.get(TransferState.WAITING, 0), sum(states.values())
        if waiting:
            too_often = rejections >= settings.failure_status_tries
            if too_often or away_too_long(connection, settings, row):
                reason = f"gave up: {trouble or 'not accepted'}; {waiting} of {total} not accepted"
                return DeliveryState.FAILED, reason, timedelta()
            # Images that came while the association was open are due at once; after trouble the peer gets a pause.
            hindered = bool(trouble) or failures > 0 or self._answered_later(connection, ours)
            wait = pause(settings, failures) if hindered else timedelta()
            return DeliveryState.WAITING, trouble or f"{waiting} of {total} to go", wait
        if TransferState.REFUSED in states:
            return DeliveryState.FAILED, refusals(connection, row.job_id, row.destination), timedelta()
        if self._config.destinations[row.destination].commitment_timeout_s is None:
            return DeliveryState.SENT, f"all {total} accepted", timedelta()
        if TransferState.ACCEPTED not in states:
            return DeliveryState.COMMITTED, f"all {total} committed", timedelta()
        return DeliveryState.COMMITTING, f"all {total} accepted, storage commitment to be asked for", timedelta()

    def _answered_later(self, connection: sa.Connection, ours: tuple[sa.ColumnElement[bool], ...]) -> bool:
        """Was an instance answered with something that may pass?"""
        open_and_answered = sa.exists().where(
            *ours, transfers.c.state == TransferState.WAITING, transfers.c.status.is_not(None)
        )
        return bool(connection.execute(sa.select(open_and_answered)).scalar_one())
