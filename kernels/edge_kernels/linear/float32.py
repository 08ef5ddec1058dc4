"""Matrix product with what follows it: bias, tanh-GELU, residual.

What enters: rows and a weight packed once at load. What leaves: rows. The weight lies in panels of NR
outputs, [panel][k][NR], so that the inner loop reads it strictly forward. A task is a block of rows × a block
of panels; inside it K is cut into blocks, so that a slab of one panel stays in the first-level cache while
all rows of the task pass it, and the rows' slab in the second. A task keeps its sums in its own buffer; bias,
GELU and residual are applied when they are written out.

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

from edge_kernels.arrays import Rows, aligned_empty, rows_view
from edge_kernels.compile import helper, kernel, leaf
from edge_kernels.linear.tasks import After, Grid, product_worker, result_rows, task_grid, what_follows
from edge_kernels.simd.epilogue import finish_row
from edge_kernels.simd.float32 import product_tile
from edge_kernels.simd.ir import MR, NR
from edge_kernels.threads import parallel_region

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

# Sizes in elements, swept on Zen 3 (32 KiB and 512 KiB caches). A slab of a panel is K_BLOCK · NR · 4 bytes (16 to 48
# KiB), the rows' slab ROW_BLOCK · K_BLOCK · 4 (up to 192 KiB). K_BLOCK decides the order of summation: it
# must not depend on the machine's load, the number of threads or the number of rows.
K_BLOCK = 256
ROW_BLOCK = 192 // MR * MR
COLUMN_BLOCK = 576 // NR * NR


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
def _pack(weight: Float32, row_stride: int, n: int, k: int, panels: Float32):
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


class _Weight(NamedTuple):
    panels: Float32
    k: int


class _Product(NamedTuple):
    rows: Rows
    weight: _Weight
    after: After
    out: Float32


@helper
def _allocate(product, grid):
    """Make room for a task's sums: [rows / MR][panels][MR][NR]."""
    return np.empty(grid.row_block * grid.panel_block * NR, np.float32)


@leaf
def _linear_task(product, grid, block, sums):
    """Compute a block of rows × a block of panels.

    K is cut into blocks, so that a slab of one panel stays in the first cache while all rows of the task pass it:

                 K_BLOCK                                  panel p
                ┌───────┬───────┐                        ┌───────┐
           rows │ slab  │       │            K_BLOCK     │ slab  │   ← read again for every MR rows
                │       │       │                        ├───────┤
                └───────┴───────┘                        │       │
    """
    (x, x_stride), (panels, k), (bias, gelu_after, residual, residual_stride), out = product
    n = grid.n
    row_tiles = (block.n_rows + MR - 1) // MR
    k_blocks = (k + K_BLOCK - 1) // K_BLOCK
    for b in range(k_blocks):
        first, last = k * b // k_blocks, k * (b + 1) // k_blocks  # equal parts: no short last block
        for p in range(block.n_panels):
            slab = ((block.panel + p) * k + first) * NR
            for r in range(row_tiles):
                product_tile(
                    x, (block.row + r * MR) * x_stride + first, x_stride, 1, min(MR, block.n_rows - r * MR),
                    panels, slab, last - first,
                    sums, (r * block.n_panels + p) * MR * NR, int(b > 0),
                )  # fmt: skip
    # Row by row, not tile by tile: neighbours in the long rows of the result go to memory together.
    for i in range(block.n_rows):
        row = block.row + i
        for p in range(block.n_panels):
            column = (block.panel + p) * NR
            finish_row(
                sums, ((i // MR * block.n_panels + p) * MR + i % MR) * NR, bias, column, gelu_after,
                residual, row * residual_stride + column, out, row * n + column, min(NR, n - column),
            )  # fmt: skip


_worker = product_worker(_allocate, _linear_task, NR)


@kernel
def _linear(rows: Rows, weight: _Weight, after: After, out: Float32, grid: Grid, tickets: Int64, workers: int):
    for _ in numba.prange(workers):
        _worker(_Product(rows, weight, after, out), grid, tickets)


def linear(
    x: Float32,
    weight: PackedWeight,
    bias: Float32 | None = None,
    *,
    gelu: bool = False,
    residual: Float32 | None = None,
    out: Float32 | None = None,
) -> Float32:
    """Multiply rows by a packed weight and apply what follows; `reference.operations.linear` defines it.

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
    after = what_follows(bias, gelu, residual, n, NR)
    with parallel_region() as workers:
        grid = task_grid(m, n, workers, (ROW_BLOCK, MR), (COLUMN_BLOCK, NR))
        _linear(
            rows_view(x),
            _Weight(weight.panels, weight.k),
            after,
            out.reshape(-1),
            grid,
            np.zeros(1, np.int64),
            workers,
        )
    return out
