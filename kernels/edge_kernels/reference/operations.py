"""The definition of every operation, in plain NumPy and float32.

Written to be read and to be obviously right, not to be fast: the compiled kernels are tested against these
functions, and these against float64 evaluations of the same formulas. Arguments and results are described
once, here; they hold for the compiled functions of the same names.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int8 = NDArray[np.int8]
Integers = Int8 | NDArray[np.int32]
Int64 = NDArray[np.int64]

SQRT_2_OVER_PI = np.float32(np.sqrt(2.0 / np.pi))


def gelu_tanh(x: Float32) -> Float32:
    """Apply the tanh form of GELU, elementwise.

    Parameters
    ----------
    x : ndarray [any shape, float32]
        Values.

    Returns
    -------
    ndarray [shape of x, float32]
        0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))).

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", section 2; torch `gelu(approximate="tanh")`.
    """
    x = np.asarray(x, np.float32)
    with np.errstate(over="ignore"):  # x³ may overflow to infinity, where tanh is 1 just as well
        inner = SQRT_2_OVER_PI * (x + np.float32(0.044715) * x * x * x)
    return np.asarray(np.float32(0.5) * x * (np.float32(1.0) + np.tanh(inner)), np.float32)


def linear(
    x: Float32,
    weight: Float32,
    bias: Float32 | None = None,
    *,
    gelu: bool = False,
    residual: Float32 | None = None,
) -> Float32:
    """Multiply rows by a weight matrix and apply what usually follows.

    Parameters
    ----------
    x : ndarray [shape=(M, K), float32]
        Rows.
    weight : ndarray [shape=(N, K), float32]
        One row per output, as checkpoints store it.
    bias : ndarray [shape=(N,), float32] or None
        Added to each row.
    gelu : bool
        Apply `gelu_tanh` after the bias.
    residual : ndarray [shape=(M, N), float32] or None
        Added last.

    Returns
    -------
    ndarray [shape=(M, N), float32]
    """
    y = np.asarray(x, np.float32) @ np.asarray(weight, np.float32).T
    if bias is not None:
        y = y + bias
    if gelu:
        y = gelu_tanh(y)
    if residual is not None:
        y = y + residual
    return y


def layer_norm(x: Float32, gain: Float32, bias: Float32, eps: float) -> Float32:
    """Normalise each row to mean 0 and variance 1, then scale and shift its columns.

    Parameters
    ----------
    x : ndarray [shape=(M, E), float32]
        Rows.
    gain, bias : ndarray [shape=(E,), float32]
        Factor and summand of each column.
    eps : float
        Added to the (biased) variance, > 0.

    Returns
    -------
    ndarray [shape=(M, E), float32]
    """
    x = np.asarray(x, np.float32)
    centred = x - x.mean(axis=1, keepdims=True)
    variance = np.mean(centred * centred, axis=1, keepdims=True)
    result: Float32 = centred / np.sqrt(variance + np.float32(eps)) * gain + bias
    return result


def attention(
    q: Float32,
    k: Float32,
    v: Float32,
    heads: int,
    scale: float,
    q_offsets: Int64,
    kv_offsets: Int64,
) -> Float32:
    """Attend with every query to all keys of its own sequence (no mask), head by head.

    Parameters
    ----------
    q : ndarray [shape=(Mq, H·D), float32]
        Queries of S sequences one after the other; head h has columns h·D to (h+1)·D.
    k, v : ndarray [shape=(Mk, H·D), float32]
        Keys and values, likewise.
    heads : int
        H, ≥ 1.
    scale : float
        Factor on the scores, usually D**-0.5.
    q_offsets, kv_offsets : ndarray [shape=(S+1,), int64]
        Sequence s has query rows q_offsets[s] to q_offsets[s+1] and key rows kv_offsets[s] to
        kv_offsets[s+1]. Each starts at 0 and ends at the number of rows.

    Returns
    -------
    ndarray [shape=(Mq, H·D), float32]
        Rows of a sequence that has no keys are zero.
    """
    q, k, v = (np.asarray(a, np.float32) for a in (q, k, v))
    out = np.zeros_like(q, order="C")
    d = q.shape[1] // heads
    for s in range(len(q_offsets) - 1):
        q_rows = slice(int(q_offsets[s]), int(q_offsets[s + 1]))
        kv_rows = slice(int(kv_offsets[s]), int(kv_offsets[s + 1]))
        if kv_rows.start == kv_rows.stop:
            continue
        for h in range(heads):
            columns = slice(h * d, (h + 1) * d)
            scores = (q[q_rows, columns] @ k[kv_rows, columns].T) * np.float32(scale)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[q_rows, columns] = weights @ v[kv_rows, columns]
    return out


def patch_embed(
    pixels: Float32,
    weight: Float32,
    bias: Float32 | None,
    position_table: Float32,
    position_ids: Int64,
) -> Float32:
    """Embed flattened patches and add the position embedding of each.

    Parameters
    ----------
    pixels : ndarray [shape=(P, K), float32]
        Flattened patches, in the order of the flattened convolution weight; K = 3·14·14 for SigLIP.
    weight : ndarray [shape=(E, K), float32]
        Flattened convolution weight.
    bias : ndarray [shape=(E,), float32] or None
        Added to each row.
    position_table : ndarray [shape=(side·side, E), float32]
        Position embeddings.
    position_ids : ndarray [shape=(P,), int64]
        Row of `position_table` for each patch.

    Returns
    -------
    ndarray [shape=(P, E), float32]
    """
    return linear(pixels, weight, bias, residual=position_table[position_ids])


# --- int8 ---------------------------------------------------------------------------------------------------


def _round_to_int8(x: Float32, centre: Float32, half: Float32) -> tuple[Int8, Float32]:
    """Map centre ± half of each row to ±127, rounding halves to even; return integers and the size of a step.

    Where half is 0 (or so small that 127 / half overflows) integers and step are 0. Where it is not finite,
    the step is NaN, and so is everything computed from the row.
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        factor = np.float32(127.0) / half
        steps = np.clip(np.rint((x - centre[:, None]) * factor[:, None]), -127, 127)
    finite = np.isfinite(half)
    usable = finite & np.isfinite(factor)
    scale = np.where(usable, half / np.float32(127.0), np.where(finite, np.float32(0.0), np.float32(np.nan)))
    return np.where(usable[:, None], steps, 0).astype(np.int8), scale.astype(np.float32)


def quantize_rows(x: Float32) -> tuple[Int8, Float32, Float32]:
    """Write each row as x ≈ scale · q + offset, with the middle of its range as offset.

    Parameters
    ----------
    x : ndarray [shape=(M, K), float32]
        Rows.

    Returns
    -------
    q : ndarray [shape=(M, K), int8]
        -127 to 127.
    scale, offset : ndarray [shape=(M,), float32]
        (max - min) / 254 and (max + min) / 2 of the row; a constant row has scale 0. Both are NaN, and q is
        0, in a row that has NaN or infinity.
    """
    x = np.asarray(x, np.float32)
    # Halved before the addition, so that the range of large values does not overflow.
    low, high = np.float32(0.5) * x.min(axis=1), np.float32(0.5) * x.max(axis=1)
    with np.errstate(invalid="ignore"):
        broken = ~np.isfinite(x).all(axis=1)
        half = np.where(broken, np.float32(np.nan), high - low)
        centre = np.where(broken, np.float32(np.nan), high + low)
    q, scale = _round_to_int8(x, centre, half)
    return q, scale, centre


SCALE_COLUMNS = 576
"""Columns that share a scale where rows are quantised as they leave a product, whose tasks see no more of them. A
multiple of every register tile's outputs and of every step."""


def quantize_row_groups(x: Float32) -> tuple[Int8, Float32, Float32]:
    """`quantize_rows` of each group of SCALE_COLUMNS columns by itself.

    Returns
    -------
    q : ndarray [shape=(M, K), int8]
    scale, offset : ndarray [shape=(G, M), float32]
    """
    groups = [quantize_rows(x[:, first : first + SCALE_COLUMNS]) for first in range(0, x.shape[1], SCALE_COLUMNS)]
    q, scale, offset = zip(*groups, strict=True)
    return np.concatenate(q, axis=1), np.stack(scale), np.stack(offset)


def quantize_weight(weight: Float32) -> tuple[Int8, Float32]:
    """Write each row of a weight as weight ≈ scale · q, symmetric about 0.

    Parameters
    ----------
    weight : ndarray [shape=(N, K), float32]
        One row per output.

    Returns
    -------
    q : ndarray [shape=(N, K), int8]
        -127 to 127.
    scale : ndarray [shape=(N,), float32]
        Largest magnitude / 127; NaN, with q 0, in a row that has NaN or infinity.
    """
    weight = np.asarray(weight, np.float32)
    return _round_to_int8(weight, np.zeros(len(weight), np.float32), np.abs(weight).max(axis=1))


FOUR_LIMIT = 128
"""Largest sum of a four's positive integers, and of its negative ones: times rows of up to 255, 16 bits hold it."""
MULTIPLIERS_TRIED = 6
"""Of a four, the smallest first. One of these always fits, and the best halves the loss."""
LARGEST_MULTIPLIER = 249
"""First one tried of the four with the largest weights; or 250, by rounding, so that the last one is 255."""
LARGEST_SUM = (2**31 - 1) // 255
"""Of multipliers · integers of one sign over k: times rows of up to 255, 32 bits hold it."""
FINEST_SHARE, FINEST_LESS = 4.1, FOUR_LIMIT * (MULTIPLIERS_TRIED + 1) // 4
"""A scale of Σ limits · 4.1 / (LARGEST_SUM - k · FINEST_LESS) makes sure of LARGEST_SUM. A multiplier is at most
limit · 4 / (FOUR_LIMIT · scale) + 6, rounded; 4.1 leaves room for its roundings."""


def quantize_weight_in_fours(weight: Float32) -> tuple[NDArray[np.int32], Float32]:
    """Write each row of a weight as weight ≈ scale · multiplier · q, with a multiplier for every four.

    Columns 0, 1, 4, 5 of each eight are a four, columns 2, 3, 6, 7 the other. Of the
    MULTIPLIERS_TRIED smallest multipliers that a four's sums allow, it has the one that loses least, in squares.

    Parameters
    ----------
    weight : ndarray [shape=(N, K), float32]
        One row per output; K ≤ 32,768.

    Returns
    -------
    integers : ndarray [shape=(N, K), int32]
        multiplier · q, q from -128 to 127.
    scale : ndarray [shape=(N,), float32]
        NaN, with integers 0, in a row that has NaN or infinity.
    """
    weight = np.asarray(weight, np.float32)
    n, k = weight.shape
    padded = np.zeros((n, -(-k // 8) * 8), np.float32)
    padded[:, :k] = weight
    broken = ~np.isfinite(padded).all(axis=1)
    padded[broken] = 0
    fours = padded.reshape(n, -1, 2, 2, 2).swapaxes(2, 3).reshape(n, -1, 4)

    def larger_side(four: NDArray[np.float32]) -> NDArray[np.float32]:
        sides = [np.maximum(side, 0) for side in (four, -four)]
        sums = [(side[..., 0] + side[..., 1]) + (side[..., 2] + side[..., 3]) for side in sides]
        result: Float32 = np.maximum(*sums)
        return result

    limits = larger_side(np.float32(0.25) * fours)  # of quarters, which cannot overflow
    totals = np.cumsum(limits, axis=1, dtype=np.float64)[:, -1]
    finest = (totals * FINEST_SHARE / (LARGEST_SUM - FINEST_LESS * k)).astype(np.float32)
    scale = np.maximum(limits.max(axis=1) / np.float32(FOUR_LIMIT // 4 * LARGEST_MULTIPLIER), finest)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = (np.float32(1) / scale)[:, None]
    inverse[np.isinf(inverse)] = 0
    multipliers = np.maximum(np.ceil(limits * (inverse / np.float32(FOUR_LIMIT // 4))), np.float32(1))
    integers, least = np.zeros_like(fours), np.full(limits.shape, np.inf, np.float32)
    for _ in range(MULTIPLIERS_TRIED):
        factors = (inverse / multipliers)[..., None]
        q = np.rint(fours * factors)
        squares = (fours * factors - q) ** 2
        loss = (squares[..., 0] + squares[..., 1]) + (squares[..., 2] + squares[..., 3])
        loss *= multipliers * multipliers
        better = (larger_side(q) <= FOUR_LIMIT) & (loss < least)
        least = np.where(better, loss, least)
        integers = np.where(better[..., None], np.minimum(q, 127) * multipliers[..., None], integers)
        multipliers += 1
    scale[inverse[:, 0] == 0] = 0
    scale[broken] = np.nan
    rows = integers.reshape(n, -1, 2, 2, 2).swapaxes(2, 3).reshape(n, -1)[:, :k]
    return rows.astype(np.int32), scale


def int8_sums(q: Int8, q_weight: Integers) -> NDArray[np.int32]:
    """Return Σ q · q_weight [M, N] in int32, exactly; what is quantised here fits, K ≤ 32,768."""
    return q.astype(np.int32) @ q_weight.astype(np.int32).T


def linear_int8(
    x: Float32,
    q_weight: Integers,
    weight_scale: Float32,
    bias: Float32 | None = None,
    *,
    gelu: bool = False,
    residual: Float32 | None = None,
    in_groups: bool = False,
) -> Float32:
    """`linear` with rows and weight in int8: integer products and sums, the rest in float32.

    Parameters
    ----------
    x : ndarray [shape=(M, K), float32]
        Rows, quantised here by `quantize_rows`, or by `quantize_row_groups` with `in_groups`.
    q_weight, weight_scale : ndarray [shape=(N, K), int8 or int32], ndarray [shape=(N,), float32]
        From `quantize_weight` or `quantize_weight_in_fours`.
    bias, gelu, residual
        As in `linear`.

    Returns
    -------
    ndarray [shape=(M, N), float32]
    """
    if in_groups:
        q, scale, offset = quantize_row_groups(x)
    else:
        q, of_row, offset_of_row = quantize_rows(x)
        scale, offset = of_row[None], offset_of_row[None]
    columns = SCALE_COLUMNS if in_groups else x.shape[1]
    y = np.zeros((len(x), len(q_weight)), np.float32)
    for group, first in enumerate(range(0, x.shape[1], columns)):
        part, part_weight = q[:, first : first + columns], q_weight[:, first : first + columns]
        # Σ (scale q + offset) · weight_scale q_weight; what the offset adds is the same in all rows, up to a factor.
        weight_sums = part_weight.sum(axis=1, dtype=np.int32).astype(np.float32)
        y = y + scale[group][:, None] * weight_scale * int8_sums(part, part_weight).astype(np.float32)
        y = y + offset[group][:, None] * (weight_scale * weight_sums)
    if bias is not None:
        y = y + bias
    if gelu:
        y = gelu_tanh(y)
    if residual is not None:
        y = y + residual
    return y


def linear_int8_quantized(
    x: Float32,
    q_weight: Integers,
    weight_scale: Float32,
    bias: Float32 | None = None,
    *,
    gelu: bool = False,
    factor: Float32 | None = None,
) -> tuple[Int8, Float32, Float32]:
    """`linear_int8`, its result quantised for another product.

    Parameters
    ----------
    factor : ndarray [shape=(N,), float32] or None
        Multiplied into the columns before they are quantised.

    Returns
    -------
    As `quantize_row_groups`.
    """
    y = linear_int8(x, q_weight, weight_scale, bias, gelu=gelu)
    return quantize_row_groups(y if factor is None else y * factor)


def layer_norm_quantized(x: Float32, eps: float) -> tuple[Int8, Float32, Float32]:
    """Normalise each row to mean 0 and variance 1 and quantise it; gain and bias belong in the next weight.

    Parameters and results as in `layer_norm` and `quantize_rows`.
    """
    e = x.shape[1]
    return quantize_rows(layer_norm(x, np.ones(e, np.float32), np.zeros(e, np.float32), eps))
