"""A process with the node's engine and nothing else, for tests that kill, freeze and watch it.

``python engine_app.py DATABASE FOLDER NAME`` obeys lines on stdin and ends when it closes:
``process KEY JOB RUN PRIORITY``, ``deliver KEY JOB DESTINATION ATTEMPT PRIORITY``, ``ended KEY``. Everything that it
runs is a line in FOLDER/log: ``begin|end NAME WHAT``. Work waits while FOLDER/hold-NAME exists.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from dicomnode.db import open_database
from dicomnode.engine import Engine

POLL_S, BEAT_S, DEAD_AFTER_S = 0.05, 0.5, 4.0
_DEADLINE_S = 60.0


def main(database: str, folder: Path, name: str) -> None:
    """Run until stdin closes."""

    def note(what: str) -> None:
        with (folder / "log").open("a") as file:
            file.write(f"{what}\n")

    def work(what: str) -> None:
        note(f"begin {name} {what}")
        end = time.monotonic() + _DEADLINE_S
        while (folder / f"hold-{name}").exists() and time.monotonic() < end:
            time.sleep(0.02)  # a test in another process ends the wait
        if "broken" in what:
            raise RuntimeError("the database failed under it")
        note(f"end {name} {what}")

    engine = Engine(
        open_database(database),
        lambda job, run: work(f"{job} {run}"),
        lambda job, destination, attempt: work(f"{job} {destination} {attempt}"),
        poll_s=POLL_S,
        beat_s=BEAT_S,
        dead_after_s=DEAD_AFTER_S,
    )
    engine.start(alone=False)
    print(f"ready {engine.executor_id}", flush=True)
    for line in sys.stdin:
        command, key, *rest = line.split()
        if command == "process":
            engine.submit_process(key, rest[0], int(rest[1]), priority=int(rest[2]))
            print("submitted", flush=True)
        elif command == "deliver":
            engine.submit_deliver(key, rest[0], rest[1], int(rest[2]), priority=int(rest[3]))
            print("submitted", flush=True)
        else:
            print(engine.ended(key), flush=True)
    engine.stop(5)
    print("stopped", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
