"""``kill -9`` at random moments, again and again: nothing acknowledged is lost, every job ends, nothing is sent twice.

    python tests/killing.py --runs 200

Each run sends a series to a running node and kills the node, or its worker, while it receives, denoises or delivers.
The seed of a run decides what is killed when, as far as processes obey; it is printed, and ``--seed`` and ``--runs 1``
try one again. Where Orthanc is installed it receives what our own oracle does, and must hold the same.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ct_builder import phantom, write_series
from holdings import check_holds_the_result, check_kept, derived_series
from node_process import NodeProcess
from oracle import Script, StorageOracle
from peers import Orthanc, orthanc, wait_for
from scanner import Gone, Image, Scanner, image

SLICES = 12
STAGES = ("reception", "denoising", "delivery")
_JITTER_S = 0.15
_ENDS_S = 90.0
_ENDED = {"DONE", "FAILED", "CANCELLED", "SKIPPED", "WITHHELD"}


@dataclass
class Ward:
    """A node that is to be killed, and the peers that hold what it sends."""

    node: NodeProcess
    oracle: StorageOracle
    orthanc: Orthanc | None


@contextmanager
def ward(folder: Path) -> Iterator[Ward]:
    """A node with both peers, all running."""
    with ExitStack() as stack:
        oracle = stack.enter_context(StorageOracle(Script(delay_s=0.02), ae_title="PACS"))
        pacs = stack.enter_context(orthanc(folder)) if shutil.which("Orthanc") else None
        others = {} if pacs is None else {"orthanc": {"ae_title": "ORTHANC", "host": pacs.host, "port": pacs.port}}
        route = {"name": "ct", "pipeline": "identity", "send_to": ["pacs", *others]}
        # As many deaths as there are kills are nobody's fault.
        settings = {"destinations": others, "routes": [route], "compute": {"max_worker_deaths": 9}}
        node = stack.enter_context(NodeProcess(folder / "node", oracle.port, settings))
        yield Ward(node, oracle, pacs)


@dataclass
class Sending:
    """A scanner that sends until every image is acknowledged, whatever happens to the node."""

    node: NodeProcess
    images: Sequence[Image]
    pause_s: float
    acknowledged: list[Image] = field(default_factory=list)
    _given_up: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def _send(self) -> None:
        while len(self.acknowledged) < len(self.images) and not self._given_up.is_set():
            with suppress(Gone, OSError), Scanner(self.node.port, self.images) as scanner:
                for one in self.images[len(self.acknowledged) :]:
                    if scanner.store(one) != 0x0000:
                        break
                    self.acknowledged.append(one)
                    time.sleep(self.pause_s)  # as long as a scanner takes to make the next one
            self._given_up.wait(0.05)

    def finish(self, timeout_s: float) -> None:
        """Wait until everything is acknowledged."""
        self._thread.join(timeout_s)
        self._given_up.set()
        assert len(self.acknowledged) == len(self.images), f"{len(self.acknowledged)} images acknowledged"


def run(ward: Ward, seed: str, folder: Path) -> str:
    """One series, one to three kills; what was done, in words.

    Raises
    ------
    AssertionError
        Something was lost, came twice, or did not end.
    """
    chance = random.Random(seed)
    node = ward.node
    images = [image(path) for path in write_series(folder, phantom(SLICES, 96), name=seed)]
    sending = Sending(node, images, chance.choice([0.0, 0.01, 0.05]))
    done = []
    for stage in sorted(chance.choices(STAGES, k=chance.choice([1, 1, 2, 3])), key=STAGES.index):
        what, count = chance.choice(["node", "node", "worker"]), chance.randrange(1, SLICES)
        _await(ward, sending, stage, count)
        time.sleep(chance.uniform(0, _JITTER_S))  # the moment of the kill, which nothing may depend on
        safe = list(sending.acknowledged)
        _kill(node, what)
        if what == "node":
            # Its start indexes what was acknowledged before anything else can come.
            check_kept(node, safe)
        done.append(f"{what} during {stage}")
    sending.finish(_ENDS_S)
    check(ward, images)
    return ", ".join(done)


def _await(ward: Ward, sending: Sending, stage: str, count: int) -> None:
    """Return when the stage is reached, or over already."""
    uid = sending.images[0].series_uid
    if stage == "reception":
        wait_for(lambda: len(sending.acknowledged) >= count, _ENDS_S, "reception")
    elif stage == "denoising":
        begun = "SELECT 1 FROM jobs WHERE series_uid = ? AND runs > 0"
        wait_for(lambda: ward.node.query(begun, uid), _ENDS_S, "the first attempt")
    else:
        sent = (
            "SELECT count(*) AS n FROM transfers JOIN jobs ON id = job_id "
            "WHERE series_uid = ? AND transfers.state = 'ACCEPTED'"
        )
        wait_for(lambda: ward.node.query(sent, uid)[0]["n"] >= count, _ENDS_S, "delivery")


def _kill(node: NodeProcess, what: str) -> None:
    if what == "node":
        node.restart()
        return
    for child in node.children():
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def check(ward: Ward, images: Sequence[Image]) -> None:
    """Every image is kept and indexed; every job ended; each peer holds each derived instance once, and no other."""
    node, uid = ward.node, images[0].series_uid
    sql = "SELECT * FROM jobs WHERE series_uid = ? ORDER BY generation"

    def ended() -> bool:
        jobs = node.query(sql, uid)
        return node.series(uid).get("state") == "CLOSED" and bool(jobs) and all(job["state"] in _ENDED for job in jobs)

    wait_for(ended, _ENDS_S, "the end of every job")
    check_kept(node, images)
    assert not list(node.spool.rglob("*.part"))
    *older, current = node.query(sql, uid)
    assert (current["state"], current["n_in"]) == ("DONE", len(images)), current["reason"]
    assert all(job["superseded_by"] and job["state"] in ("DONE", "CANCELLED") for job in older)
    check_holds_the_result(ward.oracle, node, current["id"])
    source_of = derived_series(ward.oracle, images)[current["derived_series_uid"]]
    assert sorted(source_of.values()) == sorted(one.sop_instance_uid for one in images)
    for derived in source_of:
        assert len(set(ward.oracle.received[derived])) == 1, "the same UID came with different bytes"
    if ward.orthanc is not None:
        held = ward.orthanc.instances()
        assert [len(held.get(derived, [])) for derived in source_of] == [1] * len(source_of)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200, help="how many series (default: 200)")
    parser.add_argument("--seed", help="of the first run, a number; the others follow it (default: by chance)")
    arguments = parser.parse_args()
    first = int(arguments.seed) if arguments.seed else random.SystemRandom().randrange(10**9)
    kills: Counter[str] = Counter()
    failed = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name, ward(Path(name)) as made:
        for seed in range(first, first + arguments.runs):
            if not made.node.running:
                made.node.start()
            try:
                said = run(made, str(seed), Path(name) / str(seed))
                kills.update(said.split(", "))
            except AssertionError as error:
                said = f"FAILED: {error}"
                failed.append(seed)
            print(f"{seed}: {said}", flush=True)
        with_orthanc = "" if made.orthanc is None else " and Orthanc"
    print(f"{arguments.runs} runs from seed {first}, {sum(kills.values())} kills, {time.monotonic() - begun:.0f} s:")
    for what, count in sorted(kills.items()):
        print(f"  {count:4d} {what}")
    print(
        f"{len(failed)} failed{': ' if failed else ''}{', '.join(map(str, failed))} (checked: our oracle{with_orthanc})"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
