"""The only home of compiler flags and of the compilation cache.

What enters: Python functions, through the decorators `kernel` (entry points, cached on disk), `helper` (called by
kernels) and `leaf` (compiled into its caller). What leaves: compiled functions, which are called inside
`threads.parallel_region`.

Floating point: fused multiply-add is allowed (`contract`), nothing else. No reassociation, so a result
depends neither on the vectoriser nor on the thread count; no assumption about NaN or infinity, so they reach
the output and can be seen there.

Machine code is kept in `<user cache>/edge-runtime/jit/<key>`, or below NUMBA_CACHE_DIR where the user has set
it. numba's own index notices changes to the file that defines a function, but not to helpers in other files;
`key` is a digest of all of this package's sources, of the versions and of the CPU, so stale code is never loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import stat
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import llvmlite
import numba
import platformdirs

from edge_kernels.machine import cpu_features, cpu_name, isa
from edge_kernels.threads import start_threads

logger = logging.getLogger("edge_kernels")

F = TypeVar("F", bound=Callable[..., Any])

_FLAGS: dict[str, Any] = {
    "nopython": True,
    "nogil": True,  # a server keeps answering while a picture is encoded
    "error_model": "numpy",  # division by zero gives inf or nan, not an exception: no branch per division
    "fastmath": {"contract"},
    "boundscheck": False,
}


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
    """Create `path` if needed; return whether we can write there (and nobody else, if `private`)."""
    try:
        if private:  # nobody else may write above it either, whatever the umask
            for parent in reversed(path.parents):
                if not parent.is_dir():
                    parent.mkdir(mode=0o755, exist_ok=True)
        path.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
        if private and hasattr(os, "getuid"):
            # Cached code is executed: a folder in a shared place must be ours alone and not a link elsewhere.
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
    """Whether machine code of a module's kernels is cached from an earlier run.

    Parameters
    ----------
    module : name below this package, such as `linear.gguf_blocks`.
    """
    room, stem = module.rsplit(".", 1)
    folder = cache_directory()
    return folder is not None and any(folder.glob(f"{room}_*/{stem}.*.nbc"))


@contextlib.contextmanager
def _own_cache() -> Iterator[bool]:
    """Let functions that are decorated inside the block be cached in our folder; yield whether there is one.

    numba reads the folder from its global setting when a function is decorated. It is restored at once, since other
    numba code in this process must not use our folder.
    """
    directory, before = cache_directory(), numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(directory or "")
    try:
        yield directory is not None
    finally:
        numba.config.CACHE_DIR = before


def kernel(function: F) -> F:
    """Compile an entry point: parallel, cached. Nothing is compiled before the first call.

    To get one specialisation only, call it with writable 1-D C-contiguous float32 or int64 arrays (`rows_view` and
    `vector_view` make them), Python ints, floats and bools.
    """
    with _own_cache() as is_cached:
        compiled: F = numba.jit(parallel=True, cache=is_cached, **_FLAGS)(function)
    _kernels.append(compiled)
    return compiled


def callback(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a C function for a library to call, cached as kernels are; `ctypes` of the result is the pointer.

    It is compiled when it is decorated, and needs no Python when it is called. It may call kernels: these run on the
    threads that numba has started.
    """
    start_threads()  # cached code is linked at once, and needs the symbols of numba's threads

    def decorate(function: Callable[..., Any]) -> Any:
        options = {name: value for name, value in _FLAGS.items() if name != "nogil"}
        with _own_cache() as is_cached:
            return numba.cfunc(signature, cache=is_cached, **options)(function)

    return decorate


def helper(function: F) -> F:
    """Compile a function that kernels call; its code is cached as part of theirs."""
    # Explicit, as numba would take it from the caller.
    compiled: F = numba.jit(_nrt=True, forceinline=False, **_FLAGS)(function)
    return compiled


def leaf(function: F) -> F:
    """Compile a helper that makes no arrays: without reference counts, and inlined into its caller.

    numba counts references to every array that is passed to a helper or bound to a variable, with atomic
    instructions. Each of them waits until all stores before it are done, so a processor with a thousand cycles of
    tile products in flight stalls. A call with its arrays, seven numbers each, costs as much.
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
