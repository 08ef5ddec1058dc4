"""The float32 product that is fastest here: of bfloat16 parts on AMX, of float32 elsewhere; both equally exact."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_kernels.linear import bf16_split as split
from edge_kernels.linear.bf16_split import SplitWeight, linear_split, pack_split
from edge_kernels.linear.float32 import PackedWeight, linear, pack_weight

Float32 = NDArray[np.float32]
PackedFloatWeight = PackedWeight | SplitWeight

BYTES_PER_WEIGHT = 6 if split.IS_POSSIBLE else 4
"""Bytes of a packed weight, at most."""


def pack_float_weight(weight: Float32) -> PackedFloatWeight:
    """Bring a weight [N, K] into the order that this machine's product reads; see `pack_weight` and `pack_split`."""
    return pack_split(weight) if split.IS_POSSIBLE else pack_weight(weight)


def linear_float(
    x: Float32,
    weight: PackedFloatWeight,
    bias: Float32 | None = None,
    *,
    gelu: bool = False,
    residual: Float32 | None = None,
    out: Float32 | None = None,
) -> Float32:
    """Multiply rows by a packed weight and apply what follows; see `linear` for all arguments."""
    if isinstance(weight, SplitWeight):
        return linear_split(x, weight, bias, gelu=gelu, residual=residual, out=out)
    return linear(x, weight, bias, gelu=gelu, residual=residual, out=out)
