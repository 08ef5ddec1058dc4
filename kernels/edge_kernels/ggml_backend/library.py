"""The ggml that this process has loaded: its libraries and the functions that a backend needs.

A wheel of llama-cpp-python holds each library under several names (`libggml.so`, `libggml.so.0`), as separate files:
opening another one than libllama has opened gives a second ggml, with a registry that nobody reads. So the library is
found in the process's own list of what it has loaded.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

_NAME = re.compile(r"^(?:lib)?ggml(?:-(base|cpu))?[.\-\d]*(?:so|dylib|dll)?[.\d]*$", re.IGNORECASE)


class BackendError(RuntimeError):
    """The kernels cannot be used inside this ggml; says why."""


def _loaded_files() -> Iterator[str]:
    """Paths of the shared libraries of this process."""
    if sys.platform == "linux":
        for line in Path("/proc/self/maps").read_text().splitlines():
            yield line.split(maxsplit=5)[-1]
    elif sys.platform == "darwin":
        system = ctypes.CDLL(None)
        system._dyld_get_image_name.restype = ctypes.c_char_p
        for i in range(system._dyld_image_count()):
            yield system._dyld_get_image_name(ctypes.c_uint32(i)).decode()
    elif sys.platform == "win32":
        import psutil

        for mapped in psutil.Process().memory_maps():
            yield mapped.path


@cache
def _libraries() -> dict[str, ctypes.CDLL]:
    """Open the loaded libraries again: by "", "base" and "cpu"."""
    found: dict[str, str] = {}
    for path in _loaded_files():
        name = re.split(r"[/\\]", path)[-1]
        match = _NAME.match(name)
        if match:
            found.setdefault(match[1] or "", path)
    if {"", "base"} - set(found):
        raise BackendError("ggml is not loaded in this process as a shared library; import llama_cpp first.")
    return {part: ctypes.CDLL(path) for part, path in found.items()}


_RESULTS: dict[str, Any] = {
    "ggml_version": ctypes.c_char_p,
    "ggml_op_name": ctypes.c_char_p,
    "ggml_type_name": ctypes.c_char_p,
    "ggml_type_size": ctypes.c_size_t,
    "ggml_blck_size": ctypes.c_int64,
    "ggml_tensor_overhead": ctypes.c_size_t,
    "ggml_init": ctypes.c_void_p,
    "ggml_new_tensor_4d": ctypes.c_void_p,
    "ggml_mul_mat": ctypes.c_void_p,
    "ggml_permute": ctypes.c_void_p,
    "ggml_flash_attn_ext": ctypes.c_void_p,
    "ggml_quantize_chunk": ctypes.c_size_t,
    "ggml_new_graph": ctypes.c_void_p,
    "ggml_graph_nodes": ctypes.c_void_p,
    "ggml_graph_n_nodes": ctypes.c_int,
    "ggml_backend_cpu_buffer_type": ctypes.c_void_p,
    "ggml_backend_cpu_buffer_from_ptr": ctypes.c_void_p,
    "ggml_backend_buft_is_host": ctypes.c_bool,
    "ggml_backend_buffer_get_type": ctypes.c_void_p,
    "ggml_backend_init_by_type": ctypes.c_void_p,
    "ggml_backend_graph_compute": ctypes.c_int,
}


@cache
def function(name: str) -> Any:
    """Return a function of the loaded ggml.

    Raises
    ------
    BackendError
        When ggml is not loaded, or has no such function.
    """
    for library in _libraries().values():
        try:
            found = getattr(library, name)
        except AttributeError:
            continue
        found.restype = _RESULTS.get(name)
        return found
    raise BackendError(f"this ggml has no {name}; it is another version than the kernels know.")


def address(name: str) -> int:
    """Return the address of a function of the loaded ggml, for compiled code."""
    return ctypes.cast(function(name), ctypes.c_void_p).value or 0
