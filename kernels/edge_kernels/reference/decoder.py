"""What the kernels of a decoder's prompts compute, as NumPy in float64: definitions, not for use.

Products with weights in blocks are defined in `reference.gguf_blocks`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def rms_norm(x: NDArray[Any], weight: NDArray[Any], eps: float) -> Float64:
    """Return x / √(mean(x²) + eps) · weight, over the last axis."""
    wide = np.asarray(x, np.float64)
    normed: Float64 = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * weight
    return normed


def norm_and_rotate(
    x: NDArray[Any], weight: NDArray[Any], eps: float, cosines: NDArray[Any], sines: NDArray[Any]
) -> Float64:
    """RMS norm of every head of rows [M, heads · dims]; then pairs (j, j + dims/2) are turned as complex numbers."""
    dims, half = len(weight), len(weight) // 2
    heads = rms_norm(x.reshape(len(x), -1, dims), weight, eps)
    turned = (heads[..., :half] + 1j * heads[..., half:]) * (cosines + 1j * np.asarray(sines, np.float64))[:, None]
    return np.concatenate([turned.real, turned.imag], -1).reshape(x.shape)


def gated(gate: NDArray[Any], up: NDArray[Any]) -> Float64:
    """Return gate / (1 + e^-gate) · up."""
    wide = np.asarray(gate, np.float64)
    with np.errstate(over="ignore"):  # e^-gate may be infinite, and the result 0
        found: Float64 = wide / (1 + np.exp(-wide)) * up
    return found


def attention_causal(queries: NDArray[Any], keys: NDArray[Any], values: NDArray[Any], dims: int) -> Float64:
    """Attention of the last M of N positions to themselves and all before them.

    Parameters
    ----------
    queries : [M, heads · dims].
    keys, values : [N, kv_heads · dims], numbers, not their bits.
    """
    m, n, out = len(queries), len(keys), np.zeros(queries.shape)
    heads, kv_heads = queries.shape[1] // dims, keys.shape[1] // dims
    behind = np.arange(n)[None] > np.arange(n - m, n)[:, None]
    for head in range(heads):
        own, shared = slice(head * dims, (head + 1) * dims), head // (heads // kv_heads)
        columns = slice(shared * dims, (shared + 1) * dims)
        scores = queries[:, own].astype(np.float64) @ keys[:, columns].astype(np.float64).T / np.sqrt(dims)
        scores[behind] = -np.inf
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out[:, own] = weights / weights.sum(1, keepdims=True) @ values[:, columns].astype(np.float64)
    return out
