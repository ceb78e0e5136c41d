"""What this machine is, what it computes at most, and rounds that count only while nobody else computes on it.

Contestants take turns, round after round, so that what slows the machine slows all of them. Between any two of them
`peak.c` measures again how many products the processor makes: if that falls below a part of the most it ever made, the
whole round is thrown away and counted.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Generic, TypeVar

from training.command_line import without_folders

TYPES = ("fp32", "bf16", "int8")
"""In the order of peak.c."""
QUIET = 0.9
"""Part of the machine's best peak below which a round does not count."""
ATTEMPTS = 3
"""Rounds that are tried for each that is wanted."""
PACKAGES = ("openvino", "torch", "onnxruntime", "scikit-image")
_PEAK = Path(__file__).with_name("peak.c")
_CPUINFO, _MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")

Name = TypeVar("Name", bound=Hashable)
Measured = TypeVar("Measured")


@dataclass(frozen=True, slots=True)
class Rates:
    """GMAC/s by type, 0 where the processor lacks the instruction."""

    best: Mapping[str, float]
    """In the best turn."""
    middle: Mapping[str, float]
    """In the middle one: less, when others take the processor meanwhile."""


class Machine:
    """The peak of this machine, measured whenever it is asked for; a context manager, for its temporary program.

    Parameters
    ----------
    cores
        Threads that compute, each of which has a core.

    Raises
    ------
    SystemExit
        Without a C compiler.
    """

    def __init__(self, cores: int) -> None:
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        if compiler is None:
            raise SystemExit("no C compiler (cc) to build peak.c with: install gcc")
        self.cores = cores
        self._best = dict.fromkeys(TYPES, 0.0)
        self._stack = ExitStack()
        self._program = Path(self._stack.enter_context(tempfile.TemporaryDirectory())) / "peak"
        subprocess.run([compiler, "-O2", "-pthread", str(_PEAK), "-o", str(self._program)], check=True)
        self.look()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def rates(self, cores: int) -> Rates:
        """Run peak.c on so many cores."""
        done = subprocess.run([str(self._program), str(cores)], capture_output=True, text=True, check=True)
        numbers = [float(word) for word in done.stdout.split()[1:]]
        return Rates(dict(zip(TYPES, numbers[:3], strict=True)), dict(zip(TYPES, numbers[3:], strict=True)))

    def look(self) -> Mapping[str, float]:
        """What it makes now, GMAC/s by type."""
        rates = self.rates(self.cores)
        self._best = {kind: max(self._best[kind], rates.best[kind]) for kind in TYPES}
        return rates.middle

    @property
    def peak(self) -> Mapping[str, float]:
        """The most it ever made, GMAC/s by type; 0 for a type that it has no instructions for."""
        return self._best

    def part(self, rates: Mapping[str, float]) -> float:
        """What `rates` are of the peak, in the type where that is least."""
        return min(rates[kind] / best for kind, best in self._best.items() if best)

    def describe(self) -> str:
        """Processor, memory, system, packages and peak, in a line for above a table."""
        peaks = ", ".join(f"{best:.0f} in {kind}" for kind, best in self._best.items() if best)
        tiles = " (not that of its AMX tiles, which is higher)" if "amx_int8" in _of_cpu("flags").split() else ""
        return f"{description(self.cores)} Peak of these cores: {peaks} GMAC/s{tiles}."


def description(cores: int) -> str:
    """Processor, so many of its cores, memory, system and packages, in a line for above a table."""
    memory_gb = int(_MEMINFO.read_text().split()[1]) * 1024 / 1e9
    return (
        f"{_of_cpu('model name')} (family {_of_cpu('cpu family')}, model {_of_cpu('model')}), {cores} of "
        f"{os.cpu_count()} cores, {memory_gb:.0f} GB; Linux {platform.release()}, {versions()}."
    )


def _of_cpu(key: str) -> str:
    """What Linux says of the first processor."""
    pairs = (line.partition(":") for line in _CPUINFO.read_text().splitlines())
    return next((value.strip() for name, _, value in pairs if name.strip() == key), "unknown")


def versions() -> str:
    """Of Python and of what computes here."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def own_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass
class Rounds(Generic[Name, Measured]):
    """What was measured, round by round; which of them count is known only when the best peak is."""

    machine: Machine
    quiet: float
    rounds: list[tuple[Mapping[str, float], dict[Name, Measured]]] = field(default_factory=list)
    """The lowest rates of each, and what the contestants did."""

    @property
    def counted(self) -> list[dict[Name, Measured]]:
        """Those in which the machine was quiet."""
        return [measured for low, measured in self.rounds if self.machine.part(low) >= self.quiet]

    def of(self, contestant: Name) -> list[Measured]:
        """What one of them was measured to do, in the rounds that count."""
        return [measured[contestant] for measured in self.counted]

    def describe(self) -> str:
        """How many rounds count, in a line for above a table."""
        counted = len(self.counted)
        return (
            f"{counted} interleaved round{'s' * (counted != 1)}, medians; {len(self.rounds) - counted} thrown away, in "
            f"which the peak fell below {self.quiet:.0%} of the best."
        )


def interleaved(
    machine: Machine, contestants: Mapping[Name, Callable[[], Measured]], wanted: int, quiet: float
) -> Rounds[Name, Measured]:
    """Let all `contestants` have their turn, until `wanted` rounds count, or `ATTEMPTS` times as many were tried.

    Raises
    ------
    SystemExit
        If none counts.
    """
    done: Rounds[Name, Measured] = Rounds(machine, quiet)
    for attempt in range(ATTEMPTS * wanted):
        low: Mapping[str, float] = machine.look()
        measured: dict[Name, Measured] = {}
        for name, contestant in contestants.items():
            measured[name] = contestant()
            low = {kind: min(rate, low[kind]) for kind, rate in machine.look().items()}
        done.rounds.append((low, measured))
        print(f"round {attempt + 1}: {machine.part(low):.0%} of the peak at least", file=sys.stderr, flush=True)
        if len(done.counted) == wanted:
            return done
    if not done.counted:
        raise SystemExit(
            f"in none of {ATTEMPTS * wanted} rounds had this benchmark {quiet:.0%} of the machine: end what else runs, "
            "or say with --quiet how much less is good enough"
        )
    return done


def seconds(work: Callable[[], object]) -> Callable[[], float]:
    """`work` as a contestant whose time on the wall counts."""

    def timed() -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    return timed


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds that count (default %(default)s)")
    parser.add_argument(
        "--quiet",
        type=float,
        default=QUIET,
        metavar="PART",
        help="part of the machine's peak that a round needs to count (default %(default)s)",
    )
    return parser


def command(paths: Iterable[Path | None]) -> str:
    """The command line; of `paths` the last part alone."""
    return f"python benchmarks/{Path(sys.argv[0]).name} {without_folders(sys.argv[1:], paths)}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Raises
    ------
    ValueError
        If a row is not as long as the head.
    """
    lines = [head, ["---"] * len(head), *rows]
    if any(len(line) != len(head) for line in lines):
        raise ValueError("a row is not as long as the head of its table")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int) -> str:
    """`value` for a table; "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def median(values: Sequence[float], digits: int) -> str:
    """The median for a table, with the least and the most behind it."""
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"
