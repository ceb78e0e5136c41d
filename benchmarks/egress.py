"""Sending a series: our SCU against DCMTK's dcmsend, to the same storescp and Orthanc, in interleaved rounds.

    python benchmarks/egress.py FOLDER [--slices 304] [--rounds 7]
    python benchmarks/egress.py FOLDER --sends 100                is every image of so many sends answered?

FOLDER holds the DICOM files of a CT series; they are repeated under new SOP Instance UIDs up to the number of slices.
Every program runs with TCP_NODELAY=1, but for the target named "default", which is storescp as Debian starts it.
Rounds go dcmsend, ours, dcmsend, ours, ...: only ratios within one run mean anything on a machine that is shared.
With --sends nothing is timed: our SCU sends all images to storescp again and again, which forgets them in between. Exit
status 1: an answer is lost or no success, or storescp has no file of an image.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pydicom import dcmread
from pydicom.uid import generate_uid

from dicomnode.errors import PeerError
from dicomnode.requestor import Peer
from dicomnode.scu import Answer, Outgoing, Refused, store

HOST = "127.0.0.1"
NODELAY = {**os.environ, "TCP_NODELAY": "1"}
NAGLE = {name: value for name, value in os.environ.items() if name != "TCP_NODELAY"}
STORESCP = ("storescp", "-q", "-pdu", "131072", "-od")


class Answered(NamedTuple):
    """What became of the images of some sends."""

    images: int
    successes: int
    """Answered with status 0x0000."""
    lost: int
    """Not answered at all."""
    kept: int
    """Files that the peer had after each send, in all."""


def series(source: Path, folder: Path, slices: int) -> list[Outgoing]:
    """`slices` files in `folder`: one new series, of images with new UIDs."""
    files = sorted(path for path in source.rglob("*.dcm"))
    series_uid = generate_uid()
    items = []
    for n in range(slices):
        ds = dcmread(files[n % len(files)])
        ds.SeriesInstanceUID = series_uid
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        path = folder / f"{n:04d}.dcm"
        ds.save_as(path)
        items.append(Outgoing(str(ds.SOPInstanceUID), str(ds.SOPClassUID), str(ds.file_meta.TransferSyntaxUID), path))
    return items


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def start(command: Sequence[str], port: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a server; returns when it accepts connections."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while True:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
            return process
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[0]} does not listen") from None
            time.sleep(0.05)  # a foreign program: nothing but its port tells that it listens


def dcmsend(port: int, items: Sequence[Outgoing]) -> None:
    """All items over one association."""
    folder = str(items[0].path.parent)
    subprocess.run(
        ["dcmsend", "-q", "-aec", "ANY", "+sd", HOST, str(port), folder], env=NODELAY, check=True, timeout=300
    )


def target(port: int) -> Peer:
    """How our SCU calls a server."""
    return Peer("target", "ANY", HOST, port, "BENCHMARK")


def ours(port: int, items: Sequence[Outgoing]) -> None:
    """The same with our SCU; every response must be there and be a success."""
    answers: list[Answer | Refused] = []
    store(target(port), items, answers.append, lambda: False)
    if answers != [Answer(item.sop_instance_uid, 0) for item in items]:
        raise SystemExit("a response is missing or is no success")


def again(port: int, items: Sequence[Outgoing], sends: int, folder: Path) -> Answered:
    """All items by our SCU so many times, each over an association of its own to a peer that keeps them in `folder`."""
    successes = lost = kept = 0
    for send in range(1, sends + 1):
        answers: list[Answer | Refused] = []
        try:
            store(target(port), items, answers.append, lambda: False)
        except PeerError as error:
            print(f"send {send}, after {len(answers)} answers: {error}", file=sys.stderr)
        status = {answer.sop_instance_uid: answer.status for answer in answers if isinstance(answer, Answer)}
        successes += sum(status.get(item.sop_instance_uid) == 0x0000 for item in items)
        lost += sum(item.sop_instance_uid not in status for item in items)
        for file in folder.iterdir():
            kept += 1
            file.unlink()
    return Answered(sends * len(items), successes, lost, kept)


def sent_again(items: Sequence[Outgoing], sends: int, folder: Path) -> int:
    """The exit status of ``--sends``; prints what became of the images."""
    port = free_port()
    server = start([*STORESCP, str(folder), str(port)], port, NODELAY)
    begun = time.monotonic()
    try:
        found = again(port, items, sends, folder)
    finally:
        server.terminate()
        server.wait(20)
    print(
        f"{sends} sends, {found.images} images, {found.successes} answers with status 0x0000, "
        f"{found.lost} lost answers, {found.kept} files at storescp, {time.monotonic() - begun:.0f} s"
    )
    return 0 if found == Answered(found.images, found.images, 0, found.images) else 1


def timed(send: Callable[[int, Sequence[Outgoing]], None], port: int, items: Sequence[Outgoing]) -> float:
    """Seconds on the wall."""
    begun = time.perf_counter()
    send(port, items)
    return time.perf_counter() - begun


def main() -> int:
    """Print a table of medians, or with --sends what was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slices", type=int, default=304)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sends", type=int, metavar="N", help="count the answers to so many sends; measure no time")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        for name in ("in", "out", "default", "orthanc"):
            (work / name).mkdir()
        items = series(arguments.folder, work / "in", arguments.slices)
        if arguments.sends is not None:
            return sent_again(items, arguments.sends, work / "out")
        megabytes = sum(item.path.stat().st_size for item in items) / 1e6
        ports = {name: free_port() for name in ("storescp", "default", "orthanc")}
        (work / "orthanc.json").write_text(
            f'{{"StorageDirectory": "{work}/orthanc", "IndexDirectory": "{work}/orthanc", "Plugins": [], '
            f'"HttpServerEnabled": false, "DicomPort": {ports["orthanc"]}, "OverwriteInstances": true}}'
        )
        servers = [
            start([*STORESCP, str(work / "out"), str(ports["storescp"])], ports["storescp"], NODELAY),
            start([*STORESCP, str(work / "default"), str(ports["default"])], ports["default"], NAGLE),
            start(["/usr/sbin/Orthanc", str(work / "orthanc.json")], ports["orthanc"], NODELAY),
        ]
        runs = {
            ("storescp", "dcmsend"): dcmsend,
            ("storescp", "ours"): ours,
            ("default", "ours"): ours,
            ("orthanc", "dcmsend"): dcmsend,
            ("orthanc", "ours"): ours,
        }
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        try:
            for _ in range(arguments.rounds):
                for key, send in runs.items():
                    seconds[key].append(timed(send, ports[key[0]], items))
        finally:
            for server in servers:
                server.terminate()
            for server in servers:
                server.wait(20)
    print(f"{arguments.slices} images, {megabytes:.0f} MB, {arguments.rounds} interleaved rounds, median [min-max]")
    print("| target | sender | wall s | MB/s | ratio to dcmsend |")
    print("|---|---|---|---|---|")
    for (target, sender), walls in seconds.items():
        median = statistics.median(walls)
        base = statistics.median(seconds["storescp" if target == "default" else target, "dcmsend"])
        print(
            f"| {target} | {sender} | {median:.2f} [{min(walls):.2f}-{max(walls):.2f}] "
            f"| {megabytes / median:.0f} | {median / base:.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
