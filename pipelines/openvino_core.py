"""OpenVINO, imported and set up in one place: the networks of a site run on the CPU through it, without torch.

Everything about a compiled model is set here and nothing is left to a default, because the defaults choose by
themselves: without a hint a model in float32 runs in bfloat16 where the CPU can, and the numbers change from one server
to the next. What was set is read back.

OpenVINO's Python package reports its use to the network on import if the package `openvino_telemetry` is there. That is
made impossible to import before OpenVINO is; OpenVINO has a stub for this case.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any, Literal

if sys.modules.get("openvino_telemetry") is not None:
    raise ImportError(
        "openvino was imported before pipelines.openvino_core, which keeps it from reporting its use to the network: "
        "import pipelines.openvino_core first, and openvino through it"
    )
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # this is how Python spells "not to be had"

import openvino as ov  # type: ignore[import-untyped]  # noqa: E402 - untyped; only after the line above
from openvino import opset13 as op  # noqa: E402 - likewise

__all__ = [
    "Float",
    "Precision",
    "PrecisionRefused",
    "compile_model",
    "convolution_precisions",
    "core",
    "cpu_flags",
    "cpu_supports",
    "float_of",
    "give_memory_back",
    "has_int8_tiles",
    "isa_limit",
    "op",
    "ov",
]

Precision = Literal["fp32", "bf16", "int8"]
"""What a network runs in. ``int8``: the convolutions that are quantised; the rest of it in `float_of`."""
Float = Literal["fp32", "bf16"]

CPUINFO = Path("/proc/cpuinfo")

FLAGS: dict[str, frozenset[str]] = {
    # dot products of four 8-bit pairs in one instruction; without, int8 is emulated, saturates and gains little
    "int8": frozenset({"avx512_vnni", "avx_vnni"}),
    "bf16": frozenset({"avx512_bf16", "amx_bf16"}),
}
"""CPU flags of which one is needed, as Linux names them."""

ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables, the first before the second, that keep oneDNN, whose kernels OpenVINO has, from instructions
that the CPU does have."""
_AMX = frozenset({"amx_tile", "amx_bf16", "amx_int8"})
_ABOVE_VNNI = _AMX | {"avx512_bf16"}
_ABOVE_AVX2 = _ABOVE_VNNI | {"avx512f", "avx512_vnni"}
_LEFT_OUT: dict[str, frozenset[str]] = {
    **dict.fromkeys(("SSE41", "AVX", "AVX2"), _ABOVE_AVX2 | {"avx_vnni"}),
    **dict.fromkeys(("AVX2_VNNI", "AVX2_VNNI_2"), _ABOVE_AVX2),
    "AVX512_CORE": _ABOVE_VNNI | {"avx512_vnni", "avx_vnni"},
    "AVX512_CORE_VNNI": _ABOVE_VNNI,
    **dict.fromkeys(("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512", "AVX10_2_512"), _AMX),
}
"""Flags that such a limit makes those of a CPU without them (oneDNN, "CPU Dispatcher Control"). All other values leave
nothing out that is looked at here; those that it does not know oneDNN ignores, too."""

_TYPES = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16}

_MALLOC = {
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: so much, in bytes, may lie free at the end of the heap
    -3: 2**25,  # M_MMAP_THRESHOLD: blocks of that size come from the system and go there again; glibc takes no more
    -8: 1,  # M_ARENA_MAX
}
"""Settings of glibc's malloc, see mallopt(3)."""


class PrecisionRefused(RuntimeError):
    """OpenVINO would run a model in another precision than it was told to."""


@cache
def cpu_flags() -> frozenset[str]:
    """Flags of the first CPU, but for those that OpenVINO is told to leave out; none where Linux does not tell them."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return frozenset(flags) - _LEFT_OUT.get(isa_limit().upper(), frozenset())


def isa_limit() -> str:
    """The limit that OpenVINO is told, as it stands in the environment; empty if none."""
    return next(filter(None, map(os.environ.get, ISA_LIMITS)), "")


def cpu_supports(precision: Precision) -> bool:
    """Whether this CPU has instructions for `precision`, so that it is faster than fp32.

    OpenVINO's own list of capabilities names INT8 on every x86 CPU and is of no use for this.
    """
    return precision == "fp32" or not FLAGS[precision].isdisjoint(cpu_flags())


def has_int8_tiles() -> bool:
    """Whether this CPU multiplies 8-bit numbers in tiles (AMX), of which OpenVINO wants both operands with a sign.

    Elsewhere it wants one without: VNNI has no other instruction.
    """
    return "amx_int8" in cpu_flags()


def float_of(precision: Precision) -> Float:
    """The number format of all that is not quantised in `precision`: with int8 the fastest that this CPU has."""
    if precision == "int8":
        return "bf16" if cpu_supports("bf16") else "fp32"
    return precision


@cache
def core() -> Any:
    """The one `openvino.Core` of this process."""
    _keep_freed_memory()
    return ov.Core()


def compile_model(model: Any, precision: Precision, threads: int) -> Any:
    """Compile a model for this CPU.

    Parameters
    ----------
    model
        An `openvino.Model`, or the path of one (IR: xml beside bin).
    precision
        What the network runs in. The quantised layers are in the model itself; this sets the format of the others.
    threads
        CPU cores to use, for one request at a time (that is the fastest for one volume). They are not pinned: reception
        and other processes run beside it, and a pinned thread waits for its core while another one is free.

    Returns
    -------
    openvino.CompiledModel

    Raises
    ------
    PrecisionRefused
        If OpenVINO chose another float format, as it does for bf16 on a CPU without.
    """
    wanted = _TYPES[float_of(precision)]
    compiled = core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": wanted,
            "EXECUTION_MODE_HINT": "PERFORMANCE",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,
        },
    )
    given = compiled.get_property("INFERENCE_PRECISION_HINT")
    if given != wanted:
        raise PrecisionRefused(
            f"OpenVINO would run {compiled.get_property('NETWORK_NAME')!r} in {given}, not in {wanted}: this CPU lacks "
            "the instructions; set precision: fp32"
        )
    return compiled


def _keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next who asks, until it is told to give it back.

    For one plane a network for volumes takes and frees the memory between its convolutions some 26 times, 16 MB and
    more. Whether glibc gave that to the system each time depended on what happened to lie behind it; where it did,
    `st3d` took far longer, all of it in page faults. Planes of 32 MB, as with 64 features or in fp32, still come from
    the system: without a threshold that is not so, but the heap then keeps more than the memory that is promised. No
    thread that begins later gets a heap of its own, which would keep the same once more. Other C libraries lack the
    function.
    """
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    if tell is not None:
        for what, value in _MALLOC.items():
            tell(what, value)


def give_memory_back() -> None:
    """Let the C library return freed memory to the system, after models were compiled.

    Compiling takes and frees blocks as large as the inputs, between small ones that stay; glibc fits no second aligned
    block of that size into the gap, so each model leaves one behind. Other C libraries lack the function.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def convolution_precisions(compiled: Any) -> dict[str, str]:
    """The precision each convolution of a compiled model really runs in: ``i8`` or ``u8``, ``bf16`` or ``f32`` by name.

    From the execution graph, so after all that OpenVINO fused or left out; a convolution whose quantisation it did not
    understand shows as float here.
    """
    return {
        node.get_friendly_name(): str(node.get_rt_info()["runtimePrecision"].astype(str))
        for node in compiled.get_runtime_model().get_ordered_ops()
        if node.get_rt_info()["layerType"].astype(str) in ("Convolution", "GroupConvolution", "Deconvolution")
    }
