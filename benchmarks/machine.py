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

from pipelines.openvino_core import ISA_LIMITS, cpu_flags, isa_limit
from training.command_line import without_folders

TYPES = ("fp32", "bf16", "int8")
FLAG = {
    "vfmadd231ps": "avx512f",
    "vdpbf16ps": "avx512_bf16",
    "tdpbf16ps": "amx_bf16",
    "vpdpbusd": "avx512_vnni",
    "tdpbusd": "amx_int8",
}
"""Of the CPU, as Linux names it, by the instruction of peak.c that needs it."""
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
class Rate:
    """What the machine makes with one instruction, GMAC/s: a line of peak.c."""

    kind: str
    """One of `TYPES`."""
    instruction: str
    best: float
    """In the best turn."""
    middle: float
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
        self._best: dict[tuple[str, str], float] = {}
        """By type and instruction, those of a type in the order of peak.c."""
        self._stack = ExitStack()
        self._program = Path(self._stack.enter_context(tempfile.TemporaryDirectory())) / "peak"
        subprocess.run([compiler, "-O2", "-pthread", str(_PEAK), "-o", str(self._program)], check=True)
        self.look()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def rates(self, cores: int) -> list[Rate]:
        """Run peak.c on so many cores; nothing of instructions that the processor has not, or OpenVINO leaves out."""
        done = subprocess.run([str(self._program), str(cores)], capture_output=True, text=True, check=True)
        lines = (line.split() for line in done.stdout.splitlines())
        return [
            Rate(kind, instruction, float(best), float(middle))
            for _, kind, instruction, best, middle in lines
            if FLAG[instruction] in cpu_flags()
        ]

    def look(self) -> Mapping[str, float]:
        """What it makes now, GMAC/s by type."""
        now = dict.fromkeys(TYPES, 0.0)
        for rate in self.rates(self.cores):
            of = rate.kind, rate.instruction
            self._best[of] = max(self._best.get(of, 0.0), rate.best)
            now[rate.kind] = max(now[rate.kind], rate.middle)
        return now

    @property
    def peak(self) -> Mapping[str, float]:
        """The most it ever made, GMAC/s by type, with the fastest instruction; 0 for a type that it has none for."""
        return {kind: max((best for (of, _), best in self._best.items() if of == kind), default=0.0) for kind in TYPES}

    def part(self, rates: Mapping[str, float]) -> float:
        """What `rates` are of the peak, in the type where that is least."""
        return min(rates[kind] / best for kind, best in self.peak.items() if best)

    def describe(self) -> str:
        """Processor, memory, system, packages and peak, in a line for above a table."""
        peaks = ", ".join(filter(None, map(self._by_instruction, TYPES)))
        return f"{description(self.cores)} Peak of these cores: {peaks} GMAC/s."

    def _by_instruction(self, kind: str) -> str:
        """The peak in a type by the instruction that makes it, then by the others: on a CPU with AMX, by vectors.

        With them, readers can compare with a CPU that has no tiles.
        """
        made = sorted(((best, by) for (of, by), best in self._best.items() if of == kind), reverse=True)
        if not made:
            return ""
        (best, by), *others = made
        return f"{best:.0f} in {kind} ({'; '.join([by, *(f'{other:.0f} by {name}' for other, name in others)])})"


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
    """The command line, with a limit to the instructions before it; of `paths` the last part alone."""
    limit = f"{ISA_LIMITS[0]}={isa_limit()} " if isa_limit() else ""
    return f"{limit}python benchmarks/{Path(sys.argv[0]).name} {without_folders(sys.argv[1:], paths)}"


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
