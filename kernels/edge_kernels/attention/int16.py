"""The attention of `attention`, with both products in integers: int16 pairs and int32 sums.

What enters and what leaves: as there, all float32. `reference.attention.attention_int16` defines the integers in
between, and why no sum of them overflows.

A task is one head of one sequence and a block of its queries, which it quantises itself. Keys and values are
quantised one block of keys at a time: before all tasks, since several need each, or by the task if a sequence has
only one block of queries. Scores are computed transposed, as in `attention`; the powers that softmax makes of them
are written as pairs of two successive keys, the form that the tile of the second product takes.

GAINS says whether this machine gains by it; it is correct on all machines.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from edge_kernels.arrays import rows_view
from edge_kernels.attention.blocks import TASK, Operands, Plan, plan
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
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

GAINS = PAIR_TILE.gains
"""Whether this is faster than `attention` here."""

QUERY_BLOCK = 192 // PAIR_NR * PAIR_NR  # queries per task at most: keys are read from memory once per block


@helper
def _factor_and_scale(largest, limit):
    """Return limit / largest and largest / limit, with the exceptions of `reference.attention.attention_int16`."""
    factor = limit / largest
    if not math.isfinite(largest):
        return np.float32(0.0), np.float32(np.nan)
    if math.isinf(factor):
        return np.float32(0.0), np.float32(0.0)
    return factor, largest / limit


class _Heads(NamedTuple):
    number: int
    d: int
    scale: float  # on scores, in units of log2(e)
    limit: float  # largest integer of queries and keys


class _Quantised(NamedTuple):
    """Keys and values as integers; a part is one head of a block of keys.

    Attributes
    ----------
    keys : ndarray [part][KEYS_PER_BLOCK][pairs of d], int32 words
    values : ndarray [part][pairs of keys][d], int32 words
    k_scale : ndarray [part][KEYS_PER_BLOCK], float32
    v_scale : ndarray [part][d], float32
    """

    keys: Int32
    values: Int32
    k_scale: Float32
    v_scale: Float32


class _Buffers(NamedTuple):
    queries: Int32  # [panel][pairs of d][PAIR_NR]
    words: Int32  # [pairs of d], one query
    sums: Float32  # [panel][d_padded][PAIR_NR]
    scores: Float32  # [KEYS_PER_BLOCK + PAIR_MR][PAIR_NR]
    powers: Int32  # [pairs of keys][PAIR_NR]
    state: Float32  # [panel][STATE_ROWS][PAIR_NR]


# --- keys and values ----------------------------------------------------------------------------------------


@helper
def _quantize_block(operands, heads, head, first, n_keys, part, quantised):
    """Write part number `part`, one head of a block of keys."""
    _, _, k, k_stride, v, v_stride = operands
    keys, values, k_scale, v_scale = quantised
    d, column, limit = heads.d, head * heads.d, np.float32(heads.limit)
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
        # A key that is not finite gets no weight; its NaN reaches all results from here.
        v_scale[part * d + i] = scale + broken
    for i in range(0, n_keys, 2):
        one = (first + i) * v_stride + column
        other = one + v_stride if i + 1 < n_keys else one  # any row will do: the weight of the missing key is 0
        quantize_column_pairs(v, one, other, d, factors, 0, values, (part * (KEYS_PER_BLOCK // 2) + i // 2) * d)


@helper
def _quantize_worker(operands, heads, blocks, quantised, tickets):
    ticket = take_ticket(tickets)
    while ticket < blocks.size // 2 * heads.number:
        block, head = ticket // heads.number * 2, ticket % heads.number
        _quantize_block(operands, heads, head, blocks[block], blocks[block + 1], ticket, quantised)
        ticket = take_ticket(tickets)


@kernel
def _quantize(operands: Operands, heads: _Heads, blocks: Int64, quantised: _Quantised, tickets: Int64, workers: int):
    for _ in numba.prange(workers):
        _quantize_worker(operands, heads, blocks, quantised, tickets)


# --- attention ----------------------------------------------------------------------------------------------


@helper
def _quantize_queries(operands, heads, head, start, n_q, buffers):
    """Write queries into panels [pairs of d][PAIR_NR], 0 where there is none, and initialise their state."""
    q, q_stride = operands.q, operands.q_stride
    d, column, scale, limit = heads.d, head * heads.d, np.float32(heads.scale), np.float32(heads.limit)
    queries, words, state = buffers.queries, buffers.words, buffers.state
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
def _attend(quantised, d, part, n_keys, p, buffers):
    """Add a block of keys to the sums of panel p."""
    keys, values, k_scale, v_scale = quantised
    queries, _, sums, scores, powers, state = buffers
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
def _attention_task(operands, heads, head, task, is_ready, quantised, out, buffers):
    """Attend with a block of queries, a row of `Plan.queries`, of one head to all keys of its sequence."""
    q_start, n_q, kv_start, n_kv, block = task
    d, sums, state = heads.d, buffers.sums, buffers.state
    d_padded = (d + PAIR_MR - 1) // PAIR_MR * PAIR_MR
    n_panels = (n_q + PAIR_NR - 1) // PAIR_NR
    _quantize_queries(operands, heads, head, q_start, n_q, buffers)
    for i in range(n_panels * d_padded * PAIR_NR):
        sums[i] = 0.0
    for key in range(0, n_kv, KEYS_PER_BLOCK):
        n_keys = min(KEYS_PER_BLOCK, n_kv - key)
        part = (block + key // KEYS_PER_BLOCK) * heads.number + head
        if not is_ready:
            part = 0
            _quantize_block(operands, heads, head, kv_start + key, n_keys, part, quantised)
        for p in range(n_panels):
            _attend(quantised, d, part, n_keys, p, buffers)
    for query in range(n_q):
        p, j = query // PAIR_NR, query % PAIR_NR
        norm = np.float32(1.0) / state[(p * STATE_ROWS + TOTAL) * PAIR_NR + j]
        for i in range(d):
            at = ((q_start + query) * heads.number + head) * d + i
            out[at] = sums[(p * d_padded + i) * PAIR_NR + j] * norm


@helper
def _attention_worker(operands, heads, plan, is_ready, quantised, out, tickets):
    d, panels, cells = heads.d, plan.query_block // PAIR_NR, (heads.d + 1) // 2
    buffers = _Buffers(
        np.empty(panels * cells * PAIR_NR, np.int32),
        np.zeros(cells, np.int32),
        np.empty(panels * (d + PAIR_MR) * PAIR_NR, np.float32),
        np.empty((KEYS_PER_BLOCK + PAIR_MR) * PAIR_NR, np.float32),
        np.empty(KEYS_PER_BLOCK // 2 * PAIR_NR, np.int32),
        np.empty(panels * STATE_ROWS * PAIR_NR, np.float32),
    )
    if not is_ready:  # room for one part, which every block in turn is quantised into
        quantised = _Quantised(
            np.empty(KEYS_PER_BLOCK * cells, np.int32),
            np.empty(KEYS_PER_BLOCK // 2 * d, np.int32),
            np.empty(KEYS_PER_BLOCK, np.float32),
            np.empty(d, np.float32),
        )
    tasks = plan.queries
    ticket = take_ticket(tickets)
    while ticket < tasks.size // TASK * heads.number:
        at, head = ticket // heads.number * TASK, ticket % heads.number
        task = tasks[at], tasks[at + 1], tasks[at + 2], tasks[at + 3], tasks[at + 4]
        _attention_task(operands, heads, head, task, is_ready, quantised, out, buffers)
        ticket = take_ticket(tickets)


@kernel
def _attention(
    operands: Operands, heads: _Heads, plan: Plan, is_ready: bool, quantised: _Quantised, out: Float32,
    tickets: Int64, workers: int,
):  # fmt: skip
    for _ in numba.prange(workers):
        _attention_worker(operands, heads, plan, is_ready, quantised, out, tickets)


# --- entry --------------------------------------------------------------------------------------------------


def attention_int16(
    q: Float32,
    k: Float32,
    v: Float32,
    heads: int,
    scale: float,
    q_offsets: Int64,
    kv_offsets: Int64,
) -> Float32:
    """Attend with every query to all keys of its own sequence; `reference.attention.attention_int16` defines it.

    Runs in parallel. Against that reference a power may be off by 1 of LARGEST_POWER, and sums by a few roundings.
    Against `attention`, errors are half a step of each integer: for normal data some 0.1 % of the result, root mean
    square, and 0.4 % at most; where the scores are eight times that, 0.1 % and 1 %; where one key has nine tenths
    of the weight, 0.15 % and 0.4 %. Values that are much larger than the others of their column and block cost
    these digits. The tests bound the error element by element.

    As many operations as `attention`; on AVX2 in two thirds of the time at 1024 × 1024 and heads of 72 (Zen 3), and
    three quarters at 64 × 1024 and heads of 128. Quantised keys and values together take as much memory as one of
    them in float32.

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
        blocks = plan(
            q_offsets, kv_offsets, heads, workers, panel=PAIR_NR, most=QUERY_BLOCK, key_block=KEYS_PER_BLOCK
        )
        n_tasks = blocks.queries.size // TASK
        if n_tasks == 0 or d == 0:
            return out
        operands = Operands(*rows_view(q), *rows_view(k), *rows_view(v))
        # Scores in units of log2(e), so that softmax is a power of 2.
        sizes = _Heads(heads, d, scale * math.log2(math.e), float(limit))
        # If a sequence's queries are one block, its task quantises keys and values as it reaches them.
        is_ready = len(np.unique(blocks.queries[4::TASK])) < n_tasks
        parts = blocks.keys.size // 2 * heads if is_ready else 0
        quantised = _Quantised(
            np.empty(parts * KEYS_PER_BLOCK * ((d + 1) // 2), np.int32),
            np.empty(parts * (KEYS_PER_BLOCK // 2) * d, np.int32),
            np.empty(parts * KEYS_PER_BLOCK, np.float32),
            np.empty(parts * d, np.float32),
        )
        if is_ready:
            _quantize(operands, sizes, blocks.keys, quantised, np.zeros(1, np.int64), workers)
        _attention(operands, sizes, blocks, is_ready, quantised, out.reshape(-1), np.zeros(1, np.int64), workers)
    return out
