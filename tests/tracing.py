"""System calls as strace sees them, for promises that no result shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


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


def calls(trace: str) -> Iterator[tuple[int, str, str]]:
    """Thread, name, and all that strace says of each call that succeeded, in the order in which they returned."""
    begun: dict[int, str] = {}
    for line in trace.splitlines():
        thread, _, said = line.strip().partition(" ")
        said = said.strip()
        if said.endswith("<unfinished ...>"):
            begun[int(thread)] = said.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>", said):
            said = begun.pop(int(thread)) + said[resumed.end() :]
        if done := re.match(r"(\w+)\(.*\) += \d+", said):
            yield int(thread), done[1], said
