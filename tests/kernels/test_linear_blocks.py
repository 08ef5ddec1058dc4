"""Products with weights in ggml's blocks, held against the gguf package's own unpacking."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_kernels.linear.gguf_blocks import (
    BLOCK_BYTES,
    FEW_BYTES,
    IS_POSSIBLE,
    K_BLOCK,
    OUTPUT_BLOCK,
    BlockWeight,
    linear_blocks,
    pack_gated,
    pack_rows,
)
from edge_kernels.reference import decoder as reference_decoder
from edge_kernels.reference import gguf_blocks as reference
from edge_kernels.threads import set_threads

pytestmark = [
    pytest.mark.every_core,
    pytest.mark.skipif(not IS_POSSIBLE, reason="this machine has no AMX, or EDGE_RUNTIME_ISA names another set"),
]

HALF_STEP = 2.0**-9  # of bfloat16, relative
SCALES = {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "Q8_0": [34 * i for i in range(8)]}
"""Where the float16 factors of 256 weights lie."""


def blocks_of(kind: str, n: int, k: int, seed: int = 0) -> BlockWeight:
    """A weight of random bytes, whose factors are numbers of an ordinary size, some negative."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 256, (n * k // 256, BLOCK_BYTES[kind]), np.uint8)
    for at in SCALES[kind]:
        factors = (rng.uniform(1e-4, 1e-2, len(found)) * rng.choice([1, 1, 1, -1], len(found))).astype(np.float16)
        found[:, at : at + 2] = factors.view(np.uint8).reshape(-1, 2)
    return BlockWeight(found.reshape(-1), kind, n, k)


def unpacked(weight: BlockWeight) -> Any:
    rows = weight.blocks.reshape(weight.n, -1)
    return dequantize(rows, GGMLQuantizationType[weight.kind])


def as_bf16(x: Any) -> Any:
    """Rounded to the nearest, ties to even, in float64."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


def away(x: Any) -> Any:
    """Rounded to the nearest, ties away from zero, as rows are."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32) + np.uint32(0x8000)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


def random(m: int, k: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal((m, k)).astype(np.float32)


@pytest.mark.parametrize("kind", BLOCK_BYTES)
def test_every_weight_is_unpacked_to_its_nearest_bfloat16(kind):
    """Rows of one 1 pick weights out. One in a hundred may be the neighbour: d · q - m is rounded once here."""
    weight = blocks_of(kind, 70, 512)
    picked = np.zeros((512, 512), np.float32)
    np.fill_diagonal(picked, 1)
    found, expected = linear_blocks(pack_rows(picked), weight).T, unpacked(weight)
    assert (found == as_bf16(expected)).mean() > 0.99
    np.testing.assert_allclose(found, expected, rtol=2 * HALF_STEP, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kind", BLOCK_BYTES)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 256), (16, 32, 512), (33, 31, 768), (8, OUTPUT_BLOCK + 5, K_BLOCK + 256), (70, 96, 4352), (600, 40, 256)],
)
def test_products_against_float64(kind, m, n, k):
    weight, x = blocks_of(kind, n, k), random(m, k)
    expected = away(x) @ as_bf16(unpacked(weight)).T
    size = np.abs(x) @ np.abs(unpacked(weight)).T
    found = linear_blocks(pack_rows(x), weight)
    assert found.shape == (m, n)
    # A neighbour that was taken for a weight here and there, and float32 sums.
    assert (np.abs(found - expected) <= (HALF_STEP / 64 + 1e-6 * np.sqrt(k)) * size).all()


@pytest.mark.parametrize("kind", BLOCK_BYTES)
def test_products_are_those_of_the_definition(kind):
    weight, x, before = blocks_of(kind, 70, 1024), random(37, 1024), random(37, 70, seed=2)
    found = linear_blocks(pack_rows(x), weight, residual=before)
    expected = reference.linear_blocks(x, weight.blocks, kind, 70, residual=before)
    assert found.dtype == expected.dtype
    size = np.abs(x) @ np.abs(unpacked(weight)).T + np.abs(before)
    # As against float64; sums here are of float32 on both sides.
    assert (np.abs(found - expected) <= (HALF_STEP / 64 + 2e-6 * np.sqrt(1024)) * size).all()


def test_a_residual_is_added_where_it_lies():
    weight, x, before = blocks_of("Q4_K", 300, 256), random(45, 256), random(45, 300, seed=2)
    alone = linear_blocks(pack_rows(x), weight)
    out = before.copy()
    assert linear_blocks(pack_rows(x), weight, residual=out, out=out) is out
    np.testing.assert_array_equal(out, alone + before)
    wide = np.zeros((45, 400), np.float32)
    wide[:, :300] = before
    np.testing.assert_array_equal(linear_blocks(pack_rows(x), weight, residual=wide[:, :300]), alone + before)


@given(st.integers(1, 70), st.integers(0, 69))
@settings(max_examples=30, deadline=None)
def test_a_row_does_not_depend_on_the_others(m, row):
    weight, x = blocks_of("Q6_K", 40, 512), random(70, 512)
    whole = linear_blocks(pack_rows(x), weight)
    first = min(row, 70 - m)
    np.testing.assert_array_equal(linear_blocks(pack_rows(x[first : first + m]), weight), whole[first : first + m])


def test_nor_on_whether_they_are_many():
    """Of few rows panels are small, of many large; sums are taken in the same order."""
    weight, x = blocks_of("Q4_K", 300, 4352), random(70, 4352)
    assert 2 * 16 * 4352 <= FEW_BYTES < 2 * 70 * 4352
    whole = linear_blocks(pack_rows(x), weight)
    for m in (1, 16, 17, 33, 48, 60):
        np.testing.assert_array_equal(linear_blocks(pack_rows(x[:m]), weight), whole[:m])


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one CPU only")
def test_a_result_does_not_depend_on_the_threads():
    weight, x = blocks_of("Q5_K", 700, 1280), random(100, 1280)
    try:
        found = []
        for n in (1, 2):
            set_threads(n)
            found.append(linear_blocks(pack_rows(x), weight))
    finally:
        set_threads(None)
    np.testing.assert_array_equal(*found)


def test_rows_may_lie_apart():
    weight, x = blocks_of("Q8_0", 32, 256), random(20, 512)
    for part in (x[:, 256:], x[::2, :256], x[:, ::-1][:, :256]):
        np.testing.assert_array_equal(
            linear_blocks(pack_rows(part), weight), linear_blocks(pack_rows(part.copy()), weight)
        )


def test_gated_rows():
    weight, gate, up = blocks_of("Q4_K", 64, 512), 4 * random(37, 512), random(37, 512, seed=5)
    gate[0, :4] = [-200, 200, 0, -0.0]
    rows = reference_decoder.gated(gate, up).astype(np.float32)
    expected = linear_blocks(pack_rows(rows), weight)
    size = np.abs(rows) @ np.abs(unpacked(weight)).T
    # The power is exact to 1.2e-7; where that tips a rounding to bfloat16, a term changes by its step.
    assert (np.abs(linear_blocks(pack_gated(gate, up), weight) - expected) <= HALF_STEP / 32 * size).all()


def test_not_a_number_stays():
    weight, x = blocks_of("Q4_K", 32, 256), random(3, 256)
    x[1, 7] = np.nan
    found = linear_blocks(pack_rows(x), weight)
    assert np.isnan(found[1]).all()
    assert not np.isnan(found[[0, 2]]).any()


def test_nothing_and_what_does_not_go_together():
    weight = blocks_of("Q4_K", 32, 256)
    assert linear_blocks(pack_rows(random(0, 256)), weight).shape == (0, 32)
    with pytest.raises(ValueError, match="multiple of 256"):
        pack_rows(random(2, 300))
    with pytest.raises(ValueError, match="multiple of 256"):
        pack_gated(random(2, 300), random(2, 300))
    with pytest.raises(ValueError, match="Rows of 512 meet"):
        linear_blocks(pack_rows(random(2, 512)), weight)
    with pytest.raises(ValueError, match="Rows of 256 meet"):
        linear_blocks(pack_rows(random(2, 256)), weight._replace(kind="Q6_K"))
    with pytest.raises(ValueError, match="C-contiguous"):
        linear_blocks(pack_rows(random(2, 256)), weight, out=np.empty((2, 32)))
