"""The definition of products with weights in ggml's blocks, in plain NumPy: how a block is unpacked, what is rounded.

A block holds 256 weights of one output. Integers of a few bits are scaled in groups of 16 or 32:

    Q4_K  144 bytes  d, m: float16 | 12 bytes: 8 scales and 8 minima of 6 bits | 128 bytes: 256 · 4 bits
    Q5_K  176 bytes  d, m: float16 | 12 bytes, as there | 32 bytes: fifth bits | 128 bytes: lower 4 bits
    Q6_K  210 bytes  128 bytes: lower 4 bits | 64 bytes: upper 2 bits | 16 scales: int8 | d: float16
    Q8_0  272 bytes  8 times: d: float16 | 32 · int8

Nibbles of Q4_K and Q5_K: byte i of the j-th 32 bytes has weight i of group 2j in its lower half, and weight i of
group 2j + 1 in its upper. Source: ggml's `ggml-common.h` and `dequantize_row_*` in `ggml-quants.c`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_kernels.reference.attention import round_to_bf16

Bytes = NDArray[np.uint8]
Float32 = NDArray[np.float32]

BLOCK = 256


def _float16(blocks: Bytes, first: int) -> Float32:
    """Take the float16 at byte `first` of every block, [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view(np.float16).astype(np.float32)


def _scales_and_minima(packed: Bytes) -> tuple[Float32, Float32]:
    """Unpack 12 bytes to 8 scales and 8 minima of 6 bits, [blocks, 8].

    Bits of the bytes, the highest first; s and m are numbers 0 to 3, S and M numbers 4 to 7:

        bytes 0 to 3    SS ssssss      the upper 2 bits of S, and s
        bytes 4 to 7    MM mmmmmm      likewise
        bytes 8 to 11   MMMM SSSS      the lower 4 bits of both
    """
    s, m, lower = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([s & 63, (s >> 6 << 4) | (lower & 15)], axis=1)
    minima = np.concatenate([m & 63, (m >> 6 << 4) | (lower >> 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """Unpack 128 bytes to 8 groups of 32 integers of 4 bits, [blocks, 8, 32]."""
    lines = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([lines & 15, lines >> 4], axis=2).reshape(-1, 8, 32)


def _q4_k(blocks: Bytes) -> Float32:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scales, minima = scales * _float16(blocks, 0), minima * _float16(blocks, 2)
    return scales[..., None] * _nibbles(blocks[:, 16:]) - minima[..., None]


def _q5_k(blocks: Bytes) -> Float32:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scales, minima = scales * _float16(blocks, 0), minima * _float16(blocks, 2)
    # Bit g of byte i is the fifth bit of weight i of group g.
    fifths = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    return scales[..., None] * (_nibbles(blocks[:, 48:]) | fifths) - minima[..., None]


def _q6_k(blocks: Bytes) -> Float32:
    # Halves of 128 weights. Of each, four quarters of 32: the lower bits of quarters 0 and 1 are lower nibbles of 64
    # bytes, those of 2 and 3 the upper ones; two upper bits of all four share a byte.
    lower = blocks[:, :128].reshape(-1, 2, 1, 64)
    lower = np.concatenate([lower & 15, lower >> 4], axis=2).reshape(-1, 2, 4, 32)
    upper = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    integers = (lower | upper << 4).astype(np.int8) - np.int8(32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32) * _float16(blocks, 208)
    return scales[..., None] * integers.reshape(-1, 16, 16)


def _q8_0(blocks: Bytes) -> Float32:
    parts = blocks.reshape(-1, 34)
    return np.ascontiguousarray(parts[:, 2:]).view(np.int8) * _float16(parts, 0)


_UNPACK = {"Q4_K": (144, _q4_k), "Q5_K": (176, _q5_k), "Q6_K": (210, _q6_k), "Q8_0": (272, _q8_0)}


def unpack_blocks(blocks: Bytes, kind: str, n: int, k: int) -> Float32:
    """Unpack a weight as stored in a GGUF file.

    Parameters
    ----------
    blocks : ndarray [shape=(n · k / 256 · bytes of a block,), uint8]
        Rows of blocks, one row per output.
    kind : str
        "Q4_K", "Q5_K", "Q6_K" or "Q8_0".
    n, k : int
        Number of outputs and of inputs; k is a multiple of 256.

    Returns
    -------
    ndarray [shape=(n, k), float32]
    """
    size, unpack = _UNPACK[kind]
    return np.asarray(unpack(blocks.reshape(-1, size)), np.float32).reshape(n, k)


def round_to_even_bf16(x: Float32) -> Float32:
    """Round to the nearest bfloat16, ties to even, as the processor does; as float32. NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), rounded)


def linear_blocks(x: NDArray[Any], blocks: Bytes, kind: str, n: int, *, residual: Float32 | None = None) -> Float32:
    """Multiply rows by a weight in blocks, both rounded to bfloat16, and add a residual; sums in float32.

    Rows are rounded halves away from zero, weights ties to even: the cheapest way in each place.

    Parameters
    ----------
    x : ndarray [shape=(M, K), float32]
        Rows; K is a multiple of 256.
    blocks, kind, n
        As in `unpack_blocks`.
    residual : ndarray [shape=(M, N), float32] or None
        Added last.

    Returns
    -------
    ndarray [shape=(M, N), float32]
    """
    weight = round_to_even_bf16(unpack_blocks(blocks, kind, n, x.shape[1]))
    y = round_to_bf16(x) @ weight.T
    return y if residual is None else y + residual
