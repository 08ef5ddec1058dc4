"""The definition of attention with rounded operands, in plain NumPy, as `reference.operations` is for the rest.

Arguments and results are those of `reference.operations.attention`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edge_kernels.reference.operations import linear_int8

Float32 = NDArray[np.float32]
Int8 = NDArray[np.int8]
Int64 = NDArray[np.int64]

# --- int16 attention ----------------------------------------------------------------------------------------

INT32_MAX = 2**31 - 1
# Keys that share a maximum of each query, and a scale of each column of values. A multiple of 6 and of 8, the rows of
# register tiles.
KEYS_PER_BLOCK = 120
LARGEST_POWER = 2**14 - 1  # 120 of them are below 2^24: their sum is exact in float32
LARGEST_VALUE = INT32_MAX // (KEYS_PER_BLOCK * LARGEST_POWER)  # 1092: no sum over a block leaves int32


def score_limit(d: int) -> int:
    """Return the largest integer for queries and keys of head width d: no sum of d products leaves int32.

    Raises
    ------
    ValueError
        If that is below 127.
    """
    limit = min(2**15 - 1, math.isqrt(INT32_MAX // max(d, 1)))
    if limit < 127:
        raise ValueError(f"heads of {d} columns leave integers up to {limit} only; use float32 attention.")
    return limit


def _round_symmetric(x: Float32, limit: int, axis: int) -> tuple[NDArray[np.float64], Float32]:
    """Write x ≈ scale · q with integers up to ±limit, a scale for all along `axis`, halves to even.

    q comes as float64, in which sums of products of such integers are exact. Where all is 0 (or so small that
    limit / largest overflows) scale and q are 0. Where something is not finite the scale is NaN and q is 0.
    """
    largest = np.abs(x).max(axis=axis, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factor = np.float32(limit) / largest
        q = np.rint(x * factor)
    finite = np.isfinite(largest)
    usable = finite & np.isfinite(factor)
    scale = np.where(usable, largest / np.float32(limit), np.where(finite, np.float32(0), np.float32(np.nan)))
    return np.where(usable, q, 0).astype(np.float64), scale.astype(np.float32)


def attention_int16(
    q: Float32,
    k: Float32,
    v: Float32,
    heads: int,
    scale: float,
    q_offsets: Int64,
    kv_offsets: Int64,
) -> Float32:
    """`attention` with both products in integers, arguments and result as there.

    Queries and keys have a scale per row and head. Keys are taken KEYS_PER_BLOCK at a time from the start of their
    sequence; the weights of a query in a block are integers relative to its largest weight **in that block**, so
    that one key with most of the weight leaves those of the other blocks their digits. Values have a scale per
    column and block. The divisor sums the same rounded weights as the product: where all values are equal, the
    result is that value.

    Where a row of q is not finite its result is NaN; where one of k is not, that of all queries of its sequence and
    head; where v is not, that of its column.
    """
    q, k, v = (np.asarray(a, np.float32) for a in (q, k, v))
    out = np.zeros_like(q, order="C")
    d = q.shape[1] // heads
    limit = score_limit(d)
    for s in range(len(q_offsets) - 1):
        q_rows = slice(int(q_offsets[s]), int(q_offsets[s + 1]))
        for h in range(heads):
            columns = slice(h * d, (h + 1) * d)
            queries, q_scale = _round_symmetric(q[q_rows, columns], limit, 1)
            # Scores in units of log2(e), so that softmax is a power of 2; maxima are taken before this factor.
            queries, q_scale = np.sign(scale) * queries, q_scale * np.float32(abs(scale) * math.log2(math.e))
            maximum = np.full((len(queries), 1), np.finfo(np.float32).min)
            total, sums = np.zeros((len(queries), 1), np.float32), np.zeros((len(queries), d), np.float32)
            for first in range(int(kv_offsets[s]), int(kv_offsets[s + 1]), KEYS_PER_BLOCK):
                kv_rows = slice(first, min(first + KEYS_PER_BLOCK, int(kv_offsets[s + 1])))
                keys, k_scale = _round_symmetric(k[kv_rows, columns], limit, 1)
                values, v_scale = _round_symmetric(v[kv_rows, columns], LARGEST_VALUE, 0)
                with np.errstate(over="ignore", invalid="ignore"):
                    scores = (queries @ keys.T).astype(np.float32) * k_scale.T  # without the queries' scales
                    highest = scores.max(axis=1, keepdims=True)
                    powers = np.rint(LARGEST_POWER * np.exp2((scores - highest) * q_scale))
                    before, maximum = maximum, np.maximum(maximum, highest)
                    keep, take = np.exp2((before - maximum) * q_scale), np.exp2((highest - maximum) * q_scale)
                    total = total * keep + powers.sum(axis=1, keepdims=True) * take
                    block = (powers.astype(np.float64) @ values).astype(np.float32)
                    sums = sums * keep + block * v_scale * take
            if kv_offsets[s] < kv_offsets[s + 1]:
                out[q_rows, columns] = sums / total
    return out


# --- bfloat16 attention -------------------------------------------------------------------------------------


def round_to_bf16(x: Float32) -> Float32:
    """Round to the nearest bfloat16, halves away from zero; as float32. NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64) + 0x8000
    rounded = (bits & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), rounded)


def attention_bf16(
    q: Float32,
    k: Float32,
    v: Float32,
    heads: int,
    scale: float,
    q_offsets: Int64,
    kv_offsets: Int64,
    *,
    fine_scores: bool = False,
) -> Float32:
    """`attention` with queries (times the factor on scores), keys, values and weights in bfloat16; sums in float32.

    Weights are relative to the largest of their query. The divisor sums the same rounded weights as the product:
    where all values are equal, the result is that value.

    Parameters
    ----------
    fine_scores : bool
        Add the contribution of the rounding remainders of queries and keys, also in bfloat16, to the scores.
    """
    q, k, v = (np.asarray(a, np.float32) for a in (q, k, v))
    q = q * np.float32(scale * math.log2(math.e))  # in units of log2(e), so that softmax is a power of 2
    out = np.zeros_like(q, order="C")
    d = q.shape[1] // heads
    for s in range(len(q_offsets) - 1):
        q_rows = slice(int(q_offsets[s]), int(q_offsets[s + 1]))
        kv_rows = slice(int(kv_offsets[s]), int(kv_offsets[s + 1]))
        if kv_rows.start == kv_rows.stop:
            continue
        for h in range(heads):
            columns = slice(h * d, (h + 1) * d)
            queries, keys = round_to_bf16(q[q_rows, columns]), round_to_bf16(k[kv_rows, columns])
            scores = queries @ keys.T
            if fine_scores:
                scores += queries @ round_to_bf16(k[kv_rows, columns] - keys).T
                scores += round_to_bf16(q[q_rows, columns] - queries) @ keys.T
            weights = round_to_bf16(np.exp2(scores - scores.max(axis=1, keepdims=True)))
            values = weights @ round_to_bf16(v[kv_rows, columns])
            out[q_rows, columns] = values / weights.sum(axis=1, keepdims=True)
    return out


def self_attention(
    x: Float32, q_weight: Int8, weight_scale: Float32, bias: Float32, heads: int, scale: float, offsets: Int64
) -> Float32:
    """Attend with every row to all rows of its own sequence: `linear_int8`, then `attention_bf16`.

    Parameters
    ----------
    x : ndarray [shape=(M, K), float32]
        Rows.
    q_weight, weight_scale, bias
        As in `linear_int8`, for 3·H·D outputs: queries, keys and values one after the other.
    heads, scale, offsets
        As in `attention`.
    """
    q, k, v = np.split(linear_int8(x, q_weight, weight_scale, bias), 3, axis=1)
    return attention_bf16(q, k, v, heads, scale, offsets, offsets)
