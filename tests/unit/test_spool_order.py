"""The order of the spool's system calls: what was acknowledged survives a power cut only in this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tracing import ANSWERED, kept, require_strace

_STORE = """
import sys
from pathlib import Path
from dicomnode.spool import Incoming, Spool
spool = Spool(Path(sys.argv[1]))
if sys.argv[2] == "twin":  # another association has made the folder and has not synced its name yet
    (spool.instances / "1.2.3").mkdir()
for number in ("1.2.3.1", "1.2.3.2"):
    print("begin", flush=True)
    incoming = Incoming(number, "1.2", "1.2.840.10008.1.2.1", "A", "B")
    with spool.begin(incoming, memoryview(b"data" * 50)) as arrival:
        arrival.keep("1.2.3", "1.2")
    print("acknowledged", flush=True)
"""


PRINTED = r'"\n", 1'
"""Of a call that ends what Python prints."""


def _traced(folder: Path, how: str) -> list[list[str]]:
    """System calls for each of two objects, with the paths of descriptors as strace resolves them."""
    require_strace(folder)
    log = folder / "strace"
    calls_traced = "write,writev,fsync,fdatasync,rename,renameat,renameat2,mkdir"
    command = ["strace", "-f", "-y", "-o", log, "-e", f"trace={calls_traced}"]
    done = subprocess.run(
        [*command, sys.executable, "-c", _STORE, folder / "spool", how], timeout=60, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    _, first, _, second = kept(log.read_text(), folder / "spool", PRINTED)  # begin, acknowledged, begin, ...
    return [first, second]


def test_written_synced_renamed_and_the_folder_synced_before_store_returns(tmp_path: Path) -> None:
    first, second = _traced(tmp_path, "alone")
    written = ["writev incoming/PART", "fsync incoming/PART"]
    placed = ["rename incoming/PART instances/1.2.3/1.2.3.{}.dcm", "fsync instances/1.2.3", ANSWERED]
    assert first == ["mkdir instances/1.2.3", "fsync instances", *written, placed[0].format(1), *placed[1:]]
    assert second == [*written, placed[0].format(2), *placed[1:]]


def test_the_name_of_the_series_folder_is_synced_by_whoever_uses_it_first(tmp_path: Path) -> None:
    """Two associations begin a series at once: the one that finds the folder must not rely on the other's sync."""
    first, _ = _traced(tmp_path, "twin")
    assert first[0] == "fsync instances"
