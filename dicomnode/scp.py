"""The storage SCP: what the node does with an object. Every standard storage class, raw bytes to the spool, answered
when they are safe.

`transport` and `association` bring each object whole, as its bytes and what the command says of them.

================ ====================================================================================
status           when (PS3.4 table B.2-1, PS3.7 annex C)
================ ====================================================================================
0x0000           the object is on disk, synced; or the same bytes were already
0xA700           no space, or the object is larger than allowed; nothing is kept, the sender tries again
0xA900           its UIDs are none, or differ from those in the command, or its class from the context's
0xC000           no data, data that cannot be parsed, or no SOP class or instance UID in it
0x0110           the spool cannot be written for another reason
0x0111           same UID with other bytes, where the site refuses those
================ ====================================================================================
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Collection
from typing import Any

from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    UID,
    AllTransferSyntaxes,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom import AllStoragePresentationContexts, build_context, evt
from pynetdicom.dimse_primitives import N_EVENT_REPORT
from pynetdicom.events import Event, InterventionEvent
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made at import time
    StorageCommitmentPushModel,
    Verification,
)

from dicomnode.association import MAX_PDU_BYTES, Association, Memory, StoreRequest
from dicomnode.config import Config
from dicomnode.errors import BadIdentifier, SpoolError, SpoolFull, fault
from dicomnode.negotiation import Negotiator, Rejection, Request
from dicomnode.received_header import Unreadable, read_header, uid_of
from dicomnode.router import header_values
from dicomnode.series import Header
from dicomnode.services import Services
from dicomnode.spool import Incoming, Instance, Kept, Spool, valid_uid
from dicomnode.transport import Listener

log = logging.getLogger(__name__)

_MEGABYTE = 1_000_000
_OBJECTS_IN_MEMORY = 2
"""Of the largest size; of CT images there may be thousands on their way at once."""
_NATIVE_SYNTAXES = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
)

_IDENTITY = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
_READ_WITH_VALUES = ("SpecificCharacterSet", "ContributingEquipmentSequence")
"""What `header_values` looks at beside the keywords."""

SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
DUPLICATE = 0x0111
OUT_OF_RESOURCES = 0xA700
DOES_NOT_MATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000

_REJECTED_PERMANENT, _REJECTED_TRANSIENT = 1, 2
_BY_USER, _BY_PRESENTATION = 1, 3
_CALLING_TITLE_UNKNOWN, _CALLED_TITLE_UNKNOWN = 3, 7
_LOCAL_LIMIT = 2

Stored = Callable[[Kept, Instance, Header], None]


def transfer_syntaxes() -> list[str | UID]:
    """What the installed decoders can read, Explicit VR Little Endian first: the acceptor's order decides."""
    decodable = [
        syntax for syntax in AllTransferSyntaxes if syntax not in _NATIVE_SYNTAXES and _decoder_available(syntax)
    ]
    return [*_NATIVE_SYNTAXES, *decodable]


def _decoder_available(syntax: UID) -> bool:
    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:
        return False


class StorageServer:
    """Listens, checks, stores, answers.

    Parameters
    ----------
    keywords
        DICOM keywords whose values `stored` gets with each object.
    stored
        Called when an object is safe and before it is acknowledged; must not block.
    report
        Takes event type, encoded information and its transfer syntax of reports on storage commitment (PS3.4 J.3.3)
        and gives the status that answers them. Without it none are taken.
    """

    def __init__(
        self,
        config: Config,
        spool: Spool,
        keywords: Collection[str],
        stored: Stored,
        report: Callable[[int, bytes, UID], int] | None = None,
    ) -> None:
        self._reception = config.reception
        self._called = set(config.reception.called_ae_titles or (config.node.ae_title,))
        self._calling = set(config.reception.calling_ae_titles)
        self._address = (config.node.address, config.node.port)
        self._ae_title = config.node.ae_title
        self._tls = config.tls
        self._spool = spool
        self._keywords = frozenset(keywords)
        self._tags = frozenset(filter(None, map(tag_for_keyword, {*keywords, *_IDENTITY, *_READ_WITH_VALUES})))
        self._stored = stored
        self._report = report
        self._memory = Memory(_OBJECTS_IN_MEMORY * self._reception.max_object_mb * _MEGABYTE)
        self._lock = threading.Lock()
        self._series_of: dict[Association, set[str]] = {}
        """Established association → UIDs of the series it brought something of."""
        self._listener: Listener | None = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        assert self._listener is not None
        return self._listener.port

    def open_associations(self, series_uid: str) -> int:
        """Number of open associations that brought instances of this series."""
        with self._lock:
            return sum(series_uid in brought for brought in self._series_of.values())

    def start(self) -> None:
        """Listen.

        Raises
        ------
        OSError
            If the address cannot be bound.
        TlsFileError
            If a file of `tls` changed since the configuration was read.
        """
        syntaxes = transfer_syntaxes()
        known = [str(context.abstract_syntax) for context in AllStoragePresentationContexts]
        contexts = [build_context(uid, syntaxes) for uid in self._reception.sop_classes or known]
        contexts.append(build_context(Verification, list(_NATIVE_SYNTAXES[:2])))
        handlers: dict[InterventionEvent, Callable[[Event], Any]] = {}
        if (report := self._report) is not None:
            context = build_context(StorageCommitmentPushModel, list(_NATIVE_SYNTAXES[:2]))
            context.scu_role, context.scp_role = False, True  # who reports is the SCP of the service, and calls us
            contexts.append(context)

            def on_report(event: Event) -> tuple[int, None]:
                assert isinstance(event.request, N_EVENT_REPORT)
                coded = event.request.EventInformation
                information = b"" if coded is None else coded.getvalue()
                return report(event.event_type or 0, information, UID(event.context.transfer_syntax)), None

            handlers[evt.EVT_N_EVENT_REPORT] = on_report
        negotiator = Negotiator(contexts, MAX_PDU_BYTES)
        services = Services(handlers)

        tls_context = None if self._tls is None else self._tls.context()

        def associate(connected: socket.socket, address: str) -> Association:
            return Association(
                connected, address, self._reception, negotiator, services, self, self._memory, tls_context
            )

        self._listener = Listener(*self._address, self._reception, associate)
        log.info("listening as %s on %s:%d", self._ae_title, self._address[0], self.port)

    def stop(self, timeout_s: float) -> None:
        """Accept nobody new, let open associations end for up to `timeout_s`, then abort them."""
        if self._listener is not None:
            self._listener.stop(timeout_s)

    def admit(self, association: Association, request: Request) -> Rejection | None:
        """Whether its titles are allowed, and whether there is room for it."""
        if request.called_ae_title not in self._called:
            why = f"called {request.called_ae_title!r}, which is not in reception.called_ae_titles"
            return Rejection(_REJECTED_PERMANENT, _BY_USER, _CALLED_TITLE_UNKNOWN, why)
        if self._calling and request.calling_ae_title not in self._calling:
            why = "its AE title is not in reception.calling_ae_titles"
            return Rejection(_REJECTED_PERMANENT, _BY_USER, _CALLING_TITLE_UNKNOWN, why)
        subjects = {} if self._tls is None else self._tls.subjects
        if association.common_name != subjects.get(request.calling_ae_title, association.common_name):
            why = f"its certificate is that of {association.common_name!r}, not as tls.subjects says"
            return Rejection(_REJECTED_PERMANENT, _BY_USER, _CALLING_TITLE_UNKNOWN, why)
        with self._lock:
            if len(self._series_of) >= self._reception.max_associations:
                why = f"{self._reception.max_associations} associations are open (reception.max_associations)"
                return Rejection(_REJECTED_TRANSIENT, _BY_PRESENTATION, _LOCAL_LIMIT, why)
            self._series_of[association] = set()
        return None

    def ended(self, association: Association) -> None:
        """Nothing more comes over it."""
        with self._lock:
            del self._series_of[association]

    def store(self, association: Association, request: StoreRequest) -> int:
        """Check, store; the status that answers."""
        try:
            return self._receive(association, request)
        except BadIdentifier as error:
            status, why = DOES_NOT_MATCH, str(error)
        except SpoolFull as error:
            status, why = OUT_OF_RESOURCES, str(error)
        except SpoolError as error:
            status, why = PROCESSING_FAILURE, str(error)
        except Unreadable as error:
            status, why = CANNOT_UNDERSTAND, str(error)
        except _Refusal as refusal:
            status, why = refusal.status, str(refusal)
        except Exception as error:  # a fault of ours: the sender keeps its copy, and the log says where to look
            status, why = PROCESSING_FAILURE, f"a fault of the node: {fault(error)}"
        uid = request.sop_instance_uid
        log.warning("0x%04X to %s: %s (SOP instance %.64r)", status, association.address, why, uid)
        return status

    def _receive(self, association: Association, request: StoreRequest) -> int:
        data = request.data
        if not data:
            raise _Refusal(CANNOT_UNDERSTAND, "no data set came")
        if len(data) > self._reception.max_object_mb * _MEGABYTE:
            raise _Refusal(OUT_OF_RESOURCES, f"{len(data)} bytes are more than reception.max_object_mb")
        if self._spool.free_bytes() - len(data) < self._reception.min_free_mb * _MEGABYTE:
            raise SpoolFull(f"less than {self._reception.min_free_mb} MB would be left in {self._spool.root}")
        valid_uid(request.sop_instance_uid)
        if request.sop_class_uid != request.context_class_uid:
            # Else a class that is not accepted could come in the context of one that is.
            raise _Refusal(DOES_NOT_MATCH, "SOP class of the command differs from that of its presentation context")
        incoming = Incoming(
            sop_instance_uid=request.sop_instance_uid,
            sop_class_uid=valid_uid(request.sop_class_uid),
            transfer_syntax_uid=request.transfer_syntax_uid,
            calling_ae=association.request.calling_ae_title,
            called_ae=association.request.called_ae_title,
        )
        with self._spool.begin(incoming, data) as arrival:  # the disk works while we read
            header = read_header(data, UID(request.transfer_syntax_uid), self._tags)
            series_uid, study_uid = self._identify(request, header)
            values = header_values(header, self._keywords)
            # Noted before the object is kept: assembly must not close the series while this association may bring more.
            with self._lock:
                self._series_of[association].add(series_uid)
            keep_conflict = self._reception.different_duplicate == "keep"
            kept, instance = arrival.keep(series_uid, study_uid, keep_conflict=keep_conflict)
        if kept is Kept.REFUSED:
            raise _Refusal(DUPLICATE, "this UID is here with other bytes, and reception.different_duplicate is refuse")
        self._stored(kept, instance, values)
        return SUCCESS

    @staticmethod
    def _identify(request: StoreRequest, header: Dataset) -> tuple[str, str]:
        """Series and study of an object that is what the command says."""
        identity = {keyword: uid_of(header, keyword) for keyword in _IDENTITY}
        if not identity["SOPClassUID"] or not identity["SOPInstanceUID"]:
            raise _Refusal(CANNOT_UNDERSTAND, "the data set has no SOP class or instance UID")
        named = (request.sop_class_uid, request.sop_instance_uid)
        if (identity["SOPClassUID"], identity["SOPInstanceUID"]) != named:
            raise _Refusal(DOES_NOT_MATCH, "SOP class or instance UID of the data set differs from the command's")
        return valid_uid(identity["SeriesInstanceUID"]), valid_uid(identity["StudyInstanceUID"])


class _Refusal(Exception):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
