"""Peak rates of this machine: the kernels' register tiles on operands in the first cache, and reading memory.

A loop around the tile's own instructions on all threads, without packing, memory or anything between two tiles. Rates
are in units of 1e9 operations per second; a multiplication and an addition count as two. Operands are random, as a
product's are.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

import time
from collections.abc import Callable

import numba
import numpy as np

from edge_kernels.arrays import aligned, aligned_empty
from edge_kernels.compile import helper
from edge_kernels.simd.amx import begin_tiles, end_tiles
from edge_kernels.simd.float32 import product_tile
from edge_kernels.simd.int8 import DOT_MR, DOT_NR, DOT_TILE, GROUP, dot_tile
from edge_kernels.simd.ir import MR, NR
from edge_kernels.threads import parallel_region

CELLS = 128  # panels take at most 4 KiB, with AMX 16: a first cache has 32 or, with AMX, 48
SECONDS = 0.15


@helper
def _int8_tiles(a, b, multipliers, calls):
    sums = aligned(DOT_MR * DOT_NR, np.int32)
    begin_tiles()
    for _ in range(calls):
        dot_tile(a, 0, b, 0, multipliers, CELLS, sums, 0, 0)
    end_tiles()
    return sums[0]


@helper
def _float32_tiles(a, b, calls):
    sums = np.zeros(MR * NR, np.float32)
    for _ in range(calls):
        product_tile(a, 0, CELLS, 1, MR, b, 0, CELLS, sums, 0, 1)
    return sums[0]


@numba.njit(parallel=True, nogil=True)
def _int8(a, b, multipliers, calls, results, workers):
    for worker in numba.prange(workers):
        results[worker] = _int8_tiles(a, b, multipliers, calls)


@numba.njit(parallel=True, nogil=True)
def _float32(a, b, calls, results, workers):
    for worker in numba.prange(workers):
        results[worker] = _float32_tiles(a, b, calls)


@numba.njit(nogil=True)
def _read_part(data):
    """A loop that LLVM turns into vectors: in one over part of an array it does not, and reads a third as fast."""
    found = np.uint64(0)
    for i in range(data.size):
        found ^= data[i]
    return found


@numba.njit(parallel=True, nogil=True)
def _read(data, results, workers):
    for worker in numba.prange(workers):
        results[worker] = _read_part(data[data.size * worker // workers : data.size * (worker + 1) // workers])


def read_bandwidth(n_bytes: int = 1 << 30, times: int = 3) -> float:
    """GB/s at which all threads together read memory that no cache holds; the best of some times."""
    data, results = np.ones(n_bytes // 8, np.uint64), np.zeros(256, np.uint64)
    best = 0.0
    with parallel_region() as workers:
        _read(data[:8], results, workers)  # compiles
        for _ in range(times):
            start = time.perf_counter()
            _read(data, results, workers)
            best = max(best, n_bytes / (time.perf_counter() - start) / 1e9)
    return best


def _rate(run: Callable[[int, int], None], per_call: float) -> float:
    """GOP/s of all threads together; makes enough calls to take a while."""
    with parallel_region() as workers:
        run(1, workers)  # compiles
        calls, seconds = 1000, 0.0
        while seconds < SECONDS / 10:
            calls *= 4
            start = time.perf_counter()
            run(calls, workers)
            seconds = time.perf_counter() - start
        calls = max(1, int(calls * SECONDS / seconds))
        start = time.perf_counter()
        run(calls, workers)
        return workers * calls * per_call / (time.perf_counter() - start) / 1e9


def int8_peak() -> float:
    """GOP/s of the int8 tile."""
    integer = {8: np.uint8 if DOT_TILE.row_zero else np.int8, 16: np.int16}[DOT_TILE.row_bits]
    a, b = (
        aligned_empty(CELLS * side * GROUP).view(type_)[: CELLS * side * GROUP]
        for side, type_ in ((DOT_MR, integer), (DOT_NR, np.int8))
    )
    random = np.random.default_rng(0)
    for operand, zero in ((a, DOT_TILE.row_zero), (b, 0)):
        operand[:] = np.clip(40 * random.standard_normal(operand.size), -127, 127).astype(np.int64) + zero
    multipliers = np.ones(CELLS * DOT_NR, np.uint8)
    results = np.zeros(256, np.int32)
    return _rate(
        lambda calls, workers: _int8(a, b, multipliers, calls, results, workers),
        2.0 * CELLS * GROUP * DOT_MR * DOT_NR,
    )


def float32_peak() -> float:
    """GFLOP/s of the float32 tile."""
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(CELLS * side, np.float32) for side in (MR, NR))
    results = np.zeros(256, np.float32)
    return _rate(lambda calls, workers: _float32(a, b, calls, results, workers), 2.0 * CELLS * MR * NR)
