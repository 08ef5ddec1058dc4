"""Operations between the products of a decoder layer: RMS norms and rotary positions. float32, in parallel."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from edge_kernels.arrays import vector_view
from edge_kernels.compile import kernel
from edge_kernels.simd.float32 import sum_squares_row
from edge_kernels.simd.ir import take_ticket
from edge_kernels.threads import parallel_region

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

ROW_BLOCK = 8


@kernel
def _rms_norm(
    x: Float32, weight: Float32, eps: np.float32, out: Float32, m: int, width: int, tickets: Int64, workers: int
):
    for _ in numba.prange(workers):
        task = take_ticket(tickets)
        while task * ROW_BLOCK < m:
            for row in range(task * ROW_BLOCK, min(m, (task + 1) * ROW_BLOCK)):
                at = row * width
                mean = sum_squares_row(x, at, width, np.float32(0.0)) / np.float32(width)
                scale = np.float32(1.0) / np.sqrt(mean + eps)
                for j in range(width):
                    out[at + j] = x[at + j] * scale * weight[j]
            task = take_ticket(tickets)


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """Divide by the root of the mean square: x / √(mean(x²) + eps) · weight of every row.

    Parameters
    ----------
    x : ndarray [shape=(M, K), float32, C-contiguous]
    weight : ndarray [shape=(K,), float32]

    Returns
    -------
    ndarray [shape=(M, K), float32]
    """
    m, width = x.shape
    out, tickets = np.empty((m, width), np.float32), np.zeros(1, np.int64)
    with parallel_region() as workers:
        _rms_norm(vector_view(x), vector_view(weight), np.float32(eps), out.reshape(-1), m, width, tickets, workers)
    return out


@kernel
def _norm_and_rotate(
    x: Float32, weight: Float32, eps: np.float32, cosines: Float32, sines: Float32, m: int, heads: int, dims: int,
    tickets: Int64, workers: int,
):  # fmt: skip
    half = dims // 2
    for _ in numba.prange(workers):
        task = take_ticket(tickets)
        while task * ROW_BLOCK < m:
            for row in range(task * ROW_BLOCK, min(m, (task + 1) * ROW_BLOCK)):
                for head in range(heads):
                    at = (row * heads + head) * dims
                    mean = sum_squares_row(x, at, dims, np.float32(0.0)) / np.float32(dims)
                    scale = np.float32(1.0) / np.sqrt(mean + eps)
                    for j in range(half):
                        first = x[at + j] * scale * weight[j]
                        second = x[at + half + j] * scale * weight[half + j]
                        cosine, sine = cosines[row * half + j], sines[row * half + j]
                        x[at + j] = first * cosine - second * sine
                        x[at + half + j] = first * sine + second * cosine
            task = take_ticket(tickets)


def norm_and_rotate(x: Float32, weight: Float32, eps: float, cosines: Float32, sines: Float32) -> None:
    """Apply RMS norm to every head, then rotate its numbers j and j + dims/2 by its position's angle; in place.

    Parameters
    ----------
    x : ndarray [shape=(M, heads · dims), float32, C-contiguous]
    weight : ndarray [shape=(dims,), float32]
    cosines, sines : ndarray [shape=(M, dims/2), float32]
    """
    tickets, dims = np.zeros(1, np.int64), len(weight)
    with parallel_region() as workers:
        _norm_and_rotate(
            x.reshape(-1), vector_view(weight), np.float32(eps), vector_view(cosines), vector_view(sines), len(x),
            x.shape[1] // dims, dims, tickets, workers,
        )  # fmt: skip
