"""Facts about this machine: its processor, the instruction set that kernels are made for, the cores we may use.

What enters: facts from LLVM, Linux and the environment. What leaves: names and numbers; nothing is compiled here.
EDGE_RUNTIME_ISA forces an instruction set, which is how the code of older processors is tested on newer ones.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numba
from llvmlite import binding as llvm
from numba.core import codegen
from numba.core.registry import cpu_target

logger = logging.getLogger("edge_kernels")


_IS_ARM = platform.machine().lower() in ("arm64", "aarch64")


@cache
def cpu_name() -> str:
    """Return LLVM's name of the CPU that code is generated for."""
    return str(numba.config.CPU_NAME or llvm.get_host_cpu_name())


@cache
def cpu_features() -> frozenset[str]:
    """Return LLVM's names of the CPU features that code is generated for, such as "avx2" or "neon".

    Follows numba's NUMBA_CPU_NAME, NUMBA_CPU_FEATURES and NUMBA_ENABLE_AVX, so the portable path can be run
    anywhere.
    """
    names = {name[1:] for name in _numba_features().split(",") if name.startswith("+")}
    if not numba.config.ENABLE_AVX:
        names = {name for name in names if not name.startswith("avx")}
    if _IS_ARM:
        names.add("neon")  # part of the 64-bit base architecture, and not always listed
    if "amx-tile" in names and not (_only_compiles or _tiles_permitted()):
        names = {name for name in names if not name.startswith("amx")}
    return frozenset(names)


def _numba_features() -> str:
    """Return the features that numba generates code with, "+…,-…"; first tell it those that LLVM misses."""
    found = codegen.get_host_cpu_features()
    missed = sorted(name for name in arm_features() if f"+{name}" not in found.split(",")) if _IS_ARM else []
    is_ours = bool(missed) and numba.config.CPU_FEATURES is None
    if is_ours:
        numba.config.CPU_FEATURES = ",".join([*filter(None, [found]), *(f"+{name}" for name in missed)])
    used = str(cpu_target.target_context.codegen().magic_tuple()[2])  # numba reads its setting when it starts
    if is_ours and used != numba.config.CPU_FEATURES:
        logger.warning(
            "This processor has %s, but numba was used before these kernels were imported, and makes code without. "
            "Import edge_runtime or edge_kernels.machine first, or set NUMBA_CPU_FEATURES=%s.",
            " and ".join(missed),
            numba.config.CPU_FEATURES,
        )
        numba.config.CPU_FEATURES = None
    return used


_only_compiles = False


def only_compile() -> None:
    """Say that this process makes code for other machines and runs none: tiles need no permission then."""
    global _only_compiles
    _only_compiles = True


def _tiles_permitted() -> bool:
    """Ask Linux for AMX's tile registers, which a process may use only then; elsewhere they are not used.

    Source: Linux, Documentation/arch/x86/xstate.rst.
    """
    if sys.platform != "linux":
        return False
    system_call, request, tile_data = 158, 0x1023, 18  # arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return int(ctypes.CDLL(None).syscall(system_call, request, tile_data)) == 0


# What a system says of a feature: on Linux a bit of an entry of the auxiliary vector, on macOS a number with a name.
_AT_HWCAP, _AT_HWCAP2 = 16, 26
_LINUX_FEATURES = {"dotprod": (_AT_HWCAP, 20), "i8mm": (_AT_HWCAP2, 13)}
_MAC_FEATURES = {"dotprod": b"hw.optional.arm.FEAT_DotProd", "i8mm": b"hw.optional.arm.FEAT_I8MM"}


def arm_features(system: str = sys.platform, library: Any = None) -> frozenset[str]:
    """Return which of the ARM features that kernels use this processor has, as the operating system tells it.

    LLVM looks for them on Windows alone: from Linux it takes NEON, CRC, AES, SHA, atomics and SVE, and on macOS it
    knows processors by name. So on a Raspberry Pi 5, which has dotprod, it lists none of these.

    Parameters
    ----------
    system : as `sys.platform` names it.
    library : the C library, or what stands for it.

    Sources: Linux, Documentation/arch/arm64/elf_hwcaps.rst and getauxval(3); Apple, "Determining instruction set
    characteristics"; LLVM, lib/TargetParser/Host.cpp.
    """
    try:
        if system == "linux":
            library = library or ctypes.CDLL(None)
            library.getauxval.restype = ctypes.c_ulong
            library.getauxval.argtypes = [ctypes.c_ulong]
            return frozenset(
                name for name, (entry, bit) in _LINUX_FEATURES.items() if library.getauxval(entry) >> bit & 1
            )
        if system == "darwin":
            library = library or ctypes.CDLL(None)
            return frozenset(name for name, key in _MAC_FEATURES.items() if _mac_number(library, key) == 1)
    except (OSError, AttributeError):  # another C library
        pass
    return frozenset()


def _mac_number(library: Any, key: bytes) -> int:
    """Read a number that macOS knows by a name; 0 where it knows none."""
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)  # some are of four bytes, the lower ones
    status = library.sysctlbyname(key, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return value.value if status == 0 else 0


# Instruction sets that kernels have code of their own for, and the CPU features each needs, best first. `simd`
# says what the code is; a name here needs a row in its table.
ISAS: dict[str, frozenset[str]] = {
    "amx": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vnni", "amx-tile", "amx-int8", "amx-bf16"}),
    "avx512vnni": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vnni"}),
    "avx512": frozenset({"avx512f", "avx512bw"}),
    "avxvnni": frozenset({"avx2", "fma", "avxvnni"}),
    "avx2": frozenset({"avx2", "fma"}),
    "neon-i8mm": frozenset({"neon", "dotprod", "i8mm"}),
    "neon-dot": frozenset({"neon", "dotprod"}),
    "neon": frozenset({"neon"}),
    "portable": frozenset(),
}


@cache
def isa() -> str:
    """Return the name of the instruction set that kernels are made for: a key of `ISAS`.

    The best one the machine has, or the one that the environment variable EDGE_RUNTIME_ISA names.

    Raises
    ------
    ValueError
        If EDGE_RUNTIME_ISA names none, or one the machine lacks.
    """
    chosen = os.environ.get("EDGE_RUNTIME_ISA", "")
    possible = [name for name, features in ISAS.items() if features <= cpu_features()]
    if not chosen:
        return possible[0]
    if chosen not in possible:
        missing = ISAS.get(chosen, frozenset()) - cpu_features()
        reason = f"this machine lacks {', '.join(sorted(missing))}" if missing else "there is no such instruction set"
        raise ValueError(
            f"EDGE_RUNTIME_ISA is {chosen!r}, but {reason}. Set it to one of {', '.join(possible)}, or not at all."
        )
    return chosen


def _physical_cores(cpus: set[int]) -> int:
    """Count the cores behind logical `cpus`; two hyperthreads share one multiply-add unit and count once."""
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:  # not Linux, or hidden by a sandbox: take every logical CPU for a core
            cores.add(str(cpu))
    return len(cores)


def _read_numbers(path: Path) -> list[float] | None:
    """Read a cgroup limit file: its numbers, or None where it is missing or says "max"."""
    try:
        return [float(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return None


def _cgroup_cpus(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """Return the CPU quota of this process's control groups in CPUs; infinite where none is set.

    A group is limited by its ancestors too, so every level up to the root is read. Inside a container the
    listed path is often that of the host and does not exist below `root`; the root's own files then hold the
    container's limit.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return math.inf
    limit = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2: "quota period" in one file
            base = root
        elif "cpu" in controllers.split(","):  # version 1: one file each
            base = next((root / name for name in (controllers, "cpu") if (root / name).is_dir()), root)
        else:
            continue
        group = base / path.lstrip("/")
        for level in (group, *group.parents):
            if not level.is_relative_to(base):
                break
            numbers = _read_numbers(level / "cpu.max")
            if numbers is None:
                quota = _read_numbers(level / "cpu.cfs_quota_us")
                period = _read_numbers(level / "cpu.cfs_period_us")
                numbers = [*quota, *period] if quota and period else None
            if numbers and len(numbers) == 2 and numbers[0] > 0 and numbers[1] > 0:  # -1 is "no limit" in version 1
                limit = min(limit, numbers[0] / numbers[1])
    return limit


def _allowed() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def processor_count() -> int:
    """Return the logical processors this process may use, within its affinity and control group's quota."""
    return max(1, min(len(_allowed()), math.ceil(min(_cgroup_cpus(), 1 << 20))))


def cpu_count() -> int:
    """Return the cores this process may use: physical ones, within its affinity and control group's quota."""
    allowed = _allowed()
    return max(1, min(_physical_cores(allowed), math.ceil(min(_cgroup_cpus(), 1 << 20))))
