"""A TCP connection as DICOM needs it: whole PDUs in, gathered buffers out, a deadline on both."""

from __future__ import annotations

import logging
import math
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterable
from itertools import islice

from dicomnode import pdu, tls
from dicomnode.errors import PeerAborted, PeerError, PeerTimedOut, PeerUnreachable, ProtocolViolation, TlsFailed

log = logging.getLogger(__name__)

_FIRST_BUFFER_BYTES = 4096
_FAREWELL_S = 0.5
"""Longest wait for a peer to close the connection after it was told that it is over."""
_FAREWELL_BYTES = 16 * 2**20
"""So much may still be on its way in the buffers of both systems; who pours on does not listen."""
_GATHER = 256
"""Buffers per sendmsg; Linux takes 1024."""
_TLS_RECORD_BYTES = 16384
_NO_SIGPIPE = getattr(socket, "MSG_NOSIGNAL", 0)
_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_QUICKACK: int | None = getattr(socket, "TCP_QUICKACK", None)


class Connection:
    """An open TCP connection to a peer, drained and filled in whole PDUs; not used again after an error.

    Parameters
    ----------
    connected
        Belongs to this object from now on.
    peer
        What errors call it.
    stall_timeout_s
        Longest time in which the peer may take nothing of what is sent.
    """

    def __init__(self, connected: socket.socket, peer: str, *, stall_timeout_s: float) -> None:
        self._socket = connected
        self._peer = peer
        self._stall_timeout_s = stall_timeout_s
        self._buffer = bytearray(_FIRST_BUFFER_BYTES)
        self._begin = self._end = 0
        """Where in the buffer lies what came and was not asked for yet."""
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Tried first and waited for only where it has to be: with a time-out of its own a socket asks before each try.
        self._socket.setblocking(False)
        self._poll = select.poll()

    def send(self, pieces: Iterable[pdu.Buffer], deadline: float, what: str) -> None:
        """Send all of `pieces` by `deadline` (of `time.monotonic`); without TLS, without a copy of any.

        Raises
        ------
        PeerTimedOut
            At the deadline, or after `stall_timeout_s` in which the peer took nothing.
        PeerAborted, TlsFailed
        """
        source = iter(pieces)
        window: deque[pdu.Buffer] = deque()
        while True:
            while len(window) < _GATHER and (piece := next(source, None)) is not None:
                window.append(piece)
            if not window:
                return
            left = self._left(deadline, what)  # also of a peer for whom we never have to wait
            try:
                sent = self._write(window)
            except _NOT_NOW as error:
                self._wait(error, select.POLLOUT, min(left, self._stall_timeout_s), what)
                continue
            except OSError as error:
                raise self._gone(error) from error
            while sent:
                if sent >= len(window[0]):
                    sent -= len(window.popleft())
                else:
                    window[0] = memoryview(window[0])[sent:]
                    sent = 0

    def _write(self, window: deque[pdu.Buffer]) -> int:
        """Send as much of the buffers as the socket takes now; how many bytes that was."""
        if not isinstance(self._socket, ssl.SSLSocket):
            return self._socket.sendmsg(window, (), _NO_SIGPIPE)
        # TLS has no gathering write; a PDU header shall not be a record of its own.
        small = islice(window, 2 if len(window[0]) < _TLS_RECORD_BYTES else 1)
        return self._socket.send(b"".join(piece[:_TLS_RECORD_BYTES] for piece in small)[:_TLS_RECORD_BYTES])

    def receive(self, deadline: float, max_length: int, what: str) -> tuple[int, memoryview]:
        """Type and bytes, header included, of the next PDU, complete by `deadline` (of `time.monotonic`).

        The bytes stay as they are until the next call. The buffer grows with the PDUs that come, not with those that
        are announced to come, and only up to what holds `max_length`.

        Raises
        ------
        ProtocolViolation
            If a PDU of more than `max_length` bytes is announced.
        PeerTimedOut, PeerAborted, TlsFailed
        """
        self._fill(pdu.HEADER_BYTES, deadline, what)
        header = memoryview(self._buffer)[self._begin : self._begin + pdu.HEADER_BYTES]
        kind, length = pdu.read_header(header)
        if length > max_length:
            raise ProtocolViolation(f"{self._peer} announces a PDU of {length} bytes, {max_length} are allowed")
        size = pdu.HEADER_BYTES + length
        self._fill(size, deadline, what)
        whole = memoryview(self._buffer)[self._begin : self._begin + size]
        self._begin += size
        return kind, whole

    def readable(self, timeout_s: float) -> bool:
        """Has the peer sent something that was not received yet, or does it within `timeout_s`?

        That it closed the connection counts as something.
        """
        if self._end > self._begin or (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()):
            return True
        return self._ready(select.POLLIN, timeout_s)

    def _fill(self, size: int, deadline: float, what: str) -> None:
        while self._end - self._begin < size:
            if self._begin + size > len(self._buffer):
                self._make_room(size)
            left = self._left(deadline, what)  # also of a peer for whom we never have to wait
            try:
                count = self._socket.recv_into(memoryview(self._buffer)[self._end :])
            except _NOT_NOW as error:
                if _QUICKACK is not None:
                    # Not sticky, so before every wait. A peer that writes header and body apart waits for our ACK
                    # before it writes the body (Nagle), which the kernel would otherwise delay by 40 ms.
                    self._socket.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
                self._wait(error, select.POLLIN, left, what)
                continue
            except OSError as error:
                raise self._gone(error) from error
            if not count:
                raise PeerAborted(f"{self._peer} closed the connection before {what}")
            self._end += count

    def _wait(self, why: OSError, event: int, timeout_s: float, what: str) -> None:
        """Wait until `event` comes, or what TLS wants before it."""
        if isinstance(why, ssl.SSLWantReadError):
            event = select.POLLIN
        elif isinstance(why, ssl.SSLWantWriteError):
            event = select.POLLOUT
        if not self._ready(event, timeout_s):
            raise self._late(what)

    def _ready(self, event: int, timeout_s: float) -> bool:
        self._poll.register(self._socket, event)
        return bool(self._poll.poll(math.ceil(1000 * timeout_s)))

    def _make_room(self, size: int) -> None:
        """Bring what is held to the front of the buffer; once it is full, double that, up to `size`."""
        held = self._end - self._begin
        if self._begin:
            self._buffer[:held] = self._buffer[self._begin : self._end]
            self._begin, self._end = 0, held
        if held == len(self._buffer):
            self._buffer = self._buffer + bytes(min(held, size - held))

    def send_last(self, pdu_bytes: bytes) -> None:
        """Send as much of a farewell as the socket takes at once; whether it arrives makes no difference."""
        try:
            self._write(deque([pdu_bytes]))
        except OSError as error:
            log.debug("%s: no farewell: %s", self._peer, error)

    def part(self, pdu_bytes: bytes, *, deaf: bool) -> None:
        """Send a farewell that shall arrive, give the peer a moment to close the connection, and close it.

        With unread bytes in it a closed socket resets the connection, and the peer may never see what was sent last.

        Parameters
        ----------
        pdu_bytes
            Sent as far as the socket takes it at once.
        deaf
            The receiving side was shut down, so that nobody sees whether the peer closed.
        """
        self.send_last(pdu_bytes)
        until = time.monotonic() + _FAREWELL_S
        drained_bytes = 0
        try:
            socket.socket.shutdown(self._socket, socket.SHUT_WR)  # that of SSLSocket would go on without TLS
            while (left := until - time.monotonic()) > 0 and drained_bytes < _FAREWELL_BYTES:
                self._socket.settimeout(left)
                if deaf:
                    time.sleep(left)  # for what was sent to arrive before the socket is closed
                elif count := self._socket.recv_into(self._buffer):
                    drained_bytes += count
                else:
                    break
        except OSError as error:
            log.debug("%s: gone without a farewell: %s", self._peer, error)
        self._socket.close()

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

    def _gone(self, error: OSError) -> PeerError:
        return _gone(self._peer, error)


def _gone(peer: str, error: OSError) -> PeerError:
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return TlsFailed(f"{peer}: {tls.in_words(error)}")
    return PeerAborted(f"{peer} closed the connection ({error.strerror or error})")


def begin_tls(
    connected: socket.socket, peer: str, context: ssl.SSLContext, server_name: str | None = None
) -> ssl.SSLSocket:
    """A TCP connection that will speak TLS, once hands were shaken on it; `connected` is none any more.

    Parameters
    ----------
    connected
    peer
        What errors call it.
    context
        Of a server or of a client.
    server_name
        Name that must be in the certificate, for a client.

    Raises
    ------
    TlsFailed, PeerAborted
    """
    server_side = context.protocol == ssl.PROTOCOL_TLS_SERVER
    try:
        return context.wrap_socket(
            connected, server_side=server_side, server_hostname=server_name, do_handshake_on_connect=False
        )
    except OSError as error:
        raise _gone(peer, error) from error


def shake_hands(encrypted: ssl.SSLSocket, peer: str, timeout_s: float) -> None:
    """Do the TLS handshake, all of it in `timeout_s`, with a peer that errors call `peer`.

    Raises
    ------
    TlsFailed, PeerTimedOut, PeerAborted
    """
    try:
        encrypted.settimeout(timeout_s)
        encrypted.do_handshake()
    except TimeoutError:
        raise PeerTimedOut(f"{peer} took too long with the TLS handshake; the connection was dropped") from None
    except OSError as error:
        raise _gone(peer, error) from error


def connect(
    peer: str,
    host: str,
    port: int,
    *,
    connect_timeout_s: float,
    stall_timeout_s: float,
    context: ssl.SSLContext | None = None,
    server_name: str | None = None,
) -> Connection:
    """A connection to a peer that is called `peer` in errors.

    Parameters
    ----------
    peer, host, port
    connect_timeout_s
        For each address that the name of the host stands for.
    stall_timeout_s
        As for `Connection`.
    context, server_name
        With TLS: as for `begin_tls`; the handshake has `connect_timeout_s`.

    Raises
    ------
    PeerUnreachable
    TlsFailed, PeerTimedOut, PeerAborted
        With TLS.
    """
    try:
        connected = socket.create_connection((host, port), timeout=connect_timeout_s)
    except (OSError, UnicodeError) as error:  # UnicodeError: a host name that IDNA cannot encode
        why = getattr(error, "strerror", None) or error
        raise PeerUnreachable(f"no connection to {peer}: {why}; is it running, and its address right?") from error
    try:
        if context is not None:
            connected = encrypted = begin_tls(connected, peer, context, server_name)
            shake_hands(encrypted, peer, connect_timeout_s)
        return Connection(connected, peer, stall_timeout_s=stall_timeout_s)
    except BaseException:  # whatever ends the handshake, the socket must not stay open
        connected.close()
        raise
