"""Full softmax attention within each of several sequences that lie one after the other.

What enters: projected queries, keys and values. What leaves: the weighted values, before the output
projection.

A task is one head of one sequence and a block of its queries. Scores are computed **transposed**, keys down
and queries across: the queries of a task are packed into panels of NR once, and keys and values are read in
place, as the rows of the register tile. Softmax then runs down the columns, NR queries side by side, without
a sum across a vector. Keys are taken in blocks with a running maximum and sum, so the only scores that ever
exist are KEY_BLOCK × NR per worker, in the first-level cache.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al.,
"FlashAttention" (2022).
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
from edge_kernels.compile import helper, kernel, leaf
from edge_kernels.simd.float32 import product_tile, scale_panel, softmax_panel
from edge_kernels.simd.ir import MR, NR, take_ticket
from edge_kernels.threads import parallel_region

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

# Keys per block. Fixed, because it decides the order of summation. KEY_BLOCK · NR scores take 12 to 36 KiB.
KEY_BLOCK = 192
QUERY_BLOCK = 192 // NR * NR  # queries per task at most: keys are read from memory once per block
LOG2_E = math.log2(math.e)


class _Heads(NamedTuple):
    number: int
    d: int
    scale: float  # on scores, in units of log2(e)


class _Buffers(NamedTuple):
    queries: Float32  # [panel][d][NR], scaled
    sums: Float32  # [panel][d_padded][NR]
    scores: Float32  # [KEY_BLOCK + MR][NR]
    state: Float32  # [panel][3][NR], see `softmax_panel`


@leaf
def _attention_task(operands, heads, head, q_start, n_q, kv_start, n_kv, out, buffers):
    """Attend with a block of queries of one head to all keys of its sequence.

    panel of queries [d][NR]        scores [keys][NR]             sums [d][NR]
    ┌──────────┐                    ┌──────────┐ softmax runs     ┌──────────┐
    │ q0 q1 …  │   keys · queries   │          │ down             │          │   values transposed · scores
    │ one      │   ──────────────→  │          │ ↓                │          │   ──────────────→ added here
    │ each     │                    │          │                  │          │
    └──────────┘                    └──────────┘                  └──────────┘
    """
    q, q_stride, k, k_stride, v, v_stride = operands
    queries, sums, scores, state = buffers
    d, column, out_stride = heads.d, head * heads.d, heads.number * heads.d
    scale = np.float32(heads.scale)
    d_padded = (d + MR - 1) // MR * MR
    n_panels = (n_q + NR - 1) // NR

    for p in range(n_panels):
        for j in range(NR):
            query = p * NR + j
            for i in range(d):
                value = q[(q_start + query) * q_stride + column + i] * scale if query < n_q else np.float32(0.0)
                queries[(p * d + i) * NR + j] = value
            state[p * 3 * NR + j] = -np.inf
            state[(p * 3 + 1) * NR + j] = 0.0
        for i in range(p * d_padded * NR, (p + 1) * d_padded * NR):
            sums[i] = 0.0

    for key in range(0, n_kv, KEY_BLOCK):
        n_keys = min(KEY_BLOCK, n_kv - key)
        first = kv_start + key
        for p in range(n_panels):
            for r in range(0, n_keys, MR):
                product_tile(
                    k, (first + r) * k_stride + column, k_stride, 1, min(MR, n_keys - r),
                    queries, p * d * NR, d,
                    scores, r * NR, 0,
                )  # fmt: skip
            softmax_panel(scores, 0, n_keys, state, p * 3 * NR)
            scale_panel(sums, p * d_padded * NR, d_padded, state, (p * 3 + 2) * NR)
            for r in range(0, d, MR):
                product_tile(
                    v, first * v_stride + column + r, 1, v_stride, min(MR, d - r),
                    scores, 0, n_keys,
                    sums, (p * d_padded + r) * NR, 1,
                )  # fmt: skip

    for query in range(n_q):
        p, j = query // NR, query % NR
        norm = np.float32(1.0) / state[(p * 3 + 1) * NR + j]
        for i in range(d):
            out[(q_start + query) * out_stride + column + i] = sums[(p * d_padded + i) * NR + j] * norm


@helper
def _attention_worker(operands, heads, plan, out, tickets):
    d, panels = heads.d, (plan.query_block + NR - 1) // NR
    buffers = _Buffers(
        np.empty(panels * d * NR, np.float32),
        np.empty(panels * (d + MR) * NR, np.float32),
        np.empty((KEY_BLOCK + MR) * NR, np.float32),
        np.empty(panels * 3 * NR, np.float32),
    )
    tasks = plan.queries
    ticket = take_ticket(tickets)
    while ticket < tasks.size // TASK * heads.number:
        # Heads of one block of queries follow each other: their columns lie side by side in the same rows.
        task, head = ticket // heads.number * TASK, ticket % heads.number
        _attention_task(
            operands, heads, head, tasks[task], tasks[task + 1], tasks[task + 2], tasks[task + 3], out, buffers
        )
        ticket = take_ticket(tickets)


@kernel
def _attention(operands: Operands, heads: _Heads, plan: Plan, out: Float32, tickets: Int64, workers: int):
    for _ in numba.prange(workers):
        _attention_worker(operands, heads, plan, out, tickets)


def attention(
    q: Float32,
    k: Float32,
    v: Float32,
    heads: int,
    scale: float,
    q_offsets: Int64,
    kv_offsets: Int64,
) -> Float32:
    """Attend with every query to all keys of its own sequence; `reference.operations.attention` defines it.

    Runs in parallel. Error against the reference: about 2e-7 of the largest value, plus the effect of rounding
    the scores (a score of size s carries s · 1e-7, and the exponential turns that into a relative error of the
    same size). Per sequence and head 4·Mq·Mk·D operations; keys and values are read once per
    QUERY_BLOCK queries.

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
    """
    out = np.zeros(q.shape, np.float32)
    with parallel_region() as workers:
        blocks = plan(q_offsets, kv_offsets, heads, workers, panel=NR, most=QUERY_BLOCK, key_block=KEY_BLOCK)
        if blocks.queries.size == 0:
            return out
        # Scores in units of log2(e), so that softmax is a power of 2.
        sizes = _Heads(heads, q.shape[1] // heads, scale * LOG2_E)
        operands = Operands(*rows_view(q), *rows_view(k), *rows_view(v))
        _attention(operands, sizes, blocks, out.reshape(-1), np.zeros(1, np.int64), workers)
    return out
