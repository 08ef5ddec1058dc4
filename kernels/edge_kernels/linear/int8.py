"""`linear` in int8: rows quantised on the fly, weights once at load, sums in int32, what follows in float32.

What enters: float32 rows (or rows quantised before, so that several products share one pass) and a packed
weight. What leaves: float32 rows. Rows and weights both lie in panels, in cells of GROUP successive k as
`simd_int8` describes them; blocks and tasks are those of `linear`. Integer sums are exact, so neither blocks nor
threads nor the instruction set change them.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from edge_kernels.arrays import aligned, aligned_empty, rows_view, vector_view
from edge_kernels.compile import helper, kernel, leaf
from edge_kernels.linear.float32 import result_rows, task_blocks
from edge_kernels.linear.int8_rows import (
    ROW_CELL,
    ROW_INTEGER,
    QuantizedRows,
    empty_panels,
    quantize_into,
    quantize_rows,
    scatter_row,
)
from edge_kernels.reference.operations import SCALE_COLUMNS
from edge_kernels.simd.amx import HAS_TILES, begin_tiles, end_tiles
from edge_kernels.simd.epilogue import row_magnitude, row_range, scale_gelu_tile, scale_tile
from edge_kernels.simd.int8 import DOT_MR, DOT_NR, GROUP, STEP_CELLS, cells_of, dot_tile, n_cells, output_cell
from edge_kernels.simd.ir import take_ticket
from edge_kernels.threads import parallel_region

Float32 = NDArray[np.float32]
Int8 = NDArray[np.int8]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

# In elements. A slab of a panel is K_BLOCK · DOT_NR bytes (8 to 38 KiB), the rows' slab ROW_BLOCK · K_BLOCK of one
# or two bytes. AMX has a larger one: its sums come and go through memory, as dear as a quarter of a block of 512.
K_BLOCK = 1216 if HAS_TILES else 512
ROW_BLOCK = 192 // DOT_MR * DOT_MR
COLUMN_BLOCK = 576 // DOT_NR * DOT_NR
STEP = GROUP * STEP_CELLS  # columns that blocks of K are cut into
_CELL = np.dtype(f"i{GROUP}")  # a cell of a weight is moved as one integer


class PackedInt8Weight(NamedTuple):
    """A weight in int8, in the order the product reads it.

    Attributes
    ----------
    panels : ndarray [shape=(⌈n/DOT_NR⌉ · n_cells(k) · DOT_NR · GROUP,), int8]
        Panels of DOT_NR outputs, in cells at the places that `simd_int8.output_cell` tells, padded with zeros. Not
        for files.
    scales : ndarray [shape=(⌈n/DOT_NR⌉ · DOT_NR,), float32]
        weight ≈ scale · q, per output; padded with zeros.
    sums : ndarray [shape=(G, ⌈n/DOT_NR⌉ · DOT_NR), int32]
        Sum of q over k, per output; or, where G > 1, over each group of SCALE_COLUMNS columns.
    n, k : int
        Number of outputs and of inputs.
    """

    panels: Int8
    scales: Float32
    sums: Int32
    n: int
    k: int


# --- packing ------------------------------------------------------------------------------------------------


@helper
def _pack_output(weight, row_stride, factors, integers, n, k, source, scales, row, normal, line):
    """Integers of one output, row `source` of the weight, to `line`, its scale to its place."""
    if not 0 <= source < n:
        scales[row] = 0.0
        line[:k] = 0
    elif integers.size > 0:
        for j in range(k):
            line[j] = integers[source * k + j]
    elif factors.size > 0:
        for j in range(k):
            normal[j] = weight[source * row_stride + j] * factors[j]
        scales[row] = quantize_into(normal, 0, k, np.float32(0.0), row_magnitude(normal, 0, k), line)
    else:
        half = row_magnitude(weight, source * row_stride, k)
        scales[row] = quantize_into(weight, source * row_stride, k, np.float32(0.0), half, line)


@helper
def _pack_panel(weight, row_stride, factors, integers, n, k, order, panels, scales, sums, group_columns, panel):
    scratch, normal = np.zeros(cells_of(k), _CELL), np.empty(k, np.float32)
    line = scratch.view(np.int8)
    for j in range(DOT_NR):
        row = panel * DOT_NR + j
        source = row
        if order.size > 0:
            source = order[row] if row < order.size else -1
        _pack_output(weight, row_stride, factors, integers, n, k, source, scales, row, normal, line)
        for first in range(0, k, group_columns):
            total = np.int32(0)
            for i in range(first, min(first + group_columns, k)):
                total += line[i]
            sums[first // group_columns * scales.size + row] = total
        for cell in range(scratch.size):
            panels[panel * scratch.size * DOT_NR + output_cell(cell, j)] = scratch[cell]


@kernel
def _pack(weight, row_stride, factors, integers, n, k, order, panels, scales, sums, group_columns):
    for panel in numba.prange(scales.size // DOT_NR):
        _pack_panel(weight, row_stride, factors, integers, n, k, order, panels, scales, sums, group_columns, panel)


def pack_weight_int8(
    weight: Float32 | Int8,
    scales: Float32 | None = None,
    *,
    factor: Float32 | None = None,
    in_groups: bool = False,
    order: Int64 | None = None,
) -> PackedInt8Weight:
    """Quantise a weight as `reference.quantize_weight` does and bring it into panels, once at load.

    Runs in parallel; reads N·K·4 bytes and writes N·K.

    Parameters
    ----------
    weight : ndarray [shape=(N, K), float32 or int8]
        One row per output; K from 1 to 65,536, above which sums could overflow. Integers, -127 to 127, are
        taken as they are.
    scales : ndarray [shape=(N,), float32] or None
        Where the weight is int8: weight ≈ scale · integer.
    factor : ndarray [shape=(K,), float32] or None
        Multiplied into the columns of a float32 weight first.
    in_groups : bool
        For rows that come in groups of SCALE_COLUMNS columns with a scale each, out of another product.
    order : ndarray [shape=(outputs,), int64] or None
        For each output its row of a float32 weight, or -1 for an output that is always 0; None takes them in order.

    Returns
    -------
    PackedInt8Weight
    """
    (n_rows, k), n = weight.shape, len(weight) if order is None else len(order)
    n_padded, group_columns = -(-n // DOT_NR) * DOT_NR, SCALE_COLUMNS if in_groups else k
    panels = aligned_empty(-(-n_padded * n_cells(k) * GROUP // 4)).view(np.int8)
    sums = np.empty((-(-k // group_columns), n_padded), np.int32)
    packed = PackedInt8Weight(panels, np.zeros(n_padded, np.float32), sums, n, k)
    factors = vector_view(np.empty(0, np.float32) if factor is None else factor)
    if scales is None:
        (rows, row_stride), integers = rows_view(np.asarray(weight, np.float32)), np.empty(0, np.int8)
    else:
        rows, row_stride, integers = np.empty(0, np.float32), 0, np.array(weight, np.int8, order="C").reshape(-1)
        packed.scales[:n] = scales
    with parallel_region():
        _pack(
            rows, row_stride, factors, integers, n_rows, k, np.empty(0, np.int64) if order is None else order,
            packed.panels.view(_CELL), packed.scales, sums.reshape(-1), group_columns,
        )  # fmt: skip
    return packed


# --- the product --------------------------------------------------------------------------------------------


@leaf
def _linear_task(rows, weight, after, out, sizes, block, buffers):
    """Compute a block of rows × a block of panels.

    One panel after the other goes through all columns, so that its sums stay in the first cache. What becomes of them
    waits until all rows are multiplied: tile registers lose a third of their rate when vector instructions come after
    every tile.
    """
    x, panels = rows[0], weight[0]
    cells, group_cells = sizes[2:]
    row, n_rows, panel, n_panels = block
    tiles = buffers[0]
    row_tiles, k_blocks = (n_rows + DOT_MR - 1) // DOT_MR, (group_cells * GROUP + K_BLOCK - 1) // K_BLOCK
    for p in range(n_panels):
        for start in range(0, cells, group_cells):
            steps = (min(start + group_cells, cells) - start) // STEP_CELLS
            for b in range(k_blocks):
                # Equal parts: no short last block.
                first = start + steps * b // k_blocks * STEP_CELLS
                last = start + steps * (b + 1) // k_blocks * STEP_CELLS
                for r in range(row_tiles):
                    dot_tile(
                        x, ((row // DOT_MR + r) * cells + first) * DOT_MR * GROUP,
                        panels, ((panel + p) * cells + first) * DOT_NR * GROUP, last - first,
                        tiles, r * DOT_MR * DOT_NR, int(b > 0),
                    )  # fmt: skip
            for r in range(row_tiles):
                _finish_tile(rows, weight, after, out, sizes, block, buffers, (p, start // group_cells, r))
    if out[0].size == 0:
        _quantize_lines(after, out, sizes, block, buffers)


@leaf
def _finish_tile(rows, weight, after, out, sizes, block, buffers, place):
    """Turn a tile of sums into floats, and after the last group into results."""
    x_scale, x_offset = rows[1:]
    scales, sums, shifts = weight[1:]
    bias, _, residual, residual_stride, with_gelu = after
    m, n, cells, group_cells = sizes
    first_row, n_rows, first_panel, n_panels = block
    p, group, r = place
    # lines: [row][DOT_NR], what the groups so far amount to, or [row][panel][DOT_NR] where they are quantised as a
    # whole; zeros: [DOT_NR]
    tiles, lines, zeros, _ = buffers
    result, n_padded, in_rows = out[0], scales.size, out[0].size == 0
    is_last = (group + 1) * group_cells >= cells
    row, rows_here, column = first_row + r * DOT_MR, min(DOT_MR, n_rows - r * DOT_MR), (first_panel + p) * DOT_NR
    line, width = r * DOT_MR * DOT_NR, DOT_NR
    if in_rows:
        line, width = r * DOT_MR * n_panels * DOT_NR + p * DOT_NR, n_panels * DOT_NR
    # Straight to where it belongs, unless more is to be done with it or a panel has more than belongs.
    is_direct = not (in_rows or column + DOT_NR > n or (with_gelu and residual.size > 0))
    before, before_at, before_stride = lines, line, width
    if group == 0:
        before, before_at, before_stride = zeros, 0, 0
        if is_direct and residual.size > 0:
            before, before_at, before_stride = residual, row * residual_stride + column, residual_stride
    to, to_at, to_stride = lines, line, width
    if is_direct and is_last:
        to, to_at, to_stride = result, row * n + column, n
    summands, summands_at = (bias, column) if group == 0 else (zeros, 0)
    if with_gelu and is_last:
        scale_gelu_tile(
            tiles, r * DOT_MR * DOT_NR, rows_here, x_scale, group * m + row, x_offset, scales, column, summands,
            summands_at, sums, shifts, group * n_padded + column, before, before_at, before_stride, to, to_at,
            to_stride,
        )  # fmt: skip
    else:
        scale_tile(
            tiles, r * DOT_MR * DOT_NR, rows_here, x_scale, group * m + row, x_offset, scales, column, summands,
            summands_at, sums, shifts, group * n_padded + column, before, before_at, before_stride, to, to_at,
            to_stride,
        )  # fmt: skip
    if is_direct or in_rows or not is_last:
        return
    for i in range(rows_here):
        for j in range(min(DOT_NR, n - column)):
            value = lines[line + i * DOT_NR + j]
            if residual.size > 0:
                value += residual[(row + i) * residual_stride + column + j]
            result[(row + i) * n + column + j] = value


@leaf
def _quantize_lines(after, out, sizes, block, buffers):
    """Make rows of the next product of a block that is one group of its columns."""
    _, panels, scale, offset = out
    (m, n), factors = sizes[:2], after[1]
    first_row, n_rows, panel, n_panels = block
    _, lines, _, scratch = buffers
    integers, all_cells = scratch.view(ROW_INTEGER), cells_of(n)
    width, column = n_panels * DOT_NR, panel * DOT_NR
    columns = min(width, n - column)
    cells = cells_of(columns)
    for i in range((n_rows + DOT_MR - 1) // DOT_MR * DOT_MR):
        row = first_row + i
        if i < n_rows:
            for j in range(columns if factors.size > 0 else 0):
                lines[i * width + j] *= factors[column + j]
            middle, half = row_range(lines, i * width, columns)
            at = column // SCALE_COLUMNS * m + row
            scale[at], offset[at] = quantize_into(lines, i * width, columns, middle, half, integers), middle
            integers[columns : cells * GROUP] = 0
        else:
            scratch[:] = 0
        scatter_row(scratch, cells, panels, row // DOT_MR * all_cells * DOT_MR, column // GROUP, row % DOT_MR)


@helper
def _linear_worker(
    x, x_scale, x_offset, panels, scales, sums, shifts, bias, factors, residual, residual_stride, with_gelu,
    result, out_panels, out_scale, out_offset, m, n, cells, group_cells, row_block, panel_block, tickets,
):  # fmt: skip
    all_panels = (n + DOT_NR - 1) // DOT_NR
    row_tasks = (m + row_block - 1) // row_block
    panel_tasks = (all_panels + panel_block - 1) // panel_block
    buffers = (
        aligned((row_block + DOT_MR) * DOT_NR, np.int32),
        aligned(row_block * DOT_NR * (panel_block if result.size == 0 else 1), np.float32),
        np.zeros(DOT_NR, np.float32),
        np.zeros(panel_block * DOT_NR // GROUP, ROW_CELL),
    )
    rows, weight = (x, x_scale, x_offset), (panels, scales, sums, shifts)
    after, out = (bias, factors, residual, residual_stride, with_gelu), (result, out_panels, out_scale, out_offset)
    begin_tiles()
    task = take_ticket(tickets)
    while task < row_tasks * panel_tasks:
        row, panel = task % row_tasks * row_block, task // row_tasks * panel_block
        block = row, min(row_block, m - row), panel, min(panel_block, all_panels - panel)
        _linear_task(rows, weight, after, out, (m, n, cells, group_cells), block, buffers)
        task = take_ticket(tickets)
    end_tiles()


@kernel
def _linear(
    x, x_scale, x_offset, panels, scales, sums, shifts, bias, factors, residual, residual_stride, with_gelu,
    result, out_panels, out_scale, out_offset, m, n, cells, group_cells, row_block, panel_block, tickets, workers,
):  # fmt: skip
    for _ in numba.prange(workers):
        _linear_worker(
            x, x_scale, x_offset, panels, scales, sums, shifts, bias, factors, residual, residual_stride, with_gelu,
            result, out_panels, out_scale, out_offset, m, n, cells, group_cells, row_block, panel_block, tickets,
        )  # fmt: skip


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
    padded_bias = np.zeros(len(weight.scales), np.float32)
    if bias is not None:
        padded_bias[:n] = bias
    residual_view, residual_stride = (np.empty(0, np.float32), 0) if residual is None else rows_view(residual)
    cells = n_cells(weight.k)
    shifts = weight.scales * weight.sums.astype(np.float32)
    nothing, no_cells = np.empty(0, np.float32), np.empty(0, ROW_CELL)
    with parallel_region() as workers:
        row_block, panel_block = task_blocks(m, n, workers, (ROW_BLOCK, DOT_MR), (COLUMN_BLOCK, DOT_NR))
        if isinstance(out, QuantizedRows):
            panel_block = SCALE_COLUMNS // DOT_NR
            result = nothing, out.panels.view(ROW_CELL), out.scale.reshape(-1), out.offset.reshape(-1)
        else:
            result = out.reshape(-1), no_cells, nothing, nothing
        _linear(
            rows.panels, rows.scale.reshape(-1), rows.offset.reshape(-1),
            weight.panels, weight.scales, weight.sums.reshape(-1), shifts.reshape(-1),
            padded_bias, nothing if factor is None else vector_view(factor), residual_view, residual_stride, gelu,
            *result, m, n, cells, cells if groups == 1 else SCALE_COLUMNS // GROUP, row_block, panel_block,
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
    """Multiply rows by a packed weight in int8 and apply what follows; `reference.linear_int8` defines it.

    Runs in parallel. The integer sums are those of the reference; what follows in float32 differs by a few
    roundings of its terms, with GELU by 2e-7 · |x| more. Moves M·K and N·K bytes and M·N floats (2·M·N·K
    operations), and M·N floats more with a residual.

    Parameters
    ----------
    x : QuantizedRows or ndarray [shape=(M, K), float32]
        Rows; quantised here if they are not yet.
    weight : PackedInt8Weight
        What `pack_weight_int8` made of [N, K].
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

    Runs in parallel; `reference.linear_int8_quantized` defines it. An integer may differ by 1 from the reference's,
    where the two results lie on two sides of a half. Writes M·N bytes instead of M·N floats, which would be
    read again to be quantised.

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
