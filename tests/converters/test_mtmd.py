"""The mmproj files in llama.cpp's own encoder (mtmd), against our exact path on the same file.

Both sides read the same stored weights, so what differs is arithmetic alone. The two sizes are ones that llama.cpp
cuts as the official code does (elsewhere it pads or squashes, see the reference on where mtmd departs).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edge_converters.convert import Converted
from edge_runtime import Model
from mtmd_peer import encode_with_mtmd

SIZES = ((1344, 1344), (640, 480))  # width, height: 3 x 3 cells, and 2 x 1 cells of uneven patch counts
N_SLICES = {(1344, 1344): 10, (640, 480): 3}

# Embeddings spread by 0.72. llama.cpp looks GELU up in a table of float16 inputs and outputs: 2^-11 relative
# per value, averaged over 304 of them and again over the patches a query attends to. Measured 2.4e-4.
F32_ERROR = 1e-3
# With float16 weights llama.cpp also rounds the activations to float16 before each product (16 in a row, each
# 2^-11 relative per element, averaging out in the sum). Measured 1.1e-3.
F16_ERROR = 3e-3
# Likewise with bfloat16, 2^-8 per element. Measured 9e-3.
BF16_ERROR = 2.5e-2
# With q8_0 weights it rounds activations to 8 bits per block of 32: step max/127, so 0.3 % of the RMS per product
# and, over 16 of them, about 1 % of a row; 1 - 0.01^2 / 2 would be 0.99995. Measured 0.99993.
Q8_COSINE = 0.999  # q4_0 weights are multiplied by activations rounded in the same way


def picture(width: int, height: int) -> npt.NDArray[np.uint8]:
    """Smooth waves with some noise, the same on every machine [shape=(height, width, 3)]."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    waves = np.stack([np.sin(x / 37 + y / 91), np.cos(x / 53 - y / 29), np.sin(x * y / 40000)], axis=-1)
    noise = np.random.default_rng([width, height]).normal(size=waves.shape)
    return np.clip(127.5 + 90 * waves + 12 * noise, 0, 255).astype(np.uint8)


def both(files: Converted, size: tuple[int, int]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Embeddings of a picture, ours and mtmd's, each [shape=(slices * queries, hidden)]."""
    rgb = picture(*size)
    with Model.load(files.decoder.parent, exact=True) as model:
        ours = model.encode_image(Image.fromarray(rgb))
    theirs = encode_with_mtmd(files.decoder, files.mmproj, rgb)
    assert len(ours) == len(theirs) == N_SLICES[size]
    return np.concatenate(ours), np.concatenate(theirs)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("vision_type", "tolerance"), [("f32", F32_ERROR), ("f16", F16_ERROR), ("bf16", BF16_ERROR)])
def test_embeddings_equal_those_of_mtmd(
    converted: Callable[[str, str], Converted], vision_type: str, tolerance: float, size: tuple[int, int]
) -> None:
    ours, theirs = both(converted("f32", vision_type), size)
    error = np.abs(ours - theirs)
    assert error.max() <= tolerance, f"max {error.max():.2e}, mean {error.mean():.2e}"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("vision_type", ["q8_0", "q4_0"])
def test_embeddings_point_where_those_of_mtmd_do(
    converted: Callable[[str, str], Converted], vision_type: str, size: tuple[int, int]
) -> None:
    ours, theirs = both(converted("f32", vision_type), size)
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosine = (ours * theirs).sum(axis=1) / norms
    assert cosine.min() >= Q8_COSINE, f"row {cosine.argmin()}: {cosine.min():.6f}"


def test_the_comparison_can_fail(converted: Callable[[str, str], Converted]) -> None:
    """Rounding the weights to 8 bits is enough to break the float32 limit."""
    rgb = picture(448, 448)
    exact, rounded = converted("f32", "f32"), converted("f32", "q8_0")
    with Model.load(rounded.decoder.parent, exact=True) as model:
        ours = model.encode_image(Image.fromarray(rgb))[0]
    theirs = encode_with_mtmd(exact.decoder, exact.mmproj, rgb)[0]
    assert np.abs(ours - theirs).max() > 3 * F32_ERROR
