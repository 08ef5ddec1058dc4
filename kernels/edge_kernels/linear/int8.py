"""`linear` in int8: rows quantised on the fly, weights once at load, sums in int32, what follows in float32.

What enters: float32 rows (or rows quantised before, so that several products share one pass) and a weight packed by
`linear.int8_weights`. What leaves: float32 rows. Rows and weights both lie in panels, in cells of GROUP successive k
as `simd.int8` describes them; blocks and tasks are those of `linear.tasks`. Integer sums are exact, so neither
blocks nor threads change them.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from edge_kernels.arrays import aligned, vector_view
from edge_kernels.compile import helper, kernel, leaf
from edge_kernels.linear.int8_rows import (
    ROW_CELL,
    ROW_INTEGER,
    QuantizedRows,
    RowCells,
    RowIntegers,
    empty_panels,
    quantize_into,
    quantize_rows,
    scatter_row,
)
from edge_kernels.linear.int8_weights import PackedInt8Weight
from edge_kernels.linear.tasks import After, Grid, product_worker, result_rows, task_grid, what_follows
from edge_kernels.reference.operations import SCALE_COLUMNS
from edge_kernels.simd.amx import HAS_TILES
from edge_kernels.simd.epilogue import row_range, scale_gelu_tile, scale_tile
from edge_kernels.simd.int8 import DOT_MR, DOT_NR, GROUP, STEP_CELLS, cells_of, dot_tile, n_cells
from edge_kernels.threads import parallel_region

Float32 = NDArray[np.float32]
Int8 = NDArray[np.int8]
UInt8 = NDArray[np.uint8]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

# In elements. A slab of a panel is K_BLOCK · DOT_NR bytes (8 to 38 KiB), the rows' slab ROW_BLOCK · K_BLOCK of one
# or two bytes. AMX has a larger K_BLOCK: its sums go through memory, which costs a quarter of a block of 512.
K_BLOCK = 1216 if HAS_TILES else 512
ROW_BLOCK = 192 // DOT_MR * DOT_MR
COLUMN_BLOCK = 576 // DOT_NR * DOT_NR
STEP = GROUP * STEP_CELLS  # blocks of K are whole multiples of this many columns


class _Rows(NamedTuple):
    panels: RowIntegers
    scale: Float32  # [group][m], as `offset`
    offset: Float32


class _Weight(NamedTuple):
    panels: Int8
    multipliers: UInt8
    scales: Float32
    sums: Int32  # [group][padded n], as `shifts`
    shifts: Float32  # scale · sum: what an offset of 1 adds
    cells: int
    group_cells: int


class _Result(NamedTuple):
    """Either float32 rows, or, where these are empty, rows of the next product, after `factors`."""

    rows: Float32
    factors: Float32
    panels: RowCells
    scale: Float32
    offset: Float32


class _Product(NamedTuple):
    rows: _Rows
    weight: _Weight
    after: After
    result: _Result


class _Buffers(NamedTuple):
    tiles: Int32  # [row tile][DOT_MR][DOT_NR], int32 sums of one panel
    lines: Float32  # [row][DOT_NR], total of the groups so far; for rows to be quantised [row][panel][DOT_NR]
    zeros: Float32  # [DOT_NR]
    scratch: Any  # a row of integers


@helper
def _allocate(product, grid):
    is_quantised = product.result.rows.size == 0
    return _Buffers(
        aligned((grid.row_block + DOT_MR) * DOT_NR, np.int32),
        aligned(grid.row_block * DOT_NR * (grid.panel_block if is_quantised else 1), np.float32),
        np.zeros(DOT_NR, np.float32),
        np.zeros(grid.panel_block * DOT_NR // GROUP, ROW_CELL),
    )


@leaf
def _linear_task(product, grid, block, buffers):
    """Compute a block of rows × a block of panels.

    One panel after the other goes through all columns, so that its sums stay in the first cache. The epilogue waits
    until all rows are multiplied: tile registers lose a third of their rate when vector instructions follow every
    tile.
    """
    rows, weight = product.rows.panels, product.weight
    cells, group_cells = weight.cells, weight.group_cells
    row_tiles, k_blocks = (block.n_rows + DOT_MR - 1) // DOT_MR, (group_cells * GROUP + K_BLOCK - 1) // K_BLOCK
    for p in range(block.n_panels):
        for start in range(0, cells, group_cells):
            steps = (min(start + group_cells, cells) - start) // STEP_CELLS
            for b in range(k_blocks):
                # Equal parts: no short last block.
                first = start + steps * b // k_blocks * STEP_CELLS
                last = start + steps * (b + 1) // k_blocks * STEP_CELLS
                for r in range(row_tiles):
                    dot_tile(
                        rows, ((block.row // DOT_MR + r) * cells + first) * DOT_MR * GROUP,
                        weight.panels, ((block.panel + p) * cells + first) * DOT_NR * GROUP, weight.multipliers,
                        last - first, buffers.tiles, r * DOT_MR * DOT_NR, int(b > 0),
                    )  # fmt: skip
            for r in range(row_tiles):
                _finish_tile(product, grid, block, buffers, p, start // group_cells, r)
    if product.result.rows.size == 0:
        _quantize_lines(product.result, grid, block, buffers)


@leaf
def _finish_tile(product, grid, block, buffers, p, group, r):
    """Turn the sums of row tile r and panel p into floats, and after the last group into results."""
    rows, weight, after, result = product
    tiles, lines, zeros, _ = buffers
    n_padded, in_rows = weight.scales.size, result.rows.size == 0
    is_last = (group + 1) * weight.group_cells >= weight.cells
    row, rows_here = block.row + r * DOT_MR, min(DOT_MR, block.n_rows - r * DOT_MR)
    column = (block.panel + p) * DOT_NR
    line, width = r * DOT_MR * DOT_NR, DOT_NR
    if in_rows:
        line, width = r * DOT_MR * block.n_panels * DOT_NR + p * DOT_NR, block.n_panels * DOT_NR
    # Written straight to the result, unless more work follows or the panel is wider than the result.
    is_direct = not (in_rows or column + DOT_NR > grid.n or (after.gelu != 0 and after.residual.size > 0))
    before, before_at, before_stride = lines, line, width
    if group == 0:
        before, before_at, before_stride = zeros, 0, 0
        if is_direct and after.residual.size > 0:
            before, before_stride = after.residual, after.residual_stride
            before_at = row * after.residual_stride + column
    to, to_at, to_stride = lines, line, width
    if is_direct and is_last:
        to, to_at, to_stride = result.rows, row * grid.n + column, grid.n
    summands, summands_at = (after.bias, column) if group == 0 else (zeros, 0)
    if after.gelu != 0 and is_last:
        scale_gelu_tile(
            tiles, r * DOT_MR * DOT_NR, rows_here, rows.scale, group * grid.m + row, rows.offset, weight.scales,
            column, summands, summands_at, weight.sums, weight.shifts, group * n_padded + column,
            before, before_at, before_stride, to, to_at, to_stride,
        )  # fmt: skip
    else:
        scale_tile(
            tiles, r * DOT_MR * DOT_NR, rows_here, rows.scale, group * grid.m + row, rows.offset, weight.scales,
            column, summands, summands_at, weight.sums, weight.shifts, group * n_padded + column,
            before, before_at, before_stride, to, to_at, to_stride,
        )  # fmt: skip
    if is_direct or in_rows or not is_last:
        return
    for i in range(rows_here):
        for j in range(min(DOT_NR, grid.n - column)):
            value = lines[line + i * DOT_NR + j]
            if after.residual.size > 0:
                value += after.residual[(row + i) * after.residual_stride + column + j]
            result.rows[(row + i) * grid.n + column + j] = value


@leaf
def _quantize_lines(result, grid, block, buffers):
    """Turn a block, which is one group of the next product's columns, into rows for that product."""
    lines, scratch = buffers.lines, buffers.scratch
    integers, all_cells = scratch.view(ROW_INTEGER), cells_of(grid.n)
    width, column = block.n_panels * DOT_NR, block.panel * DOT_NR
    columns = min(width, grid.n - column)
    cells = cells_of(columns)
    for i in range((block.n_rows + DOT_MR - 1) // DOT_MR * DOT_MR):
        row = block.row + i
        if i < block.n_rows:
            for j in range(columns if result.factors.size > 0 else 0):
                lines[i * width + j] *= result.factors[column + j]
            middle, half = row_range(lines, i * width, columns)
            at = column // SCALE_COLUMNS * grid.m + row
            result.scale[at] = quantize_into(lines, i * width, columns, middle, half, integers)
            result.offset[at] = middle
            integers[columns : cells * GROUP] = 0
        else:
            scratch[:] = 0
        panel = row // DOT_MR * all_cells * DOT_MR
        scatter_row(scratch, cells, result.panels, panel, column // GROUP, row % DOT_MR)


_worker = product_worker(_allocate, _linear_task, DOT_NR)


@kernel
def _linear(rows: _Rows, weight: _Weight, after: After, result: _Result, grid: Grid, tickets: Int64, workers: int):
    for _ in numba.prange(workers):
        _worker(_Product(rows, weight, after, result), grid, tickets)


def _run(
    x: QuantizedRows | Float32,
    weight: PackedInt8Weight,
    bias: Float32 | None,
    gelu: bool,
    residual: Float32 | None,
    factor: Float32 | None,
    out: Float32 | QuantizedRows,
) -> None:
    rows = x if isinstance(x, QuantizedRows) else quantize_rows(x)
    m, n, groups = rows.m, weight.n, len(weight.sums)
    assert len(rows.scale) == groups, "rows and weight must have the same groups of columns"
    after = what_follows(bias, gelu, residual, n, DOT_NR)
    cells = n_cells(weight.k)
    shifts = weight.scales * weight.sums.astype(np.float32)
    flat = _Weight(
        weight.panels, weight.multipliers, weight.scales, weight.sums.reshape(-1), shifts.reshape(-1),
        cells, cells if groups == 1 else SCALE_COLUMNS // GROUP,
    )  # fmt: skip
    nothing = np.empty(0, np.float32)
    with parallel_region() as workers:
        grid = task_grid(m, n, workers, (ROW_BLOCK, DOT_MR), (COLUMN_BLOCK, DOT_NR))
        if isinstance(out, QuantizedRows):
            grid = grid._replace(
                panel_block=SCALE_COLUMNS // DOT_NR
            )  # a task is a group of the next product's columns
            factors = nothing if factor is None else vector_view(factor)
            cells_out, scale, offset = out.panels.view(ROW_CELL), out.scale.reshape(-1), out.offset.reshape(-1)
            result = _Result(nothing, factors, cells_out, scale, offset)
        else:
            result = _Result(out.reshape(-1), nothing, np.empty(0, ROW_CELL), nothing, nothing)
        _linear(
            _Rows(rows.panels, rows.scale.reshape(-1), rows.offset.reshape(-1)), flat, after, result, grid,
            np.zeros(1, np.int64), workers,
        )  # fmt: skip


def linear_int8(
    x: QuantizedRows | Float32,
    weight: PackedInt8Weight,
    bias: Float32 | None = None,
    *,
    gelu: bool = False,
    residual: Float32 | None = None,
    out: Float32 | None = None,
) -> Float32:
    """Multiply rows by a packed weight in int8 and apply what follows; `reference.operations.linear_int8` defines it.

    Runs in parallel. The integer sums are those of the reference; what follows in float32 differs by a few
    roundings of its terms, with GELU by 2e-7 · |x| more. Moves M·K and N·K bytes and M·N floats (2·M·N·K
    operations), and M·N floats more with a residual.

    Parameters
    ----------
    x : QuantizedRows or ndarray [shape=(M, K), float32]
        Rows; quantised here if they are not yet.
    weight : PackedInt8Weight
        What `int8_weights.pack_weight_int8` made of [N, K].
    bias : ndarray [shape=(N,), float32] or None
        Added to each row.
    gelu : bool
        Apply tanh-GELU after the bias.
    residual : ndarray [shape=(M, N), float32] or None
        Added last.
    out : ndarray [shape=(M, N), float32, C-contiguous] or None
        Where to write; may be `residual` itself.

    Returns
    -------
    ndarray [shape=(M, N), float32, C-contiguous]
        `out`, or a new array.

    Raises
    ------
    ValueError
        If `out` is not a C-contiguous float32 array: the result would be written to a copy.
    """
    m = x.m if isinstance(x, QuantizedRows) else len(x)
    out = result_rows(out, m, weight.n)
    if m > 0:
        _run(x, weight, bias, gelu, residual, None, out)
    return out


def linear_int8_quantized(
    x: QuantizedRows | Float32,
    weight: PackedInt8Weight,
    bias: Float32 | None = None,
    *,
    gelu: bool = False,
    factor: Float32 | None = None,
) -> QuantizedRows:
    """Multiply rows as `linear_int8` does and quantise the result, which is never written out in float32.

    Runs in parallel; `reference.operations.linear_int8_quantized` defines it. An integer may differ by 1 from the
    reference's if the two results lie on either side of a half. Writes M·N bytes instead of M·N floats, which would
    be read again to be quantised.

    Parameters
    ----------
    x, weight, bias, gelu
        As in `linear_int8`.
    factor : ndarray [shape=(N,), float32] or None
        Multiplied into the columns of the result before it is quantised; its inverse belongs in the next weight.

    Returns
    -------
    QuantizedRows
        [M, N] in groups of SCALE_COLUMNS columns, for a weight that was packed with `in_groups`.
    """
    m, n = x.m if isinstance(x, QuantizedRows) else len(x), weight.n
    groups = -(-n // SCALE_COLUMNS)
    scale, offset = np.empty((groups, m), np.float32), np.empty((groups, m), np.float32)
    rows = QuantizedRows(empty_panels(m, n), scale, offset, m, n)
    if m > 0:
        _run(x, weight, bias, gelu, None, factor, rows)
    return rows
