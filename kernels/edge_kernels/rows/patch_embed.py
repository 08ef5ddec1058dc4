"""Patch embedding: flattened patches in, the first hidden states out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_kernels.linear.dispatch import PackedFloatWeight, linear_float

Float32 = NDArray[np.float32]


def patch_embed(
    pixels: Float32,
    weight: PackedFloatWeight,
    bias: Float32 | None,
    position_table: Float32,
    position_ids: NDArray[np.int64],
) -> Float32:
    """Embed flattened patches and add the position row of each; `reference.operations.patch_embed` defines it.

    A convolution whose stride is its width is a matrix product of flattened patches, so this is `linear_float` with
    the position rows as residual. They are gathered into the result's own memory and added to in place. Runs
    in parallel.

    Parameters
    ----------
    pixels : ndarray [shape=(P, K), float32]
        Flattened patches, in the order of the flattened convolution weight.
    weight : PackedFloatWeight
        Of the [E, K] weight.
    bias : ndarray [shape=(E,), float32] or None
        Added to each row.
    position_table : ndarray [shape=(side·side, E), float32]
        Position embeddings.
    position_ids : ndarray [shape=(P,), int64]
        Row of `position_table` for each patch.

    Returns
    -------
    ndarray [shape=(P, E), float32, C-contiguous]
    """
    out = np.ascontiguousarray(position_table[position_ids], np.float32)
    return linear_float(pixels, weight, bias, residual=out, out=out)
