"""Registering the kernels with ggml as an accelerator, and proving first that both mean the same structures.

llama.cpp gives every context the accelerators that are registered when it is made, and `used_in_new_contexts` says if
ours is one of them. Its buffers are ggml's own for the CPU, so nothing is copied: weights stay in the mapped file.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from ctypes import CFUNCTYPE, POINTER, addressof, byref, c_bool, c_char_p, c_int, c_size_t, c_void_p, cast
from functools import cache
from typing import Any

import numba
import numpy as np

from edge_kernels.attention.kv_cache import KV_KINDS
from edge_kernels.ggml_backend import compiled
from edge_kernels.ggml_backend.library import BackendError, address, function
from edge_kernels.ggml_backend.proof import MAX_TYPE, check_attention, check_buffers, check_products
from edge_kernels.ggml_backend.structures import (
    ACCELERATOR,
    API_VERSION,
    CPU,
    Backend,
    Buffer,
    BufferType,
    Capabilities,
    Device,
    Properties,
    Registration,
)
from edge_kernels.linear.gguf_int8 import KIND_NAMES
from edge_kernels.simd.gguf_layout import BLOCK, KINDS
from edge_kernels.simd.kv_rows import GROUP, GROUP_BYTES
from edge_kernels.threads import start_threads, thread_count

NAME = b"edge-kernels"
_FREE_OPERATIONS = ("NONE", "RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE")
MAX_OPERATION = 96  # past the last of interest; ggml's functions check no bounds
ATTENTION_ROWS = 1
"""Rows from which attention is computed here: all, or a row's result would depend on the other rows of its call."""


class _Registered:
    """The structures that ggml holds pointers to; they live as long as the process."""

    def __init__(self) -> None:
        self.is_used = True
        self._callbacks: list[Any] = []
        self._backends: dict[int, tuple[Backend, Any]] = {}
        self._free = self._callback(None, c_void_p)(self._free_backend)
        self._name = c_char_p(NAME)
        self._name_at = cast(self._name, c_void_p).value
        self._guid = (ctypes.c_uint8 * 16)(*b"edge-kernels\0\0\0\1")
        self.cpu_buffers: int = function("ggml_backend_cpu_buffer_type")()
        self.own_buffers, self.claims_weights = BufferType(), False
        self.table = _table()
        self.device, self.registration = Device(), Registration(API_VERSION)
        self._fill_buffer_type()
        self._fill_device()
        self._fill_registration()

    def _callback(self, result: Any, *arguments: Any) -> Any:
        """Turn a Python function into a C one: for what is called when a context is made, not while it computes."""

        def decorate(python: Any) -> int:
            self._callbacks.append(CFUNCTYPE(result, *arguments)(python))
            return cast(self._callbacks[-1], c_void_p).value or 0

        return decorate

    def _get_name(self) -> int:
        return int(self._callback(c_void_p, c_void_p)(lambda _: self._name_at))

    def _fill_buffer_type(self) -> None:
        """Make a type of buffers like ggml's for the CPU, by another name.

        llama.cpp asks accelerators for their buffers before it asks what repacks weights, but passes over the CPU's.
        """
        ctypes.memmove(addressof(self.own_buffers), self.cpu_buffers, ctypes.sizeof(BufferType))
        self.own_buffers.get_name, self.own_buffers.device = self._get_name(), addressof(self.device)

    def buffer_type(self) -> int:
        """The type of the buffers for weights, and for what is computed."""
        return addressof(self.own_buffers) if self.claims_weights else self.cpu_buffers

    def buffer_at(self, pointer: int, n_bytes: int) -> int:
        """Make a buffer of memory that is there: of a mapped file."""
        buffer = int(function("ggml_backend_cpu_buffer_from_ptr")(c_void_p(pointer), c_size_t(n_bytes)))
        Buffer.from_address(buffer).type = self.buffer_type()
        return buffer

    def _fill_device(self) -> None:
        functions, make = self.device.functions, self._callback
        functions.get_name = functions.get_description = self._get_name()
        functions.get_memory = make(None, c_void_p, POINTER(c_size_t), POINTER(c_size_t))(_no_memory)
        # llama.cpp asks for the type when it makes a context, and takes accelerators.
        functions.get_type = make(c_int, c_void_p)(lambda _: ACCELERATOR if self.is_used else CPU)
        functions.get_props = make(None, c_void_p, POINTER(Properties))(_fill_properties)
        functions.init_backend = make(c_void_p, c_void_p, c_char_p)(lambda _, __: self.new_backend())
        functions.get_buffer_type = make(c_void_p, c_void_p)(lambda _: self.buffer_type())
        functions.buffer_from_host_ptr = make(c_void_p, c_void_p, c_void_p, c_size_t, c_size_t)(
            lambda _, pointer, n_bytes, __: self.buffer_at(pointer, n_bytes)
        )
        functions.supports_op = compiled.supports_op.address
        is_host = function("ggml_backend_buft_is_host")
        functions.supports_buft = make(c_bool, c_void_p, c_void_p)(lambda _, kind: is_host(c_void_p(kind)))
        self.device.registration, self.device.context = addressof(self.registration), self.table.ctypes.data

    def _fill_registration(self) -> None:
        functions, make = self.registration.functions, self._callback
        functions.get_name = self._get_name()
        functions.get_device_count = make(c_size_t, c_void_p)(lambda _: 1)
        functions.get_device = make(c_void_p, c_void_p, c_size_t)(lambda _, __: addressof(self.device))
        functions.get_proc_address = make(c_void_p, c_void_p, c_char_p)(
            lambda _, name: compiled.set_n_threads.address if name == b"ggml_backend_set_n_threads" else None
        )

    def new_backend(self) -> int:
        """Make the backend of one context, with a table of its own."""
        backend, table = Backend(), self.table.copy()
        backend.guid, backend.device, backend.context = (
            addressof(self._guid),
            addressof(self.device),
            table.ctypes.data,
        )
        backend.functions.get_name = self.device.functions.get_name
        backend.functions.free = self._free
        backend.functions.graph_compute = compiled.graph_compute.address
        self._backends[addressof(backend)] = backend, table
        return addressof(backend)

    def _free_backend(self, backend: int) -> None:
        self._backends.pop(backend, None)


def _no_memory(_device: Any, free: Any, total: Any) -> None:
    free[0] = total[0] = 0  # "no memory to report"


def _fill_properties(_device: Any, properties: Any) -> None:
    found = properties.contents
    found.name = found.description = NAME
    found.memory_free = found.memory_total = 0
    found.type, found.device_id = ACCELERATOR, None
    found.capabilities = Capabilities(False, False, True, False, True)


def _operations() -> dict[str, int]:
    """Codes of the operations that matter, by ggml's names of them."""
    codes: dict[str, int] = {}
    wanted = {"MUL_MAT", "FLASH_ATTN_EXT", *_FREE_OPERATIONS}
    for code in range(MAX_OPERATION):
        name = (function("ggml_op_name")(c_int(code)) or b"").decode()
        if name in wanted:
            codes[name] = code
        if len(codes) == len(wanted):
            return codes
    raise BackendError(f"this ggml names no operation {', '.join(sorted(wanted - set(codes)))}.")


def _table() -> Any:
    """The table for `compiled`: what this ggml calls things."""
    operations = _operations()
    table = np.full(compiled.TABLE_SIZE, -1, np.int64)
    table[compiled.THREADS], table[compiled.MAX_THREADS] = thread_count(), numba.config.NUMBA_NUM_THREADS
    table[compiled.MIN_ROWS], table[compiled.MUL_MAT] = 1, operations["MUL_MAT"]
    table[compiled.ATTENTION], table[compiled.ATTENTION_ROWS] = operations["FLASH_ATTN_EXT"], ATTENTION_ROWS
    table[compiled.GRAPH_NODES] = address("ggml_graph_nodes")
    table[compiled.GRAPH_N_NODES] = address("ggml_graph_n_nodes")
    for i, name in enumerate(_FREE_OPERATIONS):
        table[compiled.FREE + i] = operations[name]
    for code in range(MAX_TYPE + 1):
        name = (function("ggml_type_name")(c_int(code)) or b"").decode().upper()
        if name in KV_KINDS:
            _check_size(code, name, GROUP, GROUP_BYTES[name])
            table[compiled.KV_KIND + code] = KV_KINDS.index(name)
            table[compiled.ELEMENT_BYTES + code] = function("ggml_type_size")(c_int(code))
        if name in KINDS:
            _check_size(code, name, BLOCK, KINDS[name].block_bytes)
            table[compiled.KIND + code] = KIND_NAMES.index(name)
            table[compiled.BLOCK_BYTES + code] = KINDS[name].block_bytes
    return table


def _check_size(code: int, name: str, n: int, n_bytes: int) -> None:
    """See that n numbers of a type take so many bytes."""
    found = n // function("ggml_blck_size")(c_int(code)) * function("ggml_type_size")(c_int(code))
    if found != n_bytes:
        raise BackendError(f"this ggml stores {n} numbers of {name} in {found} bytes; {n_bytes} were expected.")


# --- registering --------------------------------------------------------------------------------------------

_lock = threading.RLock()


@cache
def _registered() -> _Registered:
    layer = start_threads()
    if layer == "workqueue":
        raise BackendError(
            "numba has no thread layer here that several Python threads may use at once; install the package tbb, or "
            "libgomp."
        )
    registered = _Registered()
    check_products(registered.table, registered.new_backend)
    check_attention(registered.table, registered.new_backend)
    check_buffers()
    function("ggml_backend_register")(byref(registered.registration))
    return registered


def register(*, claims_weights: bool = True) -> None:
    """Register the kernels with the ggml that this process has loaded.

    All contexts of llama.cpp made from now on use them, unless `used_in_new_contexts` says otherwise. Compiles them
    where they are not cached, half a minute. Calling it again changes `claims_weights` alone.

    Parameters
    ----------
    claims_weights : bool
        Keep llama.cpp from repacking weights that the kernels take as they are. Programs that load models with
        `use_extra_bufts` false need not: results then share llama.cpp's own buffers, which takes less memory.

    Raises
    ------
    BackendError
        When ggml is not loaded, or is not the one that the kernels know; nothing is registered then.
    """
    with _lock:
        _registered().claims_weights = claims_weights


@contextlib.contextmanager
def used_in_new_contexts(used: bool) -> Iterator[None]:
    """Say whether contexts of llama.cpp that are made inside the block use the kernels.

    Raises
    ------
    BackendError
        As `register`, if `used` is true.
    """
    with _lock:
        if not used and not _registered.cache_info().currsize:
            yield
            return
        registered, before = _registered(), _registered().is_used
        registered.is_used = used
        try:
            yield
        finally:
            registered.is_used = before
