"""Attention inside llama.cpp: rows of queries, and keys and values where they lie in its KV cache.

What enters: addresses and strides of ggml's tensors. What leaves: the weighted values, before the output projection.

A task is a block of rows and the heads of queries that share a head of keys and values: each key and each value is
brought to float32 once for all of them. It is computed as in `attention.float32`, keys down and queries across:

    column of a panel    row 0, head 0 | row 0, head 1 | … | row 1, head 0 | …
    keys                 blocks of KEY_BLOCK cells of the cache

The mask says which cells a row sees: a position of its own sequence, up to its own. In a block only the cells from the
first to the last that a panel's rows see are computed. Leaving out the others changes no bit: their powers are 0. As
blocks begin at fixed cells and columns do not mix, a row's result depends neither on the other rows of the call nor on
the number of threads.
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
from edge_kernels.simd.float32 import product_tile, scale_panel, softmax_panel
from edge_kernels.simd.gguf_rows import write_float
from edge_kernels.simd.ir import MR, NR, take_ticket
from edge_kernels.simd.kv_rows import (
    GROUP_BYTES,
    read_bits,
    read_f16,
    read_float,
    read_half,
    read_q4_0,
    read_q8_0,
)

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

KV_KINDS = tuple(GROUP_BYTES)
KEY_BLOCK = 96
"""Keys per block: whole tiles everywhere. Fixed, because it decides the order of summation."""
COLUMNS = 192
"""Columns of a task at most: their queries and sums, 196 kB with heads of 128, stay in the second cache."""
TASKS_PER_WORKER = 4
_MASKED = 0xFC00  # -infinity in float16
_LOWEST = np.float32(-1e30)
"""The running maximum at first. Finite, so that the power of a masked score is 0 and not NaN."""


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
    queries: Float32  # [panel][d][NR], scaled
    sums: Float32  # [panel][d_padded][NR]
    scores: Float32  # [KEY_BLOCK + MR][NR]
    state: Float32  # [panel][3][NR], see `softmax_panel`
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
def _pack_queries(q, sizes, factor, first, n_rows, buffers):
    """Bring a task's queries into panels; `q` begins at its first head. Columns that are left over are 0."""
    queries, d, columns = buffers.queries, sizes.dims, n_rows * sizes.group
    for p in range((columns + NR - 1) // NR):
        for j in range(NR):
            column = p * NR + j
            if column < columns:
                at = q.address + (first + column // sizes.group) * q.row + column % sizes.group * q.head
                for i in range(d):
                    queries[(p * d + i) * NR + j] = read_float(at + 4 * i) * factor
            else:
                for i in range(d):
                    queries[(p * d + i) * NR + j] = 0.0
            buffers.state[p * 3 * NR + j] = _LOWEST
            buffers.state[(p * 3 + 1) * NR + j] = 0.0


@leaf
def _look(mask, row, n_keys, seen, place):
    """Find out what a row sees of a block whose mask begins at address `row`."""
    low, high, other = 0, n_keys, 0
    if mask.address != 0:
        while low < high and read_bits(row + 2 * low) == _MASKED:
            low += 1
        while high > low and read_bits(row + 2 * high - 2) == _MASKED:
            high -= 1
        for i in range(low, high):
            other |= read_bits(row + 2 * i)
    seen[place], seen[place + 1], seen[place + 2] = low, high, other


@leaf
def _add_mask(mask, sizes, first, n_rows, panel, low, high, scores):
    """Add the mask to a panel's scores of keys low … high - 1; its first address is that of the block."""
    for j in range(NR):
        row = (panel * NR + j) // sizes.group
        if row < n_rows:
            at = mask.address + (first + row) * mask.row
            for key in range(low, high):
                scores[(key - low) * NR + j] += read_half(at + 2 * key) * np.float32(LOG2_E)


@leaf
def _block(mask, sizes, first, n_rows, n_keys, buffers):
    """Add a block of keys, in `buffers`, to all panels of a task."""
    queries, sums, scores, state, keys, values, seen = buffers
    d = sizes.dims
    d_padded = (d + MR - 1) // MR * MR
    for p in range((n_rows * sizes.group + NR - 1) // NR):
        low, high, is_open = n_keys, 0, True
        first_row = p * NR // sizes.group
        last_row = min((p * NR + NR - 1) // sizes.group, n_rows - 1)
        for row in range(first_row, last_row + 1):
            if seen[3 * row] < seen[3 * row + 1]:
                low, high = min(low, seen[3 * row]), max(high, seen[3 * row + 1])
        if low >= high:
            continue
        for row in range(first_row, last_row + 1):
            is_open = is_open and seen[3 * row] == low and seen[3 * row + 1] == high and seen[3 * row + 2] == 0
        for r in range(low, high, MR):
            product_tile(
                keys, r * d, d, 1, min(MR, high - r), queries, p * d * NR, d, scores, (r - low) * NR, 0
            )  # fmt: skip
        if not is_open:
            _add_mask(mask, sizes, first, n_rows, p, low, high, scores)
        softmax_panel(scores, 0, high - low, state, p * 3 * NR)
        scale_panel(sums, p * d_padded * NR, d_padded, state, (p * 3 + 2) * NR)
        for r in range(0, d, MR):
            product_tile(
                values, low * d + r, 1, d, min(MR, d - r), scores, 0, high - low, sums, (p * d_padded + r) * NR, 1
            )  # fmt: skip


@leaf
def _task(q, k, v, mask, out, sizes, factor, first, n_rows, buffers):
    """Attend with a block of rows; every address is that of the task's first head."""
    d = sizes.dims
    d_padded = (d + MR - 1) // MR * MR
    columns = n_rows * sizes.group
    _pack_queries(q, sizes, factor, first, n_rows, buffers)
    for i in range((columns + NR - 1) // NR * d_padded * NR):
        buffers.sums[i] = 0.0
    for start in range(0, sizes.keys, KEY_BLOCK):
        n_keys = min(KEY_BLOCK, sizes.keys - start)
        low, high = n_keys, 0
        for row in range(n_rows):
            _look(mask, mask.address + (first + row) * mask.row + 2 * start, n_keys, buffers.seen, 3 * row)
            if buffers.seen[3 * row] < buffers.seen[3 * row + 1]:
                low, high = min(low, buffers.seen[3 * row]), max(high, buffers.seen[3 * row + 1])
        for i in range(low, high):
            _read(sizes.key_kind, k.address + (start + i) * k.row, d, buffers.keys, i * d)
            _read(sizes.value_kind, v.address + (start + i) * v.row, d, buffers.values, i * d)
        if low < high:
            block_mask = Strided(mask.address + 2 * start, mask.row, 0, 0)
            _block(block_mask, sizes, first, n_rows, n_keys, buffers)
    for column in range(columns):
        p, j = column // NR, column % NR
        total = buffers.state[(p * 3 + 1) * NR + j]
        norm = np.float32(1.0) / total if total != 0.0 else np.float32(0.0)
        to = out.address + (first + column // sizes.group) * out.row + column % sizes.group * out.head
        for i in range(d):
            write_float(to + 4 * i, buffers.sums[(p * d_padded + i) * NR + j] * norm)


@leaf
def _part(tensor, stream, heads):
    """A tensor from a stream and a head on."""
    return Strided(tensor.address + stream * tensor.stream + heads * tensor.head, tensor.row, tensor.head, 0)


@helper
def _worker(q, k, v, mask, out, sizes, factor, block, tickets):
    d, group = sizes.dims, sizes.group
    panels = (block * group + NR - 1) // NR
    buffers = _Buffers(
        aligned(panels * d * NR, np.float32), aligned(panels * (d + MR) * NR, np.float32),
        aligned((KEY_BLOCK + MR) * NR, np.float32), aligned(panels * 3 * NR, np.float32),
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
def attend(q, k, v, mask, out, sizes, scale, workers):
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
