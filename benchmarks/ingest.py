"""Receiving a series: our reception against DCMTK's storescp and Orthanc, in interleaved rounds.

    python benchmarks/ingest.py FOLDER [--slices 304] [--rounds 5]

FOLDER holds the DICOM files of a CT series; they are repeated under new UIDs up to the number of slices, anew for each
round. The sender is DCMTK's dcmsend, one process for each association. Clients and peer servers run with TCP_NODELAY=1,
but for the client named "Nagle", which is dcmsend as Debian starts it. Our server is the whole reception: digest, check
of the UIDs, index rows. Under "no sync" it does not sync files and folders, as storescp does not; nothing but this
program can switch that off. When a run begins, the disk is idle, there is memory for its files that was in use a moment
ago (in a virtual machine any other may come slowly), and nothing was deleted before, after which a file system may take
several times as long to make a file. Rounds interleave all rows, each in an order of its own: only ratios within one
run mean anything on a machine that is shared. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from egress import HOST, NAGLE, NODELAY, free_port, series, start
from pynetdicom import AllStoragePresentationContexts

from dicomnode import pdu
from dicomnode.config import Config
from dicomnode.connection import Connection, connect
from dicomnode.db import open_database
from dicomnode.intake import Intake
from dicomnode.requestor import Peer
from dicomnode.scp import StorageServer, transfer_syntaxes
from dicomnode.scu import Answer, Outgoing, Refused, store
from dicomnode.spool import Spool

_IDLE, _IDLE_S = 50, 10.0
_SETUPS = 50
_WARM_BYTES = 2**30
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_QUIET_S = 86_400
"""No series is closed while we measure."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and the folder of what it got."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    http_port: int | None = None

    def held(self) -> int:
        """Number of instances that it holds."""
        if self.http_port is None:
            return sum(1 for path in self.folder.rglob("*") if path.is_file())
        request = urllib.request.Request(f"http://{HOST}:{self.http_port}/statistics")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return int(json.loads(answer.read())["CountInstances"])

    def cpu_s(self) -> float:
        """Processor time of it and of its ended children, once it has nothing more to do."""
        before = -1.0
        while (now := self._cpu_s()) != before:
            before = now
            time.sleep(0.3)  # longer than the step of the clock that the system counts its work by
        return now

    def _cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(int(ticks) for ticks in fields[11:15]) / _TICKS_PER_S

    def resident_kib(self) -> int:
        """Resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])


def serve(folder: Path, port: int, *, sync: bool) -> None:
    """Our reception, until SIGTERM."""
    if not sync:
        os.fsync = lambda fd: None
    config = Config.model_validate(
        {
            "node": {"ae_title": "ANY", "address": HOST, "port": port},
            "assembly": {"quiet_s": _QUIET_S, "quiet_without_evidence_s": _QUIET_S},
            "reception": {"max_associations_per_peer": 64, "min_free_mb": 1, "network_timeout_s": 3600},
        }
    )
    database = open_database(f"sqlite:///{folder.parent / folder.name}.db")
    spool = Spool(folder)
    intake = Intake(config, database, spool, lambda series_uid: server.open_associations(series_uid), {})
    server = StorageServer(config, spool, intake.keywords, intake.stored)
    intake.start()
    server.start()
    signal.sigwait({signal.SIGTERM})
    server.stop(1)
    intake.stop()


def send(port: int, folders: Sequence[Path], environment: dict[str, str]) -> float:
    """Seconds that dcmsend takes, with one process for each folder."""
    begun = time.perf_counter()
    command = ["dcmsend", "-q", "-aec", "ANY", "+sd", HOST, str(port)]
    clients = [subprocess.Popen([*command, str(folder)], env=environment) for folder in folders]
    for client in clients:
        if client.wait():  # no time-out: with one it is looked at every 50 ms only
            raise SystemExit("dcmsend failed")
    return time.perf_counter() - begun


def split(files: Sequence[Path], parts: int, folder: Path) -> list[Path]:
    """Folders with links to the files, one for each association."""
    folders = [folder / f"{parts}-{n}" for n in range(parts)]
    for n, one in enumerate(folders):
        one.mkdir()
        for path in files[n::parts]:
            os.link(path, one / path.name)
    return folders


def associate(port: int, contexts: Sequence[pdu.Context], calling: str) -> tuple[Connection, float]:
    """An association, and the milliseconds from before the request until after the answer."""
    connection = connect("node", HOST, port, connect_timeout_s=10, stall_timeout_s=10)
    request = pdu.associate_rq(
        calling, "ANY", contexts, max_pdu=0, implementation_class_uid="1.2.3", implementation_version_name="BENCH"
    )
    begun = time.perf_counter()
    connection.send([request], time.monotonic() + 10, "the request")
    kind, _ = connection.receive(time.monotonic() + 10, 1_000_000, "the answer")
    took_ms = 1000 * (time.perf_counter() - begun)
    if kind != pdu.PduType.ASSOCIATE_AC:
        raise SystemExit("an association was rejected")
    return connection, took_ms


def set_up_ms(port: int, contexts: Sequence[pdu.Context], *, known: bool) -> float:
    """Median of `_SETUPS` associations, one after the other: of a peer that called before, or of one that did not."""
    took = []
    for number in range(_SETUPS):
        connection, took_ms = associate(port, contexts, "BENCH" if known else f"BENCH{len(contexts)}-{number}")
        took.append(took_ms)
        connection.send([pdu.RELEASE_RQ], time.monotonic() + 10, "the release")
        connection.receive(time.monotonic() + 10, 4096, "the answer to it")
        connection.close()
    return statistics.median(took)


def idle(server: Server, items: Sequence[Outgoing]) -> tuple[float, float]:
    """Per cent of a core and KiB for each of `_IDLE` associations that brought an image and now say nothing."""
    before_kib = server.resident_kib()
    over = threading.Event()
    arrived = threading.Semaphore(0)

    def bring(item: Outgoing) -> None:
        # Asked before every item: the answer to the second one lets the association go.
        def should_stop() -> bool:
            if answers:
                arrived.release()
                over.wait()
            return bool(answers)

        answers: list[Answer | Refused] = []
        store(Peer("node", "ANY", HOST, server.port, "BENCH"), [item, item], answers.append, should_stop)

    senders = [threading.Thread(target=bring, args=(item,)) for item in items[:_IDLE]]
    for sender in senders:
        sender.start()
    for _ in senders:
        if not arrived.acquire(timeout=60):
            raise SystemExit("an association did not bring its image")
    began_s = server.cpu_s()
    time.sleep(_IDLE_S)  # idling is what is measured
    per_cent = 100 * (server._cpu_s() - began_s) / _IDLE_S
    each_kib = (server.resident_kib() - before_kib) / _IDLE
    over.set()
    for sender in senders:
        sender.join()
    return per_cent, each_kib


def servers(work: Path) -> dict[str, Server]:
    """All that are compared, started."""
    ports = {name: free_port() for name in ("storescp", "storescp --fork", "Orthanc", "http", "ours, no sync", "ours")}
    folders = {name: work / name.replace(" ", "").replace(",", "-") for name in ports if name != "http"}
    for folder in folders.values():
        folder.mkdir()
    configuration = {
        "StorageDirectory": str(folders["Orthanc"]),
        "IndexDirectory": str(work),
        "Plugins": [],
        "HttpPort": ports["http"],
        "AuthenticationEnabled": False,
        "DicomPort": ports["Orthanc"],
        "DicomThreadsCount": 8,
    }
    (work / "orthanc.json").write_text(json.dumps(configuration))
    scp = ["storescp", "-q", "-pdu", "131072"]
    ourselves = [sys.executable, __file__, "--serve"]
    commands = {
        "storescp": [*scp, "-od", str(folders["storescp"]), str(ports["storescp"])],
        "storescp --fork": [*scp, "--fork", "-od", str(folders["storescp --fork"]), str(ports["storescp --fork"])],
        "Orthanc": ["/usr/sbin/Orthanc", str(work / "orthanc.json")],
        "ours, no sync": [*ourselves, str(folders["ours, no sync"]), str(ports["ours, no sync"]), "--no-sync"],
        "ours": [*ourselves, str(folders["ours"]), str(ports["ours"])],
    }
    started = {name: start(command, ports[name], NODELAY) for name, command in commands.items()}
    holds = {name: folder / "instances" if name.startswith("ours") else folder for name, folder in folders.items()}
    return {
        name: Server(process, ports[name], holds[name], ports["http"] if name == "Orthanc" else None)
        for name, process in started.items()
    }


ROWS: list[tuple[str, int, dict[str, str]]] = [
    ("storescp", 1, NODELAY),
    ("ours, no sync", 1, NODELAY),
    ("ours, no sync", 1, NAGLE),
    ("Orthanc", 1, NODELAY),
    ("ours", 1, NODELAY),
    ("Orthanc", 4, NODELAY),
    ("ours", 4, NODELAY),
    ("storescp --fork", 8, NODELAY),
    ("ours, no sync", 8, NODELAY),
    ("storescp --fork", 4, NODELAY),
]
"""Server, associations, environment of the client; the last is what is left of Orthanc's time without any sync."""
BARS: list[tuple[str, int, int, int, float]] = [
    ("ingest, one association", 1, 0, 0, 1.2),
    ("ingest, one association, server CPU", 1, 0, 1, 2.0),
    ("ingest, synced, one association", 4, 3, 0, 0.6),
    ("ingest, synced, four associations", 6, 5, 0, 0.5),
    ("eight associations", 8, 7, 0, 1.5),
    ("client in its default environment", 2, 1, 0, 2.0),
]
"""Name, row, row that it is compared with, 0 for the wall or 1 for the processor time, most that the ratio may be."""


def measure(running: dict[str, Server], source: Path, folder: Path, slices: int) -> list[tuple[float, float]]:
    """Wall and processor time of the server for each of `ROWS`, in seconds; no server gets an image twice."""
    took = [(0.0, 0.0)] * len(ROWS)
    sets: list[list[Path]] = []
    turns: Counter[str] = Counter()
    for row in random.sample(range(len(ROWS)), len(ROWS)):
        name, parts, environment = ROWS[row]
        server = running[name]
        if turns[name] == len(sets):
            (folder / str(len(sets))).mkdir()
            sets.append([item.path for item in series(source, folder / str(len(sets)), slices)])
        files = sets[turns[name]]
        turns[name] += 1
        folders = split(files, parts, Path(tempfile.mkdtemp(dir=folder)))
        settle()
        held, before_s = server.held(), server.cpu_s()
        wall_s = send(server.port, folders, environment)
        took[row] = wall_s, server.cpu_s() - before_s
        if (came := server.held() - held) != slices:
            raise SystemExit(f"{name} took {came} instances of {slices}")
        empty(server.folder)
    empty(folder)
    return took


def settle() -> None:
    """Wait for the disk, and give back some memory that was just in use."""
    os.sync()
    mmap.mmap(-1, _WARM_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def empty(folder: Path) -> None:
    """Make all files in it empty, however deep."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, 0)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slices", type=int, default=304)
    parser.add_argument("--rounds", type=int, default=5)
    if "--serve" in sys.argv:
        folder, port, *no_sync = sys.argv[sys.argv.index("--serve") + 1 :]
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        serve(Path(folder), int(port), sync=not no_sync)
        return
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "in").mkdir()
        items = series(arguments.folder, work / "in", arguments.slices)
        megabytes = sum(item.path.stat().st_size for item in items) / 1e6
        (work / "servers").mkdir()
        running = servers(work / "servers")
        try:
            rounds = []
            for number in range(arguments.rounds):
                (work / f"round{number}").mkdir()
                rounds.append(measure(running, arguments.folder, work / f"round{number}", arguments.slices))
            ours = running["ours, no sync"]
            classes = [str(context.abstract_syntax) for context in AllStoragePresentationContexts]
            everything = [(one, tuple(map(str, transfer_syntaxes()))) for one in classes[: pdu.MAX_CONTEXTS]]
            proposed = {"one class": everything[:1], "every class": everything}
            set_up = {
                (what, known): set_up_ms(ours.port, contexts, known=known)
                for what, contexts in proposed.items()
                for known in (True, False)
            }
            per_cent, each_kib = idle(ours, items)
        finally:
            for server in running.values():
                server.process.terminate()
            for server in running.values():
                server.process.wait(20)
    report(rounds, arguments.slices, megabytes)
    print(f"\nassociation set-up, every syntax, median of {_SETUPS} (at most 5 ms):")
    for (what, known), took_ms in set_up.items():
        print(f"- {what}, of a peer that {'called before' if known else 'never called'}: {took_ms:.1f} ms")
    print(f"{_IDLE} idle associations (at most 5 % of a core, 512 KiB each): {per_cent:.1f} %, {each_kib:.0f} KiB each")


def report(rounds: Sequence[Sequence[tuple[float, float]]], slices: int, megabytes: float) -> None:
    """What was measured, and how it compares."""
    print(f"{slices} images, {megabytes:.0f} MB, {len(rounds)} interleaved rounds, median [min-max]")
    print("| server | associations | client | wall s | MB/s | server CPU s |")
    print("|---|---|---|---|---|---|")
    middle: list[tuple[float, float]] = []
    for n, (name, parts, environment) in enumerate(ROWS):
        walls, cpus = zip(*(took[n] for took in rounds), strict=True)
        middle.append((statistics.median(walls), statistics.median(cpus)))
        wall_s, cpu_s = middle[-1]
        client = "Nagle" if environment is NAGLE else "TCP_NODELAY"
        print(
            f"| {name} | {parts} | {client} | {wall_s:.2f} [{min(walls):.2f}-{max(walls):.2f}] "
            f"| {megabytes / wall_s:.0f} | {cpu_s:.2f} [{min(cpus):.2f}-{max(cpus):.2f}] |"
        )
    print("\n| bar | against | ratio | at most |")
    print("|---|---|---|---|")
    for name, row, against, which, most in BARS:
        ratio = middle[row][which] / middle[against][which]
        print(f"| {name} | {ROWS[against][0]} | {ratio:.2f} | {most} |")


if __name__ == "__main__":
    main()
