"""Rows → int8, on the fly: quantised directly, after a factor per column, or as the last step of a layer norm.

What enters: float32 rows. What leaves: integers in panels, in cells of GROUP successive k as `simd.int8` describes
them, with a scale and an offset per row; several products can read them. `reference.operations.quantize_rows`
defines the numbers, bit for bit.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from edge_kernels.arrays import aligned_empty, rows_view, vector_view
from edge_kernels.compile import helper, kernel, leaf
from edge_kernels.reference.operations import SCALE_COLUMNS
from edge_kernels.simd.epilogue import move_step, quantize_row, row_range
from edge_kernels.simd.float32 import sum_row, sum_squares_row
from edge_kernels.simd.int8 import DOT_MR, DOT_NR, DOT_TILE, GROUP, STEP_CELLS, cells_of, n_cells, row_cell
from edge_kernels.simd.ir import take_ticket
from edge_kernels.threads import parallel_region

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

ROW_ZERO = DOT_TILE.row_zero
ROW_INTEGER = np.dtype(np.int16 if DOT_TILE.row_bits == 16 else np.int8)
# Cells are moved as one integer each. ROW_ZERO added to every byte of one is an exclusive or, as bytes wrap.
ROW_CELL = np.dtype(f"i{GROUP * DOT_TILE.row_bits // 8}")
RowCells = Annotated[NDArray[Any], ROW_CELL]
RowIntegers = Annotated[NDArray[Any], ROW_INTEGER]
ZERO_CELL = int(np.full(ROW_CELL.itemsize, ROW_ZERO, np.uint8).view(ROW_CELL)[0])
assert SCALE_COLUMNS % (DOT_TILE.step_cells * GROUP) == SCALE_COLUMNS % DOT_NR == 0


class QuantizedRows(NamedTuple):
    """Rows as `reference.operations.quantize_rows` makes them, x ≈ scale · q + offset, in the product's order.

    Attributes
    ----------
    panels : ndarray [shape=(⌈m/DOT_MR⌉ · n_cells(k) · DOT_MR · GROUP,), int8 or int16]
        q in panels of DOT_MR rows, in cells at the places given by `simd.int8.row_cell`, padded with zeros. The
        layout belongs to this machine. Machines that multiply unsigned × signed hold q + 128, as a bit pattern.
    scale, offset : ndarray [shape=(G, m), float32]
        Per row; or, where G > 1, per row and group of SCALE_COLUMNS columns.
    m, k : int
        Number of rows and of columns.
    """

    panels: NDArray[Any]
    scale: Float32
    offset: Float32
    m: int
    k: int


def empty_panels(m: int, k: int) -> NDArray[Any]:
    """Allocate panels for m rows of k columns, starting on a cache line."""
    integers = -(-m // DOT_MR) * n_cells(k) * DOT_MR * GROUP
    return aligned_empty(-(-integers * ROW_INTEGER.itemsize // 4)).view(ROW_INTEGER)[:integers]


@leaf
def _factor_and_scale(half):
    """Return 127 / half and half / 127, with the exceptions of `reference.operations.quantize_rows`."""
    factor = np.float32(127.0) / half
    if math.isnan(half):
        return np.float32(0.0), half
    if math.isinf(factor):
        return np.float32(0.0), np.float32(0.0)
    return factor, half / np.float32(127.0)


@leaf
def quantize_into(x, start, k, middle, half, scratch):
    """Write the integers of a row to `scratch`; return the scale."""
    factor, scale = _factor_and_scale(half)
    if factor == 0.0:
        for j in range(k):
            scratch[j] = 0
    else:
        quantize_row(x, start, k, middle, factor, scratch, 0)
    return scale


@leaf
def scatter_row(cells, n, panels, start, first, row):
    """Put n cells of a row, from cell `first` of the row on, into the panel that starts at cell `start`."""
    if STEP_CELLS > 1 and first % STEP_CELLS == n % STEP_CELLS == 0:
        for step in range(0, n, STEP_CELLS):
            move_step(cells, step, panels, start + row_cell(first + step, row))
    else:
        for cell in range(n):
            panels[start + row_cell(first + cell, row)] = cells[cell] ^ ZERO_CELL


@leaf
def _quantize_panel(x, x_stride, m, k, factors, normalise, eps, panels, scale, offset, panel, scratch, normal):
    integers = scratch.view(ROW_INTEGER)
    for r in range(DOT_MR):
        row = panel * DOT_MR + r
        if row >= m:
            scratch[:] = 0
        elif normalise:
            mean = sum_row(x, row * x_stride, k) / np.float32(k)
            variance = sum_squares_row(x, row * x_stride, k, mean) / np.float32(k)
            # The row itself, with the scale and offset of the normalised one: saves two passes.
            factor = np.float32(1.0) / math.sqrt(variance + eps)
            middle, half = row_range(x, row * x_stride, k)
            scale[row] = quantize_into(x, row * x_stride, k, middle, half, integers) * factor
            offset[row] = (middle - mean) * factor
        elif factors.size > 0:
            for j in range(k):
                normal[j] = x[row * x_stride + j] * factors[j]
            middle, half = row_range(normal, 0, k)
            scale[row] = quantize_into(normal, 0, k, middle, half, integers)
            offset[row] = middle
        else:
            middle, half = row_range(x, row * x_stride, k)
            scale[row] = quantize_into(x, row * x_stride, k, middle, half, integers)
            offset[row] = middle
        scatter_row(scratch, scratch.size, panels, panel * scratch.size * DOT_MR, 0, r)


@helper
def _quantize_worker(x, x_stride, m, k, factors, normalise, eps, panels, scale, offset, tickets):
    scratch = np.zeros(cells_of(k), ROW_CELL)
    normal = np.empty(k, np.float32)
    panel = take_ticket(tickets)
    while panel * DOT_MR < m:
        _quantize_panel(x, x_stride, m, k, factors, normalise, eps, panels, scale, offset, panel, scratch, normal)
        panel = take_ticket(tickets)


@kernel
def _quantize_rows(
    x: Float32, x_stride: int, m: int, k: int, factors: Float32, normalise: bool, eps: float, panels: RowCells,
    scale: Float32, offset: Float32, tickets: Int64, workers: int,
):  # fmt: skip
    for _ in numba.prange(workers):
        _quantize_worker(x, x_stride, m, k, factors, normalise, np.float32(eps), panels, scale, offset, tickets)


def _quantize(x: Float32, factor: Float32 | None, eps: float | None) -> QuantizedRows:
    m, k = x.shape
    panels = empty_panels(m, k)
    scale, offset = np.empty((1, m), np.float32), np.empty((1, m), np.float32)
    if m > 0:
        rows, row_stride = rows_view(x)
        factors = vector_view(np.empty(0, np.float32) if factor is None else factor)
        with parallel_region() as workers:
            _quantize_rows(
                rows, row_stride, m, k, factors, eps is not None, float(eps or 0.0), panels.view(ROW_CELL),
                scale.reshape(-1), offset.reshape(-1), np.zeros(1, np.int64), workers,
            )  # fmt: skip
    return QuantizedRows(panels, scale, offset, m, k)


def quantize_rows(x: Float32, factor: Float32 | None = None) -> QuantizedRows:
    """Quantise rows for one or more products; `reference.operations.quantize_rows` defines it.

    Runs in parallel. Integers, scales and offsets are those of the reference, bit by bit. Reads M·K floats,
    writes M·K integers of one or two bytes.

    Parameters
    ----------
    x : ndarray [shape=(M, K), float32]
        Rows, K ≥ 1.
    factor : ndarray [shape=(K,), float32] or None
        Multiplied into the columns first; its inverse belongs in the columns of the weight.

    Returns
    -------
    QuantizedRows
    """
    return _quantize(x, factor, None)


def layer_norm_quantized(x: Float32, eps: float) -> QuantizedRows:
    """Normalise rows and quantise them in one pass; `reference.operations.layer_norm_quantized` defines it.

    Runs in parallel. Without gain and bias, which belong in the weight and bias that follow. An integer may
    differ by 1 from the reference's if the two normalised values lie on either side of a half.

    Parameters
    ----------
    x : ndarray [shape=(M, K), float32]
        Rows, K ≥ 1.
    eps : float
        Added to the variance, > 0.

    Returns
    -------
    QuantizedRows
    """
    return _quantize(x, None, eps)
