"""The storage SCP: Verification and every standard storage class, raw bytes to the spool, answered when they are safe.

pynetdicom 3.0.4 speaks the protocol. Its server is subclassed through the public seam `make_server(server_class=)`:
peers are filtered by address before a thread exists for them, and the list of supported contexts is shared instead of
copied deeply for every association (80 to 100 ms each with all storage classes).

================ ====================================================================================
status           when (PS3.4 table B.2-1, PS3.7 annex C)
================ ====================================================================================
0x0000           the object is on disk, synced; or the same bytes were already
0xA700           no space, or the object is larger than allowed; nothing is kept, the sender tries again
0xA900           its UIDs are none, or differ from those in the command
0xC000           no data, data that cannot be parsed, or no SOP class or instance UID in it
0x0110           the spool cannot be written for another reason
0x0111           same UID with other bytes, where the site refuses those
================ ====================================================================================
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Collection
from io import BytesIO
from socketserver import BaseServer
from typing import Any, cast

from pydicom import Dataset
from pydicom.filereader import read_dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    UID,
    AllTransferSyntaxes,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom import AE, AllStoragePresentationContexts, _config, build_context, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.events import Event
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # made at import time
from pynetdicom.transport import ThreadedAssociationServer

from dicomnode.config import Config
from dicomnode.errors import BadIdentifier, SpoolError, SpoolFull
from dicomnode.router import header_values
from dicomnode.series import Header
from dicomnode.spool import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    Incoming,
    Instance,
    Kept,
    Spool,
    valid_uid,
)

log = logging.getLogger(__name__)

MAX_PDU_BYTES = 131_072
_MEGABYTE = 1_000_000
_COMMAND_BYTES = 65_536
"""More than any command set that comes with an object."""
_DEFLATED_HEADER_BYTES = 16 * _MEGABYTE
"""Of an inflated data set this much is looked at for its header; 0.4 MB could inflate to 400."""
_LISTEN_BACKLOG = 128
_NATIVE_SYNTAXES = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
)

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
    """

    def __init__(self, config: Config, spool: Spool, keywords: Collection[str], stored: Stored) -> None:
        self._reception = config.reception
        self._called = set(config.reception.called_ae_titles or (config.node.ae_title,))
        self._calling = set(config.reception.calling_ae_titles)
        self._address = (config.node.address, config.node.port)
        self._ae_title = config.node.ae_title
        self._spool = spool
        self._keywords = frozenset(keywords)
        self._stored = stored
        self._lock = threading.Lock()
        self._series_of: dict[object, set[str]] = {}
        """Established association → UIDs of the series it brought something of."""
        self._arrived: dict[object, int] = {}
        """Association → bytes of the message that it is sending."""
        self._server: _Server | None = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        assert self._server is not None
        return int(self._server.server_address[1])

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
        """
        # Its handlers format every PDU for a log that nobody reads (10 % of the time).
        _config.LOG_HANDLER_LEVEL = "none"
        entity = AE(self._ae_title)
        entity.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
        entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        entity.maximum_pdu_size = MAX_PDU_BYTES
        entity.acse_timeout = self._reception.acse_timeout_s
        entity.dimse_timeout = self._reception.dimse_timeout_s
        entity.network_timeout = self._reception.network_timeout_s
        # Counts threads, silent connections among them; our own limit is on established associations.
        entity.maximum_associations = 100_000
        syntaxes = transfer_syntaxes()
        known = [str(context.abstract_syntax) for context in AllStoragePresentationContexts]
        contexts = [build_context(uid, syntaxes) for uid in self._reception.sop_classes or known]
        contexts.append(build_context(Verification, list(_NATIVE_SYNTAXES[:2])))
        server = entity.make_server(
            self._address,
            contexts=contexts,
            evt_handlers=[
                (evt.EVT_REQUESTED, self._on_requested),
                (evt.EVT_ESTABLISHED, self._on_established),
                (evt.EVT_CONN_CLOSE, self._on_closed),
                (evt.EVT_PDU_RECV, self._on_pdu),
                (evt.EVT_C_ECHO, lambda event: SUCCESS),
                (evt.EVT_C_STORE, self._on_store),
            ],
            server_class=_Server,
            networks=self._reception.networks,
            max_per_peer=self._reception.max_associations_per_peer,
        )
        self._server = cast(_Server, server)
        threading.Thread(target=server.serve_forever, name="listener", daemon=True).start()
        log.info("listening as %s on %s:%d", self._ae_title, self._address[0], self.port)

    def stop(self, timeout_s: float) -> None:
        """Accept nobody new, let open associations end for up to `timeout_s`, then abort them."""
        if self._server is None:
            return
        self._server.shutdown()
        deadline = time.monotonic() + timeout_s
        for association in self._server.active_associations:
            association.join(max(deadline - time.monotonic(), 0))
            if association.is_alive():
                association.abort()

    def _on_requested(self, event: Event) -> None:
        request = cast(A_ASSOCIATE, event.assoc.requestor.primitive)
        peer = f"{request.calling_ae_title!r} at {event.assoc.requestor.address}"
        rejection: tuple[int, int, int] | None = None
        if request.called_ae_title.strip() not in self._called:
            rejection = (_REJECTED_PERMANENT, _BY_USER, _CALLED_TITLE_UNKNOWN)
            why = f"called {request.called_ae_title!r}, which is not in reception.called_ae_titles"
        elif self._calling and request.calling_ae_title.strip() not in self._calling:
            rejection = (_REJECTED_PERMANENT, _BY_USER, _CALLING_TITLE_UNKNOWN)
            why = "its AE title is not in reception.calling_ae_titles"
        elif len(self._series_of) >= self._reception.max_associations:
            rejection = (_REJECTED_TRANSIENT, _BY_PRESENTATION, _LOCAL_LIMIT)
            why = f"{self._reception.max_associations} associations are open (reception.max_associations)"
        if rejection is not None:
            log.warning("association of %s rejected: %s", peer, why)
            event.assoc.acse.send_reject(*rejection)
            # Waits until the answer is out: the library closes the connection as soon as this handler returns.
            event.assoc.kill()

    def _on_established(self, event: Event) -> None:
        with self._lock:
            self._series_of[event.assoc] = set()

    def _on_closed(self, event: Event) -> None:
        with self._lock:
            self._series_of.pop(event.assoc, None)
            self._arrived.pop(event.assoc, None)

    def _on_pdu(self, event: Event) -> None:
        """Count what a message brings while it arrives: the library would keep an endless one in memory."""
        if not isinstance(event.pdu, P_DATA_TF):
            return
        brought = sum(len(item) for item in event.pdu.presentation_data_value_items)
        with self._lock:
            arrived = self._arrived[event.assoc] = self._arrived.get(event.assoc, 0) + brought
        limit = self._reception.max_object_mb * _MEGABYTE + _COMMAND_BYTES
        if arrived - brought <= limit < arrived:
            log.warning(
                "association of %s aborted: its message is larger than reception.max_object_mb",
                event.assoc.requestor.address,
            )
            # Not in this thread, which is the one that has to carry the abort out.
            threading.Thread(target=event.assoc.abort, name="abort", daemon=True).start()

    def _on_store(self, event: Event) -> int:
        request = cast(C_STORE, event.request)
        try:
            return self._receive(
                request.DataSet.getbuffer() if request.DataSet is not None else memoryview(b""),
                sop_class_uid=str(request.AffectedSOPClassUID),
                sop_instance_uid=str(request.AffectedSOPInstanceUID),
                syntax=event.context.transfer_syntax,
                association=event.assoc,
            )
        except BadIdentifier as error:
            return self._refuse(event, DOES_NOT_MATCH, str(error))
        except SpoolFull as error:
            return self._refuse(event, OUT_OF_RESOURCES, str(error))
        except SpoolError as error:
            return self._refuse(event, PROCESSING_FAILURE, str(error))
        except _Refusal as refusal:
            return self._refuse(event, refusal.status, str(refusal))
        except Exception as error:  # a fault of ours: the sender keeps its copy, and the log says where to look
            place = traceback.extract_tb(error.__traceback__)[-1]
            # Not its words: they may quote the header.
            return self._refuse(event, PROCESSING_FAILURE, f"{type(error).__name__} at {place.name}:{place.lineno}")
        finally:
            with self._lock:
                self._arrived.pop(event.assoc, None)

    def _receive(
        self, data: memoryview, *, sop_class_uid: str, sop_instance_uid: str, syntax: str, association: Any
    ) -> int:
        if not data:
            raise _Refusal(CANNOT_UNDERSTAND, "no data set came")
        if len(data) > self._reception.max_object_mb * _MEGABYTE:
            raise _Refusal(OUT_OF_RESOURCES, f"{len(data)} bytes are more than reception.max_object_mb")
        if self._spool.free_bytes() - len(data) < self._reception.min_free_mb * _MEGABYTE:
            raise SpoolFull(f"less than {self._reception.min_free_mb} MB would be left in {self._spool.root}")
        valid_uid(sop_instance_uid)
        header = _parse(data, UID(syntax))
        identity = {
            keyword: str(header.get(keyword, ""))
            for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
        }
        if not identity["SOPClassUID"] or not identity["SOPInstanceUID"]:
            raise _Refusal(CANNOT_UNDERSTAND, "the data set has no SOP class or instance UID")
        if identity["SOPInstanceUID"] != sop_instance_uid or identity["SOPClassUID"] != sop_class_uid:
            raise _Refusal(DOES_NOT_MATCH, "SOP class or instance UID of the data set differs from the command's")
        incoming = Incoming(
            sop_instance_uid=sop_instance_uid,
            sop_class_uid=valid_uid(sop_class_uid),
            series_uid=valid_uid(identity["SeriesInstanceUID"]),
            study_uid=valid_uid(identity["StudyInstanceUID"]),
            transfer_syntax_uid=syntax,
            calling_ae=association.requestor.ae_title.strip(),
            called_ae=association.requestor.primitive.called_ae_title.strip(),
        )
        values = header_values(header, self._keywords)
        # Noted before the object is stored: assembly must not close the series while this association may bring more.
        with self._lock:
            if association in self._series_of:  # else it is gone already, and nobody would strike it out again
                self._series_of[association].add(incoming.series_uid)
        kept, instance = self._spool.store(incoming, data, keep_conflict=self._reception.different_duplicate == "keep")
        if kept is Kept.REFUSED:
            raise _Refusal(DUPLICATE, "this UID is here with other bytes, and reception.different_duplicate is refuse")
        self._stored(kept, instance, values)
        return SUCCESS

    def _refuse(self, event: Event, status: int, why: str) -> int:
        log.warning(
            "0x%04X to %s: %s (SOP instance %.64r)",
            status,
            event.assoc.requestor.address,
            why,
            str(cast(C_STORE, event.request).AffectedSOPInstanceUID),
        )
        return status


class _Refusal(Exception):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def _parse(data: memoryview, syntax: UID) -> Dataset:
    """Header of a data set off the network, pixels left out.

    Raises
    ------
    _Refusal
        0xC000 if it cannot be parsed.
    """
    try:
        plain: bytes | memoryview = data
        if syntax.is_deflated:
            plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, _DEFLATED_HEADER_BYTES)
        return read_dataset(
            BytesIO(plain),
            syntax.is_implicit_VR,
            syntax.is_little_endian,
            stop_when=lambda tag, vr, length: tag in _PIXEL_TAGS,
        )
    except Exception as error:  # whatever the parser stumbles over, the sender learns that we cannot read it
        raise _Refusal(CANNOT_UNDERSTAND, f"the data set cannot be parsed ({type(error).__name__})") from error


_PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})


class _SharedContexts(list[PresentationContext]):
    """Supported contexts, the same objects for all associations: negotiation reads them and makes new ones."""

    def __deepcopy__(self, memo: dict[int, Any]) -> list[PresentationContext]:
        return list(self)


class _Server(ThreadedAssociationServer):
    request_queue_size = _LISTEN_BACKLOG
    daemon_threads = True

    def __init__(self, *args: Any, networks: Collection[Any], max_per_peer: int, **kwargs: Any) -> None:
        self._networks = networks
        self._max_per_peer = max_per_peer
        super().__init__(*args, **kwargs)
        self.contexts = _SharedContexts(self.contexts)

    def shutdown(self) -> None:
        """Stop accepting and close the socket; the library's own expects a server that `start_server` made."""
        BaseServer.shutdown(self)
        self.server_close()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Drop strangers before anything is spent on them."""
        address = ipaddress.ip_address(client_address[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        if not any(address in network for network in self._networks if network.version == address.version):
            log.warning("connection from %s refused: not in reception.networks", address)
            return False
        open_here = Counter(association.requestor.address for association in self.active_associations)
        if open_here[str(client_address[0])] >= self._max_per_peer:
            log.warning("connection from %s refused: it has %d already", address, self._max_per_peer)
            return False
        return True

    def get_request(self) -> tuple[socket.socket, Any]:
        """Answers go out at once: a delayed response costs the sender 40 ms for each image."""
        connection, address = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return connection, address
