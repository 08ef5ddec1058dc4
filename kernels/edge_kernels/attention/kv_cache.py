"""Attention inside llama.cpp: rows of queries, and keys and values where they lie in its KV cache.

What enters: addresses and strides of ggml's tensors. What leaves: the weighted values, before the output projection.

A task is a block of rows and the heads of queries that share a head of keys and values: each key and each value is
brought to float32 once for all of them. It is computed as in `attention.float32`, keys down and queries across:

    column of a panel    row 0, head 0 | row 0, head 1 | … | row 1, head 0 | …
    keys                 blocks of KEY_BLOCK cells of the cache

Where few columns are left, as with one row, their panel is one vector wide.

The mask says which cells a row sees: those of its own sequence, up to its position. In a block only the cells from
the first to the last that a panel's rows see are computed. Columns do not mix, and blocks leave no trace
(`simd.whole_softmax`): a row's result depends on what it sees and on the order of that alone, not on where it lies in
the cache, nor on the other rows of the call, nor on the number of threads.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from edge_kernels.arrays import aligned
from edge_kernels.compile import helper, kernel, leaf
from edge_kernels.linear.gguf_blocks import LOG2_E
from edge_kernels.simd.float32 import product_of, product_tile, scale_of, scale_panel
from edge_kernels.simd.gguf_rows import write_float
from edge_kernels.simd.ir import MR, NR, TILE, take_ticket
from edge_kernels.simd.kv_rows import (
    GROUP_BYTES,
    read_bits,
    read_f16,
    read_float,
    read_half,
    read_q4_0,
    read_q8_0,
)
from edge_kernels.simd.whole_softmax import LOWEST_MAXIMUM, STATE_ROWS, whole_softmax

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

KV_KINDS = tuple(GROUP_BYTES)
KEY_BLOCK = 96
"""Keys per block: whole tiles everywhere."""
COLUMNS = 192
"""Columns of a task at most: their queries and sums, 196 kB with heads of 128, stay in the second cache."""
TASKS_PER_WORKER = 4
_MASKED = 0xFC00  # -infinity in float16
NARROW_MR, NARROW_NR = MR * TILE.vectors, TILE.width
"""The register tile for few columns: one vector wide, with as many sums."""


class Strided(NamedTuple):
    """A tensor of ggml's: its address, and the bytes from one row, head and stream to the next."""

    address: int
    row: int
    head: int
    stream: int


class Sizes(NamedTuple):
    """Sizes of an attention.

    Attributes
    ----------
    rows, keys : int
    kv_heads : int
        Heads of keys and values.
    group : int
        Heads of queries that share one.
    streams : int
        Independent attentions in one call.
    dims : int
        Width of a head, a multiple of 32.
    key_kind, value_kind : int
        Index of the type in KV_KINDS.
    """

    rows: int
    keys: int
    kv_heads: int
    group: int
    streams: int
    dims: int
    key_kind: int
    value_kind: int


class _Buffers(NamedTuple):
    queries: Float32  # [panel][d][width of the panel], scaled
    sums: Float32  # [panel][_padded(d)][width]
    scores: Float32  # [KEY_BLOCK][width]
    state: Float32  # [panel][STATE_ROWS][width], see `whole_softmax`
    keys: Float32  # [KEY_BLOCK][d]
    values: Float32  # [KEY_BLOCK][d]
    seen: Int64  # [row][3]: first key of the block that it sees, the one after the last, whether some number is not 0


@leaf
def _read(kind, address, n, out, offset):
    if kind == 0:
        read_f16(address, n, out, offset)
    elif kind == 1:
        read_q8_0(address, n, out, offset)
    else:
        read_q4_0(address, n, out, offset)


@leaf
def _padded(dims):
    return (dims + NARROW_MR - 1) // NARROW_MR * NARROW_MR


@leaf
def _next_panel(columns, start):
    """Columns of the panel that begins at one: NR, or those of one vector where fewer are left."""
    return NR if columns - start > NR - NARROW_NR else NARROW_NR


@leaf
def _pack_queries(q, sizes, factor, first, n_rows, buffers):
    """Bring a task's queries into panels; `q` begins at its first head. Columns that are left over are 0."""
    queries, state, d, columns = buffers.queries, buffers.state, sizes.dims, n_rows * sizes.group
    start = 0
    while start < columns:
        width = _next_panel(columns, start)
        for j in range(width):
            column = start + j
            if column < columns:
                at = q.address + (first + column // sizes.group) * q.row + column % sizes.group * q.head
                for i in range(d):
                    queries[start * d + i * width + j] = read_float(at + 4 * i) * factor
            else:
                for i in range(d):
                    queries[start * d + i * width + j] = 0.0
            state[start * STATE_ROWS + j] = LOWEST_MAXIMUM
            state[start * STATE_ROWS + width + j] = state[start * STATE_ROWS + 2 * width + j] = 0.0
        start += width


@leaf
def _look(address, n_keys, seen, place):
    """Find out what a row sees of a block whose mask is at an address."""
    low, high, other = 0, n_keys, 0
    while low < high and read_bits(address + 2 * low) == _MASKED:
        low += 1
    while high > low and read_bits(address + 2 * high - 2) == _MASKED:
        high -= 1
    for i in range(low, high):
        other |= read_bits(address + 2 * i)
    seen[place], seen[place + 1], seen[place + 2] = low, high, other


@leaf
def _add_mask(mask, sizes, rows, start, width, low, high, scores):
    """Add the mask, from the block and the task on, to a panel's scores of keys low … high - 1."""
    for j in range(width):
        row = (start + j) // sizes.group
        if row < rows:
            at = mask.address + row * mask.row
            for key in range(low, high):
                scores[(key - low) * width + j] += read_half(at + 2 * key) * np.float32(LOG2_E)


@leaf
def _range_of(seen, first, last, low, high):
    """Widen low … high - 1 by what rows first … last - 1 see."""
    for row in range(first, last):
        if seen[3 * row] < seen[3 * row + 1]:
            low, high = min(low, seen[3 * row]), max(high, seen[3 * row + 1])
    return low, high


def _panel_of(mr, vectors, product, scale):
    """Make the code of a panel of so many vectors, computed in tiles of mr rows."""
    width, softmax, add_product = (
        vectors * TILE.width,
        whole_softmax(vectors),
        product_of(mr, vectors, continues=True),
    )

    @leaf
    def run(mask, sizes, n_rows, start, low, high, is_masked, buffers):
        """Add keys low … high - 1 to the panel that begins at column `start`."""
        queries, sums, scores, state, keys, values, _ = buffers
        d, to, at = sizes.dims, start * _padded(sizes.dims), start * STATE_ROWS
        for r in range(low, high, mr):
            product(keys, r * d, d, 1, min(mr, high - r), queries, start * d, d, scores, (r - low) * width, 0)
        if is_masked:
            _add_mask(mask, sizes, n_rows, start, width, low, high, scores)
        softmax(scores, 0, high - low, state, at)
        scale(sums, to, d, state, at + (STATE_ROWS - 1) * width)
        for r in range(0, d, mr):
            add_product(values, low * d + r, 1, d, min(mr, d - r), scores, 0, high - low, sums, to + r * width, 1)

    return run


_panel = _panel_of(MR, TILE.vectors, product_tile, scale_panel)
_narrow_panel = _panel_of(NARROW_MR, 1, product_of(NARROW_MR, 1), scale_of(1))


@leaf
def _block(mask, sizes, n_rows, n_keys, buffers):
    """Add a block of keys, in `buffers`, to all panels of a task."""
    seen, columns, start = buffers.seen, n_rows * sizes.group, 0
    while start < columns:
        width = _next_panel(columns, start)
        first, last = start // sizes.group, min((start + width - 1) // sizes.group + 1, n_rows)
        low, high = _range_of(seen, first, last, n_keys, 0)
        is_masked = False
        for row in range(first, last):
            is_masked = is_masked or seen[3 * row] != low or seen[3 * row + 1] != high or seen[3 * row + 2] != 0
        if low < high and width == NR:
            _panel(mask, sizes, n_rows, start, low, high, is_masked, buffers)
        elif low < high:
            _narrow_panel(mask, sizes, n_rows, start, low, high, is_masked, buffers)
        start += width


@leaf
def _write(out, sizes, n_rows, buffers):
    """Divide a task's sums by those of the powers; rows that see nothing become 0."""
    d, d_padded, columns, start = sizes.dims, _padded(sizes.dims), n_rows * sizes.group, 0
    while start < columns:
        width = _next_panel(columns, start)
        for column in range(start, min(start + width, columns)):
            j = column - start
            total = buffers.state[start * STATE_ROWS + width + j]
            norm = np.float32(1.0) / total if total != 0.0 else np.float32(0.0)
            to = out.address + column // sizes.group * out.row + column % sizes.group * out.head
            for i in range(d):
                write_float(to + 4 * i, buffers.sums[start * d_padded + i * width + j] * norm)
        start += width


@leaf
def _task(q, k, v, mask, out, sizes, factor, first, n_rows, buffers):
    """Attend with a block of rows; every address is that of the task's first head."""
    d, columns, seen = sizes.dims, n_rows * sizes.group, buffers.seen
    _pack_queries(q, sizes, factor, first, n_rows, buffers)
    for i in range((columns + NR - 1) // NR * NR * _padded(d)):
        buffers.sums[i] = 0.0
    for start in range(0, sizes.keys, KEY_BLOCK):
        n_keys = min(KEY_BLOCK, sizes.keys - start)
        block_mask = Strided(mask.address + first * mask.row + 2 * start, mask.row, 0, 0)
        for row in range(n_rows):
            if mask.address != 0:
                _look(block_mask.address + row * mask.row, n_keys, seen, 3 * row)
            else:
                seen[3 * row], seen[3 * row + 1], seen[3 * row + 2] = 0, n_keys, 0
        low, high = _range_of(seen, 0, n_rows, n_keys, 0)
        for i in range(low, high):
            _read(sizes.key_kind, k.address + (start + i) * k.row, d, buffers.keys, i * d)
            _read(sizes.value_kind, v.address + (start + i) * v.row, d, buffers.values, i * d)
        if low < high:
            _block(block_mask, sizes, n_rows, n_keys, buffers)
    _write(Strided(out.address + first * out.row, out.row, out.head, 0), sizes, n_rows, buffers)


@leaf
def _part(tensor, stream, heads):
    """A tensor from a stream and a head on."""
    return Strided(tensor.address + stream * tensor.stream + heads * tensor.head, tensor.row, tensor.head, 0)


@helper
def _worker(q, k, v, mask, out, sizes, factor, block, tickets):
    d, group = sizes.dims, sizes.group
    panels = (block * group + NR - 1) // NR
    buffers = _Buffers(
        aligned(panels * d * NR, np.float32), aligned(panels * _padded(d) * NR, np.float32),
        aligned(KEY_BLOCK * NR, np.float32), aligned(panels * STATE_ROWS * NR, np.float32),
        aligned(KEY_BLOCK * d, np.float32), aligned(KEY_BLOCK * d, np.float32), np.empty(3 * block, np.int64),
    )  # fmt: skip
    blocks, both = (sizes.rows + block - 1) // block, sizes.kv_heads * sizes.streams
    ticket = take_ticket(tickets)
    while ticket < blocks * both:
        # The last rows see the most keys, so they come first: the tasks at the end are small.
        first, head = (blocks - 1 - ticket // both) * block, ticket % both
        stream, head = head // sizes.kv_heads, head % sizes.kv_heads
        _task(
            _part(q, stream, head * group), _part(k, stream, head), _part(v, stream, head), _part(mask, stream, 0),
            _part(out, stream, head * group), sizes, factor, first, min(block, sizes.rows - first), buffers,
        )  # fmt: skip
        ticket = take_ticket(tickets)


@helper
def _new_tickets():
    return np.zeros(1, np.int64)


@kernel
def attend(
    q: Strided, k: Strided, v: Strided, mask: Strided, out: Strided, sizes: Sizes, scale: np.float32, workers: int
):
    """Attend with all rows; the caller is in a parallel region.

    q, out: float32; k, v: of KV_KINDS; mask: float16 [row][key], without heads, or address 0 for none. Scores are
    multiplied by `scale`. Rows that see no key are 0.
    """
    most = max(1, COLUMNS // sizes.group)
    wanted = sizes.rows * sizes.kv_heads * sizes.streams // (TASKS_PER_WORKER * workers)
    unit = max(1, NR // sizes.group)
    block = min(most, max(unit, wanted // unit * unit))
    tickets, factor = _new_tickets(), np.float32(scale * LOG2_E)
    for _ in numba.prange(workers):
        _worker(q, k, v, mask, out, sizes, factor, block, tickets)
