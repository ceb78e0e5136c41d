"""Where peers call: the listening socket, its callers, and how many of them there may be.

A caller from outside of `reception.networks` is gone before anything is spent on it. Connections count from their first
moment: `max_associations_per_peer` from one address, and twice `max_associations` in all, so that the caller who is one
too many can be told so. Where a limit is reached, the oldest connection that is no association yet makes room for the
new one: who connects and says nothing keeps nobody out. Who has all its associations already is told so, too, for which
it may have as many connections again, for moments.
"""

from __future__ import annotations

import ipaddress
import logging
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable

from dicomnode.association import Association
from dicomnode.config import Reception

log = logging.getLogger(__name__)

_BACKLOG = 128
_ACCEPT_PAUSE_S = 0.2
"""After a connection could not be accepted, e.g. for want of descriptors."""
_LAST_WORDS_S = 2.0
"""For associations that were told to end, at stop."""
_SWITCH_INTERVAL_S = 1e-4
"""How long one thread may keep the interpreter from another. An association gives it up and wants it back ten times for
each image; at Python's 5 ms the thread that writes rows costs reception a tenth of its wall and a fifth of its
processor time (304 CT images from dcmsend, 14 rounds in turns)."""


class Listener:
    """Takes callers at an address from its making until `stop`.

    Parameters
    ----------
    address, port
        0 lets the system choose a port.
    limits
    associate
        Makes the association of a connected socket, given the address of the peer.

    Raises
    ------
    OSError
        If the address cannot be bound.
    """

    def __init__(
        self, address: str, port: int, limits: Reception, associate: Callable[[socket.socket, str], Association]
    ) -> None:
        self._limits = limits
        self._associate = associate
        self._lock = threading.Lock()
        self._open: dict[Association, None] = {}
        """Those whose connection is open, in the order in which they came."""
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        self._socket = socket.create_server((address, port), family=family, backlog=_BACKLOG, dualstack_ipv6=dual)
        self._socket.setblocking(False)
        self.port = int(self._socket.getsockname()[1])
        self._stop, self._stopped = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._stopped, selectors.EVENT_READ)
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        self._thread = threading.Thread(target=self._listen, name="listener", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Take nobody new, let open associations end for up to `timeout_s`, then abort them."""
        self._stop.close()
        self._thread.join()
        with self._lock:
            left = list(self._open)
        deadline = time.monotonic() + timeout_s
        for association in left:
            association.thread.join(max(deadline - time.monotonic(), 0))
        for association in left:
            association.end()
        deadline = time.monotonic() + _LAST_WORDS_S
        for association in left:
            association.thread.join(max(deadline - time.monotonic(), 0))

    def _listen(self) -> None:
        with self._socket, self._stopped, self._selector:
            while all(key.fileobj is self._socket for key, _ in self._selector.select()):
                try:
                    connected, where = self._socket.accept()
                except BlockingIOError:
                    continue  # the caller is gone already
                except OSError as error:
                    log.error("no connection can be accepted now: %s; those that are open go on", error)
                    time.sleep(_ACCEPT_PAUSE_S)
                    continue
                self._take(connected, _plain(where[0]))

    def _take(self, connected: socket.socket, address: str) -> None:
        if not self._allowed(address):
            _refuse(connected, address, "not in reception.networks")
            return
        excess = self._excess(address)
        if full := self._full():
            _refuse(connected, address, full)
            return
        association = self._associate(connected, address)
        association.when_closed(self._forget)
        if excess:
            log.warning("connection from %s refused: %s", address, excess)
            association.decline(excess)
        with self._lock:
            self._open[association] = None
        try:
            association.thread.start()
        except RuntimeError as error:
            self._forget(association)
            _refuse(connected, address, f"{error}; lower reception.max_associations or allow the process more threads")

    def _forget(self, association: Association) -> None:
        with self._lock:
            self._open.pop(association, None)

    def _allowed(self, address: str) -> bool:
        caller = ipaddress.ip_address(address)
        return any(caller in network for network in self._limits.networks if network.version == caller.version)

    def _full(self) -> str | None:
        """Why nobody can be taken now; makes room where that helps."""
        with self._lock:
            everybody = list(self._open)
        if len(everybody) >= 2 * self._limits.max_associations and not self._make_room(everybody):
            return f"{len(everybody)} connections are open, twice reception.max_associations"
        return None

    def _excess(self, address: str) -> str | None:
        """Why one more from there is one too many; makes room where that helps."""
        with self._lock:
            from_there = [association for association in self._open if association.address == address]
        most = self._limits.max_associations_per_peer
        served = [association for association in from_there if not (association.declined or association.over)]
        if len(served) < most or self._make_room(served):
            return None
        declined = [association for association in from_there if association.declined]
        if len(declined) >= most:
            self._make_room(declined)
        return f"it has {len(served)} already (reception.max_associations_per_peer)"

    def _make_room(self, among: list[Association]) -> bool:
        """Close the oldest connection that is no association; False if all are."""
        for association in among:
            if not association.admitted:
                log.warning("connection from %s closed: no association yet, and others call", association.address)
                self._forget(association)
                association.end()
                return True
        return False


def _refuse(connected: socket.socket, address: str, why: str) -> None:
    log.warning("connection from %s refused: %s", address, why)
    connected.close()


def _plain(address: str) -> str:
    """An IPv4 address as such, also where it came through an IPv6 socket."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(parsed)
