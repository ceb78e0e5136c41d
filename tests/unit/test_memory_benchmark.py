"""The table of benchmarks/memory.py against sizes that are known."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"
PLUGIN = """
import numpy as np
from pipelines.identity import Identity


class Hungry(Identity):
    def denoise(self, series, options):
        while_it_runs = np.ones(100_000_000, np.uint8)
        yield from list(super().denoise(series, options))
"""


def test_the_table_shows_what_was_taken(tmp_path: Path) -> None:
    (tmp_path / "hungry.py").write_text(PLUGIN)
    info = tmp_path / "hungry-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hungry\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dicomnode.pipelines]\ntest-hungry = hungry:Hungry\n")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "test-hungry", "--slices", "16", "64", "--size", "256"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["test-hungry", "16"], ["test-hungry", "64"]]
    megabyte_per_slice = 256 * 256 * 4 / 1e6
    for slices, peak in zip((16, 64), (float(row[3]) for row in rows), strict=True):
        assert abs(peak - 100 - slices * megabyte_per_slice) < 5  # what it took and kept; the series takes nothing
