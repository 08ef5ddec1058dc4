"""The definition of products with weights in ggml's blocks, in plain NumPy: how a block is unpacked, what is rounded.

A block holds 256 weights of one output. Integers of a few bits are scaled in groups of 16 or 32:

    Q4_K    144 bytes  d, m: float16 | 12 bytes: 8 scales and 8 minima of 6 bits | 128 bytes: 256 · 4 bits
    Q5_K    176 bytes  d, m: float16 | 12 bytes, as there | 32 bytes: fifth bits | 128 bytes: lower 4 bits
    Q6_K    210 bytes  128 bytes: lower 4 bits | 64 bytes: upper 2 bits | 16 scales: int8 | d: float16
    Q8_0    272 bytes  8 times: d: float16 | 32 · int8
    Q4_0    144 bytes  8 times: d: float16 | 16 bytes: 32 · 4 bits, 8 stands for 0
    Q4_1    160 bytes  8 times: d, m: float16 | 16 bytes: 32 · 4 bits, m is added
    IQ4_NL  144 bytes  8 times: d: float16 | 16 bytes: 32 · 4 bits, places in a table of 16 integers

Nibbles of Q4_K and Q5_K: byte i of the j-th 32 bytes has weight i of group 2j in its lower half, and weight i of
group 2j + 1 in its upper. Of the last three, byte i has weights i and i + 16.
Source: ggml's `ggml-common.h` and `dequantize_row_*` in `ggml-quants.c`.
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


def _small_nibbles(packed: Bytes) -> Bytes:
    """Unpack 16 bytes to 32 integers of 4 bits, [blocks, 32]."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _q4_0(blocks: Bytes) -> Float32:
    parts = blocks.reshape(-1, 18)
    return (_small_nibbles(parts[:, 2:]).astype(np.float32) - 8) * _float16(parts, 0)


def _q4_1(blocks: Bytes) -> Float32:
    parts = blocks.reshape(-1, 20)
    return _small_nibbles(parts[:, 4:]) * _float16(parts, 0) + _float16(parts, 2)


IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the nibbles of IQ4_NL stand for: `kvalues_iq4nl` of ggml-common.h."""


def _iq4_nl(blocks: Bytes) -> Float32:
    parts = blocks.reshape(-1, 18)
    return np.array(IQ4_NL_VALUES, np.float32)[_small_nibbles(parts[:, 2:])] * _float16(parts, 0)


_UNPACK = {
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
    "Q8_0": (272, _q8_0),
    "Q4_0": (144, _q4_0),
    "Q4_1": (160, _q4_1),
    "IQ4_NL": (144, _iq4_nl),
}


def unpack_blocks(blocks: Bytes, kind: str, n: int, k: int) -> Float32:
    """Unpack a weight as stored in a GGUF file.

    Parameters
    ----------
    blocks : ndarray [shape=(n · k / 256 · bytes of a block,), uint8]
        Rows of blocks, one row per output.
    kind : str
        One of those above.
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


def round_rows(x: Float32, kind: str) -> NDArray[np.float64]:
    """Round rows as products in 8 bits with a type of weights do: 127 for the largest of 256 numbers, or of 32.

    Types whose blocks hold 256 weights take 256, the others 32, each like its blocks.

    Returns
    -------
    ndarray [shape of x, float64]
        scale · integer. NaN for all numbers of a part that holds a NaN or an infinity.
    """
    part = 256 if kind.endswith("_K") else 32
    parts = x.reshape(*x.shape[:-1], -1, part)
    largest = np.abs(parts).max(-1, keepdims=True).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factor = np.float32(127) / largest
        factor = np.where(np.isfinite(factor), factor, np.float32(0))
        integers = np.rint(parts * factor)
    scale = largest / np.float32(127)
    scale = np.where(np.isfinite(scale), scale, np.float32(np.nan))
    return (np.where(np.isfinite(integers), integers, 0).astype(np.float64) * scale).reshape(x.shape)


def linear_gguf(x: Float32, blocks: Bytes, kind: str, n: int) -> NDArray[np.float64]:
    """Multiply rows, rounded to 8 bits, by a weight in blocks; exact but for float64.

    Parameters and errors as in `linear_blocks`.

    Returns
    -------
    ndarray [shape=(M, N), float64]
    """
    return round_rows(x, kind) @ unpack_blocks(blocks, kind, n, x.shape[1]).astype(np.float64).T
