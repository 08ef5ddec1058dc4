"""The attention of `attention` in bfloat16 with float32 sums, for machines with AMX.

What enters and what leaves: as there, all float32. `reference.attention.attention_bf16` defines what is rounded.

A task is one head of one sequence: it lays keys and values into tiles and takes 32 queries at a time, with all keys
at once. Scores are computed transposed, keys down and queries across, as in `attention`; they take 128 bytes per key
and stay in the second-level cache. The powers that softmax makes of them are written as pairs of two successive keys,
the form that the second product takes. Values have one more column, of ones: its sum is the divisor of the others.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from edge_kernels.arrays import aligned, rows_view
from edge_kernels.attention.blocks import Operands
from edge_kernels.compile import helper, kernel, leaf
from edge_kernels.simd.amx import HAS_TILES, begin_tiles, end_tiles
from edge_kernels.simd.bf16 import (
    LANES,
    TILE_WORDS,
    as_bf16,
    powers_bf16,
    raise_maxima,
    round_row,
    scale_row,
    score_tiles,
    transpose_rounded,
    transpose_words,
    value_tiles,
)
from edge_kernels.simd.ir import take_ticket
from edge_kernels.threads import parallel_region

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

BLOCK = 2 * LANES  # keys in a step of the second product, queries of a task
VALUE_BLOCKS = 8  # blocks of keys whose powers, 16 KB of them, are multiplied with values at once
IS_POSSIBLE = HAS_TILES
"""Whether this machine can run it."""


class Shape(NamedTuple):
    """Width of a head, tiles of a row of queries or keys, columns of values and the one of ones, padded."""

    d: int
    steps: int
    columns: int


# --- keys and values ----------------------------------------------------------------------------------------


@leaf
def _spread(x, start, d, factor, is_key, line):
    """Write x · factor to a line as (rounded, rest, rounded) or (rounded, rounded, rest).

    The product of two such lines is that of the rows, less the product of their rests.
    """
    rest, again = (d, 2 * d) if is_key else (2 * d, d)
    for j in range(d):
        value = x[start + j] * factor
        rounded = as_bf16(value)
        line[j] = rounded
        line[again + j] = rounded
        line[rest + j] = value - rounded


@leaf
def round_in_steps(x, start, n, factor, out, at, stride):
    """Write a row as bfloat16, BLOCK columns at a time, `stride` elements apart."""
    for step in range((n + BLOCK - 1) // BLOCK):
        round_row(x, start + step * BLOCK, min(BLOCK, n - step * BLOCK), factor, out, at + step * stride)


@leaf
def _lay_block(k, k_stride, v, v_stride, d, terms, steps, columns, first, n_keys, column, at, keys, values, buffers):
    """Lay one head of a block of keys and values into tiles: [half][steps][tile] and [columns / 16][tile]."""
    line, rows = buffers  # rows: [16][columns]
    one, tile = np.float32(1.0), 2 * TILE_WORDS
    keys[at * 2 * steps * tile : (at + 1) * 2 * steps * tile] = 0
    for half in range(2):
        for i in range(LANES):
            key, to = half * LANES + i, (at * 2 + half) * steps * tile + i * BLOCK
            row = (first + key) * k_stride + column
            if key >= n_keys:
                rows[i * columns : i * columns + d + 1] = 0.0
                continue
            if terms == 1:
                round_in_steps(k, row, d, one, keys, to, tile)
            else:
                _spread(k, row, d, one, True, line)
                round_in_steps(line, 0, terms * d, one, keys, to, tile)
            scale_row(v, (first + key) * v_stride + column, d, one, rows, i * columns)
            rows[i * columns + d] = one
        for block in range(columns // LANES):
            to = (at * (columns // LANES) + block) * tile + half * LANES
            transpose_rounded(rows, block * LANES, columns, values, to)


# --- attention ----------------------------------------------------------------------------------------------


@leaf
def _lay_queries(q, q_stride, d, factor, terms, steps, start, n_q, column, queries, first_tile, line, words):
    """Lay queries into tiles of pairs, [half][steps][tile], from a tile on; zeros where there is none."""
    for half in range(2):
        for i in range(LANES):
            query, to = half * LANES + i, i * steps * BLOCK
            row = (start + query) * q_stride + column
            if query >= n_q:
                words[to : to + terms * d] = 0
            elif terms == 1:
                round_in_steps(q, row, d, factor, words, to, BLOCK)
            else:
                _spread(q, row, d, factor, False, line)
                round_in_steps(line, 0, terms * d, np.float32(1.0), words, to, BLOCK)
        for step in range(steps):
            transpose_words(
                words.view(np.int32), step * LANES, steps * LANES,
                queries, (first_tile + half * steps + step) * TILE_WORDS, LANES,
            )  # fmt: skip


@leaf
def _score(keys, steps, queries, at, n_kv, turn, block, buffers):
    """Compute the scores of a block of keys with the block of queries at word `at`, for the turn that it has."""
    scores, n_blocks = buffers[0], (n_kv + BLOCK - 1) // BLOCK
    score_tiles(
        keys, block * 2 * steps * TILE_WORDS, queries, at, steps,
        scores, turn % 2 * scores.size // 2 + block * 2 * TILE_WORDS, n_blocks * BLOCK * LANES,
    )  # fmt: skip


@leaf
def _raise(n_kv, turn, block, buffers):
    """Include a block of keys in the maxima of a turn."""
    scores, maxima, n_blocks = buffers[0], buffers[3], (n_kv + BLOCK - 1) // BLOCK
    for half in range(2):
        at = turn % 2 * scores.size // 2 + half * n_blocks * BLOCK * LANES + block * 2 * TILE_WORDS
        raise_maxima(scores, at, min(BLOCK, n_kv - block * BLOCK), maxima, (turn % 2 * 2 + half) * LANES)


@leaf
def first_scores(queries, steps, keys, n_kv, buffers):
    """Compute the scores that `attend_block` starts with, for the block of queries in the first tiles."""
    n_blocks = (n_kv + BLOCK - 1) // BLOCK
    buffers[3][: 2 * LANES] = -np.inf
    for block in range(n_blocks):
        _score(keys, steps, queries, 0, n_kv, 0, block, buffers)
    for block in range(n_blocks):
        _raise(n_kv, 0, block, buffers)


@leaf
def attend_block(queries, following, turn, shape, keys, values, n_kv, out, out_at, out_stride, n_q, buffers):
    """Attend with block number `turn` of queries, whose scores are computed, to all keys; all of them in tiles.

    The scores of the next block, whose queries are at word `following` (none: -1), are computed on the way: tiles are
    multiplied while powers are computed. Results are used while they are in the first cache: scores for maxima one
    block of keys later, powers VALUE_BLOCKS at a time. `out` gets n_q rows of d, `out_stride` apart.
    """
    d, steps, columns = shape
    scores, powers, sums, maxima = buffers
    n_blocks = (n_kv + BLOCK - 1) // BLOCK
    panel, powers_panel, sums_panel = n_blocks * BLOCK * LANES, n_blocks * TILE_WORDS, columns * LANES
    here, mine, others = turn % 2 * scores.size // 2, turn % 2 * 2 * LANES, (1 - turn % 2) * 2 * LANES
    maxima[others : others + 2 * LANES] = -np.inf
    for half in range(2):
        powers[half * powers_panel + (n_kv + 1) // 2 * LANES : (half + 1) * powers_panel] = 0
    for block in range(n_blocks):
        n_keys = min(BLOCK, n_kv - block * BLOCK)
        if following >= 0:
            _score(keys, steps, queries, following, n_kv, turn + 1, block, buffers)
            if block > 0:
                _raise(n_kv, turn + 1, block - 1, buffers)
        for half in range(2):
            powers_bf16(
                scores, here + half * panel + block * 2 * TILE_WORDS, n_keys, maxima, mine + half * LANES,
                powers, half * powers_panel + block * TILE_WORDS,
            )  # fmt: skip
        first = block // VALUE_BLOCKS * VALUE_BLOCKS
        if block + 1 == min(n_blocks, first + VALUE_BLOCKS):
            for column in range(0, columns // LANES, 2):
                value_tiles(
                    values, (first * (columns // LANES) + column) * TILE_WORDS, columns // LANES * TILE_WORDS,
                    powers, first * TILE_WORDS, powers_panel, block + 1 - first,
                    sums, column * LANES * LANES, sums_panel, first,
                )  # fmt: skip
    if following >= 0:
        _raise(n_kv, turn + 1, n_blocks - 1, buffers)
    rows = scores.view(np.int32)  # this block's scores are no longer needed: [16][columns], a half's results
    for half in range((n_q + LANES - 1) // LANES):
        for block in range(columns // LANES):
            transpose_words(
                sums.view(np.int32),
                half * sums_panel + block * LANES * LANES,
                LANES,
                rows,
                here + block * LANES,
                columns,
            )
        for i in range(min(LANES, n_q - half * LANES)):
            norm = np.float32(1.0) / scores[here + i * columns + d]
            scale_row(scores, here + i * columns, d, norm, out, out_at + (half * LANES + i) * out_stride)


@helper
def attention_buffers(most_keys, columns):
    """Allocate what `attend_block` needs: scores (of two blocks of queries), powers, sums, maxima."""
    n_blocks = (most_keys + BLOCK - 1) // BLOCK
    return (
        aligned(2 * max(2 * n_blocks * BLOCK, columns) * LANES, np.float32),
        aligned(2 * n_blocks * TILE_WORDS, np.int32),
        aligned(2 * columns * LANES, np.float32),
        aligned(4 * LANES, np.float32),
    )


class _Heads(NamedTuple):
    number: int
    d: int
    scale: float  # on scores, in units of log2(e)
    terms: int  # 3 where scores keep the digits that rounding takes, else 1
    steps: int  # tiles of a row of queries or keys
    columns: int  # of values and the one of ones, padded


@helper
def _attention_worker(operands, heads, tasks, most_keys, out, tickets):
    q, q_stride, k, k_stride, v, v_stride = operands
    d, terms, steps, columns, factor = heads.d, heads.terms, heads.steps, heads.columns, np.float32(heads.scale)
    n_blocks = (most_keys + BLOCK - 1) // BLOCK
    buffers, block_words = attention_buffers(most_keys, columns), 2 * steps * TILE_WORDS
    queries = aligned(2 * block_words, np.int32)  # of this block and the next
    keys, values = (
        aligned(n_blocks * 2 * steps * TILE_WORDS, np.int32),
        aligned(n_blocks * columns // LANES * TILE_WORDS, np.int32),
    )
    line, words = np.zeros(steps * BLOCK, np.float32), np.zeros(LANES * steps * BLOCK, np.int16)
    rows = np.zeros(LANES * columns, np.float32)
    key_halves, value_halves = keys.view(np.int16), values.view(np.int16)
    begin_tiles()
    ticket = take_ticket(tickets)
    while ticket < tasks.size // 4 * heads.number:
        task, column = ticket // heads.number * 4, ticket % heads.number * d
        start, n_q, kv_start, n_kv = tasks[task], tasks[task + 1], tasks[task + 2], tasks[task + 3]
        for block in range((n_kv + BLOCK - 1) // BLOCK):
            first = block * BLOCK
            _lay_block(
                k, k_stride, v, v_stride, d, terms, steps, columns, kv_start + first, min(BLOCK, n_kv - first),
                column, block, key_halves, value_halves, (line, rows),
            )  # fmt: skip
        for turn in range((n_q + BLOCK - 1) // BLOCK):
            first, following = turn * BLOCK, -1
            for number in range(turn, turn + 2) if turn == 0 else range(turn + 1, turn + 2):
                if number * BLOCK < n_q:
                    following = number % 2 * block_words if number > turn else -1
                    _lay_queries(
                        q, q_stride, d, factor, terms, steps, start + number * BLOCK,
                        min(BLOCK, n_q - number * BLOCK), column, queries, number % 2 * 2 * steps, line, words,
                    )  # fmt: skip
            if turn == 0:
                first_scores(queries, steps, keys, n_kv, buffers)
            attend_block(
                queries, following, turn, Shape(d, steps, columns), keys, values, n_kv,
                out, (start + first) * heads.number * d + column, heads.number * d, min(BLOCK, n_q - first), buffers,
            )  # fmt: skip
        ticket = take_ticket(tickets)
    end_tiles()


@kernel
def _attention(
    operands: Operands, heads: _Heads, tasks: Int64, most_keys: int, out: Float32, tickets: Int64, workers: int
):
    for _ in numba.prange(workers):
        _attention_worker(operands, heads, tasks, most_keys, out, tickets)


# --- entry --------------------------------------------------------------------------------------------------


def attention_bf16(
    q: Float32,
    k: Float32,
    v: Float32,
    heads: int,
    scale: float,
    q_offsets: Int64,
    kv_offsets: Int64,
    *,
    fine_scores: bool = False,
) -> Float32:
    """Attend with every query to all keys of its own sequence; `reference.attention.attention_bf16` defines it.

    Runs in parallel, on machines with AMX only (`IS_POSSIBLE`). Sums are taken in another order than the reference's.
    A worker needs some 700 bytes per key of the sequence with the most keys.

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
    fine_scores : bool
        Keep the digits that rounding takes from queries and keys, in separate products: scores are then as good as
        float32's, for three times the operations of the first product.

    Returns
    -------
    ndarray [shape=(Mq, H·D), float32, C-contiguous]
        Rows of a sequence that has no keys are zero.
    """
    d = q.shape[1] // heads
    terms = 3 if fine_scores else 1
    steps, columns = -(-terms * d // BLOCK), -(-(d + 1) // BLOCK) * BLOCK
    # One row per sequence: first query, queries, first key, keys.
    tasks = np.stack([q_offsets[:-1], np.diff(q_offsets), kv_offsets[:-1], np.diff(kv_offsets)], axis=1)
    has_keys = tasks[:, 3] > 0
    out = np.empty(q.shape, np.float32) if has_keys.all() else np.zeros(q.shape, np.float32)
    tasks = np.ascontiguousarray(tasks[has_keys & (tasks[:, 1] > 0)])
    if len(tasks) == 0 or d == 0:
        return out
    with parallel_region() as workers:
        # Scores in units of log2(e), so that softmax is a power of 2.
        sizes = _Heads(heads, d, scale * math.log2(math.e), terms, steps, columns)
        operands = Operands(*rows_view(q), *rows_view(k), *rows_view(v))
        _attention(
            operands,
            sizes,
            tasks.reshape(-1),
            int(tasks[:, 3].max()),
            out.reshape(-1),
            np.zeros(1, np.int64),
            workers,
        )
    return out
