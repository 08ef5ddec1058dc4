"""Which processor features llama.cpp was compiled for, by Linux' names, and which this processor has.

A compiler told to make code for its own machine (`-march=native`, llama.cpp's default) uses all that it has; on a
processor with less, the program ends with an illegal instruction and without a word. So it is asked before.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

# llama.cpp's names (ggml/src/ggml-cpu/ggml-cpu.cpp) → Linux' names in /proc/cpuinfo.
_FLAGS = {
    "SSE3": ("pni",),
    "SSSE3": ("ssse3",),
    "AVX": ("avx",),
    "AVX_VNNI": ("avx_vnni",),
    "AVX2": ("avx2",),
    "F16C": ("f16c",),
    "FMA": ("fma",),
    "BMI2": ("bmi2",),
    "AVX512": ("avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"),
    "AVX512_VBMI": ("avx512vbmi",),
    "AVX512_VNNI": ("avx512_vnni",),
    "AVX512_BF16": ("avx512_bf16",),
    "AMX_INT8": ("amx_tile", "amx_int8"),
    "NEON": ("asimd",),
    "FP16_VA": ("fphp", "asimdhp"),
    "DOTPROD": ("asimddp",),
    "MATMUL_INT8": ("i8mm",),
    "SVE": ("sve",),
    "SVE2": ("sve2",),
    "SME": ("sme",),
}
_KEYS = {"x86_64": "flags", "aarch64": "Features"}


def needed_flags(system_info: str) -> list[str]:
    """Features that llama.cpp was compiled for.

    Parameters
    ----------
    system_info : what `llama_print_system_info` says, such as `CPU : AVX = 1 | AVX2 = 1 | OPENMP = 1 |`.
    """
    named = re.findall(r"(\w+) = 1\b", system_info)
    return sorted({flag for name in named for flag in _FLAGS.get(name, ())})


def own_flags(cpuinfo: Path = Path("/proc/cpuinfo"), machine: str | None = None) -> frozenset[str]:
    """Features of this processor; empty where the system does not tell them, or tells those of another one."""
    key = _KEYS.get(machine or platform.machine().lower())
    try:
        lines = cpuinfo.read_text("utf-8", "replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return frozenset(value.split())
    return frozenset()


def missing_flags(system_info: str) -> list[str]:
    """Features that llama.cpp was compiled for and this processor lacks, as far as is known."""
    own = own_flags()
    return [flag for flag in needed_flags(system_info) if own and flag not in own]
