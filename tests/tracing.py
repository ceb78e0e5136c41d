"""System calls as strace sees them, for promises that no result shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ANSWERED = "answer"


def require_strace(folder: Path) -> None:
    """Skip (fail, when CI is set) unless strace is here and the kernel lets it trace."""
    reason = "strace is not installed"
    if shutil.which("strace"):
        tried = subprocess.run(["strace", "-f", "-o", folder / "try", "true"], capture_output=True, check=False)
        if tried.returncode == 0:
            return
        reason = f"strace may not trace here: {tried.stderr.decode(errors='replace').strip()}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class Call(NamedTuple):
    """A system call that succeeded."""

    name: str
    said: str
    """All that strace says of it."""
    begun: int
    ended: int
    """Lines of the trace."""


def calls(trace: str) -> Iterator[Call]:
    """The calls of all threads, in the order in which they returned."""
    begun: dict[int, tuple[int, str]] = {}
    for number, line in enumerate(trace.splitlines()):
        thread, _, said = line.strip().partition(" ")
        first, said = number, said.strip()
        if said.endswith("<unfinished ...>"):
            begun[int(thread)] = number, said.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>", said):
            first, beginning = begun.pop(int(thread))
            said = beginning + said[resumed.end() :]
        if done := re.match(r"(\w+)\(.*\) += \d+", said):
            yield Call(done[1], said, first, number)


def kept(trace: str, spool: Path, answer: str) -> list[list[str]]:
    """What was done to files of the spool before each call of which strace says `answer`.

    A folder is made while a file is written; it stands first here. Everything else must have ended before a file is
    renamed, before its folder is synced, and before the answer.
    """
    answers: list[list[str]] = []
    folder_made: list[str] = []
    done: list[str] = []
    last_ended = -1
    for call in calls(trace):
        paths = [re.sub(r"[0-9a-f]{32}-\d+\.part", "PART", one) for one in re.findall(rf"{spool}/([^>\"]*)", call.said)]
        answered = answer in call.said
        if not paths and not answered:
            continue
        what = " ".join([call.name, *paths])
        if call.name == "mkdir" or what in ("fsync instances", "fsync conflicts"):
            folder_made.append(what)
        else:
            assert call.begun > last_ended or ("PART" in what and call.name != "rename"), f"{what} began too early"
            done.append(ANSWERED if answered else what)
        last_ended = max(last_ended, call.ended)
        if answered:
            answers.append(folder_made + done)
            folder_made, done = [], []
    return answers
