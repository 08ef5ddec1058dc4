"""The only home of compiler flags and of the compilation cache.

What enters: Python functions, through the decorators `kernel` (entry points, cached on disk), `helper` (called by
kernels) and `leaf` (compiled into its caller). What leaves: compiled functions, which are called inside
`threads.parallel_region`.

Floating point: fused multiply-add is allowed (`contract`), nothing else. No reassociation, so a result
depends neither on the vectoriser nor on the thread count; no assumption about NaN or infinity, so they reach
the output and can be seen there.

Machine code comes from a folder that was filled ahead of time, if there is one for this machine (`shipped`). Other
machine code is kept in `<user cache>/edge-runtime/jit/<key>`, or below NUMBA_CACHE_DIR where the user has set
it. numba's own index notices changes to the file that defines a function, but not to helpers in other files;
`key` is a digest of all of this package's sources, of the versions and of the CPU, so stale code is never loaded.
That folder is made when something has to be compiled, not before.
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
from numba.core import sigutils
from numba.core.caching import FunctionCache, NullCache
from numba.core.ccallback import CFunc
from numba.core.runtime import rtsys

from edge_kernels import shipped
from edge_kernels.machine import cpu_features, cpu_name, isa
from edge_kernels.shipped import digest_sources, name_of
from edge_kernels.signatures import argument_types
from edge_kernels.threads import start_threads

logger = logging.getLogger("edge_kernels")

cpu_features()  # numba starts with the first function below: what LLVM misses on ARM must be told it before

F = TypeVar("F", bound=Callable[..., Any])

_FLAGS: dict[str, Any] = {
    "nopython": True,
    "nogil": True,  # a server keeps answering while a picture is encoded
    "error_model": "numpy",  # division by zero gives inf or nan, not an exception: no branch per division
    "fastmath": {"contract"},
    "boundscheck": False,
}


PROBE_BYTES = 64 << 10
"""Written to see whether a folder can be: the smallest kernel has as much."""


class CacheStatistics(NamedTuple):
    """How often this process has loaded a kernel, shipped or cached (`hits`), or compiled one (`misses`)."""

    hits: int
    misses: int


_kernels: list[Any] = []
_caches: list[_Cache] = []
recorder: Callable[[str, Any], None] | None = None
"""Where set, by `ahead`, it gets the name and numba's result of all that is compiled; nothing is loaded or kept."""


def _cache_key() -> str:
    """Digest everything that machine code depends on."""
    facts = (
        digest_sources(Path(__file__).parent),
        numba.__version__,
        llvmlite.__version__,
        platform.python_version(),
        cpu_name(),
        isa(),
        *sorted(cpu_features()),
    )
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


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
        with tempfile.TemporaryFile(dir=path) as file:  # on a full disk, an empty file can be made
            file.write(bytes(PROBE_BYTES))
            file.flush()
        return True
    except OSError:
        return False


@cache
def cache_directory() -> Path | None:
    """Return the folder for this version's machine code; None if none can be written."""
    key = _cache_key()
    chosen = numba.config.CACHE_DIR  # NUMBA_CACHE_DIR, if the user has set it
    home = Path(chosen) if chosen else _users_folder()
    if home is not None and _usable_directory(home / key, private=not chosen):
        return home / key
    fallback = _temporary_folder()
    if fallback is not None and _usable_directory(fallback, private=True) and _usable_directory(fallback / key):
        logger.warning(
            "Compiled kernels cannot be kept in %s; keeping them in %s. "
            "Set NUMBA_CACHE_DIR to a folder that can be written to.",
            home or "a home folder, as there is none",
            fallback,
        )
        return fallback / key
    logger.warning(
        "Compiled kernels cannot be kept in %s or %s: every start compiles them anew. "
        "Set NUMBA_CACHE_DIR to a folder that can be written to.",
        home or "a home folder, as there is none,",
        fallback or "a folder for temporary files",
    )
    return None


def _users_folder() -> Path | None:
    """Return where the user's machine code is; None for users without a home, such as those of services."""
    try:
        path = Path(platformdirs.user_cache_dir("edge-runtime")) / "jit"
    except RuntimeError:
        return None
    return path if path.is_absolute() else None  # older releases of platformdirs leave the ~


def _temporary_folder() -> Path | None:
    """Return where machine code is kept if it cannot be in the user's folder; None where no folder can be written."""
    owner = os.getuid() if hasattr(os, "getuid") else "user"
    try:
        return Path(tempfile.gettempdir()) / f"edge-runtime-jit-{owner}"
    except OSError:
        return None


def is_compiled(module: str) -> bool:
    """Whether machine code of a module's kernels is shipped, or cached from an earlier run.

    Parameters
    ----------
    module : name below this package, such as `linear.gguf_blocks`.
    """
    if shipped.has_module(module):
        return True
    room, stem = module.rsplit(".", 1)
    folder = cache_directory()
    return folder is not None and any(folder.glob(f"{room}_*/{stem}.*.nbc"))


def origin() -> str:
    """Say where this machine's kernels come from: shipped, compiled by an earlier run, or compiled when needed."""
    folder = shipped.find()
    if folder is not None:
        return f"{len(folder.kernels)} for {isa()}, compiled ahead of time: {folder.path}"
    directory = cache_directory()
    cached = 0 if directory is None else len(list(directory.glob("*/*.nbc")))
    return f"{cached} for {isa()}, compiled by earlier runs" if cached else f"none for {isa()}: compiled at first use"


@contextlib.contextmanager
def _own_cache() -> Iterator[bool]:
    """Let numba's caches that are made inside the block lie in our folder; yield whether there is one.

    numba reads the folder from its global setting. It is restored at once, since other numba code in this process
    must not use our folder.
    """
    directory, before = cache_directory(), numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(directory or "")
    try:
        yield directory is not None
    finally:
        numba.config.CACHE_DIR = before


class _Cache:
    """Where numba looks for a kernel before it compiles it: among the shipped ones, then in the user's folder.

    numba calls `load_overload`, and `save_overload` with what it has compiled, under its lock.
    """

    def __init__(self, function: Callable[..., Any], *, is_kernel: bool) -> None:
        self._function, self._is_kernel, self._name = function, is_kernel, name_of(function)
        self._user: Any = None
        self._loaded: Any = None
        self.hits = self.misses = 0
        _caches.append(self)

    @property
    def cache_path(self) -> Any:
        """Numba's interface: where the user's folder is."""
        return self._users_cache().cache_path

    def load_overload(self, signature: Any, context: Any) -> Any:
        """Return a compiled function of these types of arguments, or None."""
        found = None
        if recorder is None:
            if self._is_shipped(signature):
                found = shipped.load(context, self._name)
            if found is None:
                found = self._load_cached(signature, context)
        self._loaded = found  # machine code points to Python objects of it, and of callbacks numba keeps none
        self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        return found

    def _load_cached(self, signature: Any, context: Any) -> Any:
        user = self._users_cache()
        if not isinstance(user, FunctionCache):
            return None
        # As numba's `load_overload`, which first collects all that it can compile: 0.3 s, and not needed to load.
        rtsys.initialize(context)
        try:
            return user._load_overload(signature, context)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a file, compiling makes another
            logger.warning(
                "The kernel %s in %s cannot be read (%s: %s). It is compiled anew.",
                self._name, self.cache_path, type(error).__name__, error,
            )  # fmt: skip
            with contextlib.suppress(OSError):
                user.flush()  # or its damaged index would be read again before a new one is written
            return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep what has been compiled."""
        if recorder is not None:
            recorder(self._name, result)
            return
        try:
            self._users_cache().save_overload(signature, result)
        except OSError as error:  # a full disk, above all
            logger.warning(
                "The compiled kernel %s cannot be kept in %s: %s. The next start compiles it again.",
                self._name, self.cache_path, error.strerror or error,
            )  # fmt: skip

    def flush(self) -> None:
        """Numba's interface: forget what is kept in the user's folder."""
        self._users_cache().flush()

    def _is_shipped(self, signature: Any) -> bool:
        folder = shipped.find()
        if folder is None or self._name not in folder.kernels:
            return False
        arguments, _ = sigutils.normalize_signature(signature)
        return not self._is_kernel or tuple(arguments) == argument_types(self._function)

    def _users_cache(self) -> Any:
        if self._user is None:
            with _own_cache() as is_cached:
                self._user = FunctionCache(self._function) if is_cached else NullCache()
        return self._user


def kernel(function: F) -> F:
    """Compile an entry point: parallel, cached. Nothing is compiled before the first call.

    The annotations of its parameters say what it is compiled for (`signatures`). To get this specialisation only,
    call it with writable 1-D C-contiguous float32 or int64 arrays (`rows_view` and `vector_view` make them), Python
    ints, floats and bools.
    """
    compiled: Any = numba.jit(parallel=True, **_FLAGS)(function)
    compiled._cache = _Cache(function, is_kernel=True)
    _kernels.append(compiled)
    return compiled  # type: ignore[no-any-return]


def callback(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a C function for a library to call, cached as kernels are; `ctypes` of the result is the pointer.

    It is compiled when it is decorated, and needs no Python when it is called. It may call kernels: these run on the
    threads that numba has started.
    """
    start_threads()  # cached code is linked at once, and needs the symbols of numba's threads

    def decorate(function: Callable[..., Any]) -> Any:
        options = {name: value for name, value in _FLAGS.items() if name != "nogil"}
        compiled: Any = CFunc(function, sigutils.normalize_signature(signature), locals={}, options=options)
        compiled._cache = _Cache(function, is_kernel=False)
        compiled.compile()
        return compiled

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
    """Return how many kernels and callbacks this process has loaded, and how many it has compiled."""
    return CacheStatistics(hits=sum(c.hits for c in _caches), misses=sum(c.misses for c in _caches))
