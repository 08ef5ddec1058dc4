"""The only access to llama.cpp: llama-cpp-python's ctypes layer, loaded once, with its log captured.

llama.cpp reports errors only as log lines, so the last of them are kept for exceptions to quote; nothing is
printed unless EDGE_RUNTIME_LLAMA_LOG=1. The high-level `Llama` class is not used (see docs/dependencies.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from edge_kernels.waiting import spin_briefly
from edge_runtime.decoder.processor import missing_flags
from edge_runtime.errors import BackendUnavailable

RELEASE = "llama-cpp-python==0.3.36"
WHEELS = "https://abetlen.github.io/llama-cpp-python/whl/cpu"
"""Its authors' wheels for Linux (x86-64 with AVX2, ARM64), macOS and Windows."""
_AGAIN = f"pip install --force-reinstall --no-cache-dir --no-binary=llama-cpp-python {RELEASE}"
_COMPILERS = {
    "linux": "a C++ compiler and cmake (Debian and Ubuntu: apt install g++ cmake; Fedora: dnf install gcc-c++ cmake)",
    "darwin": "Xcode's tools and cmake (xcode-select --install; brew install cmake)",
    "win32": "Microsoft's C++ tools and cmake (winget install Microsoft.VisualStudio.2022.BuildTools Kitware.CMake)",
}

LOG_ERROR = 4  # ggml_log_level; a continued line has 5
KEPT_LINES = 8
MAX_LINE = 300  # characters

_errors: deque[str] = deque(maxlen=KEPT_LINES)
_watchers: list[Callable[[str], None]] = []
_keep_alive: list[Any] = []  # ctypes callbacks must outlive the library's use of them


@cache
def library() -> Any:
    """Return the module `llama_cpp.llama_cpp` with the backend initialised.

    Raises
    ------
    BackendUnavailable
        When llama-cpp-python is not installed or its shared library cannot be loaded.
    """
    spin_briefly()  # ggml's threads are OpenMP's, and llama_cpp loads it
    try:
        from llama_cpp import llama_cpp as lib
    except ImportError as error:
        raise BackendUnavailable(
            f"llama-cpp-python is not installed ({error}); install it with 'pip install {RELEASE}'. {_compiling()}"
        ) from None
    except (OSError, RuntimeError) as error:
        raise BackendUnavailable(
            f"llama.cpp's shared library does not load ({error}); {_remedy(str(error))}"
        ) from None
    lacking = missing_flags(lib.llama_print_system_info().decode("utf-8", "replace"))
    if lacking:
        raise BackendUnavailable(
            f"llama.cpp was compiled for a processor with {', '.join(lacking)}, which this one lacks; compile it "
            f"here: '{_AGAIN}'. {_compiling()}"
        )
    callback = lib.llama_log_callback(_on_log)
    _keep_alive.append(callback)
    lib.llama_log_set(callback, ctypes.c_void_p(0))
    lib.llama_backend_init()
    return lib


def _compiling() -> str:
    """How to get the compiler on this system, and how to do without one."""
    compiler = _COMPILERS.get(sys.platform, "a C++ compiler and cmake")
    return f"That compiles for about 5 minutes and needs {compiler}; for ready wheels add --extra-index-url={WHEELS}."


def _remedy(reason: str) -> str:
    """What to do about a library that does not load, by the loader's own words."""
    if "libgomp" in reason:
        return "install OpenMP's library (Debian and Ubuntu: apt install libgomp1; Fedora: dnf install libgomp)."
    if "musl" in reason or re.search(r"version `GLIBC", reason):
        return f"it was made for another system than this one. Compile it here: '{_AGAIN}'. {_compiling()}"
    return f"reinstall it with '{_AGAIN}'. {_compiling()}"


@cache
def ggml_base() -> ctypes.CDLL:
    """Return llama.cpp's base library, which holds the block quantizers."""
    import llama_cpp
    from llama_cpp._ctypes_extensions import load_shared_library

    library()
    return load_shared_library("ggml-base", Path(llama_cpp.__file__).parent / "lib")  # type: ignore[no-any-return]


def last_errors() -> str:
    """Return llama.cpp's latest error lines as one phrase and clear them."""
    text = "; ".join(_errors)
    _errors.clear()
    return text or "it gave no reason"


@contextlib.contextmanager
def watch_log(on_line: Callable[[str], None]) -> Iterator[None]:
    """Call `on_line` with every log line inside the block."""
    library()
    _errors.clear()
    _watchers.append(on_line)
    try:
        yield
    finally:
        _watchers.remove(on_line)


def _on_log(level: int, text: bytes, _user_data: Any) -> None:
    # Lines quote names from model files: unprintable characters must not reach a terminal.
    line = "".join(c if c.isprintable() else "?" for c in text.decode("utf-8", "replace").strip())[:MAX_LINE]
    if not line or line == ".":
        return
    if level == LOG_ERROR:
        _errors.append(line)
    for watcher in _watchers:
        watcher(line)
    if os.environ.get("EDGE_RUNTIME_LLAMA_LOG"):
        print(f"llama.cpp: {line}", file=sys.stderr)
