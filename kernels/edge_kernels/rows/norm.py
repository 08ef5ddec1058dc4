"""Layer normalisation: rows in, rows out."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

from edge_kernels.arrays import rows_view, vector_view
from edge_kernels.compile import kernel, leaf
from edge_kernels.simd.float32 import sum_row, sum_squares_row
from edge_kernels.simd.ir import take_ticket
from edge_kernels.threads import parallel_region

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

ROWS_PER_TASK = 16


@leaf
def _layer_norm_row(x, start, e, gain, bias, eps, out, out_start):
    mean = sum_row(x, start, e) / np.float32(e)
    # Two passes: the one-pass formula E[x²] - mean² cancels where the mean is large against the spread.
    variance = sum_squares_row(x, start, e, mean) / np.float32(e)
    factor = np.float32(1.0) / math.sqrt(variance + eps)
    for j in range(e):
        out[out_start + j] = (x[start + j] - mean) * factor * gain[j] + bias[j]


@kernel
def _layer_norm(
    x: Float32, x_stride: int, m: int, e: int, gain: Float32, bias: Float32, eps: float, out: Float32, tickets: Int64,
    workers: int,
):  # fmt: skip
    for _ in numba.prange(workers):
        row = take_ticket(tickets) * ROWS_PER_TASK
        while row < m:
            for i in range(row, min(row + ROWS_PER_TASK, m)):
                _layer_norm_row(x, i * x_stride, e, gain, bias, np.float32(eps), out, i * e)
            row = take_ticket(tickets) * ROWS_PER_TASK


def layer_norm(x: Float32, gain: Float32, bias: Float32, eps: float) -> Float32:
    """Normalise each row, then scale and shift its columns; `reference.operations.layer_norm` defines it.

    Runs in parallel, not in place. Error against the reference: about 2e-7 of |value| + |gain| + |bias|.
    Moves 2·M·E floats.

    Parameters
    ----------
    x : ndarray [shape=(M, E), float32]
        Rows.
    gain, bias : ndarray [shape=(E,), float32]
        Factor and summand of each column.
    eps : float
        Added to the variance, > 0.

    Returns
    -------
    ndarray [shape=(M, E), float32, C-contiguous]
    """
    m, e = x.shape
    out = np.empty((m, e), np.float32)
    if m == 0:
        return out
    rows, row_stride = rows_view(x)
    tickets = np.zeros(1, np.int64)
    with parallel_region() as workers:
        _layer_norm(
            rows,
            row_stride,
            m,
            e,
            vector_view(gain),
            vector_view(bias),
            float(eps),
            out.reshape(-1),
            tickets,
            workers,
        )
    return out
