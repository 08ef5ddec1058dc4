"""Attention of new positions to themselves and to a KV cache, on AMX: for a decoder's prompt.

Several query heads share one head of keys and values. A task is 32 queries of one head: scores with the keys up to
the last of them, the powers in one go, and the sum of values. Scores are made of both bfloat16 parts of queries and
keys, so they are as exact as float16 keys allow; powers and values are bfloat16.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from edge_kernels.arrays import aligned, aligned_empty, vector_view
from edge_kernels.compile import helper, kernel, leaf
from edge_kernels.linear.gguf_blocks import LOG2_E
from edge_kernels.linear.tasks import result_rows
from edge_kernels.simd.amx import SIDE, STEP, TILE, begin_tiles, end_tiles
from edge_kernels.simd.bf16 import as_bf16
from edge_kernels.simd.epilogue import finish_transposed
from edge_kernels.simd.gguf_blocks import STEP_ELEMENTS, blocks_half_tile, blocks_tile, pack_pairs
from edge_kernels.simd.ir import take_ticket
from edge_kernels.simd.kv_cache import softmax_pairs, split_key, turn_values
from edge_kernels.threads import parallel_region

Float32 = NDArray[np.float32]
Halves = NDArray[np.uint16]
Int16 = NDArray[np.int16]
Int64 = NDArray[np.int64]


@leaf
def _pack_keys(past, new, n_past, width, head, n, dims, high, low, tile):
    """Split 32 keys of a head, from key 32 · tile on; those after the last become 0."""
    steps = dims // STEP
    for i in range(SIDE):
        row = tile * SIDE + i
        for step in range(steps):
            to = (tile * steps + step) * STEP_ELEMENTS + i // 16 * TILE + i % 16 * STEP
            column = head * dims + step * STEP
            if row < n_past:
                split_key(past, row * width + column, high, to, low, to)
            elif row < n:
                split_key(new, (row - n_past) * width + column, high, to, low, to)
            else:
                high[to : to + STEP] = 0
                low[to : to + STEP] = 0


@leaf
def _pack_values(past, new, n_past, width, head, n, dims, out, tile, tiles, lines):
    """Transpose 32 values of a head: a tile of [16 numbers][32 positions] for every 16 numbers."""
    first, column = tile * SIDE, head * dims
    is_mixed = first < n_past < min(n, first + SIDE)
    for i in range(min(SIDE, n - first) if is_mixed else 0):
        for j in range(dims):
            if first + i < n_past:
                lines[i * dims + j] = past[(first + i) * width + column + j]
            else:
                lines[i * dims + j] = new[(first + i - n_past) * width + column + j]
    for part in range(dims // 16):
        to = (part // 2 * tiles + tile) * STEP_ELEMENTS + part % 2 * TILE
        if is_mixed:
            turn_values(lines, part * 16, dims, n - first, out, to)
        elif first < n_past:
            turn_values(past, first * width + column + part * 16, width, n - first, out, to)
        else:
            turn_values(new, (first - n_past) * width + column + part * 16, width, n - first, out, to)


@kernel
def _pack(
    past: tuple[Halves, Halves], new: tuple[Halves, Halves], n_past: int, width: int, heads: int, n: int, dims: int,
    packed: tuple[Int16, Int16, Int16], tickets: Int64, workers: int,
):  # fmt: skip
    high, low, turned = packed
    tiles = (n + SIDE - 1) // SIDE
    size = tiles * SIDE * dims
    for _ in numba.prange(workers):
        lines = np.empty(SIDE * dims, np.uint16)
        task = take_ticket(tickets)
        while task < heads * tiles:
            head, tile = task // tiles, task % tiles
            place = head * size
            _pack_keys(
                past[0], new[0], n_past, width, head, n, dims, high[place : place + size], low[place : place + size],
                tile,
            )  # fmt: skip
            _pack_values(
                past[1], new[1], n_past, width, head, n, dims, turned[place : place + size], tile, tiles, lines
            )  # fmt: skip
            task = take_ticket(tickets)


@leaf
def _pack_queries(queries, width, first, m, head, dims, factor, high, low, lines):
    """Bring 32 queries of a head into pairs, in two parts."""
    steps = dims // STEP
    for half in range(2):
        n_rows = min(16, m - first - half * 16)
        for step in range(steps):
            for i in range(max(0, n_rows)):
                at = (first + half * 16 + i) * width + head * dims + step * STEP
                for j in range(STEP):
                    value = queries[at + j] * factor
                    upper = as_bf16(value)
                    lines[i * STEP + j] = upper
                    lines[(16 + i) * STEP + j] = value - upper
            to = (step * STEP_ELEMENTS + half * TILE) // 2
            pack_pairs(lines, 0, STEP, n_rows, high, to)
            pack_pairs(lines, 16 * STEP, STEP, n_rows, low, to)


@leaf
def _task(queries, width, head, group, first, m, past, dims, factor, packed, size, tiles, out, buffers):
    """Compute 32 rows of a head."""
    high, low, turned = packed
    q_high, q_low, lines, scores, pairs, sums, result = buffers
    _pack_queries(queries, width, first, m, head, dims, factor, q_high.view(np.int32), q_low.view(np.int32), lines)
    last = past + min(first + SIDE, m)  # keys that the last of the rows sees
    n_tiles, steps = (last + SIDE - 1) // SIDE, dims // STEP
    place = head // group * size
    is_half = m - first <= SIDE // 2
    for tile in range(n_tiles):
        at, to = place + tile * steps * STEP_ELEMENTS, tile * SIDE * SIDE
        if is_half:
            blocks_half_tile(high, at, q_high, 0, steps, scores, to, 0)
            blocks_half_tile(high, at, q_low, 0, steps, scores, to, 1)
            blocks_half_tile(low, at, q_high, 0, steps, scores, to, 1)
        else:
            blocks_tile(high, at, q_high, 0, steps, scores, to, 0)
            blocks_tile(high, at, q_low, 0, steps, scores, to, 1)
            blocks_tile(low, at, q_high, 0, steps, scores, to, 1)
    for key in range(past + first + 1, n_tiles * SIDE):  # query i sees keys up to past + first + i
        for i in range(min(SIDE, key - past - first)):
            scores[key * SIDE + i] = -np.inf
    for half in range(1 if is_half else 2):
        column = half * SIDE // 2
        softmax_pairs(scores, column, n_tiles * SIDE, pairs.view(np.int32), half * TILE // 2, sums, column)
    for tile in range(dims // SIDE):
        at = place + tile * tiles * STEP_ELEMENTS
        if is_half:
            blocks_half_tile(turned, at, pairs, 0, n_tiles, result, 0, 0)
        else:
            blocks_tile(turned, at, pairs, 0, n_tiles, result, 0, 0)
        for j in range(SIDE):
            for i in range(SIDE):
                result[j * SIDE + i] /= sums[i]
        finish_transposed(
            result, 0, result, 0, 0, 0, out, first * width + head * dims + tile * SIDE, width,
            min(SIDE, m - first), SIDE,
        )  # fmt: skip


@helper
def _worker(queries, heads, group, m, past, dims, factor, packed, out, tickets):
    width, tiles = heads * dims, (past + m + SIDE - 1) // SIDE
    size = tiles * SIDE * dims
    buffers = (
        aligned(SIDE * dims // 2, np.int32).view(np.int16), aligned(SIDE * dims // 2, np.int32).view(np.int16),
        aligned(SIDE * STEP, np.float32), aligned(tiles * SIDE * SIDE, np.float32),
        aligned(tiles * SIDE * SIDE // 2, np.int32).view(np.int16), aligned(SIDE, np.float32),
        aligned(SIDE * SIDE, np.float32),
    )  # fmt: skip
    row_tiles = (m + SIDE - 1) // SIDE
    begin_tiles()
    task = take_ticket(tickets)
    while task < heads * row_tiles:
        # The last rows see the most keys, so they come first: the tasks at the end are small.
        head, row = task % heads, (row_tiles - 1 - task // heads) * SIDE
        _task(queries, width, head, group, row, m, past, dims, factor, packed, size, tiles, out, buffers)
        task = take_ticket(tickets)
    end_tiles()


@kernel
def _attention(
    queries: Float32, heads: int, group: int, m: int, past: int, dims: int, factor: np.float32,
    packed: tuple[Int16, Int16, Int16], out: Float32, tickets: Int64, workers: int,
):  # fmt: skip
    for _ in numba.prange(workers):
        _worker(queries, heads, group, m, past, dims, factor, packed, out, tickets)


def attention_causal(
    queries: Float32,
    keys: Halves,
    values: Halves,
    dims: int,
    *,
    past: tuple[Halves, Halves] | None = None,
    out: Float32 | None = None,
) -> Float32:
    """Attend from M new positions, which follow those of the past, to themselves and all before them.

    Runs in parallel, on machines with AMX. Scores are exact to some 2^-16 of |q| · |k|, the sum of values to 2^-9.
    8·M·N·heads·dims operations where every one of M positions sees N.

    Parameters
    ----------
    queries : ndarray [shape=(M, heads · dims), float32, C-contiguous]
    keys, values : ndarray [shape=(M, kv_heads · dims), uint16, C-contiguous]
        Bits of float16. heads / kv_heads query heads share one of these.
    dims : int
        Numbers of a head, a multiple of 32.
    past : ndarrays [shape=(P, kv_heads · dims), uint16, C-contiguous], optional
        Keys and values of the earlier positions.
    out : ndarray [shape=(M, heads · dims), float32, C-contiguous], optional

    Returns
    -------
    ndarray [shape=(M, heads · dims), float32]
        `out`, or a new array.
    """
    (m, width), kv_width = queries.shape, keys.shape[1]
    heads, kv_heads = width // dims, kv_width // dims
    out = result_rows(out, m, width)
    before = (keys[:0], values[:0]) if past is None else past
    n_past = len(before[0])
    tiles = -(-(n_past + m) // SIDE)
    n_packed = kv_heads * tiles * SIDE * dims // 2
    packed = (
        aligned_empty(n_packed).view(np.int16), aligned_empty(n_packed).view(np.int16),
        aligned_empty(n_packed).view(np.int16),
    )  # fmt: skip
    factor = np.float32(LOG2_E / np.sqrt(dims))
    tickets = np.zeros(2, np.int64)
    with parallel_region() as workers:
        _pack(
            (before[0].reshape(-1), before[1].reshape(-1)), (keys.reshape(-1), values.reshape(-1)), n_past, kv_width,
            kv_heads, n_past + m, dims, packed, tickets[:1], workers,
        )  # fmt: skip
        _attention(
            vector_view(queries), heads, heads // kv_heads, m, n_past, dims, factor, packed, out.reshape(-1),
            tickets[1:], workers,
        )  # fmt: skip
    return out
