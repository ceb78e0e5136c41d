"""Sending a series: our SCU against DCMTK's dcmsend, to the same storescp and Orthanc, in interleaved rounds.

    python benchmarks/egress.py FOLDER [--slices 304] [--rounds 7]

FOLDER holds the DICOM files of a CT series; they are repeated under new SOP Instance UIDs up to the number of slices.
Every program runs with TCP_NODELAY=1, but for the target named "default", which is storescp as Debian starts it.
Rounds go dcmsend, ours, dcmsend, ours, ...: only ratios within one run mean anything on a machine that is shared.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pydicom import dcmread
from pydicom.uid import generate_uid

from dicomnode.requestor import Peer
from dicomnode.scu import Answer, Outgoing, Refused, store

HOST = "127.0.0.1"
NODELAY = {**os.environ, "TCP_NODELAY": "1"}
NAGLE = {name: value for name, value in os.environ.items() if name != "TCP_NODELAY"}


def series(source: Path, folder: Path, slices: int) -> list[Outgoing]:
    """`slices` files in `folder`, each with a UID of its own."""
    files = sorted(path for path in source.rglob("*.dcm"))
    items = []
    for n in range(slices):
        ds = dcmread(files[n % len(files)])
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
            time.sleep(0.05)


def dcmsend(port: int, items: Sequence[Outgoing]) -> None:
    """All items over one association."""
    folder = str(items[0].path.parent)
    subprocess.run(
        ["dcmsend", "-q", "-aec", "ANY", "+sd", HOST, str(port), folder], env=NODELAY, check=True, timeout=300
    )


def ours(port: int, items: Sequence[Outgoing]) -> None:
    """The same with our SCU; every response must be there and be a success."""
    answers: list[Answer | Refused] = []
    store(Peer("target", "ANY", HOST, port, "BENCHMARK"), items, answers.append, lambda: False)
    if answers != [Answer(item.sop_instance_uid, 0) for item in items]:
        raise SystemExit("a response is missing or is no success")


def timed(send: Callable[[int, Sequence[Outgoing]], None], port: int, items: Sequence[Outgoing]) -> float:
    """Seconds on the wall."""
    begun = time.perf_counter()
    send(port, items)
    return time.perf_counter() - begun


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slices", type=int, default=304)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        for name in ("in", "out", "default", "orthanc"):
            (work / name).mkdir()
        items = series(arguments.folder, work / "in", arguments.slices)
        megabytes = sum(item.path.stat().st_size for item in items) / 1e6
        ports = {name: free_port() for name in ("storescp", "default", "orthanc")}
        (work / "orthanc.json").write_text(
            f'{{"StorageDirectory": "{work}/orthanc", "IndexDirectory": "{work}/orthanc", "Plugins": [], '
            f'"HttpServerEnabled": false, "DicomPort": {ports["orthanc"]}, "OverwriteInstances": true}}'
        )
        scp = ["storescp", "-q", "-pdu", "131072", "-od"]
        servers = [
            start([*scp, str(work / "out"), str(ports["storescp"])], ports["storescp"], NODELAY),
            start([*scp, str(work / "default"), str(ports["default"])], ports["default"], NAGLE),
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


if __name__ == "__main__":
    main()
