"""A storage SCP that commits to what it keeps, or does as it is told (PS3.4 annex J), and somebody who asks it."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import sqlalchemy as sa
from oracle import StorageOracle
from peers import HOST
from pydicom import Dataset
from pydicom.uid import UID
from pynetdicom import AE, build_role, evt
from sender import Sender
from tables import history

from dicomnode.commitment import Commitment
from dicomnode.config import Config, Destination
from dicomnode.db import DeliveryState
from dicomnode.delivery import Delivery
from dicomnode.scp import StorageServer
from dicomnode.spool import Spool

COMMITMENT = "1.2.840.10008.1.20.1"
INSTANCE = "1.2.840.10008.1.20.1.1"
NO_SUCH_OBJECT = 0x0112
TIMEOUT_S = 100.0
"""`commitment_timeout_s` of a `Site`."""


@dataclass(slots=True)
class Manner:
    """How a `CommittingOracle` answers; may be changed while it runs."""

    report: Literal["new", "same", "never"] = "new"
    """On a new association, on that of the request, or not at all."""
    action_status: int = 0x0000
    failing: Mapping[str, int] = field(default_factory=dict)
    """SOP Instance UID → Failure Reason, whatever it keeps."""
    leave_out: Collection[str] = ()
    """Named neither as committed nor as failed."""
    lose: int = 0
    """So many of the instances that the next request names are lost before it is answered."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came."""

    transaction_uid: str
    instances: dict[str, str]
    """SOP Instance UID → SOP class UID."""
    requested_instance: str
    action_type: int


class CommittingOracle(StorageOracle):
    """A `StorageOracle` that offers storage commitment.

    Parameters
    ----------
    report_port
        Where the one who asks listens.
    report_title
        Its AE title.
    """

    def __init__(
        self, report_port: int, report_title: str = "DICOMNODE", *, offered: bool = True, **changes: Any
    ) -> None:
        super().__init__(**changes)
        self.manner = Manner()
        self.asked: list[Asked] = []
        self.statuses: list[int] = []
        """Answers to its reports on new associations."""
        self.report_to = (report_port, report_title)
        if offered:
            self._ae.add_supported_context(COMMITMENT)

    def _handlers(self) -> list[Any]:
        return [*super()._handlers(), (evt.EVT_N_ACTION, self._on_action)]

    def forget(self, sop_instance_uid: str) -> None:
        """Lose an instance that was accepted."""
        with self._lock:
            self.received.pop(sop_instance_uid)

    def _on_action(self, event: Any) -> Any:
        information = event.action_information
        asked = Asked(
            str(information.TransactionUID),
            {str(i.ReferencedSOPInstanceUID): str(i.ReferencedSOPClassUID) for i in information.ReferencedSOPSequence},
            str(event.request.RequestedSOPInstanceUID),
            event.request.ActionTypeID,
        )
        for uid in list(asked.instances)[: self.manner.lose]:
            self.forget(uid)
        self.manner.lose = 0
        with self._lock:
            self.asked.append(asked)
        if self.manner.action_status == 0x0000:
            if self.manner.report == "new":
                threading.Thread(target=self.report, args=(asked,), daemon=True).start()
            elif self.manner.report == "same":
                threading.Thread(target=self._report_on, args=(event.assoc, asked), daemon=True).start()
        return self.manner.action_status, None

    def information(self, asked: Asked) -> tuple[int, Dataset]:
        """Event type and Event Information (PS3.4 tables J.3-2 and J.3-3) that answer a request now."""
        information = Dataset()
        information.TransactionUID = asked.transaction_uid
        information.ReferencedSOPSequence, failed = [], []
        for uid, sop_class_uid in asked.instances.items():
            if uid in self.manner.leave_out:
                continue
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class_uid, uid
            reason = self.manner.failing.get(uid, 0 if uid in self.sop_instance_uids() else NO_SUCH_OBJECT)
            if reason:
                item.FailureReason = reason
                failed.append(item)
            else:
                information.ReferencedSOPSequence.append(item)
        if failed:
            information.FailedSOPSequence = failed
        return (2 if failed else 1), information

    def report(self, asked: Asked) -> int:
        """Report on a new association, with the roles reversed (PS3.7 D.3.3.4); the status that answers it."""
        event_type, information = self.information(asked)
        return self.say(event_type, information)

    def say(self, event_type: int, information: Dataset) -> int:
        """Send this report."""
        port, title = self.report_to
        ae = AE(self.ae_title)
        ae.add_requested_context(COMMITMENT)
        role = build_role(COMMITMENT, scu_role=False, scp_role=True)
        association = ae.associate(HOST, port, ae_title=title, ext_neg=[role])
        assert association.is_established, "the report found nobody to take it"
        answer, _ = association.send_n_event_report(information, event_type, COMMITMENT, INSTANCE)
        association.release()
        status = int(answer.Status)
        with self._lock:
            self.statuses.append(status)
        return status

    def _report_on(self, association: Any, asked: Asked) -> None:
        event_type, information = self.information(asked)
        association.send_n_event_report(information, event_type, COMMITMENT, INSTANCE)


class Site(Sender):
    """A `Sender` whose destination is asked for commitment, and the listener that takes its reports."""

    def __init__(self, database: sa.Engine, files: list[Path], pacs: int, port: int, folder: Path) -> None:
        super().__init__(database, files, {"pacs": pacs})
        self.use(commitment_timeout_s=TIMEOUT_S)
        listening = self.config.model_copy(update={"node": self.config.node.model_copy(update={"port": port})})
        self.server = StorageServer(listening, Spool(folder / "received"), [], lambda *_: None, self.take)

    def __enter__(self) -> Self:
        self.server.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stop(5)

    def use(self, config: Config | None = None, **changes: Any) -> None:
        """Go on as a new process, with another configuration."""
        config = config or self.config
        changed = {
            name: Destination.model_validate({**one.model_dump(), **changes})
            for name, one in config.destinations.items()
        }
        self.config = config.model_copy(update={"destinations": changed})
        self.delivery = Delivery(self.config, self.database, self.spool)
        self.commitment = Commitment(self.config, self.database)

    def take(self, event_type: int, information: bytes, syntax: UID) -> int:
        return self.commitment.report(event_type, information, syntax)

    def ask(self) -> dict[str, Any]:
        """The next attempt, when it is due to ask; the row after it."""
        self.commitment.request("job", "pacs", self.row()["attempts"])
        return self.row()

    def sent(self) -> Site:
        """Send all."""
        assert self.attempt()["state"] == DeliveryState.COMMITTING
        return self

    def history(self) -> list[str]:
        with self.database.connect() as connection:
            return history(connection)
