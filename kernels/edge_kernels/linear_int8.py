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

from edge_kernels.compile import aligned_empty, helper, kernel, parallel_region, rows_view, vector_view
from edge_kernels.linear import TASKS_PER_WORKER, even_block
from edge_kernels.rows_int8 import ROW_ZERO, QuantizedRows, quantize_into, quantize_rows, scatter
from edge_kernels.simd import gelu, take_ticket
from edge_kernels.simd_int8 import DOT_MR, DOT_NR, GROUP, dot_tile, row_magnitude

Float32 = NDArray[np.float32]
Int8 = NDArray[np.int8]
Int32 = NDArray[np.int32]

# In elements. A slab of a panel is K_BLOCK · DOT_NR bytes (8 to 24 KiB), the rows' slab ROW_BLOCK · K_BLOCK of one
# or two bytes.
K_BLOCK = 512
ROW_BLOCK = 192 // DOT_MR * DOT_MR
COLUMN_BLOCK = 576 // DOT_NR * DOT_NR
_CELL = np.dtype(f"i{GROUP}")  # a cell of a weight is moved as one integer


class PackedInt8Weight(NamedTuple):
    """A weight in int8, in the order the product reads it.

    Attributes
    ----------
    panels : ndarray [shape=(⌈n/DOT_NR⌉ · ⌈k/GROUP⌉ · DOT_NR · GROUP,), int8]
        Panels of DOT_NR outputs, each [k / GROUP][output][GROUP], padded with zeros. Not for files.
    scales : ndarray [shape=(⌈n/DOT_NR⌉ · DOT_NR,), float32]
        weight ≈ scale · q, per output; padded with zeros.
    sums : ndarray [shape=(⌈n/DOT_NR⌉ · DOT_NR,), int32]
        Sum of q over k, per output.
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
def _pack_output(weight, row_stride, factors, integers, n, k, scales, sums, row, normal, line):
    """Integers of one output to `line`, scale and sum to their places."""
    if row >= n:
        scales[row] = 0.0
        line[:k] = 0
    elif integers.size > 0:
        for j in range(k):
            line[j] = integers[row * k + j]
    elif factors.size > 0:
        for j in range(k):
            normal[j] = weight[row * row_stride + j] * factors[j]
        scales[row] = quantize_into(normal, 0, k, np.float32(0.0), row_magnitude(normal, 0, k), line)
    else:
        half = row_magnitude(weight, row * row_stride, k)
        scales[row] = quantize_into(weight, row * row_stride, k, np.float32(0.0), half, line)
    total = np.int32(0)
    for j in range(k):
        total += line[j]
    sums[row] = total


@helper
def _pack_panel(weight, row_stride, factors, integers, n, k, panels, scales, sums, panel):
    scratch, normal = np.zeros((k + GROUP - 1) // GROUP, _CELL), np.empty(k, np.float32)
    for j in range(DOT_NR):
        _pack_output(
            weight, row_stride, factors, integers, n, k, scales, sums, panel * DOT_NR + j, normal,
            scratch.view(np.int8),
        )  # fmt: skip
        scatter(scratch, panels, panel * scratch.size * DOT_NR, j, DOT_NR, 0)


@kernel
def _pack(weight, row_stride, factors, integers, n, k, panels, scales, sums):
    for panel in numba.prange((n + DOT_NR - 1) // DOT_NR):
        _pack_panel(weight, row_stride, factors, integers, n, k, panels, scales, sums, panel)


def pack_weight_int8(
    weight: Float32 | Int8, scales: Float32 | None = None, *, factor: Float32 | None = None
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

    Returns
    -------
    PackedInt8Weight
    """
    n, k = weight.shape
    n_padded = -(-n // DOT_NR) * DOT_NR
    panels = aligned_empty(-(-n_padded * -(-k // GROUP) * GROUP // 4)).view(np.int8)
    packed = PackedInt8Weight(panels, np.zeros(n_padded, np.float32), np.empty(n_padded, np.int32), n, k)
    factors = vector_view(np.empty(0, np.float32) if factor is None else factor)
    if scales is None:
        (rows, row_stride), integers = rows_view(np.asarray(weight, np.float32)), np.empty(0, np.int8)
    else:
        rows, row_stride, integers = np.empty(0, np.float32), 0, np.array(weight, np.int8, order="C").reshape(-1)
        packed.scales[:n] = scales
    with parallel_region():
        _pack(rows, row_stride, factors, integers, n, k, packed.panels.view(_CELL), packed.scales, packed.sums)
    return packed


# --- the product --------------------------------------------------------------------------------------------


@helper
def _linear_task(
    x,
    x_scale,
    x_offset,
    k,
    panels,
    scales,
    sums,
    bias,
    with_gelu,
    residual,
    residual_stride,
    out,
    n,
    row,
    rows,
    panel,
    n_panels,
    tile,
    line,
):
    # tile: [rows / DOT_MR][n_panels][DOT_MR][DOT_NR], sums of this task; line: [DOT_NR], what becomes of a row of one
    row_tiles = (rows + DOT_MR - 1) // DOT_MR
    cells = (k + GROUP - 1) // GROUP
    k_blocks = (k + K_BLOCK - 1) // K_BLOCK
    for b in range(k_blocks):
        first, last = cells * b // k_blocks, cells * (b + 1) // k_blocks  # equal parts: no short last block
        for p in range(n_panels):
            slab = ((panel + p) * cells + first) * DOT_NR * GROUP
            for r in range(row_tiles):
                dot_tile(
                    x, ((row // DOT_MR + r) * cells + first) * DOT_MR * GROUP, panels, slab, last - first,
                    tile, (r * n_panels + p) * DOT_MR * DOT_NR, int(b > 0),
                )  # fmt: skip
    for i in range(rows):
        scale, offset = x_scale[row + i], x_offset[row + i]
        for p in range(n_panels):
            column = (panel + p) * DOT_NR
            at = ((i // DOT_MR * n_panels + p) * DOT_MR + i % DOT_MR) * DOT_NR
            # Whole panel rows (what belongs to outputs is padded), as in `linear`.
            for j in range(DOT_NR):
                c = column + j
                total = np.float32(tile[at + j] - np.int32(ROW_ZERO) * sums[c])
                line[j] = scale * scales[c] * total + offset * (scales[c] * np.float32(sums[c])) + bias[c]
            if with_gelu:
                for j in range(DOT_NR):
                    line[j] = gelu(line[j])
            start, width = (row + i) * n + column, min(DOT_NR, n - column)
            if residual.size > 0:
                start_residual = (row + i) * residual_stride + column
                for j in range(width):
                    out[start + j] = line[j] + residual[start_residual + j]
            else:
                for j in range(width):
                    out[start + j] = line[j]


@helper
def _linear_worker(
    x,
    x_scale,
    x_offset,
    m,
    k,
    panels,
    scales,
    sums,
    bias,
    with_gelu,
    residual,
    residual_stride,
    out,
    n,
    row_block,
    panel_block,
    tickets,
):
    all_panels = (n + DOT_NR - 1) // DOT_NR
    row_tasks = (m + row_block - 1) // row_block
    panel_tasks = (all_panels + panel_block - 1) // panel_block
    tile = np.empty(row_block * panel_block * DOT_NR, np.int32)
    line = np.empty(DOT_NR, np.float32)
    task = take_ticket(tickets)
    while task < row_tasks * panel_tasks:
        row, panel = task % row_tasks * row_block, task // row_tasks * panel_block
        _linear_task(
            x, x_scale, x_offset, k, panels, scales, sums, bias, with_gelu, residual, residual_stride, out, n,
            row, min(row_block, m - row), panel, min(panel_block, all_panels - panel), tile, line,
        )  # fmt: skip
        task = take_ticket(tickets)


@kernel
def _linear(
    x,
    x_scale,
    x_offset,
    m,
    k,
    panels,
    scales,
    sums,
    bias,
    with_gelu,
    residual,
    residual_stride,
    out,
    n,
    row_block,
    panel_block,
    tickets,
    workers,
):
    for _ in numba.prange(workers):
        _linear_worker(
            x, x_scale, x_offset, m, k, panels, scales, sums, bias, with_gelu, residual, residual_stride, out, n,
            row_block, panel_block, tickets,
        )  # fmt: skip


def _blocks(m: int, n: int, workers: int) -> tuple[int, int]:
    """Choose rows and panels per task, as `linear` does."""
    row_block, column_block = even_block(m, ROW_BLOCK, DOT_MR), even_block(n, COLUMN_BLOCK, DOT_NR)
    wanted = TASKS_PER_WORKER * workers if workers > 1 else 1
    while -(-m // row_block) * -(-n // column_block) < wanted and column_block > DOT_NR:
        column_block = -(-column_block // (2 * DOT_NR)) * DOT_NR
    return row_block, column_block // DOT_NR


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
    rows = x if isinstance(x, QuantizedRows) else quantize_rows(x)
    m, n = rows.m, weight.n
    if out is None:
        out = np.empty((m, n), np.float32)
    elif out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} with strides {out.strides}; a C-contiguous float32 array is needed.")
    if m == 0:
        return out
    padded_bias = np.zeros(len(weight.scales), np.float32)
    if bias is not None:
        padded_bias[:n] = bias
    residual_view, residual_stride = (np.empty(0, np.float32), 0) if residual is None else rows_view(residual)
    with parallel_region() as workers:
        row_block, panel_block = _blocks(m, n, workers)
        _linear(
            rows.panels, vector_view(rows.scale), vector_view(rows.offset), m, weight.k,
            weight.panels, weight.scales, weight.sums, padded_bias, gelu, residual_view, residual_stride,
            out.reshape(-1), n, row_block, panel_block, np.zeros(1, np.int64), workers,
        )  # fmt: skip
    return out
