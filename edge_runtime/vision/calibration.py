"""What `edge-runtime convert --calibrate` found out about a vision file, stored in that file.

Products that follow a layer norm are rounded well without help (see `arithmetic`). The inputs of the others, after
attention and GELU, can have columns a hundred times larger than the rest. For each such product a file may carry

    edge_runtime.smooth.NAME       tensor [K], float32: factors that the columns of the input are divided by before
                                   rounding, and those of the weight multiplied by; the product stays the same
    edge_runtime.float_products    key, names of the products that lose too much in int8 even so

The weights themselves are the same as without calibration, and llama.cpp ignores both.
Source of the factors: Xiao et al., "SmoothQuant" (2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edge_runtime.errors import ModelFileError
from edge_runtime.weights.gguf_file import Float32, GGUFFile

KEY_FLOAT_PRODUCTS = "edge_runtime.float_products"
SMOOTH_PREFIX = "edge_runtime.smooth."


@dataclass(frozen=True)
class Calibration:
    """Findings by product name, such as "v.blk.3.attn_out"."""

    smooth: Mapping[str, Float32] = field(default_factory=dict)
    """ndarray [shape=(K,), float32], positive, by product."""
    in_float: frozenset[str] = frozenset()


def read_calibration(file: GGUFFile) -> Calibration:
    """Read a file's findings; usually there are none.

    Raises
    ------
    ModelFileError
        When a product is unknown, or its factors have the wrong shape or are not positive.
    """
    in_float = frozenset(file.strings(KEY_FLOAT_PRODUCTS) if KEY_FLOAT_PRODUCTS in file.metadata else ())
    smooth = {}
    for tensor in file.tensors:
        if tensor.startswith(SMOOTH_PREFIX):
            name = tensor.removeprefix(SMOOTH_PREFIX)
            smooth[name] = file.array(tensor, file.tensor(f"{name}.weight").shape[-1:])
            if not (np.isfinite(smooth[name]).all() and (smooth[name] > 0).all()):
                raise ModelFileError(
                    f"{file.path.name}: the tensor {tensor} holds factors that are not positive numbers; "
                    "calibrate the file again."
                )
    for name in in_float:
        file.tensor(f"{name}.weight")
    return Calibration(smooth, in_float)
