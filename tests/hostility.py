"""What hostile and broken peers say, byte by byte, what each is owed, and how long it may take."""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from caller import CT, ECHO, WORKLIST, Caller, command, p_data, pdv, request, seconds_until_closed, whole

from dicomnode import pdu
from dicomnode.pdu import AbortReason

MR = "1.2.840.10008.5.1.4.1.1.4"
ECHO_RQ = pdu.c_echo_rq(1)
INVALID, UNEXPECTED = AbortReason.INVALID_PARAMETER, AbortReason.UNEXPECTED_PDU

NO_REQUEST = {
    "4-gib": (struct.pack(">BxL", 1, 0xFFFFFFFF), INVALID),
    "over-144-kib": (struct.pack(">BxL", 1, 147_457), INVALID),
    "http": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", INVALID),
    "unknown-type": (whole(0x99, b"abcd"), AbortReason.UNRECOGNIZED_PDU),
    "type-0": (whole(0, b""), AbortReason.UNRECOGNIZED_PDU),
    "p-data": (p_data(ECHO, 3, pdu.c_echo_rq(1)), UNEXPECTED),
    "release": (pdu.RELEASE_RQ, UNEXPECTED),
    "empty": (whole(1), INVALID),
    "zeros": (whole(1, bytes(200)), INVALID),
    "half-of-one": (whole(1, request()[6:100]), INVALID),
    "no-titles": (request()[:10] + b" " * 32 + request()[42:], INVALID),
    "random": (whole(1, random.Random(1).randbytes(3000)), INVALID),
    "many-contexts": (whole(1, request()[6:74] + b"\x20\0\0\x04\x01\0\0\0" * 18_000), INVALID),
    "many-items": (whole(1, request()[6:] + b"\x54\0\0\0" * 34_000), INVALID),
}
"""Instead of an association request: what is said, and the reason of the A-ABORT that answers."""

BROKEN = {
    "item-too-long": (whole(4, struct.pack(">LBB", 0x7FFFFFFF, CT, 3) + b"abcd"), INVALID),
    "item-of-0": (whole(4, bytes(6)), INVALID),
    "item-of-1": (whole(4, struct.pack(">LBB", 1, CT, 3)), INVALID),
    "half-an-item-header": (whole(4, b"\0\0\0"), INVALID),
    "no-item": (whole(4), INVALID),
    "context-refused": (p_data(WORKLIST, 3, command()), INVALID),
    "context-never-proposed": (p_data(99, 3, command()), INVALID),
    "two-contexts": (p_data(CT, 3, command()) + p_data(ECHO, 2, bytes(8)), INVALID),
    "data-first": (p_data(CT, 2, bytes(8)), INVALID),
    "two-commands": (p_data(CT, 3, command()) * 2, INVALID),
    "command-of-ff": (p_data(CT, 3, b"\xff" * 64), INVALID),
    "empty-command": (p_data(CT, 3, b""), INVALID),
    "endless-command": (p_data(CT, 1, bytes(65_000)) * 2, INVALID),
    "no-command-field": (p_data(CT, 3, command(e0100=None, e0800=pdu.us(0x0101))), INVALID),
    "no-message-id": (p_data(CT, 3, command(e0110=None, e0800=pdu.us(0x0101))), INVALID),
    "long-message-id": (p_data(CT, 3, command(e0110=bytes(4), e0800=pdu.us(0x0101))), INVALID),
    "no-data-set-type": (p_data(CT, 3, command(e0800=None)), INVALID),
    "unknown-command": (p_data(CT, 3, command(e0100=b"\x77\x77", e0800=pdu.us(0x0101))), INVALID),
    "find-in-a-storage-context": (p_data(CT, 3, command(e0100=pdu.us(0x20))) + p_data(CT, 2, bytes(8)), INVALID),
    "response": (p_data(CT, 3, command(e0100=pdu.us(0x8001), e0800=pdu.us(0x0101))), INVALID),
    "cancel": (p_data(CT, 3, pdu.command_set({0x100: pdu.us(0xFFF), 0x120: pdu.us(1), 0x800: pdu.us(0x101)})), INVALID),
    "behind-the-end": (whole(4, pdv(ECHO, 3, ECHO_RQ) * 2), INVALID),
    "second-request": (whole(1, bytes(100)), UNEXPECTED),
    "acceptance": (whole(2, bytes(100)), UNEXPECTED),
    "release-response": (pdu.RELEASE_RP, UNEXPECTED),
    "unknown-type": (whole(0x99, b"abcd"), AbortReason.UNRECOGNIZED_PDU),
}
"""Within an association: what is said, and the reason of the A-ABORT that answers."""

REFUSED = {
    "no-data-set": (p_data(CT, 3, command(e0800=pdu.us(0x0101))), 0xC000),
    "empty": (p_data(CT, 3, command()) + p_data(CT, 2, b""), 0xC000),
    "zeros": (p_data(CT, 3, command()) + p_data(CT, 2, bytes(64)), 0xC000),
    "garbage": (p_data(CT, 3, command()) + p_data(CT, 2, random.Random(0).randbytes(5000)), 0xC000),
    "no-uid": (p_data(CT, 3, command(e1000=None)) + p_data(CT, 2, bytes(8)), 0xA900),
    "parent-folder": (p_data(CT, 3, command(e1000=b"../evil1")) + p_data(CT, 2, bytes(8)), 0xA900),
    "path-after-uid": (p_data(CT, 3, command(e1000=b"1.2/../../../../evil")) + p_data(CT, 2, bytes(8)), 0xA900),
    "not-ascii": (p_data(CT, 3, command(e1000=b"\xff\xfe" * 20)) + p_data(CT, 2, bytes(8)), 0xA900),
    "endless-uid": (p_data(CT, 3, command(e1000=b"1" * 60_000)) + p_data(CT, 2, bytes(8)), 0xA900),
    "no-class": (p_data(CT, 3, command(e0002=None)) + p_data(CT, 2, bytes(8)), 0xA900),
    "class-of-no-context": (p_data(CT, 3, command(e0002=pdu.ui(MR))) + p_data(CT, 2, bytes(8)), 0xA900),
    "class-of-another-context": (p_data(ECHO, 3, command()) + p_data(ECHO, 2, bytes(8)), 0xA900),
}
"""Within an association: a C-STORE, and the status that answers it."""

Act = tuple[Callable[[], Caller], Callable[[Caller], object]]
"""How somebody calls, and what is done then."""


@contextmanager
def at_once(peers: Mapping[str, Act], within_s: float) -> Iterator[list[str]]:
    """All these peers during the block; afterwards the list tells whose connection was not closed in time."""
    late: list[str] = []

    def suffer(name: str, call: Callable[[], Caller], act: Callable[[Caller], object]) -> None:
        with call() as caller:
            begun = time.monotonic()
            act(caller)
            seconds_until_closed(caller)
            if (took_s := time.monotonic() - begun) > within_s:
                late.append(f"{name}: {took_s:.1f} s")

    threads = [threading.Thread(target=suffer, args=(name, *peer)) for name, peer in peers.items()]
    for thread in threads:
        thread.start()
    try:
        yield late
    finally:
        for thread in threads:
            thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "somebody is never closed"
