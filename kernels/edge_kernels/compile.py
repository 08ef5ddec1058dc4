"""The only home of compiler flags, the compilation cache, threads, and the choice of the instruction set.

What enters: Python functions, through the decorators `kernel` (entry points, cached on disk) and `helper`
(called by kernels). What leaves: compiled functions, and `parallel_region`, inside which kernels are called.

Floating point: fused multiply-add is allowed (`contract`), nothing else. No reassociation, so a result
depends neither on the vectoriser nor on the thread count; no assumption about NaN or infinity, so they reach
the output and can be seen there.

Machine code is kept in `<user cache>/edge-runtime/jit/<key>`, or below NUMBA_CACHE_DIR where the user has set
it. numba's own index notices changes of the file a function stands in, but not of helpers it calls from other
files; `key` is a digest of all of this package's sources, of the versions and of the CPU, so stale code is
never loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import platform
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import llvmlite
import numba
import numpy as np
import platformdirs
from llvmlite import binding as llvm
from numpy.typing import NDArray

logger = logging.getLogger("edge_kernels")

F = TypeVar("F", bound=Callable[..., Any])

# omp first: numba's own workqueue layer aborts the process when two Python threads are inside parallel code
# at the same time (numba issue 8563), and OpenMP idles between calls instead of being torn down. workqueue
# stays as the layer that is always there (macOS wheels have no OpenMP). A layer the user has chosen in the
# environment is left alone. OpenMP's one limit: a process that has run a kernel must not fork() and run
# kernels in the child; spawn instead.
if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

_FLAGS: dict[str, Any] = {
    "nopython": True,
    "nogil": True,  # a server keeps answering while a picture is encoded
    "error_model": "numpy",  # division by zero gives inf or nan, not an exception: no branch per division
    "fastmath": {"contract"},
    "boundscheck": False,
}


# --- what this machine is -----------------------------------------------------------------------------------


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
        except RuntimeError:  # LLVM cannot tell on this system
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
    """Ask Linux for AMX's tile registers, which a process may use only after this; elsewhere they are left alone.

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


def cpu_count() -> int:
    """Return the cores this process may use: physical ones, within its affinity and control group's quota."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    return max(1, min(_physical_cores(allowed), math.ceil(min(_cgroup_cpus(), 1 << 20))))


# --- threads ------------------------------------------------------------------------------------------------

_threads: int | None = None  # None: cpu_count() at the first use
_one_at_a_time = threading.RLock()


def set_threads(n: int | None) -> None:
    """Set the number of threads kernels run on; None returns to `cpu_count()`.

    Raises
    ------
    ValueError
        If n is below 1, or above what numba was started with (NUMBA_NUM_THREADS, by default the logical CPUs
        allowed).
    """
    global _threads
    most = int(numba.config.NUMBA_NUM_THREADS)
    if n is not None and not 1 <= n <= most:
        raise ValueError(
            f"{n} threads were asked for; 1 to {most} are possible here. Set NUMBA_NUM_THREADS for more."
        )
    _threads = n


def thread_count() -> int:
    """Return the number of threads kernels run on."""
    global _threads
    if _threads is None:
        _threads = max(1, min(cpu_count(), int(numba.config.NUMBA_NUM_THREADS)))
    return _threads


@contextmanager
def parallel_region() -> Iterator[int]:
    """Enter parallel code; gives the number of workers to pass to the kernel.

    One thread at a time: a second caller waits. Under the workqueue layer this is what keeps the process
    alive, under OpenMP it keeps two calls from sharing the cores, which is slower than one after the other.
    numba code of others that runs in parallel in another thread is not covered. The caller's own numba thread
    count is put back afterwards.
    """
    with _one_at_a_time:
        before = numba.get_num_threads()
        workers = thread_count()
        numba.set_num_threads(workers)
        try:
            yield workers
        finally:
            numba.set_num_threads(before)


# --- compilation and its cache ------------------------------------------------------------------------------


class CacheStatistics(NamedTuple):
    """How often this process has loaded a kernel from the cache (`hits`) or compiled one (`misses`)."""

    hits: int
    misses: int


_kernels: list[Any] = []


def _cache_key() -> str:
    """Digest everything that machine code depends on."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    facts = (
        numba.__version__,
        llvmlite.__version__,
        platform.python_version(),
        cpu_name(),
        isa(),
        *sorted(cpu_features()),
    )
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()[:16]


def _usable_directory(path: Path, *, private: bool = False) -> bool:
    """Make sure of `path`; tell whether we can write there (and nobody else, if `private`)."""
    try:
        if private:  # also above it nobody else may write, whatever the umask
            for parent in reversed(path.parents):
                if not parent.is_dir():
                    parent.mkdir(mode=0o755, exist_ok=True)
        path.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
        if private and hasattr(os, "getuid"):
            # Cached code is executed: a folder in a shared place must be ours alone and no link to somewhere
            # else.
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
                return False
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False


@cache
def cache_directory() -> Path | None:
    """Return the folder for this version's machine code; None if none can be written."""
    key = _cache_key()
    chosen = numba.config.CACHE_DIR  # NUMBA_CACHE_DIR, if the user has set it
    home = Path(chosen) if chosen else Path(platformdirs.user_cache_dir("edge-runtime")) / "jit"
    if _usable_directory(home / key, private=not chosen):
        return home / key
    owner = os.getuid() if hasattr(os, "getuid") else "user"
    fallback = Path(tempfile.gettempdir()) / f"edge-runtime-jit-{owner}"
    if _usable_directory(fallback, private=True) and _usable_directory(fallback / key):
        logger.warning(
            "Compiled kernels cannot be kept in %s; keeping them in %s. "
            "Set NUMBA_CACHE_DIR to a folder that can be written to.",
            home,
            fallback,
        )
        return fallback / key
    logger.warning(
        "Compiled kernels cannot be kept in %s or %s: every start compiles them anew. "
        "Set NUMBA_CACHE_DIR to a folder that can be written to.",
        home,
        fallback,
    )
    return None


def is_compiled(module: str) -> bool:
    """Whether machine code of a module's kernels is kept from an earlier run.

    Parameters
    ----------
    module : below this package, as `linear.gguf_blocks`.
    """
    room, stem = module.rsplit(".", 1)
    folder = cache_directory()
    return folder is not None and any(folder.glob(f"{room}_*/{stem}.*.nbc"))


def kernel(function: F) -> F:
    """Compile an entry point: parallel, kept in the cache. Nothing is compiled before the first call.

    To have one specialisation only, call it with 1-D C-contiguous float32 or int64 arrays that are writable
    (`rows_view` and `vector_view` make such), Python ints, floats and bools.
    """
    directory = cache_directory()
    # numba reads the folder from its global setting when a function is decorated. It is put back at once,
    # since other numba code in this process has no business in our folder.
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(directory or "")
    try:
        compiled: F = numba.jit(parallel=True, cache=directory is not None, **_FLAGS)(function)
    finally:
        numba.config.CACHE_DIR = before
    _kernels.append(compiled)
    return compiled


def helper(function: F) -> F:
    """Compile a function that kernels call; its code is cached as part of theirs."""
    # Said aloud, as it would be taken from the caller.
    compiled: F = numba.jit(_nrt=True, forceinline=False, **_FLAGS)(function)
    return compiled


def leaf(function: F) -> F:
    """Compile a helper that makes no arrays: without reference counts, and into its caller.

    numba counts references of every array that a helper is given, or that a variable is bound to, with atomic
    instructions. Each of them waits until all stores before it are done, so a processor that has a thousand cycles
    of tile products under way stands still instead of computing on. A call with its arrays, seven numbers each,
    costs as much.
    """
    compiled: F = numba.jit(_nrt=False, forceinline=True, **_FLAGS)(function)
    return compiled


def cache_statistics() -> CacheStatistics:
    """Return how many kernels this process has loaded from the cache and how many it has compiled."""
    statistics = [k.stats for k in _kernels]
    return CacheStatistics(
        hits=sum(sum(s.cache_hits.values()) for s in statistics),
        misses=sum(sum(s.cache_misses.values()) for s in statistics),
    )


# --- arguments ----------------------------------------------------------------------------------------------


class _Memory:
    """Makes NumPy view memory as a writable 1-D float32 array, and keeps its owner alive."""

    def __init__(self, owner: NDArray[Any], length: int) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "typestr": np.dtype(np.float32).str,
            "shape": (length,),
            "data": (owner.__array_interface__["data"][0], False),
        }


def vector_view(x: NDArray[Any]) -> NDArray[np.float32]:
    """View an array as the one type kernels are compiled for: 1-D, contiguous, float32, writable.

    Copies only where dtype, order or alignment ask for it. Read-only memory (a mapped model file) gets a view
    that numba takes for writable, because numba would compile a second specialisation for read-only arrays;
    kernels write to no input.
    """
    x = np.require(x, np.float32, ["C", "A"])
    if x.flags.writeable or x.size == 0:
        return np.empty(0, np.float32) if x.size == 0 else x.reshape(-1)
    return np.asarray(_Memory(x, x.size))


def rows_view(x: NDArray[Any]) -> tuple[NDArray[np.float32], int]:
    """View a matrix as a vector (see `vector_view`) and the distance of its rows in elements.

    Rows that lie apart but are contiguous themselves, as in a column slice, are taken as they are.
    """
    m, n = x.shape
    in_place = (
        x.dtype == np.float32 and x.flags.aligned and m > 1 and n > 0
        and x.strides[1] == 4 and x.strides[0] >= 4 * n and x.strides[0] % 4 == 0
    )  # fmt: skip
    if not in_place or x.flags.c_contiguous:
        return vector_view(x), n
    stride = x.strides[0] // 4
    return np.asarray(_Memory(x, (m - 1) * stride + n)), stride


def aligned_empty(length: int) -> NDArray[np.float32]:
    """Allocate a float32 vector that starts on a cache line, so that no vector load straddles two."""
    spare = 64 // 4
    block = np.empty(length + spare, np.float32)
    start = (-block.__array_interface__["data"][0] // 4) % spare
    return block[start : start + length]


@helper
def aligned(length: int, dtype: Any) -> NDArray[Any]:
    """Allocate a vector of 4-byte elements in compiled code, from the start of a cache line on."""
    block = np.empty(length + 16, dtype)
    start = (-(block.ctypes.data // 4)) % 16
    return block[start : start + length]
