"""Queries, keys, values and attention of one layer in one pass: `linear_int8` and `attention_bf16`, for AMX.

What enters: quantised rows and a weight packed head by head. What leaves: attended rows. A task is one head of one
sequence: it multiplies the sequence's rows by the head's weights, arranges the results in tiles as it goes, and
attends. So queries, keys and values, which are three times the rows and in float32 the most that a layer writes,
never leave the second-level cache.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from edge_kernels.arrays import aligned
from edge_kernels.attention.bf16 import BLOCK, Shape, attend_block, attention_buffers, first_scores, round_in_steps
from edge_kernels.compile import helper, kernel, leaf
from edge_kernels.linear.int8_rows import QuantizedRows
from edge_kernels.linear.int8_weights import PackedInt8Weight, pack_weight_int8
from edge_kernels.simd.amx import begin_tiles, end_tiles
from edge_kernels.simd.bf16 import LANES, TILE_WORDS, transpose_rounded, transpose_words
from edge_kernels.simd.epilogue import scale_tile
from edge_kernels.simd.int8 import DOT_MR, DOT_NR, GROUP, dot_tile, n_cells
from edge_kernels.simd.ir import take_ticket
from edge_kernels.threads import parallel_region

Float32 = NDArray[np.float32]
Int8 = NDArray[np.int8]
UInt8 = NDArray[np.uint8]
Int16 = NDArray[np.int16]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


class PackedHeads(NamedTuple):
    """Weights of queries, keys and values, head by head.

    Attributes
    ----------
    weight : PackedInt8Weight
        For each head D outputs of queries, times the factor on scores, D of keys, D of values and one that is always
        1, padded to whole panels.
    bias : ndarray [shape=(outputs,), float32]
    heads, d : int
        Number and width of heads.
    """

    weight: PackedInt8Weight
    bias: Float32
    heads: int
    d: int


def pack_heads(
    weight: Float32, bias: Float32, heads: int, scale: float, *, factor: Float32 | None = None
) -> PackedHeads:
    """Quantise and pack the weights of a layer's queries, keys and values, once at load.

    Parameters
    ----------
    weight, bias : ndarrays [shape=(3·H·D, K), float32] and [shape=(3·H·D,), float32]
        Queries, keys and values one after the other.
    heads : int
        H.
    scale : float
        Factor on the scores.
    factor : ndarray [shape=(K,), float32] or None
        Multiplied into the columns first.
    """
    d = len(weight) // (3 * heads)
    outputs = -(-(3 * d + 1) // DOT_NR) * DOT_NR
    order, times = np.full((heads, outputs), -1), np.ones(outputs, np.float32)
    order[:, : 3 * d] = np.arange(3 * heads * d).reshape(3, heads, d).swapaxes(0, 1).reshape(heads, 3 * d)
    times[:d] = scale * math.log2(math.e)  # scores in units of log2(e), so that softmax is a power of 2
    padded = np.append(bias, np.float32(0)).astype(np.float32)
    bias_by_head = padded[order] * times
    bias_by_head[:, 3 * d] = 1
    packed = pack_weight_int8(weight, factor=factor, order=order.reshape(-1))
    packed.scales[:] *= np.tile(times, heads)  # the same integers, whatever a row is multiplied by
    return PackedHeads(packed, bias_by_head.reshape(-1), heads, d)


class _Rows(NamedTuple):
    panels: Int8
    scale: Float32
    offset: Float32
    cells: int


class _Weight(NamedTuple):
    panels: Int8
    multipliers: UInt8
    scales: Float32
    sums: Int32
    shifts: Float32  # scale · sum: what an offset of 1 adds
    bias: Float32


class _Heads(NamedTuple):
    number: int
    d: int
    panels: int  # of a head's outputs: queries, keys, values and the one of ones
    steps: int  # tiles of a row of queries or keys
    columns: int  # of values and the one of ones, padded
    stride: int  # of a line of outputs


class _Tiles(NamedTuple):
    queries: Int32
    keys: Int16
    values: Int16
    words: Int16  # 16 queries, before they are transposed


@leaf
def _lay(lines, heads, block, n_rows, tiles):
    """Arrange a block of rows, of which n_rows exist, in tiles of queries, keys and values."""
    _, d, _, steps, columns, stride = heads
    queries, keys, values, words = tiles
    one, tile = np.float32(1.0), 2 * TILE_WORDS
    lines[n_rows * stride : BLOCK * stride] = 0.0
    for half in range(2):
        first = half * LANES
        for i in range(LANES):
            line = (first + i) * stride
            round_in_steps(lines, line, d, one, words, i * steps * BLOCK, BLOCK)
            round_in_steps(lines, line + d, d, one, keys, (block * 2 + half) * steps * tile + i * BLOCK, tile)
        for step in range(steps):
            transpose_words(
                words.view(np.int32), step * LANES, steps * LANES,
                queries, ((block * 2 + half) * steps + step) * TILE_WORDS, LANES,
            )  # fmt: skip
        for part in range(columns // LANES):
            to = (block * (columns // LANES) + part) * tile + half * LANES
            transpose_rounded(lines, first * stride + 2 * d + part * LANES, stride, values, to)


@leaf
def _project(rows, weight, heads, head, start, stop, lines, sums, zeros, tiles):
    """Compute queries, keys and values of one head for rows start to stop, in tiles."""
    x, x_scale, x_offset, cells = rows
    w, multipliers, scales, w_sums, shifts, bias = weight
    panels, stride = heads.panels, heads.stride
    for panel in range(start // DOT_MR, (stop + DOT_MR - 1) // DOT_MR):
        first, last = max(start, panel * DOT_MR), min(stop, (panel + 1) * DOT_MR)
        # Blocks of rows start where the sequence starts, panels do not: a panel's rows may belong to two blocks, one
        # after the other in the lines.
        here = (first - start) % BLOCK
        for p in range(panels):
            slab = (head * panels + p) * cells * DOT_NR * GROUP
            dot_tile(x, panel * cells * DOT_MR * GROUP, w, slab, multipliers, cells, sums, p * DOT_MR * DOT_NR, 0)
        for p in range(panels):  # not one by one, see `linear.int8`
            column = (head * panels + p) * DOT_NR
            scale_tile(
                sums, (p * DOT_MR + first - panel * DOT_MR) * DOT_NR, last - first,
                x_scale, first, x_offset, scales, column, bias, column, w_sums, shifts, column, zeros, 0, 0,
                lines, here * stride + p * DOT_NR, stride,
            )  # fmt: skip
        filled, block = here + last - first, (first - start) // BLOCK
        if filled >= BLOCK or last == stop:
            n = min(filled, BLOCK)
            _lay(lines, heads, block, n, tiles)
        if filled > BLOCK:
            n = filled - BLOCK
            for j in range(n * stride):
                lines[j] = lines[BLOCK * stride + j]
            if last == stop:
                _lay(lines, heads, block + 1, n, tiles)


@helper
def _worker(rows, weight, heads, offsets, most_rows, out, tickets):
    _, d, panels, steps, columns, stride = heads
    n_blocks = (most_rows + BLOCK - 1) // BLOCK
    # Zeros, because padding is never written: columns after the values, and those after queries and keys.
    queries, keys = (
        aligned(n_blocks * 2 * steps * TILE_WORDS, np.int32),
        aligned(n_blocks * 2 * steps * TILE_WORDS, np.int32),
    )
    values, tile = (
        aligned(n_blocks * columns // LANES * TILE_WORDS, np.int32),
        aligned(panels * DOT_MR * DOT_NR, np.int32),
    )
    lines, words = aligned(2 * BLOCK * stride, np.float32), np.zeros(LANES * steps * BLOCK, np.int16)
    keys[:], lines[:] = 0, 0.0
    zeros, buffers = np.zeros(DOT_NR, np.float32), attention_buffers(most_rows, columns)
    tiles = _Tiles(queries, keys.view(np.int16), values.view(np.int16), words)
    begin_tiles()
    ticket = take_ticket(tickets)
    while ticket < (offsets.size - 1) * heads.number:
        sequence, head = ticket // heads.number, ticket % heads.number
        start, stop = offsets[sequence], offsets[sequence + 1]
        _project(rows, weight, heads, head, start, stop, lines, tile, zeros, tiles)
        if start < stop:
            first_scores(queries, steps, keys, stop - start, buffers)
        for first in range(start, stop, BLOCK):
            turn = (first - start) // BLOCK
            following = (turn + 1) * 2 * steps * TILE_WORDS if first + BLOCK < stop else -1
            attend_block(
                queries, following, turn, Shape(d, steps, columns), keys, values, stop - start,
                out, (first * heads.number + head) * d, heads.number * d, min(BLOCK, stop - first), buffers,
            )  # fmt: skip
        ticket = take_ticket(tickets)
    end_tiles()


@kernel
def _self_attention(
    rows: _Rows, weight: _Weight, heads: _Heads, offsets: Int64, most_rows: int, out: Float32, tickets: Int64,
    workers: int,
):  # fmt: skip
    for _ in numba.prange(workers):
        _worker(rows, weight, heads, offsets, most_rows, out, tickets)


def self_attention(x: QuantizedRows, packed: PackedHeads, offsets: Int64) -> Float32:
    """Attend with every row to all rows of its own sequence; `reference.attention.self_attention` defines it.

    Runs in parallel, on machines with AMX only. 2·M·K·3·H·D operations in int8 and, per sequence of M rows and head,
    4·M²·D in bfloat16; reads the rows once per head.

    Parameters
    ----------
    x : QuantizedRows
        [M, K], a scale per row.
    packed : PackedHeads
    offsets : ndarray [shape=(S+1,), int64]
        First row of each sequence, and the number of rows at the end.

    Returns
    -------
    ndarray [shape=(M, H·D), float32, C-contiguous]
    """
    weight, heads, d = packed.weight, packed.heads, packed.d
    out = np.empty((x.m, heads * d), np.float32)
    most_rows = int(np.diff(offsets).max(initial=0))
    if most_rows == 0:
        return out
    steps, columns = -(-d // BLOCK), -(-(d + 1) // BLOCK) * BLOCK
    shifts = weight.scales * weight.sums[0].astype(np.float32)
    panels = len(weight.scales) // heads // DOT_NR
    with parallel_region() as workers:
        _self_attention(
            _Rows(x.panels, x.scale.reshape(-1), x.offset.reshape(-1), n_cells(x.k)),
            _Weight(weight.panels, weight.multipliers, weight.scales, weight.sums.reshape(-1), shifts, packed.bias),
            _Heads(heads, d, panels, steps, columns, max(panels * DOT_NR, 2 * d + columns)),
            offsets, most_rows, out.reshape(-1), np.zeros(1, np.int64), workers,
        )  # fmt: skip
    return out
