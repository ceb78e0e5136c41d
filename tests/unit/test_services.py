"""Other services on the same port: Storage Commitment by pynetdicom's service class, as a pynetdicom SCU sees it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from peers import HOST
from pydicom import Dataset
from pydicom.uid import CTImageStorage, ImplicitVRLittleEndian
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.association import Association as TheirAssociation
from pynetdicom.events import Event
from tables import config_of

from dicomnode.association import Association, Memory, StoreRequest
from dicomnode.negotiation import Negotiator, Rejection, Request
from dicomnode.services import Services
from dicomnode.transport import Listener

COMMITMENT, INSTANCE = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"


class Anybody:
    """Admits everybody and stores nothing."""

    def admit(self, association: Association, request: Request) -> Rejection | None:
        return None

    def store(self, association: Association, request: StoreRequest) -> int:
        return 0x0110

    def ended(self, association: Association) -> None:
        pass


@pytest.fixture
def call() -> Iterator[Callable[..., TheirAssociation]]:
    """Listens with handlers; an association of a PACS with it, in the role that is given."""
    opened: list[Any] = []

    def start(handlers: dict[Any, Any], role: Any = None) -> TheirAssociation:
        context = build_context(COMMITMENT, [ImplicitVRLittleEndian])
        context.scu_role = context.scp_role = True
        negotiator, services = Negotiator([context, build_context(CTImageStorage)], 16384), Services(handlers)
        limits = config_of().reception

        def associate(connected: socket.socket, address: str) -> Association:
            return Association(connected, address, limits, negotiator, services, Anybody(), Memory(1 << 30))

        listener = Listener(HOST, 0, limits, associate)
        pacs = AE("PACS")
        pacs.dimse_timeout = pacs.acse_timeout = 60
        pacs.add_requested_context(COMMITMENT, [ImplicitVRLittleEndian])
        association = pacs.associate(HOST, listener.port, ext_neg=None if role is None else [role])
        opened.extend((association, listener))
        assert association.is_established
        return association

    yield start
    for association, listener in zip(opened[::2], opened[1::2], strict=True):
        association.abort()
        listener.stop(0)


def asked(count: int) -> Dataset:
    """Information of a commitment request for so many images (PS3.4 table J.3-1)."""
    information = Dataset()
    information.TransactionUID = "1.2.3"
    information.ReferencedSOPSequence = []
    for k in range(count):
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, f"1.2.{k + 1}"
        information.ReferencedSOPSequence.append(item)
    return information


def test_a_request_reaches_its_handler_and_its_answer_the_peer(call: Callable[..., TheirAssociation]) -> None:
    seen: list[tuple[Any, ...]] = []

    def on_action(event: Event) -> tuple[int, None]:
        names = [item.ReferencedSOPInstanceUID for item in event.action_information.ReferencedSOPSequence]
        seen.append((event.action_type, names, event.assoc.requestor.ae_title, event.assoc.requestor.address))
        return 0x0000, None

    association = call({evt.EVT_N_ACTION: on_action})
    for count in (1, 500):  # of 30 kB: more than one PDU
        status, _ = association.send_n_action(asked(count), 1, COMMITMENT, INSTANCE)
        assert status.Status == 0
    assert seen == [(1, [f"1.2.{k + 1}" for k in range(count)], "PACS", HOST) for count in (1, 500)]
    association.release()
    assert association.is_released


def test_a_report_comes_in_the_role_that_was_negotiated(call: Callable[..., TheirAssociation]) -> None:
    """The PACS calls us and stays the SCP; what it reports has a data set, and so has our answer."""

    def on_report(event: Event) -> tuple[int, Dataset]:
        assert event.event_type == 1
        return 0x0000, event.event_information

    association = call({evt.EVT_N_EVENT_REPORT: on_report}, build_role(COMMITMENT, scp_role=True))
    assert association.accepted_contexts[0].as_scp
    status, reply = association.send_n_event_report(asked(300), 1, COMMITMENT, INSTANCE)
    assert status.Status == 0
    assert reply == asked(300)


@pytest.mark.parametrize("handlers", [{}, {evt.EVT_N_ACTION: lambda event: 1 / 0}], ids=["no-handler", "broken"])
def test_a_request_that_nobody_handles_is_a_failure(
    call: Callable[..., TheirAssociation], handlers: dict[Any, Any]
) -> None:
    association = call(handlers)
    status, _ = association.send_n_action(asked(1), 1, COMMITMENT, INSTANCE)
    assert status.Status == 0x0110
    assert association.is_established


def test_a_request_of_another_service_is_aborted(
    call: Callable[..., TheirAssociation], caplog: pytest.LogCaptureFixture
) -> None:
    association = call({})
    status, _ = association.send_n_get([0x00100010, 0x00100020], COMMITMENT, INSTANCE)
    assert "Status" not in status
    assert "aborted: N_GET in a context of SOP class 1.2.840.10008.1.20.1" in caplog.text
