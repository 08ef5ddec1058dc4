"""Weights of `linear.int8`: float32 → integers in panels, once at load.

What enters: a weight, and factors for its columns. What leaves: a `PackedInt8Weight`. Where the tile has multipliers
(see `simd.int8`), weights are rounded in fours; elsewhere each output has one scale.
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
from edge_kernels.linear.int8_rows import quantize_into
from edge_kernels.reference.operations import (
    FINEST_LESS,
    FINEST_SHARE,
    FOUR_LIMIT,
    LARGEST_MULTIPLIER,
    LARGEST_SUM,
    SCALE_COLUMNS,
)
from edge_kernels.simd.epilogue import row_magnitude
from edge_kernels.simd.int8 import DOT_NR, GROUP, HAS_MULTIPLIERS, cells_of, n_cells, output_cell
from edge_kernels.simd.int8_fours import round_fours
from edge_kernels.threads import parallel_region

Float32 = NDArray[np.float32]
Int8 = NDArray[np.int8]
UInt8 = NDArray[np.uint8]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

_CELL = np.dtype(f"i{GROUP}")  # a cell of a weight is moved as one integer
Cells = Annotated[NDArray[Any], _CELL]


class PackedInt8Weight(NamedTuple):
    """A weight in int8, in the order the product reads it.

    Attributes
    ----------
    panels : ndarray [shape=(⌈n/DOT_NR⌉ · n_cells(k) · DOT_NR · GROUP,), int8]
        Panels of DOT_NR outputs, in cells at the places given by `simd.int8.output_cell`, padded with zeros. Not for
        files.
    multipliers : ndarray [shape=(panels / 4,) or (0,), uint8]
        Of each four, [panel][step][output][four]; empty where the tile has none.
    scales : ndarray [shape=(⌈n/DOT_NR⌉ · DOT_NR,), float32]
        weight ≈ scale · multiplier · q, per output; padded with zeros.
    sums : ndarray [shape=(G, ⌈n/DOT_NR⌉ · DOT_NR), int32]
        Sum of multiplier · q over k, per output; or, where G > 1, over each group of SCALE_COLUMNS columns.
    n, k : int
        Number of outputs and of inputs.
    """

    panels: Int8
    multipliers: UInt8
    scales: Float32
    sums: Int32
    n: int
    k: int


class _Line(NamedTuple):
    """One output while it is rounded."""

    values: Float32  # [k, padded to whole steps]
    fours: Float32  # [4][four]
    rounded: Float32  # [6][four]: integers, multiplier, its product with their sum
    cells: NDArray[np.signedinteger]
    integers: Int8  # of the cells
    multipliers: UInt8  # [four]


@leaf
def _side(a, b, c, d):
    """Return the sum of the positive of four values."""
    zero = np.float32(0.0)
    return (max(a, zero) + max(b, zero)) + (max(c, zero) + max(d, zero))


@leaf
def _bring_into_fours(line, n):
    """Put the values of four i at [0 to 3][i]; return the largest limit of a quarter of a four, and the total."""
    values, fours, quarter = line.values, line.fours, np.float32(0.25)
    largest, total = np.float32(0.0), 0.0
    for i in range(n):
        first = i // 2 * 8 + i % 2 * 2
        a, b, c, d = values[first], values[first + 1], values[first + 4], values[first + 5]
        fours[i], fours[n + i], fours[2 * n + i], fours[3 * n + i] = a, b, c, d
        a, b, c, d = quarter * a, quarter * b, quarter * c, quarter * d
        limit = max(_side(a, b, c, d), _side(-a, -b, -c, -d))
        largest = max(largest, limit)
        total += limit
    return largest, total


@leaf
def _round_fours(line, k):
    """Round a line in fours; return the scale. `reference.operations.quantize_weight_in_fours` defines it."""
    n, integers, rounded = line.multipliers.size, line.integers, line.rounded
    integers[:], line.multipliers[:], rounded[5 * n :] = 0, 0, 0.0
    if math.isnan(row_magnitude(line.values, 0, k)):
        return np.float32(np.nan)
    largest, total = _bring_into_fours(line, n)
    finest = np.float32(total * FINEST_SHARE / (LARGEST_SUM - FINEST_LESS * k))
    scale = max(largest / np.float32(FOUR_LIMIT // 4 * LARGEST_MULTIPLIER), finest)
    inverse = np.float32(1.0) / scale
    if math.isinf(inverse):
        return np.float32(0.0)
    round_fours(line.fours, n, inverse, rounded)
    for i in range(n):
        first = i // 2 * 8 + i % 2 * 2
        integers[first], integers[first + 1] = rounded[i], rounded[n + i]
        integers[first + 4], integers[first + 5] = rounded[2 * n + i], rounded[3 * n + i]
        line.multipliers[i] = rounded[4 * n + i]
    return scale


@leaf
def _round_output(weight, start, k, factors, line):
    """Round one output, from element `start` of the weight; return the scale."""
    values = line.values
    for j in range(k):
        values[j] = weight[start + j] * factors[j] if factors.size > 0 else weight[start + j]
    if HAS_MULTIPLIERS:
        return _round_fours(line, k)
    return quantize_into(values, 0, k, np.float32(0.0), row_magnitude(values, 0, k), line.integers)


@leaf
def _sum(line, first, last):
    """Return the sum of columns first to last - 1 of what the integers stand for; groups are whole steps of 8."""
    total = np.int32(0)
    if HAS_MULTIPLIERS:
        n = line.multipliers.size
        for i in range(first // 4, (last + 7) // 8 * 2):
            total += np.int32(line.rounded[5 * n + i])
    else:
        for i in range(first, last):
            total += line.integers[i]
    return total


@helper
def _pack_panel(weight, row_stride, factors, n, k, order, packed, group_columns, panel):
    panels, multipliers, scales, sums = packed
    cells = np.zeros(cells_of(k), _CELL)
    n_fours = cells.size if multipliers.size > 0 else 0
    line = _Line(
        np.zeros(cells.size * GROUP, np.float32), np.empty(4 * n_fours, np.float32),
        np.empty(6 * n_fours, np.float32), cells, cells.view(np.int8), np.zeros(n_fours, np.uint8),
    )  # fmt: skip
    for j in range(DOT_NR):
        row = panel * DOT_NR + j
        source = row
        if order.size > 0:
            source = order[row] if row < order.size else -1
        if 0 <= source < n:
            scales[row] = _round_output(weight, source * row_stride, k, factors, line)
        else:
            scales[row], cells[:], line.multipliers[:], line.rounded[:] = 0.0, 0, 0, 0.0
        for first in range(0, k, group_columns):
            sums[first // group_columns * scales.size + row] = _sum(line, first, min(first + group_columns, k))
        for cell in range(cells.size):
            panels[panel * cells.size * DOT_NR + output_cell(cell, j)] = cells[cell]
        for four in range(n_fours):
            at = (panel * (n_fours // 2) + four // 2) * DOT_NR + j
            multipliers[2 * at + four % 2] = line.multipliers[four]


@kernel
def _pack(
    weight: Float32, row_stride: int, factors: Float32, n: int, k: int, order: Int64,
    packed: tuple[Cells, UInt8, Float32, Int32], group_columns: int,
):  # fmt: skip
    for panel in numba.prange(packed[2].size // DOT_NR):
        _pack_panel(weight, row_stride, factors, n, k, order, packed, group_columns, panel)


def pack_weight_int8(
    weight: Float32, *, factor: Float32 | None = None, in_groups: bool = False, order: Int64 | None = None
) -> PackedInt8Weight:
    """Quantise a weight and bring it into panels, once at load.

    `reference.operations.quantize_weight` defines the integers, or `quantize_weight_in_fours` where the tile has
    multipliers. Runs in parallel; reads N·K·4 bytes and writes N·K, with multipliers a quarter more.

    Parameters
    ----------
    weight : ndarray [shape=(N, K), float32]
        One row per output; K from 1 to 32,768, above which sums could overflow.
    factor : ndarray [shape=(K,), float32] or None
        Multiplied into the columns first.
    in_groups : bool
        For rows that come in groups of SCALE_COLUMNS columns with a scale each, out of another product.
    order : ndarray [shape=(outputs,), int64] or None
        For each output its row of the weight, or -1 for an output that is always 0; None takes them in order.

    Returns
    -------
    PackedInt8Weight
    """
    (n_rows, k), n = weight.shape, len(weight) if order is None else len(order)
    n_padded, group_columns = -(-n // DOT_NR) * DOT_NR, SCALE_COLUMNS if in_groups else k
    panels = aligned_empty(-(-n_padded * n_cells(k) * GROUP // 4)).view(np.int8)
    n_fours = n_padded * n_cells(k) if HAS_MULTIPLIERS else 0
    multipliers = aligned_empty(-(-n_fours // 4)).view(np.uint8)[:n_fours]
    sums = np.empty((-(-k // group_columns), n_padded), np.int32)
    packed = PackedInt8Weight(panels, multipliers, np.zeros(n_padded, np.float32), sums, n, k)
    rows, row_stride = rows_view(np.asarray(weight, np.float32))
    with parallel_region():
        _pack(
            rows, row_stride, vector_view(np.empty(0, np.float32) if factor is None else factor), n_rows, k,
            np.empty(0, np.int64) if order is None else order,
            (panels.view(_CELL), multipliers, packed.scales, sums.reshape(-1)), group_columns,
        )  # fmt: skip
    return packed
