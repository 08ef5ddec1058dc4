"""Rows of a tensor → stored blocks of one type, in chunks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from edge_runtime.decoder import llama_cpp as llama
from edge_runtime.errors import CheckpointError

if TYPE_CHECKING:
    pass

FULL_BYTES = 1 << 20  # free on a disk that something has just failed to write to


@cache
def _quantize_chunk() -> Callable[..., int]:
    function = llama.ggml_base().ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
    return function


def encode_rows(
    values: npt.NDArray[np.float32],
    kind: GGMLQuantizationType,
    importance: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.uint8]:
    """Encode float32 rows as blocks of `kind`.

    Parameters
    ----------
    values : ndarray [shape=(rows, columns), float32]; columns a multiple of the block.
    importance : ndarray [shape=(columns,), float32] or None
        What an error in a column costs, relative to the others: the mean square of its inputs. With it llama.cpp
        tries 19 scales per block and takes the cheapest instead of the largest value's; types of 8 and more bits
        have no search.

    Returns
    -------
    blocks : ndarray [shape=(rows, bytes per row), uint8]
    """
    values = np.ascontiguousarray(values, np.float32)
    if kind == GGMLQuantizationType.F32:
        return values.view(np.uint8)
    if kind == GGMLQuantizationType.F16:
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if np.isinf(halves).any():
            raise CheckpointError(
                f"A weight of {np.abs(values).max():.3g} does not fit float16 (at most 65504); convert with f32 or "
                "bf16."
            )
        return halves.view(np.uint8)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    n_rows, n_columns = values.shape
    blocks = np.empty((n_rows, n_columns // block * block_bytes), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointer = None if weights is None else weights.ctypes.data
    _quantize_chunk()(int(kind), values.ctypes.data, blocks.ctypes.data, 0, n_rows, n_columns, pointer)
    return blocks
