"""What this CPU can, and that OpenVINO is silent and runs in what it was told to."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipelines import openvino_core
from pipelines.openvino_core import (
    PrecisionRefused,
    compile_model,
    convolution_precisions,
    cpu_supports,
    float_of,
    has_int8_tiles,
    op,
    ov,
)

ZEN_5 = "avx2 avx512f avx_vnni avx512_bf16 avx512_vnni"
SAPPHIRE_RAPIDS = "avx2 avx512f avx512_vnni amx_bf16 avx512_bf16 amx_tile amx_int8"
ALDER_LAKE = "avx2 avx_vnni"
HASWELL = "avx2 fma"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(openvino_core, "CPUINFO", file)
    for name in openvino_core.ISA_LIMITS:
        monkeypatch.delenv(name, raising=False)
    openvino_core.cpu_flags.cache_clear()
    yield file
    openvino_core.cpu_flags.cache_clear()


@pytest.mark.parametrize(
    ("flags", "int8", "bf16", "beside_int8", "tiles"),
    [
        (ZEN_5, True, True, "bf16", False),
        (SAPPHIRE_RAPIDS, True, True, "bf16", True),
        (ALDER_LAKE, True, False, "fp32", False),
        (HASWELL, False, False, "fp32", False),
    ],
    ids=["Zen 5", "Sapphire Rapids", "Alder Lake", "Haswell"],
)
def test_the_flags_decide(cpuinfo: Path, flags: str, int8: bool, bf16: bool, beside_int8: str, tiles: bool) -> None:
    cpuinfo.write_text(
        f"processor\t: 0\nflags\t\t: fpu {flags}\nbugs\t\t: spectre_v1\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    )
    assert (cpu_supports("int8"), cpu_supports("bf16"), cpu_supports("fp32")) == (int8, bf16, True)
    assert float_of("int8") == beside_int8
    assert has_int8_tiles() == tiles
    assert (float_of("fp32"), float_of("bf16")) == ("fp32", "bf16")


def test_an_unknown_cpu_has_fp32_only(cpuinfo: Path) -> None:
    assert not cpuinfo.exists()
    assert (cpu_supports("int8"), cpu_supports("bf16"), cpu_supports("fp32")) == (False, False, True)


@pytest.mark.parametrize(
    ("limit", "bf16", "tiles"),
    [
        ("AVX512_CORE_VNNI", False, False),
        ("AVX512_CORE_BF16", True, False),
        ("avx512_core_fp16", True, False),
        ("AVX512_CORE_AMX", True, True),
        ("ALL", True, True),
        ("nonsense", True, True),
    ],
)
def test_what_openvino_is_told_to_leave_out_is_left_out_here(
    cpuinfo: Path, monkeypatch: pytest.MonkeyPatch, limit: str, bf16: bool, tiles: bool
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    cpuinfo.write_text(f"flags\t\t: fpu {SAPPHIRE_RAPIDS}\n")
    assert (cpu_supports("int8"), cpu_supports("bf16"), has_int8_tiles()) == (True, bf16, tiles)


def test_either_name_of_the_limit_counts_and_the_newer_more(cpuinfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    cpuinfo.write_text(f"flags\t\t: fpu {SAPPHIRE_RAPIDS}\n")
    assert not cpu_supports("int8")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    openvino_core.cpu_flags.cache_clear()
    assert cpu_supports("int8")
    assert not has_int8_tiles()


def _convolution() -> object:
    x = op.parameter([1, 8, 16, 16], ov.Type.f32, name="x")
    weight = np.random.default_rng(0).normal(size=(8, 8, 3, 3)).astype(np.float32)
    y = op.convolution(x, op.constant(weight), [1, 1], [1, 1], [1, 1], [1, 1], name="it")
    return ov.Model([op.result(y)], [x], "one convolution")


def test_a_model_runs_in_what_it_was_told_to() -> None:
    compiled = compile_model(_convolution(), "fp32", 2)
    assert convolution_precisions(compiled) == {"it": "f32"}
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 2
    assert compiled.get_property("NUM_STREAMS") == 1
    assert compiled.get_property("ENABLE_CPU_PINNING") is False
    if cpu_supports("bf16"):
        assert convolution_precisions(compile_model(_convolution(), "bf16", 1)) == {"it": "bf16"}


def test_another_precision_than_told_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled:
        def get_property(self, name: str) -> object:
            return {"INFERENCE_PRECISION_HINT": ov.Type.f32, "NETWORK_NAME": "one convolution"}[name]

    class Core:
        def compile_model(self, *_: object) -> Compiled:
            return Compiled()

    monkeypatch.setattr(openvino_core, "core", Core)
    with pytest.raises(PrecisionRefused, match=r"'one convolution' in .*float32.*, not in .*bfloat16"):
        compile_model(_convolution(), "bf16", 1)


def test_it_speaks_to_nobody() -> None:
    """In a fresh interpreter that does not look like continuous integration, where OpenVINO is silent by itself."""
    program = """
import sys
heard = []
ways_out = ("socket.", "subprocess.", "os.fork", "os.posix_spawn", "os.system")
sys.addaudithook(lambda event, _: heard.append(event) if event.startswith(ways_out) else None)
import numpy as np
from pipelines.openvino_core import compile_model, op, ov
x = op.parameter([1, 2], ov.Type.f32, name="x")
compile_model(ov.Model([op.result(op.relu(x))], [x], "relu"), "fp32", 1)(np.ones((1, 2), np.float32))
assert sys.modules["openvino_telemetry"] is None and "torch" not in sys.modules
assert not heard, heard
"""
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_an_openvino_that_may_have_spoken_is_refused() -> None:
    program = (
        "import sys, types; sys.modules['openvino_telemetry'] = types.ModuleType('t'); import pipelines.openvino_core"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ran.returncode != 0
    assert "import pipelines.openvino_core first" in ran.stderr


_FAULTS = """
import ctypes, resource
from pipelines.openvino_core import core

core()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def take(size):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)

take(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    take(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_what_is_freed_is_taken_again_without_a_page_fault() -> None:
    """16 MB have 4,096 pages, and each of ten times would fault for each of them."""
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
