"""Stored rows of a tensor → float32, or the integers and scales inside them; knows block layouts but no files.

The types that vision towers are stored in are read here, in few passes over memory, because half a billion values
have to be read between start-up and the first picture. gguf-py reads the others, of which only single rows are used.

Source: ggml's `block_q8_0` (float16 scale, 32 int8) and `block_q4_0` (float16 scale, 16 bytes: the low halves are
values 0 to 15, the high halves 16 to 31, each plus 8).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf import quants as gguf_quants

Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

BLOCK = 32  # values, of both types
SCALE_BYTES = 2
CHUNK = 1 << 18  # values at once: enough to hide NumPy's overhead, few enough for temporaries to stay in caches
CHUNKS_PER_THREAD = 4  # at least: a smaller tensor is not worth a thread
_LOW_HALVES = np.uint64(0x0F0F0F0F0F0F0F0F)


class BlockParts(NamedTuple):
    """The parts of blocks, as views: nothing is copied."""

    scales: npt.NDArray[np.float16]
    """ndarray [shape=(rows, blocks per row), float16]; value = scale · integer."""
    integers: npt.NDArray[np.int8] | Bytes
    """Q8_0: ndarray [shape=(rows, blocks, 32), int8]. Q4_0: ndarray [shape=(rows, blocks, 16), uint8], byte j holding
    8 + integer j in its low half and 8 + integer j + 16 in its high half."""


def parts(rows: Bytes, kind: GGMLQuantizationType) -> BlockParts:
    """Split stored blocks into scales and integers.

    Parameters
    ----------
    rows : ndarray [shape=(rows, bytes per row), uint8, C-contiguous]

    Raises
    ------
    NotImplementedError
        When `kind` is neither Q8_0 nor Q4_0.
    """
    if kind not in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0):
        raise NotImplementedError(kind.name)
    is_q8 = kind == GGMLQuantizationType.Q8_0
    block_bytes = SCALE_BYTES + (BLOCK if is_q8 else BLOCK // 2)
    blocks = rows.reshape(len(rows), -1, block_bytes)
    integers = blocks[:, :, SCALE_BYTES:]
    return BlockParts(blocks[:, :, :SCALE_BYTES].view("<f2")[:, :, 0], integers.view(np.int8) if is_q8 else integers)


def dequantize(rows: Bytes, kind: GGMLQuantizationType, columns: int | None = None) -> Float32:
    """Stored rows as float32.

    Parameters
    ----------
    rows : ndarray [shape=(rows, bytes per row), uint8, C-contiguous]
    columns : values wanted from each row, for block types; None for all.

    Returns
    -------
    values : ndarray [shape=(rows, columns), float32, C-contiguous]; a view if `kind` is F32

    Raises
    ------
    NotImplementedError, KeyError
        When `kind` has no dequantiser.
    """
    if kind == GGMLQuantizationType.F32:
        return rows.view("<f4")
    if kind == GGMLQuantizationType.F16:
        return _from_float16(rows.view("<f2"))
    if kind == GGMLQuantizationType.BF16:
        bits = rows.view("<u2").astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0):
        return _from_blocks(parts(rows, kind), kind, columns)
    return np.ascontiguousarray(gguf_quants.dequantize(rows, kind)[:, :columns], np.float32)


def _from_float16(values: npt.NDArray[np.float16]) -> Float32:
    """float16 → float32 exactly, at three times the speed of NumPy's conversion.

    Exponent and fraction are shifted to their places in a float32, whose exponent is then 112 too small; a
    multiplication corrects that, subnormals included. Infinities and NaN come out as 65536 or more; NumPy converts
    those.
    """
    result = np.empty(values.shape, np.float32)
    flat, bits = result.reshape(-1), values.reshape(-1).view(np.int16)
    sign_exponent_fraction = np.int32(~0x70000000)  # the three bits between sign and exponent are copies of the sign

    def convert(chunk: slice) -> None:
        out = flat[chunk]
        integers = out.view(np.int32)
        np.copyto(integers, bits[chunk])
        np.left_shift(integers, 13, out=integers)
        np.bitwise_and(integers, sign_exponent_fraction, out=integers)
        np.multiply(out, np.float32(2.0**112), out=out)
        if out.max() >= 65536 or out.min() <= -65536:
            np.copyto(out, values.reshape(-1)[chunk])

    _for_chunks(bits.size, CHUNK, convert)
    return result


def _for_chunks(total: int, step: int, work: Callable[[slice], None]) -> None:
    """Call `work` for slices of a range, in threads where there are many: NumPy releases the GIL."""
    chunks = [slice(start, min(start + step, total)) for start in range(0, total, step)]
    threads = min(len(chunks) // CHUNKS_PER_THREAD, _cpus())
    if threads < 2:
        for chunk in chunks:
            work(chunk)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, chunks))  # a list, so that errors are raised


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _from_blocks(blocks: BlockParts, kind: GGMLQuantizationType, columns: int | None) -> Float32:
    scales = blocks.scales.astype(np.float32)[:, :, None]
    n_rows, n_stored = len(scales), scales.shape[1] * BLOCK
    values = np.empty((n_rows, n_stored if columns is None else columns), np.float32)
    whole, step = values.shape[1] == n_stored, max(1, CHUNK // n_stored)

    def convert(chunk: slice) -> None:
        integers = blocks.integers[chunk]
        integers = integers if kind == GGMLQuantizationType.Q8_0 else _four_bit_integers(integers)
        target = values[chunk] if whole else np.empty((len(integers), n_stored), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # damaged scales; the computation finds the infinities
            np.multiply(integers, scales[chunk], out=target.reshape(integers.shape))
        if not whole:
            values[chunk] = target[:, :columns]

    _for_chunks(n_rows, step, convert)
    return values


def _four_bit_integers(halves: npt.NDArray[np.uint8 | np.int8]) -> npt.NDArray[np.int8]:
    """Integers of Q4_0 blocks: ndarray [shape=(rows, blocks, 32), int8], -8 to 7.

    Everything is moved in items of 8 or 16 bytes, which NumPy copies ten times faster than as many single bytes.
    """
    n_rows, n_blocks, _ = halves.shape
    words = np.ascontiguousarray(halves.view("V16")).view(np.uint64)
    integers = np.empty((n_rows, n_blocks, 2), "V16")
    integers[:, :, :1] = (words & _LOW_HALVES).view("V16")
    high = words >> np.uint64(4)
    high &= _LOW_HALVES
    integers[:, :, 1:] = high.view("V16")
    result = integers.view(np.int8).reshape(n_rows, n_blocks, BLOCK)
    result -= 8
    return result
