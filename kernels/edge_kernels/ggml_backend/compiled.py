"""What ggml calls while it plans and computes: compiled, so that neither Python nor its lock is needed.

ggml hands over pointers to its structures (`structures`); fields are read at their offsets. What the functions must
know besides lies in a *table* of int64, which devices and backends point to with their `context`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_kernels.attention.kv_cache import Sizes, Strided, attend
from edge_kernels.compile import callback, helper
from edge_kernels.ggml_backend.structures import FLOAT16, FLOAT32, MUST_BE_COMPUTED, Backend, Device, Tensor
from edge_kernels.linear.gguf_int8 import Matrix, Weight, multiply
from edge_kernels.simd.gguf_layout import BLOCK, BLOCK_NR
from edge_kernels.simd.ir import BYTE, INDEX, INT
from edge_kernels.simd.kv_rows import GROUP, read_float
from edge_kernels.threads import exchange_threads

# The table: where each number is. Operations are ggml's codes; -1 where it has no such operation.
THREADS, MAX_THREADS, MIN_ROWS, GRAPH_NODES, GRAPH_N_NODES, MUL_MAT, ATTENTION, ATTENTION_ROWS = range(8)
FREE, N_FREE = 8, 5
KIND = FREE + N_FREE
"""From here on, for each of ggml's types: index of its kind in `KINDS`, or -1."""
N_TYPES = 64
BLOCK_BYTES = KIND + N_TYPES
KV_KIND = BLOCK_BYTES + N_TYPES
"""For each of ggml's types: index in `KV_KINDS`, or -1. After it, bytes of what ggml takes for one element."""
ELEMENT_BYTES = KV_KIND + N_TYPES
TABLE_SIZE = ELEMENT_BYTES + N_TYPES
MAX_DIMS = 512
"""Of a head: wider ones do not fit the caches."""

SUCCESS = 0

_NE, _NB, _SRC = Tensor.ne.offset, Tensor.nb.offset, Tensor.src.offset
_TYPE, _OP, _FLAGS, _DATA = Tensor.type.offset, Tensor.op.offset, Tensor.flags.offset, Tensor.data.offset
_PARAMETERS = Tensor.op_params.offset
_DEVICE_CONTEXT, _BACKEND_CONTEXT = Device.context.offset, Backend.context.offset


def _reader(type_):
    @intrinsic
    def read(typing_context, address, offset):
        def generate(context, builder, signature, args):
            at = builder.inttoptr(builder.add(*args), type_.as_pointer())
            value = builder.load(at)
            return value if type_ == INDEX else builder.sext(value, INDEX)

        return types.int64(types.int64, types.int64), generate

    return read


_read, _read_int32 = _reader(INDEX), _reader(INT)
"""Read an integer: (address, offset in bytes)."""


@intrinsic
def _write(typing_context, address, offset, value):
    def generate(context, builder, signature, args):
        builder.store(args[2], builder.inttoptr(builder.add(args[0], args[1]), INDEX.as_pointer()))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), generate


@intrinsic
def _address(typing_context, pointer):
    def generate(context, builder, signature, args):
        return builder.ptrtoint(args[0], INDEX)

    return types.int64(types.voidptr), generate


@intrinsic
def _call(typing_context, function, argument):
    """Call a C function of one pointer that returns a pointer or an int."""

    def generate(context, builder, signature, args):
        pointer = BYTE.as_pointer()
        type_ = ir.FunctionType(INDEX, [pointer])
        return builder.call(builder.inttoptr(args[0], type_.as_pointer()), [builder.inttoptr(args[1], pointer)])

    return types.int64(types.int64, types.int64), generate


@helper
def _entry(table, i):
    return _read(table, 8 * i)


@helper
def _source(op, i):
    return _read(op, _SRC + 8 * i)


@helper
def _is_free(table, op):
    """Whether an operation only says where data lies."""
    found = False
    for i in range(N_FREE):
        found = found or op == _entry(table, FREE + i)
    return found


@helper
def _can_multiply(table, op):
    """Whether a product is one of a weight in blocks and rows of float32."""
    weight, rows = _read(op, _SRC), _read(op, _SRC + 8)
    kind_at = _read_int32(weight, _TYPE)
    if kind_at < 0 or kind_at >= N_TYPES or _entry(table, KIND + kind_at) < 0:
        return False
    if _read_int32(rows, _TYPE) != FLOAT32 or _read_int32(op, _TYPE) != FLOAT32:
        return False
    for tensor in (weight, rows, op):
        if _read(tensor, _NE + 16) != 1 or _read(tensor, _NE + 24) != 1:
            return False
    k, n, m = _read(weight, _NE), _read(weight, _NE + 8), _read(rows, _NE + 8)
    row_bytes = k // BLOCK * _entry(table, BLOCK_BYTES + kind_at)
    return (
        k % BLOCK == 0 and n >= BLOCK_NR and m >= _entry(table, MIN_ROWS)
        and _read(weight, _NB + 8) == row_bytes and _read(rows, _NB) == 4 and _read(op, _NB) == 4
    )  # fmt: skip


@helper
def _kv_kind(table, tensor, dims):
    """Kind of keys or values, -1 if they are none that `attend` can read."""
    type_ = _read_int32(tensor, _TYPE)
    if type_ < 0 or type_ >= N_TYPES or _read(tensor, _NE) != dims:
        return -1
    return _entry(table, KV_KIND + type_) if _read(tensor, _NB) == _entry(table, ELEMENT_BYTES + type_) else -1


@helper
def _can_mask(mask, rows, keys, streams):
    """Whether a mask is none, or one for all heads."""
    if mask == 0:
        return True
    of_streams = _read(mask, _NE + 24)
    return (
        _read_int32(mask, _TYPE) == FLOAT16 and _read(mask, _NB) == 2 and _read(mask, _NE) >= keys
        and _read(mask, _NE + 8) >= rows and _read(mask, _NE + 16) == 1 and of_streams in (1, streams)
    )  # fmt: skip


@helper
def _can_attend(table, op):
    """Whether an attention has many rows of float32, known keys and values, one mask, and nothing besides."""
    q, k, v = _source(op, 0), _source(op, 1), _source(op, 2)
    mask, sinks = _source(op, 3), _source(op, 4)
    dims, rows, heads, streams = _read(q, _NE), _read(q, _NE + 8), _read(q, _NE + 16), _read(q, _NE + 24)
    keys, kv_heads = _read(k, _NE + 8), _read(k, _NE + 16)
    if rows < _entry(table, ATTENTION_ROWS) or sinks != 0 or dims % GROUP != 0 or dims > MAX_DIMS:
        return False
    if read_float(op + _PARAMETERS + 4) != 0.0 or read_float(op + _PARAMETERS + 8) != 0.0:  # ALiBi, soft cap
        return False
    for tensor in (q, op):
        if _read_int32(tensor, _TYPE) != FLOAT32 or _read(tensor, _NB) != 4:
            return False
    for tensor in (k, v):
        if _kv_kind(table, tensor, dims) < 0 or _read(tensor, _NE + 24) != streams:
            return False
    return (
        keys > 0 and kv_heads > 0 and heads % kv_heads == 0 and _can_mask(mask, rows, keys, streams)
        and _read(v, _NE + 8) == keys and _read(v, _NE + 16) == kv_heads
    )  # fmt: skip


@callback(types.uint8(types.voidptr, types.voidptr))
def supports_op(device, op):
    """`supports_op` of a device: whether `graph_compute` can compute a node. Asked thousands of times per graph."""
    table = _read(_address(device), _DEVICE_CONTEXT)
    node = _address(op)
    code = _read_int32(node, _OP)
    if _is_free(table, code):
        return 1
    if code == _entry(table, MUL_MAT):
        return 1 if _can_multiply(table, node) else 0
    return 1 if code == _entry(table, ATTENTION) and _can_attend(table, node) else 0


@helper
def _multiply(table, node, threads):
    weight, rows = _read(node, _SRC), _read(node, _SRC + 8)
    type_ = _read_int32(weight, _TYPE)
    multiply(
        Weight(
            _read(weight, _DATA), _entry(table, KIND + type_), _entry(table, BLOCK_BYTES + type_),
            _read(weight, _NB + 8), _read(weight, _NE + 8), _read(weight, _NE),
        ),
        Matrix(_read(rows, _DATA), _read(rows, _NB + 8)), _read(rows, _NE + 8),
        Matrix(_read(node, _DATA), _read(node, _NB + 8)), threads,
    )  # fmt: skip


@helper
def _strided(tensor, row, head):
    """A tensor whose rows and heads are its dimensions `row` and `head`."""
    return Strided(
        _read(tensor, _DATA), _read(tensor, _NB + 8 * row), _read(tensor, _NB + 8 * head), _read(tensor, _NB + 24)
    )


@helper
def _attend(table, node, threads):
    q, k, v, mask = _source(node, 0), _source(node, 1), _source(node, 2), _source(node, 3)
    dims, kv_heads, seen = _read(q, _NE), _read(k, _NE + 16), Strided(0, 0, 0, 0)
    if mask != 0:
        per_stream = _read(mask, _NB + 24) if _read(mask, _NE + 24) > 1 else 0
        seen = Strided(_read(mask, _DATA), _read(mask, _NB + 8), 0, per_stream)
    sizes = Sizes(
        _read(q, _NE + 8), _read(k, _NE + 8), kv_heads, _read(q, _NE + 16) // kv_heads, _read(q, _NE + 24), dims,
        _kv_kind(table, k, dims), _kv_kind(table, v, dims),
    )  # fmt: skip
    attend(
        _strided(q, 1, 2), _strided(k, 1, 2), _strided(v, 1, 2), seen, _strided(node, 2, 1), sizes,
        read_float(node + _PARAMETERS), threads,
    )  # fmt: skip


@callback(types.int32(types.voidptr, types.voidptr))
def graph_compute(backend, graph):
    """`graph_compute` of a backend: compute the nodes that `supports_op` has accepted, one after the other."""
    table, graph_at = _read(_address(backend), _BACKEND_CONTEXT), _address(graph)
    nodes = _call(_entry(table, GRAPH_NODES), graph_at)
    n_nodes = _call(_entry(table, GRAPH_N_NODES), graph_at) & 0x7FFFFFFF
    threads = _entry(table, THREADS)
    before = exchange_threads(threads)
    for i in range(n_nodes):
        node = _read(nodes, 8 * i)
        if _read_int32(node, _FLAGS) & MUST_BE_COMPUTED:
            if _read_int32(node, _OP) == _entry(table, MUL_MAT):
                _multiply(table, node, threads)
            elif _read_int32(node, _OP) == _entry(table, ATTENTION):
                _attend(table, node, threads)
    exchange_threads(before)
    return SUCCESS


@callback(types.void(types.voidptr, types.int32))
def set_n_threads(backend, n_threads):
    """`ggml_backend_set_n_threads`, which llama.cpp looks up by name: its setting is the kernels', too."""
    table = _read(_address(backend), _BACKEND_CONTEXT)
    _write(table, 8 * THREADS, max(1, min(n_threads, _entry(table, MAX_THREADS))))
