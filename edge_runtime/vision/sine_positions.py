"""Sine embeddings of the resampler: float32 tables for positions, with the same bits on every machine.

The official tables are NumPy float32 throughout, and NumPy's float32 `power` is a different function on every kind of
processor: with AVX-512 it is Intel's SVML, elsewhere the C library, and they differ in the last bit of one
frequency in five. A phase is position times frequency, so that bit grows to 1e-5 at position 100 and 5e-3 at time
72,000. The tables here are those of an AVX-512 machine (where the official code was checked), computed with
elementary float64 arithmetic only.

Source: get_1d_sincos_pos_embed of MiniCPM-V's resampler.py; the arithmetic of powf in numpy/SVML (svml_z0_pow_s_la).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

# log2(10000) as the pair of float32 that SVML's logarithm returns; their sum is off by 2e-12.
_LOG_HIGH, _LOG_LOW = float.fromhex("0x1.a934fp+3"), float.fromhex("0x1.2f35p-22")
# Its cubic for (2**r - 1) / r on 0 <= r < 1/16.
_C1, _C2, _C3 = float.fromhex("0x1.62e444p-1"), float.fromhex("0x1.ebe2d8p-3"), float.fromhex("0x1.d0a996p-5")


def sine(dim: int, positions: npt.ArrayLike) -> Float32:
    """Embed positions: ndarray [shape=(n, dim), float32], all sines, then all cosines.

    Parameters
    ----------
    dim : an even number.
    positions : n numbers >= 0; columns, rows, or times in units of 0.1 s.
    """
    # The phase is rounded to float32 as in the official code; its sine does not use a float32 library function.
    phase = (np.asarray(positions, np.float32)[:, None] * frequencies(dim // 2)).astype(np.float64)
    table: Float32 = np.concatenate([np.sin(phase), np.cos(phase)], axis=1).astype(np.float32)
    return table


@lru_cache(maxsize=16)
def frequencies(n: int) -> Float32:
    """1 / 10000**(j/n) for j = 0..n-1: ndarray [shape=(n,), float32].

    SVML computes 2**(y log2 x) in float32 with fused multiply-adds, to 1 ulp but not correctly rounded. A product
    of two float32 is exact in float64, so each fused step below is one float64 expression rounded once.
    """
    y = (np.arange(n, dtype=np.float32) / np.float32(n)).astype(np.float64)
    # z + (low - (z - head)) = y log2(10000); these four steps round toward zero there.
    product = y * _LOG_HIGH
    head = _chop(product)
    low = _chop(y * _LOG_LOW + (product - head))
    z = _chop(head + low)
    # 2**z = 2**(k // 16) * 2**(k % 16 / 16) * 2**r
    k = np.floor(z * 16).astype(np.int64)
    r = _nearest((z - k / 16) + _nearest(low - (z - head)))
    root = _nearest(np.exp2(np.arange(16) / 16))[k & 15]
    polynomial = _nearest(r * _nearest(r * _C3 + _C2) + _C1)
    power = np.ldexp(_nearest(_nearest(root * r) * polynomial + root), k >> 4)
    omega: Float32 = np.float32(1) / power.astype(np.float32)
    return omega


def _nearest(x: Float64) -> Float64:
    """Round to the nearest float32, kept as float64."""
    return x.astype(np.float32).astype(np.float64)


def _chop(x: Float64) -> Float64:
    """Round values >= 0 toward zero to float32, kept as float64: 29 bits of the significand are dropped."""
    return (x.view(np.int64) & -(1 << 29)).view(np.float64)
