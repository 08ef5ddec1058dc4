"""Targets that kernels are compiled ahead of time for: what LLVM is told, and what a processor must have.

What enters: the name of an instruction set. What leaves: the processor that code is scheduled for, all features that
LLVM may use for it, and the triple. `TARGETS` has the names of `machine.ISAS`: code for another one has other tiles.
"""

from __future__ import annotations

import platform
import re
from typing import NamedTuple

from llvmlite import binding as llvm

# The levels of the x86-64 psABI, in LLVM's names: every processor with AVX2 and FMA that was sold has level 3, every
# one with AVX-512 BW level 4. Features that LLVM only uses where it is asked to (rdrand, invpcid) are not listed.
_LEVEL_2 = frozenset({"cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3"})
_LEVEL_3 = _LEVEL_2 | {"avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"}
_LEVEL_4 = _LEVEL_3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_VECTOR_BYTES = frozenset({"gfni", "vaes", "vpclmulqdq"})  # Alder Lake's, and Sapphire Rapids'
_SAPPHIRE_RAPIDS = _VECTOR_BYTES | {
    "avx512bf16", "avx512bitalg", "avx512fp16", "avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512vnni",
    "avx512vpopcntdq", "amx-bf16", "amx-int8", "amx-tile",
}  # fmt: skip
# What Cortex-A76 has besides: a processor with the product need not have it, and the kernels gain nothing from it.
_NOT_NEEDED = ("lse", "rdm", "fullfp16", "rcpc", "ssbs", "crc", "aes", "sha2")


class Target(NamedTuple):
    """A kind of processor.

    Attributes
    ----------
    family : str
        "x86_64", "aarch64", or "" for the family of the machine that compiles.
    cpu : str
        LLVM's name of the processor whose latencies and tuning are taken.
    features : frozenset of str
        LLVM's names of the features that code may use, besides the base of the family: a processor must have them.
    without : tuple of str
        Features of `cpu` that code must not use.
    """

    family: str
    cpu: str
    features: frozenset[str]
    without: tuple[str, ...] = ()

    def feature_string(self) -> str:
        """The features as LLVM reads them."""
        signs = [f"-{name}" for name in self.without] + [f"+{name}" for name in sorted(self.features)]
        return ",".join(signs)


TARGETS: dict[str, Target] = {
    "amx": Target("x86_64", "sapphirerapids", _LEVEL_4 | _SAPPHIRE_RAPIDS),
    "avx512vnni": Target("x86_64", "cascadelake", _LEVEL_4 | {"avx512vnni"}),
    "avx512": Target("x86_64", "skylake-avx512", _LEVEL_4),
    "avxvnni": Target("x86_64", "alderlake", _LEVEL_3 | _VECTOR_BYTES | {"avxvnni"}),
    "avx2": Target("x86_64", "haswell", _LEVEL_3),
    "neon-i8mm": Target("aarch64", "cortex-a76", frozenset({"neon", "dotprod", "i8mm"}), _NOT_NEEDED),
    "neon-dot": Target("aarch64", "cortex-a76", frozenset({"neon", "dotprod"}), _NOT_NEEDED),
    "neon": Target("aarch64", "cortex-a72", frozenset({"neon"}), ("crc", "aes", "sha2")),
    "portable": Target("", "", frozenset()),
}
"""By the names of `machine.ISAS`."""
_BASES = {"x86_64": ("x86-64", "+sse2"), "aarch64": ("generic", "+neon")}
"""Processor and features of `portable`; numba takes an empty list of features for none given."""


def family() -> str:
    """Return the family of this machine's processor as targets name it."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def processor(target: str) -> tuple[str, str]:
    """Return LLVM's name of a target's processor, and its features as LLVM reads them."""
    if target == "portable":
        return _BASES.get(family(), ("generic", ""))
    return TARGETS[target].cpu, TARGETS[target].feature_string()


def triple(target: str) -> str:
    """Return the triple of a target: this machine's, or Linux's where the target is of another family."""
    wanted = TARGETS[target].family
    return str(llvm.get_process_triple()) if wanted in ("", family()) else f"{wanted}-unknown-linux-gnu"


def system_of(triple: str) -> tuple[str, ...]:
    """Return what of a triple decides whether code runs: neither vendor nor version, which builds of LLVM choose."""
    family, _, *rest = f"{triple}--".split("-")
    family = {"amd64": "x86_64", "arm64": "aarch64"}.get(family, family)
    return (family, *(re.sub(r"[\d.]+$", "", part) for part in rest if part))
