"""Facts about this machine: its processor, the instruction set that kernels are made for, the cores we may use.

What enters: facts from LLVM, Linux and the environment. What leaves: names and numbers; nothing is compiled here.
EDGE_RUNTIME_ISA forces an instruction set, which is how the code of older processors is tested on newer ones.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import sys
from functools import cache
from pathlib import Path

import numba
from llvmlite import binding as llvm


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
    if numba.config.CPU_FEATURES is not None:
        listed = str(numba.config.CPU_FEATURES)
    else:
        try:
            listed = llvm.get_host_cpu_features().flatten()
        except RuntimeError:  # LLVM does not know on this system
            listed = ""
    names = {name[1:] for name in listed.split(",") if name.startswith("+")}
    if not numba.config.ENABLE_AVX:
        names = {name for name in names if not name.startswith("avx")}
    if platform.machine().lower() in ("arm64", "aarch64"):
        names.add("neon")  # part of the 64-bit base architecture, and not always listed
    if "amx-tile" in names and not _tiles_permitted():
        names = {name for name in names if not name.startswith("amx")}
    return frozenset(names)


def _tiles_permitted() -> bool:
    """Ask Linux for AMX's tile registers, which a process may use only then; elsewhere they are not used.

    Source: Linux, Documentation/arch/x86/xstate.rst.
    """
    if sys.platform != "linux":
        return False
    system_call, request, tile_data = 158, 0x1023, 18  # arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return int(ctypes.CDLL(None).syscall(system_call, request, tile_data)) == 0


# Instruction sets that kernels have code of their own for, and the CPU features each needs, best first. `simd`
# says what the code is; a name here needs a row in its table.
ISAS: dict[str, frozenset[str]] = {
    "amx": frozenset({"avx512f", "avx512bw", "avx512vnni", "amx-tile", "amx-int8", "amx-bf16"}),
    "avx512vnni": frozenset({"avx512f", "avx512bw", "avx512vnni"}),
    "avx512": frozenset({"avx512f", "avx512bw"}),
    "avxvnni": frozenset({"avx2", "fma", "avxvnni"}),
    "avx2": frozenset({"avx2", "fma"}),
    "neon-i8mm": frozenset({"neon", "i8mm"}),
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
