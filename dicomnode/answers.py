"""What the answers of a peer mean, and where they are kept.

"Delivered" means that the peer answered 0x0000 or a warning for every instance (PS3.4 B.2.3). What a status
means is decided in one place, `judge`.

======================= ======================================================================================
answer                  meaning
======================= ======================================================================================
0000, B000, B006, B007  accepted
0111                    accepted if an earlier request for this instance ended without an answer, else refused
A9xx, 0117, 0122, 0124  refused at once
Cxxx, 0110, any other   refused after `failure_status_tries`: peers answer them for passing trouble too
A7xx                    not yet: later again, without a count, until `give_up_after_days`
no context accepted     refused at once, the transfer syntax named
no answer               later again; the peer may have it (the UIDs do not change, so a second copy is the same object)
======================= ======================================================================================

Where a destination is asked for storage commitment (PS3.4 annex J), it may still say of an accepted instance that it
does not keep it. What its failure reasons mean is decided in `judge_commitment`.
"""

from __future__ import annotations

import time
from collections import Counter
from enum import Enum

import sqlalchemy as sa

from dicomnode.db import TransferState, now, transfers
from dicomnode.scu import Answer, Refused

_WARNINGS = frozenset({0xB000, 0xB006, 0xB007})
_ACCEPTED = _WARNINGS | {0x0000}
_REFUSED = frozenset({0x0117, 0x0122, 0x0124})
_DUPLICATE = 0x0111
_NEVER_COMMITTED = frozenset({0x0119, 0x0122})
_RESOURCE_LIMITATION = 0x0213
_WRITE_EVERY_S = 0.5
"""Answers are written in batches: a crash between two makes at most this much be sent again."""
_CANCEL_LOOK_S = 1.0


class Verdict(Enum):
    """What an answer means for one instance."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    COUNTED = "may pass; a few tries"
    LATER = "may pass; no count"


def judge(status: int, *, unanswered_before: bool) -> Verdict:
    """Meaning of a C-STORE status (PS3.4 table B.2-1, PS3.7 annex C); see the table at the top.

    `unanswered_before`: an earlier request for this instance was sent to this destination and not answered.
    """
    if status in _ACCEPTED:
        return Verdict.ACCEPTED
    if status == _DUPLICATE:
        return Verdict.ACCEPTED if unanswered_before else Verdict.REFUSED
    if status in _REFUSED or status & 0xFF00 == 0xA900:
        return Verdict.REFUSED
    if status & 0xFF00 == 0xA700:
        return Verdict.LATER
    return Verdict.COUNTED


def judge_commitment(failure_reason: int) -> Verdict:
    """Meaning of a Failure Reason (0008,1197) of a storage commitment (PS3.3 C.14.1.1, PS3.4 J.3.3.1.1).

    REFUSED: 0119 class and instance do not fit, 0122 SOP class not supported. LATER: 0213 resource limitation. COUNTED:
    all others, above all 0112, no such object: sending it again may help.
    """
    if failure_reason in _NEVER_COMMITTED:
        return Verdict.REFUSED
    return Verdict.LATER if failure_reason == _RESOURCE_LIMITATION else Verdict.COUNTED


class Answers:
    """Collects the answers of one attempt and writes them in batches."""

    def __init__(self, database: sa.Engine, job_id: str, destination: str, tries: int) -> None:
        self._database = database
        self._job_id = job_id
        self._destination = destination
        self._tries = tries
        self._unwritten: list[Answer | Refused] = []
        self._written_at = time.monotonic()
        self._looked_at = time.monotonic()
        self._warnings: Counter[int] = Counter()
        self.expected = ""
        """SOP Instance UID of the request that is on the wire without an answer; empty if none is."""
        self.progressed = False
        """Some instance came to its end, accepted or refused."""
        self.peer_is_full = False
        """It answered that it is out of resources: no use to go on now."""

    def expect(self, sop_instance_uid: str) -> None:
        """A request for this instance goes out now."""
        self.expected = sop_instance_uid

    def take(self, answer: Answer | Refused) -> None:
        """An instance was answered, or found unsendable."""
        self.expected = ""
        self._unwritten.append(answer)
        if isinstance(answer, Answer):
            if judge(answer.status, unanswered_before=True) is Verdict.LATER:
                self.peer_is_full = True
            if answer.status in _WARNINGS:
                self._warnings[answer.status] += 1
        if time.monotonic() - self._written_at >= _WRITE_EVERY_S:
            self.write()

    def warned(self) -> str:
        """What was accepted with a warning, in words; empty if nothing was."""
        return ", ".join(f"{n} accepted with warning 0x{status:04X}" for status, n in sorted(self._warnings.items()))

    def time_to_look(self) -> bool:
        """True once in a while: look whether the job was cancelled."""
        if time.monotonic() - self._looked_at < _CANCEL_LOOK_S:
            return False
        self._looked_at = time.monotonic()
        return True

    def write(self) -> None:
        """Write down what was answered since the last time."""
        self._written_at = time.monotonic()
        if not self._unwritten:
            return
        with self._database.begin() as connection:
            for answer in self._unwritten:
                self._write_one(connection, answer)
        self._unwritten.clear()

    def _write_one(self, connection: sa.Connection, answer: Answer | Refused) -> None:
        mine = (
            transfers.c.job_id == self._job_id,
            transfers.c.destination == self._destination,
            transfers.c.sop_instance_uid == answer.sop_instance_uid,
        )
        values: dict[str, object] = {"updated_at": now(), "unanswered": False}
        if isinstance(answer, Refused):
            values |= {"state": TransferState.REFUSED, "detail": answer.reason}
        else:
            row = connection.execute(sa.select(transfers.c.tries, transfers.c.unanswered).where(*mine)).one()
            verdict = judge(answer.status, unanswered_before=row.unanswered)
            detail = f"status 0x{answer.status:04X}"
            values |= {"status": answer.status, "detail": detail, "state": TransferState.WAITING}
            if verdict is Verdict.ACCEPTED:
                values["state"] = TransferState.ACCEPTED
            elif verdict is Verdict.REFUSED:
                values["state"] = TransferState.REFUSED
            elif verdict is Verdict.COUNTED:
                values["tries"] = row.tries + 1
                if row.tries + 1 >= self._tries:
                    values["state"] = TransferState.REFUSED
        if values["state"] in (TransferState.ACCEPTED, TransferState.REFUSED):
            self.progressed = True
        connection.execute(sa.update(transfers).where(*mine).values(**values))
