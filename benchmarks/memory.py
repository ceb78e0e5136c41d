"""Memory of a pipeline: the peak while it denoises, for each number of slices in a process of its own.

    python benchmarks/memory.py PIPELINE... [--slices 100 300] [--size 512]

What is denoised is noise on a water phantom: memory does not depend on what an image shows. Its slices are there
before, and each result is dropped, so what is measured is the pipeline alone. Linux only (/proc). Unlike times, these
figures are the same on a busy machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pipelines.base import Options, denoise, load
from pipelines.openvino_core import give_memory_back
from pipelines.testing import water_volume
from pipelines.volume import Plane, Series, Volume

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_DIFFERENT_SLICES = 8


@dataclass(frozen=True, kw_only=True)
class Repeated(Series):
    """A series of any length that takes no more memory than the slices it repeats."""

    block: Volume
    slices: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices, rows, columns."""
        return self.slices, *self.block.shape[1:]

    def plane(self, k: int) -> Plane:
        """Slice `k`."""
        return self.block.plane(k % self.block.shape[0])


def megabytes(key: str) -> float:
    """``VmRSS`` (resident now) or ``VmHWM`` (most so far) of this process, MB; see proc(5)."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024 / 1e6


def forget_peak() -> None:
    """Make the most so far (``VmHWM``) what there is now, without what was freed: a pipeline could work in that."""
    give_memory_back()
    _CLEAR.write_text("5")


def measure(name: str, slices: int, size: int) -> tuple[float, float]:
    """MB of the process with the pipeline loaded; added, at most, while it denoises."""
    pipeline = load(name)
    loaded = megabytes("VmRSS")
    block = water_volume((_DIFFERENT_SLICES, size, size))
    series = Repeated(geometry=block.geometry, slice_uids=(), slice_paths=(), block=block, slices=slices)
    forget_peak()
    before = megabytes("VmRSS")
    for _ in denoise(pipeline, series, Options()):
        pass
    return loaded, megabytes("VmHWM") - before


def main() -> None:
    """Print a table, or with ``--alone`` one row of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="+", metavar="PIPELINE")
    parser.add_argument("--slices", type=int, nargs="+", default=[100, 300])
    parser.add_argument("--size", type=int, default=512, help="rows and columns (default %(default)s)")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        (name,), (slices,) = arguments.pipelines, arguments.slices
        parts = measure(name, slices, arguments.size)
        print(f"| {name} | {slices} | {' | '.join(f'{part:.0f}' for part in parts)} |")
        return
    print(f"| pipeline | slices of {arguments.size}×{arguments.size} | loaded (MB) | denoising (MB) |")
    print("| --- | --- | --- | --- |", flush=True)
    for name in arguments.pipelines:
        for slices in arguments.slices:
            alone = [__file__, "--alone", name, "--slices", str(slices), "--size", str(arguments.size)]
            subprocess.run([sys.executable, *alone], check=True)


if __name__ == "__main__":
    main()
