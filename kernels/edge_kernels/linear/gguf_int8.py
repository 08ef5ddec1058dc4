"""Products with weights that stay in ggml's blocks × rows in 8 bits: prompts, batches and single rows, on any CPU.

What enters: addresses of rows and of weights where they lie, in a mapped file or in ggml's buffers. What leaves:
float32 rows. A worker takes a panel of BLOCK_NR outputs, unpacks some blocks of it into the first cache, and
multiplies all rows by them:

    for panel of the task                       outputs
        for blocks of k that fit the cache      unpack: every weight is read and unpacked once, for all rows
            for tile of up to 6 rows            multiply

Up to MOST_DOT_ROWS rows read every output in the order of the file instead, with a block of it in each lane: they are
as fast as the memory. Sums are integers, and blocks are added up in the same order either way, so a row has the same
bits alone and in any company.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from edge_kernels.arrays import aligned
from edge_kernels.compile import helper, kernel
from edge_kernels.linear.tasks import result_rows
from edge_kernels.simd.gguf_dots import dots
from edge_kernels.simd.gguf_int8 import tiles
from edge_kernels.simd.gguf_layout import (
    BLOCK,
    BLOCK_MR,
    BLOCK_NR,
    DOT_ROWS,
    KINDS,
    LANES,
    ROW_BYTES,
    UNPACKED_BYTES,
    VECTORS,
)
from edge_kernels.simd.gguf_panels import unpackers
from edge_kernels.simd.gguf_rows import lay_side_by_side, quantize_float, quantize_integer, write_float, write_rows
from edge_kernels.simd.ir import take_ticket
from edge_kernels.threads import parallel_region

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]

KIND_NAMES = tuple(KINDS)
_FIRST_FLOAT = next(i for i, kind in enumerate(KINDS.values()) if kind.is_float)

# Blocks of a panel unpacked at a time, 5.8 kB each on AVX2, so that the first cache holds them beside a tile's rows.
# With many rows four of them, which load and store the sums less often; with few all rows should stay there, too.
MANY_BLOCKS, FEW_BLOCKS = 4, 2
# With many rows, parts of ROW_BLOCK rows × PANEL_BLOCK panels: the rows' numbers for the blocks at hand, 245 kB, and
# the sums, 50 kB on AVX2, stay in the second cache while panel after panel is multiplied. The third is too slow.
ROW_BLOCK = 192
PANEL_BLOCK = 4
FEW_ROWS = 32
"""Up to here panels are finished one by one, so that weights are read in the order in which they lie."""
MOST_DOT_ROWS = max(DOT_ROWS)
"""Up to here rows meet the weights as they are unpacked."""
TASKS_PER_WORKER = 16
AHEAD_BYTES = 4096
"""How far ahead few rows' weights are prefetched: beyond the page, where hardware stops."""
SERIAL_NUMBERS = 1 << 15
"""Numbers of all rows up to which one thread quantises them: sharing costs more."""


@helper
def _tile_rows(left):
    """Rows of the next tile, when so many are left."""
    if left >= 6:
        return 6
    return 4 if left >= 4 else min(left, 2)


def _chosen(functions):
    """Make a helper that calls the function of a kind: (index of the kind, tuple of arguments)."""
    f0, f1, f2, f3, f4, f5, f6 = functions

    @helper
    def choose(kind, arguments):
        if kind == 0:
            return f0(*arguments)
        if kind == 1:
            return f1(*arguments)
        if kind == 2:
            return f2(*arguments)
        if kind == 3:
            return f3(*arguments)
        if kind == 4:
            return f4(*arguments)
        if kind == 5:
            return f5(*arguments)
        return f6(*arguments)

    return choose


def _unpacking(name):
    unpack = unpackers[name]

    @helper
    def run(blocks, row_bytes, panel, vectors):
        unpack(blocks, row_bytes, panel, vectors)

    return run


def _multiplying(name):
    tile_6, tile_4, tile_2, tile_1 = (tiles[name, n] for n in (6, 4, 2, 1))

    @helper
    def run(panel, n_blocks, rows, m, totals, ahead):
        row = 0
        while row < m:
            at, sums, size = rows + row * n_blocks * ROW_BYTES, totals + row * 4 * BLOCK_NR, _tile_rows(m - row)
            if size == 6:
                tile_6(panel, n_blocks, at, sums, ahead)
            elif size == 4:
                tile_4(panel, n_blocks, at, sums, ahead)
            elif size == 2:
                tile_2(panel, n_blocks, at, sums, ahead)
            else:
                tile_1(panel, n_blocks, at, sums, ahead)
            row += size
            ahead = 0  # the first tile has asked for all of it

    return run


def _dotting(name, n):
    """Make a helper that computes one output of m rows, as n rows: those that are not there are computed in vain."""
    dot, zeros = dots[name, n], (np.float32(0.0),) * n

    @helper
    def run(weight, blocks, rows, m, to, stride):
        row_bytes, totals = weight.k // BLOCK * ROW_BYTES, zeros
        for start in range(0, weight.k // BLOCK, LANES):
            at = blocks + start * weight.block_bytes
            totals = dot(at, at + AHEAD_BYTES, rows + start * ROW_BYTES, row_bytes, totals)
        for r in range(n):
            if r < m:
                write_float(to + r * stride, totals[r])

    return run


def _few_rows(name):
    one, two, most = (_dotting(name, n) for n in (1, 2, MOST_DOT_ROWS))

    @helper
    def run(weight, rows, m, first, last, y):
        """Compute outputs of m rows, one output after the other, as they lie in the file."""
        for output in range(first, last):
            blocks, to = weight.address + output * weight.row_bytes, y.address + output * 4
            if m == 1:
                one(weight, blocks, rows, m, to, y.stride)
            elif m == 2:
                two(weight, blocks, rows, m, to, y.stride)
            else:
                most(weight, blocks, rows, m, to, y.stride)

    return run


_unpack = _chosen([_unpacking(name) for name in KIND_NAMES])
_multiply = _chosen([_multiplying(name) for name in KIND_NAMES])
_compute_few_rows = _chosen([_few_rows(name) for name in KIND_NAMES])


class Weight(NamedTuple):
    """A weight [n, k] in blocks: its address, index of its type in KINDS, bytes of a block and of an output."""

    address: int
    kind: int
    block_bytes: int
    row_bytes: int
    n: int
    k: int


class Matrix(NamedTuple):
    """Rows of float32: their address, and the bytes from one to the next."""

    address: int
    stride: int


@helper
def _quantize_row(weight, x, row, m, quantized):
    blocks, together = weight.k // BLOCK, _blocks_together(m)
    first = row // BLOCK_MR * BLOCK_MR
    size = _tile_rows(m - first)
    while first + size <= row:
        first += size
        size = _tile_rows(m - first)
    for b in range(blocks):
        source = x.address + row * x.stride + b * BLOCK * 4
        # Blocks that are multiplied together lie side by side, and inside them tile after tile, block after block: so
        # every tile reads on where the one before it ended, as hardware that prefetches expects.
        start = b // together * together
        place = start * m + first * min(together, blocks - start) + (b - start) * size
        to = quantized.ctypes.data + place * ROW_BYTES + 4 * (row - first)
        if weight.kind < _FIRST_FLOAT:
            quantize_integer(source, to, size)
        else:
            quantize_float(source, to, size)


@helper
def _blocks_together(m):
    return MANY_BLOCKS if m > FEW_ROWS else FEW_BLOCKS


class _Part(NamedTuple):
    """What is computed together: some panels of outputs and some rows."""

    panel: int
    n_panels: int
    row: int
    n_rows: int


@helper
def _compute(weight, rows, m, y, part, unpacked, totals):
    """Compute a part; the addresses are those of the quantised rows, of unpacked blocks and of sums."""
    blocks, together = weight.k // BLOCK, _blocks_together(m)
    for start in range(0, blocks, together):
        n_blocks = min(together, blocks - start)
        at = rows + (start * m + part.row * n_blocks) * ROW_BYTES
        for p in range(part.n_panels):
            first = weight.address + _first_output(weight, part.panel + p) * weight.row_bytes
            for b in range(n_blocks):
                block = first + (start + b) * weight.block_bytes
                _unpack(weight.kind, (block, weight.row_bytes, unpacked + b * UNPACKED_BYTES, VECTORS))
            sums = totals + p * part.n_rows * BLOCK_NR * 4
            # The next panel's bytes follow this one's: as many of them as were unpacked now.
            ahead = first + BLOCK_NR * (weight.row_bytes + start * weight.block_bytes)
            _multiply(weight.kind, (unpacked, n_blocks, at, part.n_rows, sums, ahead))
    for p in range(part.n_panels):
        to = y.address + part.row * y.stride + _first_output(weight, part.panel + p) * 4
        write_rows(totals + p * part.n_rows * BLOCK_NR * 4, part.n_rows, to, y.stride)


@helper
def _first_output(weight, panel):
    """First output of a panel; the last panel overlaps the one before it where outputs are left over."""
    return min(panel * BLOCK_NR, weight.n - BLOCK_NR)


@helper
def _row_of_part(m, part, parts):
    """First row of a part; tiles are not divided."""
    return m if part == parts else m * part // parts // BLOCK_MR * BLOCK_MR


@helper
def _work(weight, quantized, m, y, tickets, panels_of_task):
    """Compute tasks until there are none."""
    panels = (weight.n + BLOCK_NR - 1) // BLOCK_NR
    tasks = (panels + panels_of_task - 1) // panels_of_task
    row_blocks = (m + ROW_BLOCK - 1) // ROW_BLOCK
    panel_block = PANEL_BLOCK if m > FEW_ROWS else 1
    unpacked = aligned(MANY_BLOCKS * UNPACKED_BYTES // 4, np.float32)
    totals = aligned(panel_block * min(m, ROW_BLOCK + BLOCK_MR) * BLOCK_NR, np.float32)
    task = take_ticket(tickets)
    while task < tasks:
        end = min((task + 1) * panels_of_task, panels)
        for panel in range(task * panels_of_task, end, panel_block):
            for r in range(row_blocks):
                row, row_end = _row_of_part(m, r, row_blocks), _row_of_part(m, r + 1, row_blocks)
                part = _Part(panel, min(panel_block, end - panel), row, row_end - row)
                totals[:] = 0.0
                _compute(weight, quantized.ctypes.data, m, y, part, unpacked.ctypes.data, totals.ctypes.data)
        task = take_ticket(tickets)
    unpacked[0] = totals[0]  # both are in use until here


@helper
def _work_on_few_rows(weight, quantized, m, y, tickets, outputs_of_task):
    """Compute tasks of few rows until there are none."""
    rows = quantized.ctypes.data + weight.k // BLOCK * ROW_BYTES
    tasks = (weight.n + outputs_of_task - 1) // outputs_of_task
    task = take_ticket(tickets)
    while task < tasks:
        first, last = task * outputs_of_task, min((task + 1) * outputs_of_task, weight.n)
        _compute_few_rows(weight.kind, (weight, rows, m, first, last, y))
        task = take_ticket(tickets)


@helper
def _quantize_few(weight, x, m, quantized):
    """Quantise rows on this thread, each at the beginning, and lay its blocks side by side after that."""
    row_bytes = weight.k // BLOCK * ROW_BYTES
    for row in range(m):
        _quantize_row(weight, Matrix(x.address + row * x.stride, x.stride), 0, 1, quantized)
        to = quantized.ctypes.data + (1 + row) * row_bytes
        for start in range(0, row_bytes, LANES * ROW_BYTES):
            lay_side_by_side(quantized.ctypes.data + start, to + start)


@helper
def _new_tickets():
    return np.zeros(1, np.int64)


@kernel
def multiply(weight: Weight, x: Matrix, m: int, y: Matrix, workers: int):
    """Multiply m rows x by a weight, into y: a `Weight` and two of `Matrix`. The caller is in a parallel region."""
    blocks, tickets = weight.k // BLOCK, _new_tickets()
    if m <= MOST_DOT_ROWS and blocks % LANES == 0:
        few = aligned((1 + MOST_DOT_ROWS) * blocks * ROW_BYTES // 4, np.float32)
        _quantize_few(weight, x, m, few)
        outputs = max(1, weight.n // (TASKS_PER_WORKER * workers))
        for _ in numba.prange(workers):
            _work_on_few_rows(weight, few, m, y, tickets, outputs)
        return
    quantized = aligned(m * blocks * ROW_BYTES // 4, np.float32)
    if m * weight.k <= SERIAL_NUMBERS:
        for row in range(m):
            _quantize_row(weight, x, row, m, quantized)
    else:
        for row in numba.prange(m):
            _quantize_row(weight, x, row, m, quantized)
    panels = (weight.n + BLOCK_NR - 1) // BLOCK_NR
    panels_of_task = max(1, panels // (TASKS_PER_WORKER * workers))
    for _ in numba.prange(workers):
        _work(weight, quantized, m, y, tickets, panels_of_task)


def linear_gguf(x: Float32, blocks: Bytes, kind: str, n: int, *, out: Float32 | None = None) -> Float32:
    """Multiply rows, rounded to 8 bits, by a weight in ggml's blocks; `reference.gguf_blocks.linear_gguf` defines it.

    Runs in parallel. A result depends neither on the other rows nor on the number of threads. Reads the weight once:
    N·K / 256 blocks.

    Parameters
    ----------
    x : ndarray [shape=(M, K), float32]
        Rows; K is a multiple of 256.
    blocks : ndarray [shape=(N · K / 256 · bytes of a block,), uint8]
        The weight as it lies in a GGUF file, one row of blocks per output.
    kind : str
        A key of `simd.gguf_layout.KINDS`.
    n : int
        Outputs, at least BLOCK_NR.
    out : ndarray [shape=(M, N), float32, C-contiguous] or None

    Returns
    -------
    ndarray [shape=(M, N), float32, C-contiguous]
        `out`, or a new array.

    Raises
    ------
    ValueError
        If rows and weight do not match, or `out` cannot be written into.
    """
    m, k = x.shape
    block_bytes = KINDS[kind].block_bytes
    if k % BLOCK or n < BLOCK_NR or blocks.size != n * k // BLOCK * block_bytes:
        raise ValueError(f"Rows of {k} meet {blocks.size} bytes of {kind} for {n} outputs.")
    out = result_rows(out, m, n)
    if m == 0:
        return out
    x, blocks = np.require(x, np.float32, ["C", "A"]), np.ascontiguousarray(blocks)
    weight = Weight(_address(blocks), KIND_NAMES.index(kind), block_bytes, k // BLOCK * block_bytes, n, k)
    with parallel_region() as workers:
        multiply(weight, Matrix(_address(x), 4 * k), m, Matrix(_address(out), 4 * n), workers)
    return out


def _address(array) -> int:
    return int(array.__array_interface__["data"][0])
