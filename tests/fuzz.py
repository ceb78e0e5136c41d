"""What reads bytes off the network, given bytes that no peer means: `python tests/fuzz.py --inputs 100000`.

Seeds are real PDUs and data sets (of synthetic CT, and with `--files` of any DICOM files); each input is one of them
with a few mutations, drawn by a generator that depends on the seed that is printed, the reader and the number of the
input alone. A reader may take an input or refuse it by the error that it documents; anything else is a crash, and so
is an input that takes longer than `SLOW_S` of processor time. Exit status 1 says that there were some.
"""

from __future__ import annotations

import argparse
import logging
import random
import socket
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast

from caller import CONTEXTS, CT, ECHO, command, p_data, request, store_rq
from ct_builder import phantom, write_series
from pydicom import Dataset, dcmread
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID, CTImageStorage, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian
from pydicom.uid import ImplicitVRLittleEndian as Implicit
from pynetdicom import build_context, build_role, evt
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import UserIdentityNegotiation
from scanner import data_set_of, image
from tables import config_of

from dicomnode import pdu
from dicomnode.association import MAX_PDU_BYTES, Association, Memory
from dicomnode.errors import MalformedPdu
from dicomnode.negotiation import Negotiator
from dicomnode.received_header import Unreadable, read_header, read_report, uid_of
from dicomnode.router import header_values
from dicomnode.scp import StorageServer
from dicomnode.series import KEYWORDS
from dicomnode.services import Services
from dicomnode.spool import Incoming, Instance, Kept
from pipelines.element_index import HandedOver, index_file, index_start

SLOW_S = 5.0
COMMITMENT = "1.2.840.10008.1.20.1"
_NUMBERS = [0, 1, 2, 6, 7, 0x7F, 0x80, 0xFE, 0xFF, 0x101, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]
_TAGS = [0x00080005, 0x00080016, 0x00080018, 0x0020000E, 0x0020000D, 0x00081140, 0x7FE00010, 0xFFFEE000, 0xFFFEE00D]


class Crash(Exception):
    """A fault of ours that only the log tells of."""


@dataclass(frozen=True)
class Reader:
    """Something that takes bytes, and how it may refuse them."""

    take: Callable[[bytes], object]
    seeds: Sequence[bytes]
    refuses: type[Exception] | tuple[type[Exception], ...] = ()


def mutated(seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """One of `seeds` with one to eight changes."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.choice([1, 1, 1, 2, 2, 3, 5, 8])):
        # Headers are where the readers decide; of pixels they see the length.
        at = chance.randrange(min(len(data), chance.choice([64, 512, 4096, 10**6])) + 1)
        size = chance.choice([1, 1, 2, 4, 8, 40, 400])
        change = chance.randrange(8)
        if change == 0:
            data[at : at + 1] = bytes([chance.randrange(256)])
        elif change == 1:
            value, width = chance.choice(_NUMBERS), chance.choice("BHL")
            packed = struct.pack(chance.choice("<>") + width, value & (1 << 8 * struct.calcsize("=" + width)) - 1)
            data[at : at + len(packed)] = packed
        elif change == 2:
            data[at:at] = chance.randbytes(size)
        elif change == 3:
            del data[at : at + size]
        elif change == 4:
            data[at:at] = data[at : at + size] * chance.choice([1, 2, 50])
        elif change == 5:
            other = chance.choice(seeds)
            start = chance.randrange(len(other) + 1)
            data[at : at + size] = other[start : start + size]
        elif change == 6:
            tag = chance.choice(_TAGS)
            data[at : at + 4] = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
        elif chance.random() < 0.3:
            del data[at:]
    return bytes(data)


# ── a peer that has said all it will ───────────────────────────────────────────────────────────────────────────────


class Said(socket.socket):
    """A socket out of which comes what a peer said, and then its end; takes every answer."""

    def __init__(self, said: bytes) -> None:
        super().__init__()
        self._said, self._at = said, 0

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        count = min(len(buffer), len(self._said) - self._at)
        buffer[:count] = self._said[self._at : self._at + count]
        self._at += count
        return count

    def sendmsg(self, buffers: Iterable[Any], *ancillary: Any) -> int:
        return sum(map(len, buffers))

    def send(self, data: Any, flags: int = 0) -> int:
        return len(data)


class _Nowhere:
    """A spool that keeps nothing."""

    root = Path("nowhere")

    def free_bytes(self) -> int:
        return 2**60

    @contextmanager
    def begin(self, incoming: Incoming, data: memoryview) -> Iterator[_Nowhere]:
        yield self

    def keep(self, series_uid: str, study_uid: str, *, keep_conflict: bool) -> tuple[Kept, Instance | None]:
        return Kept.NEW, None


_LOGGERS = ("dicomnode.association", "dicomnode.scp")


class _Faults(logging.Handler):
    """Makes a crash of what is logged as a fault of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.ERROR or text.startswith(f"0x{0x0110:04X}"):
            self.seen.append(text)


def converse() -> Callable[[bytes], None]:
    """A whole association, from the request to the store, of a peer that says these bytes."""
    config = config_of(reception={"max_object_mb": 1, "min_free_mb": 0, "sop_classes": ["CTImageStorage"]})
    server = StorageServer(config, cast(Any, _Nowhere()), KEYWORDS, lambda kept, instance, header: None)
    negotiator, services = Negotiator(_supported(), MAX_PDU_BYTES), _services()

    def take(said: bytes) -> None:
        faults = _Faults()
        with ExitStack() as stack:
            for name in _LOGGERS:
                logging.getLogger(name).addHandler(faults)
                stack.callback(logging.getLogger(name).removeHandler, faults)
            memory = Memory(len(said))
            Association(Said(said), "192.0.2.1", config.reception, negotiator, services, server, memory).thread.run()
        if faults.seen:
            raise Crash(faults.seen[0])

    return take


def _supported() -> list[Any]:
    syntaxes: list[str | UID] = [ExplicitVRLittleEndian, Implicit, DeflatedExplicitVRLittleEndian]
    commitment = build_context(COMMITMENT, [Implicit])
    commitment.scu_role = commitment.scp_role = True
    return [build_context(CTImageStorage, syntaxes), build_context(pdu.VERIFICATION, [Implicit]), commitment]


def _services() -> Services:
    def report(event: evt.Event) -> tuple[int, Dataset]:
        return 0, event.event_information

    return Services({evt.EVT_N_EVENT_REPORT: report, evt.EVT_N_ACTION: lambda event: (0, event.action_information)})


# ── readers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_items(body: bytes) -> None:
    """The items of a P-DATA-TF, their commands, what answers them."""
    for item in pdu.pdvs(memoryview(body)):
        if item.command:
            elements = pdu.read_command_set(bytes(item.data))
            pdu.read_ui(elements, pdu.Element.AFFECTED_SOP_INSTANCE_UID)
            pdu.response(elements, 0)


def read_any_header(coded: bytes) -> None:
    """A data set behind a byte that chooses its transfer syntax, and all that the node asks of it."""
    syntax = [ExplicitVRLittleEndian, Implicit, DeflatedExplicitVRLittleEndian][coded[0] % 3] if coded else Implicit
    header = read_header(memoryview(coded)[1:], UID(syntax), _TAGS_ASKED)
    header_values(header, KEYWORDS)
    for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        uid_of(header, keyword)


_TAGS_ASKED = frozenset({0x0018A001, *_TAGS[:6]})


def index_any_start(coded: bytes) -> None:
    """The same, without a way out to pydicom."""
    index_start(coded[1 : 2**15], len(coded) - 1, coded[:1] == b"\1", _TAGS_ASKED)


def readers(files: Sequence[Path]) -> dict[str, Reader]:
    """By name."""
    requests, commands, sessions, headers, whole_files = _seeds(files)
    negotiator, services = Negotiator(_supported(), MAX_PDU_BYTES), _services()
    acceptances = [negotiator.read(one).acceptance for one in requests]
    context = pdu.AcceptedContext(1, COMMITMENT, Implicit)

    def serve(said: bytes) -> None:
        (length,) = struct.unpack_from("<H", said + b"\0\0")
        address = {"calling_ae_title": "A", "address": "192.0.2.1", "max_pdu": 16384}
        services.answer(context, said[2 : 2 + length], said[2 + length :] or None, **cast(Any, address))

    return {
        "association": Reader(converse(), sessions),
        "request": Reader(negotiator.read, requests, MalformedPdu),
        "acceptance": Reader(pdu.read_associate_ac, acceptances, MalformedPdu),
        "items": Reader(read_items, [p_data(CT, 3, one)[6:] for one in commands], MalformedPdu),
        "command set": Reader(pdu.read_command_set, commands, MalformedPdu),
        "service": Reader(serve, [struct.pack("<H", len(one)) + one + _asked() for one in commands], MalformedPdu),
        "header": Reader(read_any_header, headers, Unreadable),
        "report": Reader(lambda data: read_report(data, UID(Implicit)), [_asked()], Unreadable),
        "start of a data set": Reader(index_any_start, [one for one in headers if one[0] < 2], HandedOver),
        "file": Reader(index_file, whole_files, HandedOver),
    }


def _seeds(files: Sequence[Path]) -> tuple[list[bytes], ...]:
    plain = request()
    asked = A_ASSOCIATE_RQ()
    asked.decode(plain)
    rich = asked.to_primitive()
    identity = UserIdentityNegotiation()
    identity.user_identity_type, identity.primary_field, identity.secondary_field = 2, b"user", b"password"
    rich.user_information += [build_role(COMMITMENT, scp_role=True), identity]
    requests = [plain, request(contexts=[*CONTEXTS, (COMMITMENT, (Implicit,))]), A_ASSOCIATE_RQ(rich).encode()]

    n = pdu.Element
    notified = {0x0002: pdu.ui(COMMITMENT), 0x0100: pdu.us(0x0100), 0x0110: pdu.us(1), 0x0800: pdu.us(1)}
    action = {0x0003: pdu.ui(COMMITMENT), 0x0100: pdu.us(0x0130), 0x0110: pdu.us(1), 0x0800: pdu.us(1)}
    commands = [
        command(),
        pdu.c_echo_rq(1),
        pdu.command_set({**notified, n.AFFECTED_SOP_INSTANCE_UID: pdu.ui("1.2.3"), 0x1002: pdu.us(1)}),
        pdu.command_set({**action, 0x1001: pdu.ui("1.2.3"), 0x1008: pdu.us(1)}),
        pdu.command_set({0x0100: pdu.us(0x0FFF), 0x0120: pdu.us(1), 0x0800: pdu.us(0x0101)}),
    ]
    with tempfile.TemporaryDirectory() as folder:
        synthetic = write_series(Path(folder), phantom(2, 16), SpecificCharacterSet="ISO_IR 192")
        one = image(synthetic[0])
        contents = [path.read_bytes() for path in [*synthetic, *files]]
    sessions = [
        asked_for + p_data(ECHO, 3, pdu.c_echo_rq(1)) + store_rq(one) + pdu.RELEASE_RQ for asked_for in requests
    ]
    sessions += [plain + p_data(CT, 3, said) + p_data(CT, 2, one.data) + pdu.RELEASE_RQ for said in commands]
    headers = [b"\0" + data_set_of(content) for content in contents]
    headers += [bytes([k]) + _encoded(content, k) for content in contents for k in (1, 2)]
    return requests, commands, sessions, headers, contents


def _encoded(content: bytes, coding: int) -> bytes:
    """The data set of a file in implicit VR (1), or deflated (2)."""
    if coding == 2:
        packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        return packer.compress(data_set_of(content)) + packer.flush()
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, True
    write_dataset(buffer, dcmread(BytesIO(content), force=True))
    return buffer.getvalue()


def _asked() -> bytes:
    """Information of a report on a commitment, in implicit VR."""
    item = struct.pack("<HHL", 8, 0x1150, 26) + CTImageStorage.encode() + b"\0"
    sequence = struct.pack("<HHLHHL", 8, 0x1199, 0xFFFFFFFF, 0xFFFE, 0xE000, len(item)) + item
    return struct.pack("<HHL", 8, 0x1195, 6) + b"1.2.3\0" + sequence + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)


# ── the run ────────────────────────────────────────────────────────────────────────────────────────────────────────


def outcome(reader: Reader, data: bytes) -> str:
    """``taken``, ``refused``, or what went wrong and where."""
    begun = time.thread_time()
    try:
        reader.take(data)
    except reader.refuses:
        said = "refused"
    except Exception as error:  # what this looks for
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    else:
        said = "taken"
    took_s = time.thread_time() - begun
    return said if took_s < SLOW_S else f"slow: {took_s:.1f} s"


def run(name: str, reader: Reader, seed: str, numbers: range) -> tuple[Counter[str], dict[str, int]]:
    """How many inputs were taken, refused and crashed; crash → number of the first input that caused it."""
    counts: Counter[str] = Counter(taken=0, refused=0, crashed=0)
    crashes: dict[str, int] = {}
    with _hushed():
        for number in numbers:
            data = mutated(reader.seeds, random.Random(f"{seed}/{name}/{number}"))
            said = outcome(reader, data)
            if said in ("taken", "refused"):
                counts[said] += 1
            else:
                counts["crashed"] += 1
                crashes.setdefault(said, number)
    return counts, crashes


@contextmanager
def _hushed() -> Iterator[None]:
    """What is thought of the inputs fills no screen."""
    libraries = [logging.getLogger(name) for name in ("pydicom", "pynetdicom")]
    ours = [logging.getLogger(name) for name in _LOGGERS]
    with warnings.catch_warnings(action="ignore"):
        for logger in libraries:
            logger.disabled = True
        for logger in ours:
            logger.propagate = False
        try:
            yield
        finally:
            for logger in libraries:
                logger.disabled = False
            for logger in ours:
                logger.propagate = True


def report(name: str, counts: Mapping[str, int], crashes: Mapping[str, int], seed: str) -> None:
    """A line for a reader, and one for each way in which it crashed."""
    print(f"{name:16} {sum(counts.values()):9} {counts['taken']:9} {counts['refused']:9} {counts['crashed']:9}")
    for said, number in crashes.items():
        print(f"    input {number} of seed {seed}: {said}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="in all, shared among the readers")
    parser.add_argument("--seed", default=None, help="of an earlier run, to have its inputs again")
    parser.add_argument("--files", type=Path, nargs="*", default=[], help="DICOM files to begin from")
    asked = parser.parse_args()
    seed = asked.seed or f"{random.SystemRandom().randrange(2**32):08x}"
    with _hushed():
        every = readers(asked.files)
    print(f"seed {seed}, files {len(asked.files)}")
    print(f"{'reader':16} {'inputs':>9} {'taken':>9} {'refused':>9} {'crashed':>9}")
    crashed = 0
    for name, reader in every.items():
        counts, crashes = run(name, reader, seed, range(-(-asked.inputs // len(every))))
        report(name, counts, crashes, seed)
        crashed += counts["crashed"]
    return 1 if crashed else 0


if __name__ == "__main__":
    sys.exit(main())
