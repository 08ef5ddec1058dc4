"""Arrays as kernels take them: flat, contiguous, writable; and memory that starts on a cache line.

What enters: any NumPy array. What leaves: views of it where possible, otherwise copies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_kernels.compile import helper


class Rows(NamedTuple):
    """Rows of a matrix in a flat array, and the distance of one row from the next in elements."""

    data: NDArray[np.float32]
    stride: int


class _Memory:
    """Makes NumPy view memory as a writable 1-D float32 array, and keeps its owner alive."""

    def __init__(self, owner: NDArray[Any], length: int) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "typestr": np.dtype(np.float32).str,
            "shape": (length,),
            "data": (owner.__array_interface__["data"][0], False),
        }


def vector_view(x: NDArray[Any]) -> NDArray[np.float32]:
    """View an array as the one type kernels are compiled for: 1-D, contiguous, float32, writable.

    Copies only where dtype, order or alignment require it. Read-only memory (a mapped model file) gets a view
    that numba treats as writable, because numba would compile a second specialisation for read-only arrays;
    kernels write to no input.
    """
    x = np.require(x, np.float32, ["C", "A"])
    if x.flags.writeable or x.size == 0:
        return np.empty(0, np.float32) if x.size == 0 else x.reshape(-1)
    return np.asarray(_Memory(x, x.size))


def rows_view(x: NDArray[Any]) -> Rows:
    """View a matrix as a vector (see `vector_view`) and the distance of its rows in elements.

    Rows that lie apart but are contiguous themselves, as in a column slice, are not copied.
    """
    m, n = x.shape
    in_place = (
        x.dtype == np.float32 and x.flags.aligned and m > 1 and n > 0
        and x.strides[1] == 4 and x.strides[0] >= 4 * n and x.strides[0] % 4 == 0
    )  # fmt: skip
    if not in_place or x.flags.c_contiguous:
        return Rows(vector_view(x), n)
    stride = x.strides[0] // 4
    return Rows(np.asarray(_Memory(x, (m - 1) * stride + n)), stride)


def aligned_empty(length: int) -> NDArray[np.float32]:
    """Allocate a float32 vector that starts on a cache line, so that no vector load straddles two."""
    spare = 64 // 4
    block = np.empty(length + spare, np.float32)
    start = (-block.__array_interface__["data"][0] // 4) % spare
    return block[start : start + length]


@helper
def aligned(length: int, dtype: Any) -> NDArray[Any]:
    """Allocate a vector of 4-byte elements in compiled code, starting on a cache line."""
    block = np.empty(length + 16, dtype)
    start = (-(block.ctypes.data // 4)) % 16
    return block[start : start + length]
