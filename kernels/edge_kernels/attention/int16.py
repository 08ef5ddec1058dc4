"""The attention of `attention`, with both products in integers: int16 pairs and int32 sums.

What enters and what leaves: as there, all float32. `reference_attention.attention_int16` tells which integers lie
between, and why no sum of them overflows.

A task is one head of one sequence and a block of its queries, which it quantises itself. Keys and values are
quantised block of keys by block: before all tasks, since several need each, or by the task where a sequence has one
block of queries. Scores are computed transposed, as in `attention`; the powers that softmax makes of them are
written as pairs of two successive keys, which is what the tile of the second product takes.

Whether a machine gains by it, GAINS tells; it is right on all of them.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

from edge_kernels.arrays import rows_view
from edge_kernels.compile import helper, kernel
from edge_kernels.reference.attention import KEYS_PER_BLOCK, LARGEST_VALUE, score_limit
from edge_kernels.simd.int16 import (
    BLOCK_MAXIMUM,
    LOWEST,
    MAXIMUM,
    PAIR_MR,
    PAIR_NR,
    PAIR_TILE,
    QUERY_SCALE,
    STATE_ROWS,
    TOTAL,
    largest_magnitude,
    powers_panel,
    quantize_column_pairs,
    quantize_row_pairs,
    raise_magnitudes,
    score_tile,
    value_tile,
)
from edge_kernels.simd.ir import take_ticket
from edge_kernels.threads import parallel_region

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

GAINS = PAIR_TILE.gains
"""Whether this is faster than `attention` here."""

QUERY_BLOCK = 192 // PAIR_NR * PAIR_NR  # queries per task at most: keys are read from memory once for so many
TASKS_PER_WORKER = 4


@helper
def _factor_and_scale(largest, limit):
    """Return limit / largest and largest / limit, with the exceptions of `reference_attention.attention_int16`."""
    factor = limit / largest
    if not math.isfinite(largest):
        return np.float32(0.0), np.float32(np.nan)
    if math.isinf(factor):
        return np.float32(0.0), np.float32(0.0)
    return factor, largest / limit


# --- keys and values ----------------------------------------------------------------------------------------


@helper
def _quantize_block(
    k, k_stride, v, v_stride, d, limit, first, n_keys, column, part, keys, values, k_scale, v_scale
):  # fmt: skip
    """Write part number `part`, one head of a block of keys.

    Keys lie [part][KEYS_PER_BLOCK][pairs of d], values [part][pairs of keys][d], scales [part][KEYS_PER_BLOCK] and
    [part][d].
    """
    cells = (d + 1) // 2
    broken = np.float32(0.0)
    for i in range(n_keys):
        row, at = (first + i) * k_stride + column, part * KEYS_PER_BLOCK + i
        factor, scale = _factor_and_scale(largest_magnitude(k, row, d), limit)
        keys[(at + 1) * cells - 1] = 0
        quantize_row_pairs(k, row, d, factor, keys, at * cells)
        k_scale[at] = scale
        broken += scale * np.float32(0.0)
    factors = np.zeros(d, np.float32)
    for i in range(n_keys):
        raise_magnitudes(factors, 0, v, (first + i) * v_stride + column, d)
    for i in range(d):
        factors[i], scale = _factor_and_scale(factors[i], np.float32(LARGEST_VALUE))
        # A key that is not finite gets no weight; from here its NaN comes to all results.
        v_scale[part * d + i] = scale + broken
    for i in range(0, n_keys, 2):
        one = (first + i) * v_stride + column
        other = one + v_stride if i + 1 < n_keys else one  # any: the weight of a key that is not there is 0
        quantize_column_pairs(v, one, other, d, factors, 0, values, (part * (KEYS_PER_BLOCK // 2) + i // 2) * d)


@helper
def _quantize_worker(
    k, k_stride, v, v_stride, heads, d, limit, blocks, n_blocks, keys, values, k_scale, v_scale, tickets
):  # fmt: skip
    ticket = take_ticket(tickets)
    while ticket < n_blocks * heads:
        block, head = ticket // heads * 2, ticket % heads
        _quantize_block(
            k, k_stride, v, v_stride, d, limit, blocks[block], blocks[block + 1], head * d,
            ticket, keys, values, k_scale, v_scale,
        )  # fmt: skip
        ticket = take_ticket(tickets)


@kernel
def _quantize(
    k, k_stride, v, v_stride, heads, d, limit, blocks, n_blocks, keys, values, k_scale, v_scale, tickets, workers
):
    for _ in numba.prange(workers):
        _quantize_worker(
            k, k_stride, v, v_stride, heads, d, np.float32(limit), blocks, n_blocks,
            keys, values, k_scale, v_scale, tickets,
        )  # fmt: skip


# --- attention ----------------------------------------------------------------------------------------------


@helper
def _quantize_queries(q, q_stride, d, scale, limit, start, n_q, column, queries, state, words):
    """Write queries into panels [pairs of d][PAIR_NR], 0 where there is none, and begin their state."""
    cells = (d + 1) // 2
    for query in range((n_q + PAIR_NR - 1) // PAIR_NR * PAIR_NR):
        p, j = query // PAIR_NR, query % PAIR_NR
        q_scale = np.float32(0.0)
        if query < n_q:
            row = (start + query) * q_stride + column
            factor, q_scale = _factor_and_scale(largest_magnitude(q, row, d), limit)
            q_scale *= abs(scale)  # the sign goes into the integers: maxima are taken before this factor
            quantize_row_pairs(q, row, d, math.copysign(factor, scale), words, 0)
        else:
            words[:] = 0
        for i in range(cells):
            queries[(p * cells + i) * PAIR_NR + j] = words[i]
        at = p * STATE_ROWS * PAIR_NR + j
        state[at + MAXIMUM * PAIR_NR] = LOWEST
        state[at + TOTAL * PAIR_NR] = 0.0
        state[at + QUERY_SCALE * PAIR_NR] = q_scale


@helper
def _attend(keys, values, k_scale, v_scale, d, part, n_keys, queries, p, state, sums, scores, powers):
    """Take a block of keys into the sums of panel p."""
    cells, pairs = (d + 1) // 2, (n_keys + 1) // 2
    d_padded = (d + PAIR_MR - 1) // PAIR_MR * PAIR_MR
    here = p * STATE_ROWS * PAIR_NR
    for j in range(PAIR_NR):
        state[here + BLOCK_MAXIMUM * PAIR_NR + j] = LOWEST
    for r in range(0, n_keys, PAIR_MR):
        key = part * KEYS_PER_BLOCK + r
        score_tile(
            keys, key * cells, cells, min(PAIR_MR, n_keys - r), queries, p * cells * PAIR_NR, cells,
            k_scale, key, state, here, scores, r * PAIR_NR,
        )  # fmt: skip
    if n_keys % 2 == 1:
        for j in range(PAIR_NR):
            scores[n_keys * PAIR_NR + j] = -np.inf
    powers_panel(scores, 0, pairs, state, here, powers, 0)
    for r in range(0, d, PAIR_MR):
        value_tile(
            values, part * (KEYS_PER_BLOCK // 2) * d + r, d, min(PAIR_MR, d - r), powers, 0, pairs,
            v_scale, part * d + r, state, here, sums, (p * d_padded + r) * PAIR_NR,
        )  # fmt: skip


@helper
def _attention_task(
    q, q_stride, k, k_stride, v, v_stride, heads, d, scale, limit, ready, keys, values, k_scale, v_scale,
    head, q_start, n_q, kv_start, n_kv, block, out, buffers,
):  # fmt: skip
    d_padded = (d + PAIR_MR - 1) // PAIR_MR * PAIR_MR
    n_panels = (n_q + PAIR_NR - 1) // PAIR_NR
    queries, words, sums, scores, powers, state = buffers
    _quantize_queries(q, q_stride, d, scale, limit, q_start, n_q, head * d, queries, state, words)
    for i in range(n_panels * d_padded * PAIR_NR):
        sums[i] = 0.0
    for key in range(0, n_kv, KEYS_PER_BLOCK):
        n_keys = min(KEYS_PER_BLOCK, n_kv - key)
        part = (block + key // KEYS_PER_BLOCK) * heads + head
        if not ready:
            part = 0
            _quantize_block(
                k, k_stride, v, v_stride, d, limit, kv_start + key, n_keys, head * d,
                part, keys, values, k_scale, v_scale,
            )  # fmt: skip
        for p in range(n_panels):
            _attend(keys, values, k_scale, v_scale, d, part, n_keys, queries, p, state, sums, scores, powers)
    for query in range(n_q):
        p, j = query // PAIR_NR, query % PAIR_NR
        norm = np.float32(1.0) / state[(p * STATE_ROWS + TOTAL) * PAIR_NR + j]
        for i in range(d):
            out[((q_start + query) * heads + head) * d + i] = sums[(p * d_padded + i) * PAIR_NR + j] * norm


@helper
def _attention_worker(
    q, q_stride, k, k_stride, v, v_stride, heads, d, scale, limit, ready, keys, values, k_scale, v_scale,
    tasks, n_tasks, query_block, out, tickets,
):  # fmt: skip
    panels, cells = query_block // PAIR_NR, (d + 1) // 2
    buffers = (
        np.empty(panels * cells * PAIR_NR, np.int32),
        np.zeros(cells, np.int32),
        np.empty(panels * (d + PAIR_MR) * PAIR_NR, np.float32),
        np.empty((KEYS_PER_BLOCK + PAIR_MR) * PAIR_NR, np.float32),
        np.empty(KEYS_PER_BLOCK // 2 * PAIR_NR, np.int32),
        np.empty(panels * STATE_ROWS * PAIR_NR, np.float32),
    )
    if not ready:
        keys, values = np.empty(KEYS_PER_BLOCK * cells, np.int32), np.empty(KEYS_PER_BLOCK // 2 * d, np.int32)
        k_scale, v_scale = np.empty(KEYS_PER_BLOCK, np.float32), np.empty(d, np.float32)
    ticket = take_ticket(tickets)
    while ticket < n_tasks * heads:
        task, head = ticket // heads * 5, ticket % heads
        _attention_task(
            q, q_stride, k, k_stride, v, v_stride, heads, d, scale, limit, ready, keys, values, k_scale, v_scale,
            head, tasks[task], tasks[task + 1], tasks[task + 2], tasks[task + 3], tasks[task + 4], out, buffers,
        )  # fmt: skip
        ticket = take_ticket(tickets)


@kernel
def _attention(
    q, q_stride, k, k_stride, v, v_stride, heads, d, scale, limit, ready, keys, values, k_scale, v_scale,
    tasks, n_tasks, query_block, out, tickets, workers,
):  # fmt: skip
    for _ in numba.prange(workers):
        _attention_worker(
            q, q_stride, k, k_stride, v, v_stride, heads, d, np.float32(scale), np.float32(limit), ready,
            keys, values, k_scale, v_scale, tasks, n_tasks, query_block, out, tickets,
        )  # fmt: skip


# --- entry --------------------------------------------------------------------------------------------------


def _plan(q_offsets: Int64, kv_offsets: Int64, heads: int, workers: int) -> tuple[Int64, Int64, int]:
    """Cut keys and queries into blocks.

    Blocks of queries are as large as the caches like, but small enough to keep all workers busy. Rows do not depend
    on their block.

    Returns
    -------
    blocks : (first key, keys) of every block of keys.
    tasks : (first query, queries, first key of the sequence, its keys, its first block) of every block of queries.
    query_block : the largest block of queries, in whole panels.
    """
    total = int(q_offsets[-1] - q_offsets[0])
    wanted = -(-total * heads // (TASKS_PER_WORKER * workers))
    query_block = min(QUERY_BLOCK, max(PAIR_NR, -(-wanted // PAIR_NR) * PAIR_NR))
    blocks: list[tuple[int, int]] = []
    tasks: list[tuple[int, int, int, int, int]] = []
    for s in range(len(q_offsets) - 1):
        start, stop = int(q_offsets[s]), int(q_offsets[s + 1])
        kv_start, kv_stop = int(kv_offsets[s]), int(kv_offsets[s + 1])
        if start == stop or kv_start == kv_stop:
            continue
        rest = (kv_start, kv_stop - kv_start, len(blocks))
        tasks += [(first, min(query_block, stop - first), *rest) for first in range(start, stop, query_block)]
        starts = range(kv_start, kv_stop, KEYS_PER_BLOCK)
        blocks += [(first, min(KEYS_PER_BLOCK, kv_stop - first)) for first in starts]
    return np.array(blocks, np.int64).reshape(-1), np.array(tasks, np.int64).reshape(-1), query_block


def attention_int16(
    q: Float32,
    k: Float32,
    v: Float32,
    heads: int,
    scale: float,
    q_offsets: Int64,
    kv_offsets: Int64,
) -> Float32:
    """Attend with every query to all keys of its own sequence; `reference_attention.attention_int16` defines it.

    Runs in parallel. Against that reference a power may be off by 1 of LARGEST_POWER, and sums by a few roundings.
    Against `attention`, errors are half a step of each integer: for normal data some 0.1 % of the result, root mean
    square, and 0.4 % at most; where the scores are eight times that, 0.1 % and 1 %; where one key has nine tenths
    of the weight, 0.15 % and 0.4 %. Values that are much larger than the others of their column and block take
    digits from these. The tests bound it element by element.

    As many operations as there; on AVX2 in two thirds of the time at 1024 × 1024 and heads of 72 (Zen 3), and three
    quarters at 64 × 1024 and heads of 128. Quantised keys and values take as much memory as one of them in float32.

    Parameters
    ----------
    q : ndarray [shape=(Mq, H·D), float32]
        Queries of all sequences; head h has columns h·D to (h+1)·D.
    k, v : ndarray [shape=(Mk, H·D), float32]
        Keys and values, likewise.
    heads : int
        H, ≥ 1.
    scale : float
        Factor on the scores.
    q_offsets, kv_offsets : ndarray [shape=(S+1,), int64]
        First row of each sequence, and the number of rows at the end.

    Returns
    -------
    ndarray [shape=(Mq, H·D), float32, C-contiguous]
        Rows of a sequence that has no keys are zero.

    Raises
    ------
    ValueError
        If heads are wider than 133,144 columns, for which int32 sums leave too few bits.
    """
    d = q.shape[1] // heads
    limit = score_limit(d)
    out = np.zeros(q.shape, np.float32)
    with parallel_region() as workers:
        blocks, tasks, query_block = _plan(q_offsets, kv_offsets, heads, workers)
        n_blocks, n_tasks = blocks.size // 2, tasks.size // 5
        if n_tasks == 0 or d == 0:
            return out
        keys_and_values = *rows_view(k), *rows_view(v)
        # Where a sequence's queries are one block, its task quantises keys and values as it comes to them.
        ready = len(np.unique(tasks[4::5])) < n_tasks
        parts = n_blocks * heads if ready else 0
        integers = (
            np.empty(parts * KEYS_PER_BLOCK * ((d + 1) // 2), np.int32),
            np.empty(parts * (KEYS_PER_BLOCK // 2) * d, np.int32),
            np.empty(parts * KEYS_PER_BLOCK, np.float32),
            np.empty(parts * d, np.float32),
        )
        if ready:
            _quantize(
                *keys_and_values, heads, d, limit, blocks, n_blocks, *integers, np.zeros(1, np.int64), workers
            )  # fmt: skip
        # Scores in units of log2(e), so that softmax is a power of 2.
        _attention(
            *rows_view(q), *keys_and_values, heads, d, scale * math.log2(math.e), limit, ready, *integers,
            tasks, n_tasks, query_block, out.reshape(-1), np.zeros(1, np.int64), workers,
        )  # fmt: skip
    return out
