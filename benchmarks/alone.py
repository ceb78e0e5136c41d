"""A turn in a process of its own, whose memory nobody else has filled: what it is told and answers is JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FLAG = "--alone"


def ask(program: str, told: Any, environment: Mapping[str, str] | None = None) -> Any:
    """What the script `program` answers, see `answer`; with other environment variables than this process has.

    Raises
    ------
    SystemExit
        If it failed; with what it wrote.
    """
    command = [sys.executable, program, FLAG]
    done = subprocess.run(command, input=json.dumps(told), capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{Path(program).name} failed with {told}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(work: Callable[[Any], Any], main: Callable[[], None]) -> None:
    """Run a script: `main`, or for `ask` what `work` makes of what it was told."""
    if sys.argv[1:] == [FLAG]:
        print(json.dumps(work(json.loads(sys.stdin.read()))))
    else:
        main()
