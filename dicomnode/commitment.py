"""Storage commitment as SCU: a destination that accepted all is asked whether it keeps it (PS3.4 annex J, push model).

A request names the instances that were accepted and not committed, under a transaction UID that is in the database
before it is on the wire. The report may come on the association of the request, on another one to our listener, after
a restart, twice, or never:

============================ =================================================================================
report                       what becomes of it
============================ =================================================================================
all committed                the delivery is COMMITTED
some failed, or left out     these alone are sent again and then asked for again; `answers.judge_commitment`
none in time                 asked again under a new transaction, the wait doubled, at most `failure_status_tries`
                             times; a late report still counts
the same again               answered with success, changes nothing
of an unknown transaction    answered with 0x0115, invalid argument value
============================ =================================================================================
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from pydicom.uid import UID, generate_uid

from dicomnode import jobs as job_table
from dicomnode.answers import Verdict, judge_commitment
from dicomnode.config import Config
from dicomnode.db import DeliveryState, TransferState, commitments, deliveries, now, transfers
from dicomnode.delivery import away_too_long, begin, counts, pause, peer, refusals
from dicomnode.errors import NoStorageCommitment, PeerError, fault
from dicomnode.received_header import read_report
from dicomnode.scu import request_commitment
from dicomnode.settlement import settle

log = logging.getLogger(__name__)

SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
NO_SUCH_EVENT_TYPE = 0x0113
INVALID_ARGUMENT_VALUE = 0x0115
"""Statuses of an N-EVENT-REPORT response (PS3.7 section 10.1.1.1.8, annex C)."""
_EVENT_TYPES = frozenset({1, 2})
"""Request successful; request complete, failures exist (PS3.4 table J.3-2)."""
_LONGEST_WAIT = timedelta(days=1)
_OPEN = (DeliveryState.COMMITTING, DeliveryState.REQUESTING)


@dataclass(frozen=True, slots=True)
class _Report:
    transaction_uid: str
    committed: frozenset[str]
    """SOP Instance UIDs."""
    failed: Mapping[str, int]
    """SOP Instance UID → Failure Reason (0008,1197)."""


def _read(encoded: bytes, syntax: UID) -> _Report:
    """An Event Information (PS3.4 table J.3-3); raises whatever its garbage provokes."""
    information = read_report(encoded, syntax)
    failed = information.get("FailedSOPSequence") or ()
    return _Report(
        str(information.TransactionUID),
        frozenset(str(one.ReferencedSOPInstanceUID) for one in information.get("ReferencedSOPSequence") or ()),
        {str(one.ReferencedSOPInstanceUID): int(one.get("FailureReason", PROCESSING_FAILURE)) for one in failed},
    )


class Commitment:
    """Asks, and takes reports; made once per node. `request` is what the engine calls when a delivery is COMMITTING."""

    def __init__(self, config: Config, database: sa.Engine) -> None:
        self._config = config
        self._database = database
        self._stopping = threading.Event()
        self._reported: dict[str, threading.Event] = {}
        """Transaction under way in this process → set when its report has come, on whatever association."""

    def stop(self) -> None:
        """Wait no longer for reports on open associations; they can come on others after the next start."""
        self._stopping.set()

    def request(self, job_id: str, destination: str, attempt: int) -> None:
        """Attempt number `attempt` (from 0, counted together with those to send) to ask for commitment."""
        begun = self._begin(job_id, destination, attempt)
        if begun is None:
            return
        transaction_uid, instances = begun
        reported = self._reported[transaction_uid] = threading.Event()
        status: int | None = None

        def answered(said: int) -> None:
            nonlocal status
            status = said

        trouble: PeerError | None = None
        try:
            request_commitment(
                peer(self._config, destination),
                transaction_uid,
                instances,
                on_answer=answered,
                on_report=self.report,
                enough=lambda: reported.is_set() or self._stopping.is_set(),
            )
        except PeerError as error:
            trouble = error
        except Exception as error:  # a fault of ours is to be seen at the job, and gets the pauses of any other trouble
            log.error("job %s to %s: a fault of the node: %s", job_id[:12], destination, fault(error))
            trouble = PeerError(f"a fault of the node: {fault(error)}")
        finally:
            del self._reported[transaction_uid]
        self._finish(job_id, destination, attempt, transaction_uid, status, trouble)

    def _begin(self, job_id: str, destination: str, attempt: int) -> tuple[str, list[tuple[str, str]]] | None:
        """Transaction UID and (SOP class, SOP instance) UIDs to ask for; None if there is nothing to ask."""
        with self._database.begin() as connection:
            row = begin(connection, self._config, job_id, destination, attempt, DeliveryState.REQUESTING)
            if row is None:
                return None
            if self._config.destinations[destination].commitment_timeout_s is None:
                _move(connection, row, DeliveryState.SENT, "all accepted; storage commitment is no longer asked for")
                return None
            asked = self._unreported(connection, row)
            if asked >= self._config.delivery.failure_status_tries:
                reason = f"gave up: asked {asked} times for storage commitment without a report; {self._hint(row)}"
                _move(connection, row, DeliveryState.FAILED, reason)
                return None
            instances = connection.execute(
                sa.select(transfers.c.sop_class_uid, transfers.c.sop_instance_uid)
                .where(*_accepted(job_id, destination))
                .order_by(transfers.c.sop_instance_uid)
            ).all()
            transaction_uid = str(generate_uid(prefix=None))  # random, so that a report cannot be forged
            connection.execute(
                sa.insert(commitments).values(
                    transaction_uid=transaction_uid, job_id=job_id, destination=destination, asked_at=now()
                )
            )
        return transaction_uid, [(one.sop_class_uid, one.sop_instance_uid) for one in instances]

    def _finish(
        self,
        job_id: str,
        destination: str,
        attempt: int,
        transaction_uid: str,
        status: int | None,
        trouble: PeerError | None,
    ) -> None:
        with self._database.begin() as connection:
            connection.execute(
                sa.update(commitments).where(commitments.c.transaction_uid == transaction_uid).values(status=status)
            )
            row = _delivery(connection, job_id, destination)
            if row is None or row.state != DeliveryState.REQUESTING or row.attempts != attempt + 1:
                return  # the report was faster, or a cancel
            settings = self._config.delivery
            asked = self._unreported(connection, row)
            if status == SUCCESS:
                first = timedelta(seconds=self._config.destinations[destination].commitment_timeout_s or 0)
                wait = min(first * 2 ** (asked - 1), max(_LONGEST_WAIT, first))
                reason = f"storage commitment asked for, report awaited until {now() + wait:%Y-%m-%d %H:%M:%S}"
                reason += f" (UTC; transaction {transaction_uid})"
                _move(connection, row, DeliveryState.COMMITTING, reason, wait)
            elif status is not None:
                reason = f"it answered the request for storage commitment with status 0x{status:04X}"
                if asked >= settings.failure_status_tries:
                    _move(connection, row, DeliveryState.FAILED, f"gave up after {asked} times: {reason}")
                else:
                    _move(connection, row, DeliveryState.COMMITTING, reason, pause(settings, asked))
            else:
                rejections = row.rejections + 1 if trouble is not None and trouble.permanent else 0
                too_old = away_too_long(connection, settings, row)
                if isinstance(trouble, NoStorageCommitment):
                    _move(connection, row, DeliveryState.FAILED, str(trouble))
                elif too_old or rejections >= settings.failure_status_tries:
                    _move(connection, row, DeliveryState.FAILED, f"gave up: {trouble}; accepted but not committed")
                else:
                    failures = row.failures + 1
                    wait = pause(settings, failures)
                    _move(
                        connection,
                        row,
                        DeliveryState.COMMITTING,
                        str(trouble),
                        wait,
                        failures=failures,
                        rejections=rejections,
                    )

    def report(self, event_type: int, information: bytes, syntax: UID) -> int:
        """Take a report; from any thread.

        Parameters
        ----------
        event_type
            1 or 2 (PS3.4 table J.3-2).
        information, syntax
            Event Information as it was encoded, and how; from the network, so anything.

        Returns
        -------
        int
            Status that answers the N-EVENT-REPORT.
        """
        if event_type not in _EVENT_TYPES:
            log.warning("a report on a storage commitment has the unknown event type %d", event_type)
            return NO_SUCH_EVENT_TYPE
        try:
            report = _read(information, syntax)
        except Exception as error:  # whatever the garbage provokes; not its words, they may quote it
            log.warning("a report on a storage commitment cannot be read (%s)", type(error).__name__)
            return INVALID_ARGUMENT_VALUE
        try:
            with self._database.begin() as connection:
                known = self._take(connection, report)
        except sa.exc.SQLAlchemyError as error:
            log.error("a report on a storage commitment cannot be kept now, it will be asked for again: %s", error)
            return PROCESSING_FAILURE
        if not known:
            log.warning("a report on the unknown storage commitment %.64r", report.transaction_uid)
            return INVALID_ARGUMENT_VALUE
        if awaited := self._reported.get(report.transaction_uid):
            awaited.set()
        return SUCCESS

    def _take(self, connection: sa.Connection, report: _Report) -> bool:
        """Write down what is reported; False if nothing was asked under that transaction UID."""
        asked = connection.execute(
            sa.select(commitments).where(commitments.c.transaction_uid == report.transaction_uid)
        ).one_or_none()
        if asked is None:
            return False
        if asked.reported_at is not None:
            return True
        connection.execute(
            sa.update(commitments)
            .where(commitments.c.transaction_uid == report.transaction_uid)
            .values(reported_at=now())
        )
        row = _delivery(connection, asked.job_id, asked.destination)
        assert row is not None
        open_ = {
            one.sop_instance_uid: one.tries
            for one in connection.execute(
                sa.select(transfers.c.sop_instance_uid, transfers.c.tries).where(
                    *_accepted(row.job_id, row.destination)
                )
            )
        }
        failed = dict(report.failed)
        if row.state in _OPEN and report.transaction_uid == self._latest(connection, row):
            # What was asked for last is all that is open; a report must mention all of it (PS3.4 J.3.3.1.2).
            failed |= dict.fromkeys(open_.keys() - report.committed - failed.keys(), PROCESSING_FAILURE)
        failed = {uid: reason for uid, reason in failed.items() if uid in open_}
        for uid, reason in failed.items():
            self._not_committed(connection, row, uid, reason, open_[uid])
        committed = open_.keys() & report.committed - failed.keys()
        for uid in committed:
            connection.execute(
                sa.update(transfers)
                .where(*_accepted(row.job_id, row.destination), transfers.c.sop_instance_uid == uid)
                .values(state=TransferState.COMMITTED, updated_at=now())
            )
        if row.state in _OPEN:
            self._conclude(connection, row, failed, progressed=bool(committed))
        return True

    def _not_committed(self, connection: sa.Connection, row: sa.Row[Any], uid: str, reason: int, tries: int) -> None:
        verdict = judge_commitment(reason)
        tries += verdict is Verdict.COUNTED
        refused = verdict is Verdict.REFUSED or tries >= self._config.delivery.failure_status_tries
        connection.execute(
            sa.update(transfers)
            .where(*_accepted(row.job_id, row.destination), transfers.c.sop_instance_uid == uid)
            .values(
                state=TransferState.REFUSED if refused else TransferState.WAITING,
                detail=f"accepted but not committed, failure reason 0x{reason:04X}",
                tries=tries,
                unanswered=True,  # it may be there: if the peer then says "duplicate", that is ours
                updated_at=now(),
            )
        )

    def _conclude(
        self, connection: sa.Connection, row: sa.Row[Any], failed: Mapping[str, int], *, progressed: bool
    ) -> None:
        states = counts(connection, row.job_id, row.destination)
        total = sum(states.values())
        if TransferState.WAITING in states:
            failures = 0 if progressed else row.failures + 1
            uid, why = next(iter(sorted(failed.items())), ("", PROCESSING_FAILURE))
            reason = f"{states[TransferState.WAITING]} of {total} accepted but not committed, e.g. {uid}: failure "
            reason += f"reason 0x{why:04X}; these are sent again"
            wait = pause(self._config.delivery, max(failures, 1))
            _move(connection, row, DeliveryState.WAITING, reason, wait, failures=failures)
        elif TransferState.REFUSED in states:
            _move(connection, row, DeliveryState.FAILED, refusals(connection, row.job_id, row.destination))
        elif TransferState.ACCEPTED not in states:
            _move(connection, row, DeliveryState.COMMITTED, f"all {total} committed")
        # Else a late report on an earlier request, which does not mention all: that on the last request is awaited.

    def _unreported(self, connection: sa.Connection, row: sa.Row[Any]) -> int:
        """Requests that were answered and not reported on, since the delivery began or was tried again by hand."""
        return int(
            connection.execute(
                sa.select(sa.func.count()).where(
                    commitments.c.job_id == row.job_id,
                    commitments.c.destination == row.destination,
                    commitments.c.asked_at >= row.created_at,
                    commitments.c.status.is_not(None),
                    commitments.c.reported_at.is_(None),
                )
            ).scalar_one()
        )

    def _latest(self, connection: sa.Connection, row: sa.Row[Any]) -> str:
        return str(
            connection.execute(
                sa.select(commitments.c.transaction_uid)
                .where(commitments.c.job_id == row.job_id, commitments.c.destination == row.destination)
                .order_by(commitments.c.asked_at.desc())
                .limit(1)
            ).scalar_one()
        )

    def _hint(self, row: sa.Row[Any]) -> str:
        node, destination = self._config.node, self._config.destinations[row.destination]
        title = destination.calling_ae_title or node.ae_title
        return f"does it know {title} at port {node.port} of this machine, and do reception's lists let it in?"


def _mine(job_id: str, destination: str) -> tuple[sa.ColumnElement[bool], ...]:
    return deliveries.c.job_id == job_id, deliveries.c.destination == destination


def _accepted(job_id: str, destination: str) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        transfers.c.job_id == job_id,
        transfers.c.destination == destination,
        transfers.c.state == TransferState.ACCEPTED,
    )


def _delivery(connection: sa.Connection, job_id: str, destination: str) -> sa.Row[Any] | None:
    return connection.execute(sa.select(deliveries).where(*_mine(job_id, destination))).one_or_none()


def _move(
    connection: sa.Connection,
    row: sa.Row[Any],
    state: DeliveryState,
    reason: str,
    wait: timedelta = timedelta(),
    *,
    failures: int = 0,
    rejections: int = 0,
) -> None:
    """Bring a delivery into a state, due after `wait`, with an event; the job follows."""
    connection.execute(
        sa.update(deliveries)
        .where(*_mine(row.job_id, row.destination))
        .values(
            state=state,
            reason=reason,
            failures=failures,
            rejections=rejections,
            enqueued=deliveries.c.enqueued + 1,  # a new key: the old one may have been handed over for what is over
            next_try_at=now() + wait,
            updated_at=now(),
        )
    )
    job = job_table.get(connection, row.job_id)
    assert job is not None
    job_table.add_event(connection, row.job_id, job.state, f"{row.destination}: {reason}")
    settle(connection, row.job_id)
    log.info("job %s: %s: %s, %s", row.job_id[:12], row.destination, state, reason)
