"""What the benchmarks stand on: the machine's peak, rounds that count, a turn in a process of its own, tables."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # they are scripts, not a package
alone, machine = map(importlib.import_module, ("alone", "machine"))


class Clock:
    """A machine whose looks are given; it is as fast as the best of them."""

    def __init__(self, looks: list[float]) -> None:
        self._looks: Iterator[float] = iter(looks)
        self.best = 0.0

    def look(self) -> Mapping[str, float]:
        now = next(self._looks)
        self.best = max(self.best, now)
        return {"fp32": now / 4, "int8": now}

    def part(self, rates: Mapping[str, float]) -> float:
        return min(rates["fp32"] * 4, rates["int8"]) / self.best


def rounds(looks: list[float], wanted: int) -> Any:
    count = iter(range(100))
    return machine.interleaved(Clock(looks), {"a": lambda: next(count), "b": lambda: next(count)}, wanted, 0.9)


def test_a_round_counts_if_the_machine_was_quiet_before_and_after_every_turn() -> None:
    # three looks a round; the second round is disturbed in its middle, the third at its end
    done = rounds([100, 95, 97, 99, 60, 99, 99, 98, 89, 100, 100, 91], 2)
    assert done.of("a") == [0, 6]
    assert done.of("b") == [1, 7]
    assert "2 interleaved rounds, medians; 2 thrown away" in done.describe()


def test_a_round_is_judged_by_the_best_that_is_known_in_the_end() -> None:
    done = rounds([80, 80, 80, 100, 100, 100, 95, 95, 95], 2)  # the first was slow, which nobody could know then
    assert done.of("a") == [2, 4]


def test_a_machine_that_is_never_quiet_gives_no_table() -> None:
    with pytest.raises(SystemExit, match="in none of 6 rounds"):
        rounds([100, 50, 50] * 6, 2)
    assert rounds([100, 50, 50] * 5 + [95, 95, 95], 2).of("a") == [10]  # fewer than wanted, and the table says so


def test_the_peak_is_that_of_the_best_turn_and_grows_with_the_cores() -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    with machine.Machine(1) as here:
        printed = subprocess.run([here._program, "1"], capture_output=True, text=True, check=True).stdout.splitlines()
        assert [line.split()[2] for line in printed] == instructions_of_linux()
        assert all(0 < rate.middle <= rate.best for rate in here.rates(1))
        if here.peak["int8"]:
            assert here.peak["int8"] > 1.5 * here.peak["fp32"]
            assert f"{here.peak['int8']:.0f} in int8" in here.describe()
        assert here.part(here.peak) == 1


def instructions_of_linux() -> list[str]:
    """Those of peak.c that this CPU has, by what Linux says of it; the kernel names AMX only where it hands it out."""
    line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    return [name for name, flag in machine.FLAG.items() if flag in line.split()]


@pytest.fixture
def told_by_peak(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What peak.c prints, one look after the other; it is neither built nor run."""
    told: list[str] = []

    def run(words: list[str], **_: Any) -> Any:
        return SimpleNamespace(stdout=told.pop(0) if words[-1].isdigit() else "")

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(machine.subprocess, "run", run)
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(machine.FLAG.values()))
    return told


def test_the_peak_is_that_of_the_tiles_where_there_are_any(told_by_peak: list[str]) -> None:
    told_by_peak += [
        "2 fp32 vfmadd231ps 200 150\n2 bf16 vdpbf16ps 100 90\n2 bf16 tdpbf16ps 2800 2000\n"
        "2 int8 vpdpbusd 800 700\n2 int8 tdpbusd 5500 5000\n",
        "2 fp32 vfmadd231ps 190 180\n2 bf16 vdpbf16ps 110 100\n2 bf16 tdpbf16ps 2700 2600\n"
        "2 int8 vpdpbusd 790 780\n2 int8 tdpbusd 5600 5040\n",
    ]
    with machine.Machine(2) as here:
        now = here.look()
        assert here.peak == {"fp32": 200, "bf16": 2800, "int8": 5600}
        assert now == {"fp32": 180, "bf16": 2600, "int8": 5040}
        assert here.part(now) == pytest.approx(0.9)
        assert here.describe().endswith(
            "Peak of these cores: 200 in fp32 (vfmadd231ps), 2800 in bf16 (tdpbf16ps; 110 by vdpbf16ps), "
            "5600 in int8 (tdpbusd; 800 by vpdpbusd) GMAC/s."
        )


def test_instructions_that_openvino_leaves_out_make_no_peak(
    told_by_peak: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset({"avx512f", "avx512_bf16", "avx512_vnni"}))
    told_by_peak += [
        "2 bf16 vdpbf16ps 100 90\n2 bf16 tdpbf16ps 2800 2000\n2 int8 vpdpbusd 800 700\n2 int8 tdpbusd 5500 1\n"
    ]
    with machine.Machine(2) as here:
        assert here.peak == {"fp32": 0, "bf16": 100, "int8": 800}
    assert machine.command([]).startswith("ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python benchmarks/")


def test_a_type_without_an_instruction_has_no_peak(told_by_peak: list[str]) -> None:
    told_by_peak += ["2 fp32 vfmadd231ps 117 117\n2 int8 vpdpbusd 468 460\n"]
    with machine.Machine(2) as here:
        assert here.peak == {"fp32": 117, "bf16": 0, "int8": 468}
        assert here.part({"fp32": 117, "bf16": 0, "int8": 234}) == 0.5
        assert here.describe().endswith(
            "Peak of these cores: 117 in fp32 (vfmadd231ps), 468 in int8 (vpdpbusd) GMAC/s."
        )


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="install gcc"):
        machine.Machine(1)


def test_tables() -> None:
    assert machine.table(["a", "b"], [["1", "2"], ["3", "4"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |"
    with pytest.raises(ValueError, match="row"):
        machine.table(["a", "b"], [["1"]])
    assert machine.median([3.0, 1.0, 2.04], 1) == "2.0 [1.0-3.0]"
    assert machine.number(None, 2) == "-"


def test_a_turn_in_a_process_of_its_own(tmp_path: Path) -> None:
    program = tmp_path / "double.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(alone.__file__).parent)!r})\nfrom alone import answer\n"
        "def work(told):\n    print('on the way')\n    return 2 * told['x']\nanswer(work, lambda: None)\n"
    )
    assert alone.ask(str(program), {"x": 21}) == 42
    with pytest.raises(SystemExit, match="KeyError: 'x'"):
        alone.ask(str(program), {})
