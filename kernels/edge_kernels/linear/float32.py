"""Matrix product with what follows it: bias, tanh-GELU, residual.

What enters: rows and a weight packed once at load. What leaves: rows. The weight lies in panels of NR
outputs, [panel][k][NR], so that the inner loop reads it strictly forward. A task is a block of rows × a block
of panels; inside it K is cut into blocks, so that a slab of one panel stays in the first-level cache while
all rows of the task pass it, and the rows' slab in the second. Sums of a task are kept in a buffer of its
own; bias, GELU and residual are applied on the way out of it.

Source of the blocking: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008),
without the packing of A, which the register tile reads in place.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from edge_kernels.arrays import aligned_empty, rows_view
from edge_kernels.compile import helper, kernel, leaf
from edge_kernels.simd.float32 import gelu, product_tile
from edge_kernels.simd.ir import MR, NR, take_ticket
from edge_kernels.threads import parallel_region

Float32 = NDArray[np.float32]

# Sizes in elements, swept on Zen 3 (32 KiB and 512 KiB caches). A slab of a panel is K_BLOCK · NR · 4 bytes (16 to 48
# KiB), the rows' slab ROW_BLOCK · K_BLOCK · 4 (up to 192 KiB). K_BLOCK decides the order of summation: it
# must not depend on the machine's load, the number of threads or the number of rows.
K_BLOCK = 256
ROW_BLOCK = 192 // MR * MR
COLUMN_BLOCK = 576 // NR * NR
TASKS_PER_WORKER = 4  # smaller blocks are cut until there are so many, so that no worker waits long for the last one


class PackedWeight(NamedTuple):
    """A weight matrix in the order the product reads it.

    Attributes
    ----------
    panels : ndarray [shape=(⌈n/NR⌉ · k · NR,), float32]
        Panels of NR outputs, each [k][NR], the last one padded with zeros. NR belongs to this machine: not
        for files.
    n, k : int
        Number of outputs and of inputs.
    """

    panels: Float32
    n: int
    k: int


@helper
def _pack_panel(weight, row_stride, n, k, panels, panel):
    start = panel * k * NR
    for j in range(NR):
        row = panel * NR + j
        if row < n:
            for i in range(k):
                panels[start + i * NR + j] = weight[row * row_stride + i]
        else:
            for i in range(k):
                panels[start + i * NR + j] = 0.0


@kernel
def _pack(weight, row_stride, n, k, panels):
    for panel in numba.prange((n + NR - 1) // NR):
        _pack_panel(weight, row_stride, n, k, panels, panel)


def pack_weight(weight: Float32) -> PackedWeight:
    """Bring a weight matrix into panels, once at load.

    Runs in parallel; reads N·K·4 bytes and writes as many.

    Parameters
    ----------
    weight : ndarray [shape=(N, K), float32]
        One row per output.

    Returns
    -------
    PackedWeight
    """
    n, k = weight.shape
    panels = aligned_empty(-(-n // NR) * k * NR)
    rows, row_stride = rows_view(weight)
    with parallel_region():
        _pack(rows, row_stride, n, k, panels)
    return PackedWeight(panels, n, k)


@leaf
def _linear_task(
    x,
    x_stride,
    k,
    panels,
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
):
    # tile: [rows / MR][n_panels][MR][NR], sums of this task
    row_tiles = (rows + MR - 1) // MR
    k_blocks = (k + K_BLOCK - 1) // K_BLOCK
    for b in range(k_blocks):
        first, last = k * b // k_blocks, k * (b + 1) // k_blocks  # equal parts: no short last block
        for p in range(n_panels):
            slab = ((panel + p) * k + first) * NR
            for r in range(row_tiles):
                product_tile(
                    x, (row + r * MR) * x_stride + first, x_stride, 1, min(MR, rows - r * MR),
                    panels, slab, last - first,
                    tile, (r * n_panels + p) * MR * NR, int(b > 0),
                )  # fmt: skip
    for i in range(rows):
        for p in range(n_panels):
            column = (panel + p) * NR
            sums = ((i // MR * n_panels + p) * MR + i % MR) * NR
            # Whole panel rows (`bias` is padded): a constant length is vectorised without a remainder.
            if with_gelu:
                for j in range(NR):
                    tile[sums + j] = gelu(tile[sums + j] + bias[column + j])
            else:
                for j in range(NR):
                    tile[sums + j] += bias[column + j]
            start, width = (row + i) * n + column, min(NR, n - column)
            if residual.size > 0:
                start_residual = (row + i) * residual_stride + column
                for j in range(width):
                    out[start + j] = tile[sums + j] + residual[start_residual + j]
            else:
                for j in range(width):
                    out[start + j] = tile[sums + j]


@helper
def _linear_worker(
    x,
    x_stride,
    m,
    k,
    panels,
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
    all_panels = (n + NR - 1) // NR
    row_tasks = (m + row_block - 1) // row_block
    panel_tasks = (all_panels + panel_block - 1) // panel_block
    tile = np.empty(row_block * panel_block * NR, np.float32)
    task = take_ticket(tickets)
    while task < row_tasks * panel_tasks:
        # Neighbouring tasks share panels: what one worker has just brought into the shared cache the other
        # finds there.
        row, panel = task % row_tasks * row_block, task // row_tasks * panel_block
        _linear_task(
            x, x_stride, k, panels, bias, with_gelu, residual, residual_stride, out, n,
            row, min(row_block, m - row), panel, min(panel_block, all_panels - panel), tile,
        )  # fmt: skip
        task = take_ticket(tickets)


@kernel
def _linear(
    x,
    x_stride,
    m,
    k,
    panels,
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
            x,
            x_stride,
            m,
            k,
            panels,
            bias,
            with_gelu,
            residual,
            residual_stride,
            out,
            n,
            row_block,
            panel_block,
            tickets,
        )


def even_block(total: int, most: int, unit: int) -> int:
    """Cut `total` into equal blocks of at most `most`, rounded up to whole units."""
    parts = -(-total // most)
    return -(-total // (parts * unit)) * unit


def task_blocks(m: int, n: int, workers: int, rows: tuple[int, int], columns: tuple[int, int]) -> tuple[int, int]:
    """Choose rows and panels per task: what the caches like, but enough tasks for all workers.

    Parameters
    ----------
    rows, columns : most per task, and those of a register tile.
    """
    (most_rows, tile_rows), (most_columns, tile_columns) = rows, columns
    row_block, column_block = even_block(m, most_rows, tile_rows), even_block(n, most_columns, tile_columns)
    wanted = TASKS_PER_WORKER * workers if workers > 1 else 1
    while -(-m // row_block) * -(-n // column_block) < wanted and column_block > tile_columns:
        column_block = -(-column_block // (2 * tile_columns)) * tile_columns
    return row_block, column_block // tile_columns


def result_rows(out: Float32 | None, m: int, n: int) -> Float32:
    """Return `out` when a product can be written into it, or new memory where there is none.

    Raises
    ------
    ValueError
        If it is not a C-contiguous float32 array: the result would be written to a copy.
    """
    if out is None:
        return np.empty((m, n), np.float32)
    if out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} with strides {out.strides}; a C-contiguous float32 array is needed.")
    return out


def linear(
    x: Float32,
    weight: PackedWeight,
    bias: Float32 | None = None,
    *,
    gelu: bool = False,
    residual: Float32 | None = None,
    out: Float32 | None = None,
) -> Float32:
    """Multiply rows by a packed weight and apply what follows; `reference.linear` defines it.

    Runs in parallel. Error against the reference: order of summation only, up to some 2e-7 of the sum of
    |products|; with GELU 2e-7 · |x| more. Moves M·K + N·K + M·N floats (2·M·N·K operations), and M·N more
    with a residual.

    Parameters
    ----------
    x : ndarray [shape=(M, K), float32]
        Rows.
    weight : PackedWeight
        What `pack_weight` made of [N, K].
    bias : ndarray [shape=(N,), float32] or None
        Added to each row.
    gelu : bool
        Apply tanh-GELU after the bias.
    residual : ndarray [shape=(M, N), float32] or None
        Added last.
    out : ndarray [shape=(M, N), float32, C-contiguous] or None
        Where to write; may be `residual` itself, but not `x`.

    Returns
    -------
    ndarray [shape=(M, N), float32, C-contiguous]
        `out`, or a new array.

    Raises
    ------
    ValueError
        If `out` is not a C-contiguous float32 array: the result would be written to a copy.
    """
    m, n = x.shape[0], weight.n
    out = result_rows(out, m, n)
    if m == 0:
        return out
    rows, row_stride = rows_view(x)
    padded_bias = np.zeros(-(-n // NR) * NR, np.float32)
    if bias is not None:
        padded_bias[:n] = bias
    residual_view, residual_stride = (np.empty(0, np.float32), 0) if residual is None else rows_view(residual)
    tickets = np.zeros(1, np.int64)
    with parallel_region() as workers:
        row_block, panel_block = task_blocks(m, n, workers, (ROW_BLOCK, MR), (COLUMN_BLOCK, NR))
        _linear(
            rows, row_stride, m, weight.k, weight.panels, padded_bias, gelu, residual_view, residual_stride,
            out.reshape(-1), n, row_block, panel_block, tickets, workers,
        )  # fmt: skip
    return out
