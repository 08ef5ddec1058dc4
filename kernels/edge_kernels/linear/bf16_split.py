"""`linear` on AMX: every float32 as a sum of three bfloat16, multiplied on tiles with sums in float32.

What enters and what leaves: as there. The omitted part of a product is below 2^-26 of it, a quarter of the error of
rounding it to float32, and a sum is rounded six times in 32 products instead of 32 times: the result is as close to
the true one as `linear`'s. Rows are split in a separate pass, weights once at load; blocks and tasks are those of
`linear.tasks`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from edge_kernels.arrays import aligned, aligned_empty, rows_view
from edge_kernels.compile import helper, kernel, leaf
from edge_kernels.linear.tasks import After, Grid, product_worker, result_rows, task_grid, what_follows
from edge_kernels.simd.amx import HAS_TILES, SIDE, STEP, TILE
from edge_kernels.simd.bf16_split import PARTS, split_outputs, split_rows, split_tile
from edge_kernels.simd.epilogue import finish_square
from edge_kernels.simd.ir import take_ticket
from edge_kernels.threads import parallel_region

Float32 = NDArray[np.float32]
Int16 = NDArray[np.int16]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

IS_POSSIBLE = HAS_TILES
"""Whether this machine can run it."""

# In elements. K_BLOCK decides the order of summation. A slab of a panel is K_BLOCK · 32 · 6 bytes.
K_BLOCK = 128
ROW_BLOCK = 512
COLUMN_BLOCK = 288


class SplitWeight(NamedTuple):
    """A weight as the tiles take it.

    Attributes
    ----------
    panels : ndarray [shape=(⌈n/32⌉ · ⌈k/32⌉ · parts · 1024,), int16]
        bfloat16, in panels of 32 outputs as `simd.bf16_split` describes them, padded with zeros. Not for files.
    parts : int
        3, or 2 where the third would be 0 everywhere: weights that a file stores in float16 or bfloat16.
    n, k : int
        Number of outputs and of inputs.
    """

    panels: Int16
    parts: int
    n: int
    k: int


@helper
def _split_panel(x, x_stride, m, k, out, panel):
    """Split 32 rows, from row 32 · panel on."""
    steps = (k + STEP - 1) // STEP
    rest, line = k % STEP, np.zeros(STEP, np.float32)
    for i in range(SIDE):
        row = panel * SIDE + i
        to = panel * steps * PARTS * 2 * TILE + i // 16 * TILE + i % 16 * STEP
        for step in range(steps):
            at = to + step * PARTS * 2 * TILE
            if row < m and (step + 1) * STEP <= k:
                split_rows(x, row * x_stride + step * STEP, out, at)
                continue
            for j in range(STEP):
                line[j] = x[row * x_stride + step * STEP + j] if row < m and j < rest else np.float32(0.0)
            split_rows(line, 0, out, at)


@kernel
def _split(x: Float32, x_stride: int, m: int, k: int, out: Int16, tickets: Int64, workers: int):
    for _ in numba.prange(workers):
        panel = take_ticket(tickets)
        while panel * SIDE < m:
            _split_panel(x, x_stride, m, k, out, panel)
            panel = take_ticket(tickets)


@helper
def _pack_panel(weight, row_stride, n, k, panels, parts, panel):
    """Split a panel of 32 outputs into as many parts as wanted, and report whether its third parts are all 0."""
    steps = (k + STEP - 1) // STEP
    lines, words = np.zeros(16 * STEP, np.float32), np.empty(PARTS * TILE, np.int32)
    third = np.int32(0)
    for step in range(steps):
        columns = min(STEP, k - step * STEP)
        for half in range(2):
            first = panel * SIDE + half * 16
            for i in range(16):
                for j in range(STEP):
                    inside = first + i < n and j < columns
                    lines[i * STEP + j] = weight[(first + i) * row_stride + step * STEP + j] if inside else 0.0
            split_outputs(lines, 0, STEP, words, 0)
            for i in range(TILE // 2):
                third |= words[2 * TILE + i]
            for part in range(parts):
                to = (((panel * steps + step) * parts + part) * 2 + half) * TILE // 2
                panels[to : to + TILE // 2] = words[part * TILE : part * TILE + TILE // 2]
    return third


@kernel
def _pack(weight: Float32, row_stride: int, n: int, k: int, panels: Int32, parts: int, thirds: Int32):
    for panel in numba.prange(thirds.size):
        thirds[panel] = _pack_panel(weight, row_stride, n, k, panels, parts, panel)


def pack_split(weight: Float32) -> SplitWeight:
    """Split a weight and bring it into panels, once at load.

    Runs in parallel; reads N·K·4 bytes and writes N·K·4, or N·K·6 where the weight has more than 16 bits.

    Parameters
    ----------
    weight : ndarray [shape=(N, K), float32]
        One row per output.

    Returns
    -------
    SplitWeight
    """
    n, k = weight.shape
    rows, row_stride = rows_view(weight)
    thirds = np.empty(-(-n // SIDE), np.int32)
    first = np.ascontiguousarray(weight[:1], np.float32).view(np.int32)
    for parts in (PARTS,) if np.any(first & 0xFF) else (PARTS - 1, PARTS):  # the first row says what is worth trying
        panels = aligned_empty(thirds.size * -(-k // STEP) * parts * TILE)
        with parallel_region():
            _pack(rows, row_stride, n, k, panels.view(np.int32), parts, thirds)
        if not thirds.any():
            break
    return SplitWeight(panels.view(np.int16), parts, n, k)


class _Weight(NamedTuple):
    panels: Int16
    parts: int
    k: int


class _Product(NamedTuple):
    rows: Int16
    weight: _Weight
    after: After
    out: Float32


@helper
def _allocate(product, grid):
    """Make room for a task's sums, [panel][row tile][32][32], and for a block of one tile."""
    sums = aligned(grid.row_block * grid.panel_block * SIDE, np.float32)
    return sums, aligned(SIDE**2, np.float32)


@leaf
def _linear_task(product, grid, block, buffers):
    """Compute a block of rows × a block of panels."""
    rows, (panels, parts, k), after, out = product
    sums, scratch = buffers
    row_tiles, steps = (block.n_rows + SIDE - 1) // SIDE, (k + STEP - 1) // STEP
    k_blocks, size = (k + K_BLOCK - 1) // K_BLOCK, SIDE * SIDE
    for b in range(k_blocks):
        first, last = steps * b // k_blocks, steps * (b + 1) // k_blocks  # equal parts: no short last block
        # One tile behind: a tile's epilogue runs while the next is multiplied.
        for t in range(block.n_panels * row_tiles + 1):
            if t < block.n_panels * row_tiles:
                p, r = t // row_tiles, t % row_tiles
                split_tile(
                    rows, ((block.row // SIDE + r) * steps + first) * PARTS * 2 * TILE,
                    panels, ((block.panel + p) * steps + first) * parts * 2 * TILE, parts, last - first,
                    scratch, 0, sums, t * size, b,
                )  # fmt: skip
            if t > 0 and b == k_blocks - 1:
                p, i = (t - 1) // row_tiles, (t - 1) % row_tiles * SIDE
                row, column = block.row + i, (block.panel + p) * SIDE
                finish_square(
                    sums, (t - 1) * size, after.bias, column, after.gelu,
                    after.residual, row * after.residual_stride + column, after.residual_stride,
                    out, row * grid.n + column, grid.n, min(SIDE, block.n_rows - i),
                    min(SIDE, grid.n - column),
                )  # fmt: skip


_worker = product_worker(_allocate, _linear_task, SIDE)


@kernel
def _linear(rows: Int16, weight: _Weight, after: After, out: Float32, grid: Grid, tickets: Int64, workers: int):
    for _ in numba.prange(workers):
        _worker(_Product(rows, weight, after, out), grid, tickets)


_space = aligned_empty(0)


def _row_space(length: int) -> Int16:
    """Memory for split rows, the same at every call: getting fresh memory costs more than filling it.

    Call it inside a parallel region, where no other thread is.
    """
    global _space
    if _space.size < length:
        _space = aligned_empty(length)
    return _space.view(np.int16)


def linear_split(
    x: Float32,
    weight: SplitWeight,
    bias: Float32 | None = None,
    *,
    gelu: bool = False,
    residual: Float32 | None = None,
    out: Float32 | None = None,
) -> Float32:
    """Multiply rows by a split weight and apply what follows; `reference.operations.linear` defines it.

    Runs in parallel, on machines with AMX. Error against the reference: as `linear`'s, up to some 2e-7 of the sum of
    |products|; with GELU 2e-7 · |x| more. Infinities become NaN. 12·M·N·K operations (10 with two parts).

    Parameters
    ----------
    x : ndarray [shape=(M, K), float32]
        Rows.
    weight : SplitWeight
        What `pack_split` made of [N, K].
    bias, gelu, residual, out : as of `linear`.

    Returns
    -------
    ndarray [shape=(M, N), float32, C-contiguous]
        `out`, or a new array.

    Raises
    ------
    ValueError
        If `out` is not a C-contiguous float32 array: the result would be written to a copy.
    """
    m, n, k = x.shape[0], weight.n, weight.k
    out = result_rows(out, m, n)
    if m == 0:
        return out
    rows, row_stride = rows_view(x)
    after = what_follows(bias, gelu, residual, n, SIDE)
    tickets = np.zeros(2, np.int64)
    with parallel_region() as workers:
        panels = _row_space(-(-m // SIDE) * -(-k // STEP) * PARTS * TILE)
        _split(rows, row_stride, m, k, panels, tickets[:1], workers)
        grid = task_grid(m, n, workers, (ROW_BLOCK, SIDE), (COLUMN_BLOCK, SIDE))
        _linear(panels, _Weight(weight.panels, weight.parts, k), after, out.reshape(-1), grid, tickets[1:], workers)
    return out
