"""Products with weights that stay in ggml's blocks, on AMX in bfloat16: for prompts, which have many rows.

A task unpacks a panel of outputs to bfloat16, in the cache, and multiplies all rows by it. So weights take no memory
beyond the file's, and are unpacked once for all rows of a call. Rows and unpacked weights are rounded to bfloat16,
sums are float32: with a relative error of 2^-9 in each this is closer to the exact product than ggml, which rounds
activations to 8-bit blocks.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from typing import Annotated, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from edge_kernels.arrays import aligned, aligned_empty, rows_view
from edge_kernels.compile import helper, kernel, leaf
from edge_kernels.linear.tasks import Grid, product_worker, result_rows
from edge_kernels.signatures import READ_ONLY
from edge_kernels.simd.amx import HAS_TILES, SIDE, STEP, TILE, keep_awake
from edge_kernels.simd.epilogue import finish_transposed
from edge_kernels.simd.float32 import exp2
from edge_kernels.simd.gguf_blocks import (
    NUMBERS,
    STEP_ELEMENTS,
    blocks_half_tile,
    blocks_tile,
    pack_pairs,
    read_minima,
    read_scales,
    unpack_q4_k,
    unpack_q5_k,
    unpack_q6_k,
    unpack_q8_0,
)
from edge_kernels.simd.ir import take_ticket
from edge_kernels.threads import parallel_region

Float32 = NDArray[np.float32]
Int16 = NDArray[np.int16]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Bytes = NDArray[np.uint8]

IS_POSSIBLE = HAS_TILES
"""Whether this machine can run it."""

BLOCK = 256  # weights that are unpacked at a time
BLOCK_BYTES = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "Q8_0": 8 * 34}
"""Bytes of 256 weights, for each type that can be multiplied."""
_KINDS = tuple(BLOCK_BYTES)

STEPS = BLOCK // STEP
"""Steps of a block: 32 outputs or rows of it, a square, are multiplied at a time."""
SQUARE = STEPS * STEP_ELEMENTS

LOG2_E = 1.4426950408889634

TASKS_PER_WORKER = 3
# Outputs of a task, at least. With many rows, the second cache holds a panel of OUTPUT_BLOCK · K_BLOCK weights, the
# same k of ROW_TILES · 32 rows, and the sums; 2 MB together. All rows come from memory once per panel.
OUTPUT_BLOCK = 256
K_BLOCK = 512
ROW_TILES = 16

FEW_BYTES = 1 << 19
"""Bytes of rows up to which a panel is a square of 16 KB, which stays in the first cache; each reads all rows."""


class PackedRows(NamedTuple):
    """Rows as the tiles take them.

    Attributes
    ----------
    panels : ndarray [shape=(k / 256 · ⌈m / 32⌉ · 8192,), int16]
        bfloat16, [block of 256 k][32 rows], each as `simd.gguf_blocks` describes it.
    m, k : int
        Number of rows and of inputs.
    """

    panels: NDArray[np.int16]
    m: int
    k: int


class BlockWeight(NamedTuple):
    """A weight as it lies in a GGUF file.

    Attributes
    ----------
    blocks : ndarray [shape=(n · k / 256 · BLOCK_BYTES[kind],), uint8]
        Rows of blocks, one row per output.
    kind : str
        A key of `BLOCK_BYTES`.
    n, k : int
        Number of outputs and of inputs; k is a multiple of 256.
    """

    blocks: Bytes
    kind: str
    n: int
    k: int


@leaf
def _place(m, panel, half, step):
    """Place of the pairs of 16 rows and 32 k, in words of two bfloat16."""
    tiles = (m + SIDE - 1) // SIDE
    return ((step // STEPS * tiles + panel) * SQUARE + step % STEPS * STEP_ELEMENTS + half * TILE) // 2


@kernel
def _pack(x: Float32, x_stride: int, m: int, k: int, out: Int32, tickets: Int64, workers: int):
    blocks = k // BLOCK
    for _ in numba.prange(workers):
        task = take_ticket(tickets)  # 16 rows of a block; half a square without rows is never read
        while task < (m + 15) // 16 * blocks:
            first, block = task // blocks * 16, task % blocks
            for step in range(block * STEPS, (block + 1) * STEPS):
                place = _place(m, first // SIDE, first % SIDE // 16, step)
                pack_pairs(x, first * x_stride + step * STEP, x_stride, m - first, out, place)
            task = take_ticket(tickets)


@kernel
def _pack_gated(gate: Float32, up: Float32, m: int, k: int, out: Int32, tickets: Int64, workers: int):
    blocks = k // BLOCK
    for _ in numba.prange(workers):
        lines = aligned(16 * STEP, np.float32)
        task = take_ticket(tickets)
        while task < (m + 15) // 16 * blocks:
            first, block = task // blocks * 16, task % blocks
            for step in range(block * STEPS, (block + 1) * STEPS):
                for i in range(min(16, m - first)):
                    at = (first + i) * k + step * STEP
                    for j in range(STEP):
                        value = gate[at + j]
                        power = exp2(value * np.float32(-LOG2_E))
                        lines[i * STEP + j] = value / (np.float32(1.0) + power) * up[at + j]
                pack_pairs(lines, 0, STEP, m - first, out, _place(m, first // SIDE, first % SIDE // 16, step))
            task = take_ticket(tickets)


@leaf
def _unpack(blocks, kind, row_bytes, at, n_outputs, numbers, square):
    """Unpack a block of up to 32 outputs, the first of which lies at `at`; missing outputs become 0."""
    for i in range(min(n_outputs, SIDE)):
        if kind < 2:
            read_minima(blocks, at + i * row_bytes, numbers, i * NUMBERS)
        elif kind == 2:
            read_scales(blocks, at + i * row_bytes, numbers, i * NUMBERS)
    for i in range(SIDE):
        to, place, ahead = i // 16 * TILE + i % 16 * STEP, at + i * row_bytes, SIDE * row_bytes
        if i >= n_outputs:
            for step in range(STEPS):
                square[to + step * STEP_ELEMENTS : to + step * STEP_ELEMENTS + STEP] = 0
        elif kind == 0:
            unpack_q4_k(blocks, place, ahead, numbers, i * NUMBERS, square, to)
        elif kind == 1:
            unpack_q5_k(blocks, place, ahead, numbers, i * NUMBERS, square, to)
        elif kind == 2:
            unpack_q6_k(blocks, place, ahead, numbers, i * NUMBERS, square, to)
        else:
            unpack_q8_0(blocks, place, ahead, numbers, i * NUMBERS, square, to)
        if kind > 0 and i % 8 == 7:  # Q4_K is done before the tile unit falls asleep
            keep_awake()


class _Weight(NamedTuple):
    blocks: Annotated[Bytes, READ_ONLY]  # one specialisation, whether they are in a mapped file or not
    kind: int  # index of `_KINDS`
    block_bytes: int
    k: int


class _Residual(NamedTuple):
    rows: Float32
    stride: int
    is_there: int


class _Blocking(NamedTuple):
    """Outputs and k whose weights are unpacked before they are multiplied."""

    outputs: int
    k: int


class _Product(NamedTuple):
    rows: NDArray[np.int16]
    weight: _Weight
    residual: _Residual
    out: Float32
    blocking: _Blocking


class _Buffers(NamedTuple):
    panel: NDArray[np.int16]  # unpacked weights
    sums: Float32  # [output tile][row tile][32][32]
    numbers: Float32  # scales and minima for unpacking 32 blocks


@helper
def _allocate(product, grid):
    outputs, k = product.blocking
    return _Buffers(
        aligned(outputs * k // 2, np.int32).view(np.int16),
        aligned((grid.m + SIDE - 1) // SIDE * SIDE * outputs, np.float32),
        aligned(SIDE * NUMBERS, np.float32),
    )


@leaf
def _linear_task(product, grid, block, buffers):
    """Compute all rows × the outputs of a task, block by block of them."""
    last = min(grid.n, (block.panel + block.n_panels) * SIDE)
    for first in range(block.panel * SIDE, last, product.blocking.outputs):
        _outputs(product, grid, first, min(product.blocking.outputs, grid.n - first), buffers)


@leaf
def _outputs(product, grid, first, n_outputs, buffers):
    """Compute all rows × a block of outputs."""
    rows, (blocks, kind, block_bytes, k), residual, out, blocking = product
    panel, sums, numbers = buffers
    m, n = grid.m, grid.n
    row_tiles, output_tiles, size = (m + SIDE - 1) // SIDE, (n_outputs + SIDE - 1) // SIDE, SIDE * SIDE
    row_bytes, k_blocks = k // BLOCK * block_bytes, (k + blocking.k - 1) // blocking.k
    for part in range(k_blocks):
        begin, end = k // BLOCK * part // k_blocks, k // BLOCK * (part + 1) // k_blocks
        for o in range(output_tiles):
            output = first + o * SIDE
            for b in range(begin, end):
                at = (o * (end - begin) + b - begin) * SQUARE
                _unpack(
                    blocks, kind, row_bytes, output * row_bytes + b * block_bytes, n - output, numbers,
                    panel[at : at + SQUARE],
                )  # fmt: skip
        for start in range(0, row_tiles, ROW_TILES):
            for o in range(output_tiles):
                for b in range(begin, end):
                    at = (o * (end - begin) + b - begin) * SQUARE
                    for r in range(start, min(row_tiles, start + ROW_TILES)):
                        row, to = (b * row_tiles + r) * SQUARE, (o * row_tiles + r) * size
                        if m - r * SIDE > SIDE // 2:
                            blocks_tile(panel, at, rows, row, STEPS, sums, to, b)
                        else:
                            blocks_half_tile(panel, at, rows, row, STEPS, sums, to, b)
    for o in range(output_tiles):
        for r in range(row_tiles):
            column = first + o * SIDE
            finish_transposed(
                sums, (o * row_tiles + r) * size, residual.rows, r * SIDE * residual.stride + column,
                residual.stride, residual.is_there, out, r * SIDE * n + column, n, min(SIDE, m - r * SIDE),
                min(SIDE, n - column),
            )  # fmt: skip


_worker = product_worker(_allocate, _linear_task, SIDE)


@kernel
def _linear(
    rows: Int16, weight: _Weight, residual: _Residual, out: Float32, blocking: _Blocking, grid: Grid, tickets: Int64,
    workers: int,
):  # fmt: skip
    for _ in numba.prange(workers):
        _worker(_Product(rows, weight, residual, out, blocking), grid, tickets)


def _empty_rows(m: int, k: int) -> NDArray[np.float32]:
    if k % BLOCK:
        raise ValueError(f"Rows have {k} numbers; a multiple of {BLOCK} is needed, as blocks have.")
    return aligned_empty(-(-m // SIDE) * (k // BLOCK) * SQUARE // 2)


def pack_rows(x: Float32) -> PackedRows:
    """Round rows to bfloat16 and bring them into tile order, once for all products that take them.

    Parameters
    ----------
    x : ndarray [shape=(M, K), float32], K a multiple of 256.

    Raises
    ------
    ValueError
        If K is no multiple of 256.
    """
    m, k = x.shape
    panels, (rows, stride) = _empty_rows(m, k), rows_view(x)
    with parallel_region() as workers:
        _pack(rows, stride, m, k, panels.view(np.int32), np.zeros(1, np.int64), workers)
    return PackedRows(panels.view(np.int16), m, k)


def pack_gated(gate: Float32, up: Float32) -> PackedRows:
    """Pack the rows gate / (1 + e^-gate) · up as `pack_rows` does, without writing them out first.

    Parameters
    ----------
    gate, up : ndarray [shape=(M, K), float32, C-contiguous], K a multiple of 256.

    Raises
    ------
    ValueError
        If K is no multiple of 256.
    """
    m, k = gate.shape
    panels = _empty_rows(m, k)
    with parallel_region() as workers:
        _pack_gated(
            gate.reshape(-1), up.reshape(-1), m, k, panels.view(np.int32), np.zeros(1, np.int64), workers
        )  # fmt: skip
    return PackedRows(panels.view(np.int16), m, k)


def linear_blocks(
    rows: PackedRows, weight: BlockWeight, *, residual: Float32 | None = None, out: Float32 | None = None
) -> Float32:
    """Multiply rows by a weight in blocks: rows · weightᵀ, plus a residual.

    Runs in parallel, on machines with AMX. 2·M·N·K operations in bfloat16, and N·K weights are unpacked. Rows and
    weights are rounded to bfloat16, sums are float32: the error is some 2^-9 of √K · |x| · |w|. A result depends
    neither on the other rows nor on the number of threads.

    Parameters
    ----------
    rows : PackedRows
        M rows.
    weight : BlockWeight
        [N, K].
    residual : ndarray [shape=(M, N), float32], optional
        Added; may be `out`.
    out : ndarray [shape=(M, N), float32, C-contiguous], optional

    Returns
    -------
    ndarray [shape=(M, N), float32, C-contiguous]
        `out`, or a new array.

    Raises
    ------
    ValueError
        If rows and weight do not match, or `out` cannot be written into.
    """
    m, n, k = rows.m, weight.n, weight.k
    if rows.k != k or weight.blocks.size != n * k // BLOCK * BLOCK_BYTES[weight.kind]:
        raise ValueError(f"Rows of {rows.k} meet {weight.blocks.size} bytes of {weight.kind} for [{n}, {k}].")
    out = result_rows(out, m, n)
    if m == 0:
        return out
    nothing = _Residual(np.empty(0, np.float32), 0, 0)
    stored = weight.blocks.view()
    stored.flags.writeable = False  # one specialisation, whether they are in a mapped file or not
    blocks = _Weight(stored, _KINDS.index(weight.kind), BLOCK_BYTES[weight.kind], k)
    blocking = _Blocking(SIDE, BLOCK) if 2 * m * k <= FEW_BYTES else _Blocking(OUTPUT_BLOCK, K_BLOCK)
    with parallel_region() as workers:
        # The start of a task has not been prefetched, so tasks are as large as leaves work for all workers.
        outputs = OUTPUT_BLOCK * max(1, n // (OUTPUT_BLOCK * TASKS_PER_WORKER * workers))
        _linear(
            rows.panels, blocks, nothing if residual is None else _Residual(*rows_view(residual), 1),
            out.reshape(-1), blocking, Grid(m, n, m, outputs // SIDE), np.zeros(1, np.int64), workers,
        )  # fmt: skip
    return out
