"""How a product is split: tasks of rows × outputs, and the worker that takes them by ticket.

What enters: the sizes of a product and of its register tile. What leaves: blocks, and a worker for kernels to run.

                       panels of outputs →
                     panel_block   panel_block
                    ┌────────────┬────────────┬───
        row_block   │  task 0    │  task 2    │          A panel is what one register tile computes for all rows:
            rows    ├────────────┼────────────┼───       NR outputs, whose weights lie together.
        row_block   │  task 1    │  task 3    │
            rows    └────────────┴────────────┴───

Workers take numbers from one counter until none is left, so a worker that is slow, or was interrupted, takes fewer.
Neighbouring tasks share panels: one worker finds in the shared cache what another has just loaded. Which worker
computes a task changes no bit of it: a task's sums are its own.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_kernels.arrays import rows_view
from edge_kernels.compile import helper
from edge_kernels.simd.amx import begin_tiles, end_tiles
from edge_kernels.simd.ir import take_ticket

Float32 = NDArray[np.float32]

TASKS_PER_WORKER = 4  # blocks are cut smaller until there are this many, so that no worker waits long for the last


class Grid(NamedTuple):
    """A product's result, rows × outputs, and the largest task: rows, and panels of outputs."""

    m: int
    n: int
    row_block: int
    panel_block: int


class Block(NamedTuple):
    """What a task computes: the first row, rows, the first panel, panels."""

    row: int
    n_rows: int
    panel: int
    n_panels: int


class After(NamedTuple):
    """The epilogue of sums: add the bias, apply tanh-GELU where `gelu` is not 0, add the residual.

    Attributes
    ----------
    bias : ndarray [shape=(panels · outputs of a panel,), float32]
        Padded with zeros, so that code for whole panels may read it to the end.
    gelu : int
        0 or 1.
    residual : ndarray [float32]
        Flat; nothing is added where it is empty.
    residual_stride : int
        Distance of its rows.
    """

    bias: Float32
    gelu: int
    residual: Float32
    residual_stride: int


def what_follows(bias: Float32 | None, gelu: bool, residual: Float32 | None, n: int, columns: int) -> After:
    """Bring what follows a product of n outputs, in panels of `columns`, into the form that kernels take."""
    padded = np.zeros(-(-n // columns) * columns, np.float32)
    if bias is not None:
        padded[:n] = bias
    nothing = (np.empty(0, np.float32), 0)
    return After(padded, int(gelu), *(nothing if residual is None else rows_view(residual)))


def even_block(total: int, most: int, unit: int) -> int:
    """Cut `total` into equal blocks of at most `most`, rounded up to whole units."""
    parts = -(-total // most)
    return -(-total // (parts * unit)) * unit


def task_grid(m: int, n: int, workers: int, rows: tuple[int, int], columns: tuple[int, int]) -> Grid:
    """Choose rows and panels per task: what fits the caches, but enough tasks for all workers.

    Parameters
    ----------
    rows, columns : the most per task, and those of a register tile.
    """
    (most_rows, tile_rows), (most_columns, tile_columns) = rows, columns
    row_block, column_block = even_block(m, most_rows, tile_rows), even_block(n, most_columns, tile_columns)
    wanted = TASKS_PER_WORKER * workers if workers > 1 else 1
    while -(-m // row_block) * -(-n // column_block) < wanted and column_block > tile_columns:
        column_block = -(-column_block // (2 * tile_columns)) * tile_columns
    return Grid(m, n, row_block, column_block // tile_columns)


def product_worker(allocate: Any, compute: Any, columns: int) -> Any:
    """Make the worker of a product: compiled code that takes tasks until there are none.

    Parameters
    ----------
    allocate : helper (product, grid) → buffers
        What a worker needs for any task; made once.
    compute : leaf (product, grid, block, buffers)
        Compute a task. It is inlined into the worker: a call would count references to every array.
    columns : int
        Outputs of a panel.

    Returns
    -------
    helper (product, grid, tickets)
        `product` is what the kernel got, any tuple; `tickets` a counter that all workers share, 0 at the start.
    """

    @helper
    def work(product, grid, tickets):
        panels = (grid.n + columns - 1) // columns
        row_tasks = (grid.m + grid.row_block - 1) // grid.row_block
        panel_tasks = (panels + grid.panel_block - 1) // grid.panel_block
        buffers = allocate(product, grid)
        begin_tiles()
        task = take_ticket(tickets)
        while task < row_tasks * panel_tasks:
            row, panel = task % row_tasks * grid.row_block, task // row_tasks * grid.panel_block
            block = Block(row, min(grid.row_block, grid.m - row), panel, min(grid.panel_block, panels - panel))
            compute(product, grid, block, buffers)
            task = take_ticket(tickets)
        end_tiles()

    return work


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
