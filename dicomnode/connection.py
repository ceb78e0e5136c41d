"""A TCP connection as DICOM needs it: whole PDUs in, gathered buffers out, a deadline on both."""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Iterable

from dicomnode import pdu
from dicomnode.errors import PeerAborted, PeerTimedOut, PeerUnreachable, ProtocolViolation

log = logging.getLogger(__name__)

_GATHER = 256
"""Buffers per sendmsg; Linux takes 1024."""
_NO_SIGPIPE = getattr(socket, "MSG_NOSIGNAL", 0)
_QUICKACK: int | None = getattr(socket, "TCP_QUICKACK", None)


class Connection:
    """An open TCP connection to a peer, drained and filled in whole PDUs; not used again after an error."""

    def __init__(self, peer: str, host: str, port: int, *, connect_timeout_s: float, stall_timeout_s: float) -> None:
        """Connect.

        Parameters
        ----------
        peer
            What errors call it.
        host, port
        connect_timeout_s
            For each address that the name of the host stands for.
        stall_timeout_s
            Longest time in which the peer may take nothing of what is sent.

        Raises
        ------
        PeerUnreachable
        """
        self._peer = peer
        self._stall_timeout_s = stall_timeout_s
        self._received = bytearray()
        try:
            self._socket = socket.create_connection((host, port), timeout=connect_timeout_s)
        except (OSError, UnicodeError) as error:  # UnicodeError: a host name that IDNA cannot encode
            why = getattr(error, "strerror", None) or error
            raise PeerUnreachable(f"no connection to {peer}: {why}; is it running, and its address right?") from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, pieces: Iterable[pdu.Buffer], deadline: float, what: str) -> None:
        """Send all of `pieces` by `deadline` (of `time.monotonic`), without a copy of any."""
        source = iter(pieces)
        window: deque[pdu.Buffer] = deque()
        while True:
            while len(window) < _GATHER and (piece := next(source, None)) is not None:
                window.append(piece)
            if not window:
                return
            self._socket.settimeout(min(self._left(deadline, what), self._stall_timeout_s))
            try:
                sent = self._socket.sendmsg(window, (), _NO_SIGPIPE)
            except TimeoutError:
                raise self._late(what) from None
            except OSError as error:
                raise self._gone(error) from error
            while sent:
                if sent >= len(window[0]):
                    sent -= len(window.popleft())
                else:
                    window[0] = memoryview(window[0])[sent:]
                    sent = 0

    def receive(self, deadline: float, max_length: int, what: str) -> tuple[int, bytes]:
        """Type and bytes, header included, of the next PDU, complete by `deadline` (of `time.monotonic`)."""
        self._fill(pdu.HEADER_BYTES, deadline, what)
        kind, length = pdu.read_header(bytes(self._received[: pdu.HEADER_BYTES]))
        if length > max_length:
            raise ProtocolViolation(f"{self._peer} announces a PDU of {length} bytes, {max_length} are allowed")
        end = pdu.HEADER_BYTES + length
        self._fill(end, deadline, what)
        whole = bytes(self._received[:end])
        del self._received[:end]
        return kind, whole

    def _fill(self, size: int, deadline: float, what: str) -> None:
        while len(self._received) < size:
            self._socket.settimeout(self._left(deadline, what))
            try:
                if _QUICKACK is not None:
                    # Not sticky, so before every wait. A peer that writes header and body apart waits for our ACK
                    # before it writes the body (Nagle), which the kernel would otherwise delay by 40 ms.
                    self._socket.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
                chunk = self._socket.recv(65536)
            except TimeoutError:
                raise self._late(what) from None
            except OSError as error:
                raise self._gone(error) from error
            if not chunk:
                raise PeerAborted(f"{self._peer} closed the connection before {what}")
            self._received += chunk

    def send_last(self, pdu_bytes: bytes) -> None:
        """Send as much of a farewell as the socket takes at once; whether it arrives makes no difference."""
        try:
            self._socket.settimeout(0)
            self._socket.send(pdu_bytes, _NO_SIGPIPE)
        except OSError as error:
            log.debug("%s: no farewell: %s", self._peer, error)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _left(self, deadline: float, what: str) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise self._late(what)
        return left

    def _late(self, what: str) -> PeerTimedOut:
        return PeerTimedOut(f"{self._peer} took too long with {what}; the connection was dropped")

    def _gone(self, error: OSError) -> PeerAborted:
        return PeerAborted(f"{self._peer} closed the connection ({error.strerror or error})")
