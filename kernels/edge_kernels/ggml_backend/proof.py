"""Proof that ggml and the kernels mean the same structures: small graphs, computed by both.

What enters: the table of `compiled`, and what makes a backend. What leaves: nothing, or a `BackendError`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_float, c_int, c_int64, c_size_t, c_void_p, cast
from typing import Any

import numpy as np

from edge_kernels.attention.kv_cache import KEY_BLOCK, KV_KINDS
from edge_kernels.ggml_backend import compiled
from edge_kernels.ggml_backend.library import BackendError, function
from edge_kernels.ggml_backend.structures import (
    CPU,
    FLOAT16,
    FLOAT32,
    MUST_BE_COMPUTED,
    Buffer,
    InitParameters,
    Tensor,
)
from edge_kernels.linear.gguf_int8 import KIND_NAMES
from edge_kernels.simd.gguf_int8 import TILE_ROWS
from edge_kernels.simd.gguf_layout import BLOCK, BLOCK_NR, WIDTH

MAX_TYPE = 20  # past the last of interest; ggml's functions check no bounds
MAX_ERROR = 0.02
"""Of a result, relative to its largest number: ggml rounds rows and queries to 8 bits, and so do products here."""

NewBackend = Callable[[], int]


class Graph:
    """A graph of one node in ggml, and the memory that holds all of it."""

    def __init__(self, n_bytes: int) -> None:
        self._memory = np.zeros(n_bytes, np.uint8)
        begin = self._memory.ctypes.data + -self._memory.ctypes.data % 64
        self._context = function("ggml_init")(InitParameters(n_bytes - 64, begin, False))
        if not self._context:
            raise BackendError("ggml makes no context.")
        self._random = np.random.default_rng(0)

    def make(self, name: str, *arguments: Any) -> int:
        """Make a tensor by a function of ggml's."""
        return int(function(name)(c_void_p(self._context), *arguments))

    def tensor(self, type_: int, *shape: int) -> int:
        """Make a tensor of up to four dimensions."""
        sizes = [*shape, 1, 1, 1][:4]
        return self.make("ggml_new_tensor_4d", c_int(type_), *map(c_int64, sizes))

    def fill(self, tensor: Tensor, numbers: Any = None) -> None:
        """Fill a tensor with numbers, by default random ones; ggml quantises them where it is not float32."""
        n = int(np.prod(tensor.ne))
        if numbers is None:
            numbers = self._random.standard_normal(n)
        numbers = np.ascontiguousarray(numbers, np.float32)
        if tensor.type == FLOAT32:
            ctypes.memmove(tensor.data, numbers.ctypes.data, numbers.nbytes)
            return
        function("ggml_quantize_chunk")(
            c_int(tensor.type), numbers.ctypes.data_as(c_void_p), c_void_p(tensor.data), c_int64(0),
            c_int64(n // tensor.ne[0]), c_int64(tensor.ne[0]), c_void_p(None),
        )  # fmt: skip

    def error(self, node: int, new_backend: NewBackend) -> float:
        """Compute a node both ways; return the largest difference, relative to the largest number."""
        graph = self.make("ggml_new_graph")
        function("ggml_build_forward_expand")(c_void_p(graph), c_void_p(node))
        if not tensor_at(node).flags & MUST_BE_COMPUTED:
            raise BackendError("this ggml marks no nodes that must be computed.")
        theirs, ours = (
            computed(backend, graph, tensor_at(node))
            for backend in (function("ggml_backend_init_by_type")(c_int(CPU), None), new_backend())
        )
        return float(np.abs(ours - theirs).max() / np.abs(theirs).max())

    def free(self) -> None:
        """Free it."""
        function("ggml_free")(c_void_p(self._context))


def tensor_at(address: int) -> Tensor:
    """The tensor at an address."""
    found: Tensor = cast(address, POINTER(Tensor)).contents
    return found


def computed(backend: int, graph: int, result: Tensor) -> Any:
    """Compute a graph with a backend, free it, and return the numbers of its result."""
    numbers = np.ctypeslib.as_array(cast(result.data, POINTER(c_float)), (int(np.prod(result.ne)),))
    numbers[:] = np.nan
    status = function("ggml_backend_graph_compute")(c_void_p(backend), c_void_p(graph))
    function("ggml_backend_free")(c_void_p(backend))
    if status != compiled.SUCCESS:
        raise BackendError(f"a graph ended with status {status}.")
    return numbers.copy()


def _compare(facts: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    if facts != expected:
        raise BackendError(f"this ggml's tensors look different: {facts} instead of {expected}.")


# --- products -----------------------------------------------------------------------------------------------


def check_products(table: Any, new_backend: NewBackend) -> None:
    """Compute small products of every type with ggml and with the kernels: one row, and one of each size of tile.

    Raises
    ------
    BackendError
        When fields are not where they should be, or the results differ.
    """
    for code in range(MAX_TYPE + 1):
        kind = int(table[compiled.KIND + code])
        for m in (1, sum(TILE_ROWS)) if kind >= 0 else ():
            error = _product_error(table, new_backend, code, 3 * BLOCK_NR + 1, BLOCK * WIDTH, m)
            if not error <= MAX_ERROR:
                raise BackendError(
                    f"a product with {KIND_NAMES[kind]} differs from ggml's by {error:.3g} of its largest number."
                )


def _product_error(table: Any, new_backend: NewBackend, kind: int, n: int, k: int, m: int) -> float:
    """Largest difference of a product, relative to its largest number."""
    graph = Graph(1 << 21)
    try:
        weight_at, rows_at = graph.tensor(kind, k, n), graph.tensor(FLOAT32, k, m)
        node = graph.make("ggml_mul_mat", c_void_p(weight_at), c_void_p(rows_at))
        found = tensor_at(node)
        weight, rows = found.src[0].contents, found.src[1].contents
        facts = (
            weight.type, rows.type, found.op, *weight.ne, *rows.ne, *found.ne, weight.nb[1], rows.nb[1], found.nb[1],
            ctypes.sizeof(Tensor) <= function("ggml_tensor_overhead")(),
        )  # fmt: skip
        expected = (
            kind, FLOAT32, table[compiled.MUL_MAT], k, n, 1, 1, k, m, 1, 1, n, m, 1, 1,
            k // BLOCK * table[compiled.BLOCK_BYTES + kind], 4 * k, 4 * n, True,
        )  # fmt: skip
        _compare(facts, expected)
        graph.fill(weight)
        graph.fill(rows)
        return graph.error(node, new_backend)
    finally:
        graph.free()


# --- attention ----------------------------------------------------------------------------------------------


def check_attention(table: Any, new_backend: NewBackend) -> None:
    """Compute a small attention with every type of keys and values, with ggml and with the kernels.

    Raises
    ------
    BackendError
        When fields are not where they should be, or the results differ.
    """
    for code in range(MAX_TYPE + 1):
        kind = int(table[compiled.KV_KIND + code])
        if kind < 0:
            continue
        error = _attention_error(table, new_backend, code)
        if not error <= MAX_ERROR:
            raise BackendError(
                f"attention with keys in {KV_KINDS[kind]} differs from ggml's by {error:.3g} of its largest number."
            )


def _attention_error(table: Any, new_backend: NewBackend, kind: int) -> float:
    """Largest difference of an attention of 5 rows, each of which sees one key more than the one before."""
    dims, rows, heads, keys, kv_heads, scale = 64, 5, 6, KEY_BLOCK + 7, 2, 0.125
    graph = Graph(1 << 20)
    try:
        lying = [(FLOAT32, heads, rows), (kind, kv_heads, keys), (kind, kv_heads, keys)]
        q, k, v = (
            graph.make("ggml_permute", c_void_p(graph.tensor(type_, dims, *shape)), *map(c_int, (0, 2, 1, 3)))
            for type_, *shape in lying
        )
        mask = graph.tensor(FLOAT16, keys, rows)
        node = graph.make(
            "ggml_flash_attn_ext", *map(c_void_p, (q, k, v, mask)), c_float(scale), c_float(0), c_float(0)
        )
        found = tensor_at(node)
        sources = [found.src[i].contents for i in range(4)]
        parameters = (c_float * 3).from_buffer_copy(bytes(found.op_params)[:12])
        facts = (
            found.op, found.type, *found.ne, found.nb[1], found.nb[2], *parameters, bool(found.src[4]),
            *(number for t in sources for number in (t.type, *t.ne, *t.nb[:3])),
        )  # fmt: skip
        row = dims * table[compiled.ELEMENT_BYTES + kind] // (1 if kind == FLOAT16 else 32)
        cache = (kind, dims, keys, kv_heads, 1, table[compiled.ELEMENT_BYTES + kind], kv_heads * row, row)
        expected = (
            table[compiled.ATTENTION], FLOAT32, dims, heads, rows, 1, 4 * dims, 4 * dims * heads, scale, 0, 0, False,
            FLOAT32, dims, rows, heads, 1, 4, 4 * dims * heads, 4 * dims, *cache, *cache,
            FLOAT16, keys, rows, 1, 1, 2, 2 * keys, 2 * keys * rows,
        )  # fmt: skip
        _compare(facts, expected)
        for tensor in sources[:3]:
            graph.fill(tensor)
        seen = np.arange(keys) < keys - rows + 1 + np.arange(rows)[:, None]
        hidden = np.where(seen, 0.0, -np.inf).astype(np.float16)
        ctypes.memmove(sources[3].data, hidden.ctypes.data, hidden.nbytes)
        return graph.error(node, new_backend)
    finally:
        graph.free()


# --- buffers ------------------------------------------------------------------------------------------------


def check_buffers() -> None:
    """See that a buffer of ggml names its type where it should.

    Raises
    ------
    BackendError
        When it does not.
    """
    memory = np.zeros(256, np.uint8)
    begin = memory.ctypes.data + -memory.ctypes.data % 64
    buffer = int(function("ggml_backend_cpu_buffer_from_ptr")(c_void_p(begin), c_size_t(64)))
    is_known = function("ggml_backend_buffer_get_type")(c_void_p(buffer)) == Buffer.from_address(buffer).type
    function("ggml_backend_buffer_free")(c_void_p(buffer))
    if not is_known:
        raise BackendError("this ggml's buffers look different.")
