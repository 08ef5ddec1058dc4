"""What else a decoder's layer computes for prompts: causal attention over a cache, norms and rotated positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_kernels.attention.causal import attention_causal
from edge_kernels.linear.gguf_blocks import IS_POSSIBLE
from edge_kernels.reference import decoder as reference_decoder
from edge_kernels.rows.decoder_rows import norm_and_rotate, rms_norm

pytestmark = pytest.mark.every_core

needs_amx = pytest.mark.skipif(
    not IS_POSSIBLE, reason="this machine has no AMX, or EDGE_RUNTIME_ISA names another set"
)


def random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def halves(*shape: int, seed: int = 0) -> Any:
    return random(*shape, seed=seed).astype(np.float16)


def attended(queries, keys, values, dims):
    """Keys and values of all positions; those of the past lie apart, as they do in a cache."""
    n, keys, values = len(keys) - len(queries), keys.view(np.uint16), values.view(np.uint16)
    past = (keys[:n].copy(), values[:n].copy()) if n else None
    return attention_causal(queries, keys[n:], values[n:], dims, past=past)


@needs_amx
@pytest.mark.parametrize(
    ("m", "past", "heads", "kv_heads", "dims"),
    [
        (1, 0, 1, 1, 32),
        (5, 3, 4, 2, 32),
        (32, 32, 2, 2, 64),
        (33, 0, 8, 2, 64),
        (40, 77, 8, 1, 128),
        (2, 1000, 4, 2, 96),
    ],
)
def test_attention_against_float64(m, past, heads, kv_heads, dims):
    queries = 3 * random(m, heads * dims)
    keys, values = halves(m + past, kv_heads * dims, seed=1), halves(m + past, kv_heads * dims, seed=2)
    found = attended(queries, keys, values, dims)
    expected = reference_decoder.attention_causal(queries, keys, values, dims)
    # Weights and values are rounded to bfloat16, each to 2^-9 at most and 2^-10.8 in the mean of squares.
    assert np.linalg.norm(found - expected) <= 0.0025 * np.linalg.norm(expected)
    np.testing.assert_allclose(found, expected, atol=2.0**-8 * np.abs(values).max())


@needs_amx
def test_scores_of_large_queries_and_keys_stay_exact():
    """Where one key wins by a hair of a large score, bfloat16 alone would mistake the winner."""
    dims, n = 128, 64
    queries, keys = random(n, dims), halves(n, dims, seed=1)
    keys[1:] = keys[:1]
    keys[1:, 0] += np.float16(0.03125) * np.arange(1, n, dtype=np.float16)[:, None][:, 0]
    values = halves(n, dims, seed=2)
    found = attended(40 * queries, keys, values, dims)
    expected = reference_decoder.attention_causal(40 * queries, keys, values, dims)
    assert np.linalg.norm(found - expected) <= 0.006 * np.linalg.norm(expected)


@needs_amx
def test_positions_see_nothing_behind_them():
    queries, keys, values = random(50, 128), halves(50, 64), halves(50, 64, seed=3)
    first = attended(queries, keys, values, 64)
    keys[30:], values[30:] = np.float16(9), np.float16(-9)
    second = attended(queries, keys, values, 64)
    np.testing.assert_array_equal(first[:30], second[:30])
    assert (first[30:] != second[30:]).any(axis=1).all()


@needs_amx
def test_in_two_parts_or_at_once():
    """A prompt that is computed in chunks: the second one finds the first in the cache."""
    queries, keys, values = random(70, 256), halves(70, 128), halves(70, 128, seed=3)
    whole = attended(queries, keys, values, 64)
    last = attended(queries[33:], keys, values, 64)
    np.testing.assert_allclose(last, whole[33:], atol=1e-5)


@pytest.mark.parametrize(("m", "width"), [(1, 32), (9, 256), (40, 1000)])
def test_rms_norm(m, width):
    x, weight = 5 * random(m, width), random(width, seed=1)
    expected = reference_decoder.rms_norm(x, weight, 1e-6)
    np.testing.assert_allclose(rms_norm(x, weight, 1e-6), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("m", "heads", "dims"), [(1, 1, 32), (11, 3, 64), (20, 2, 128)])
def test_heads_are_normed_and_turned(m, heads, dims):
    x, weight, angles = random(m, heads * dims), random(dims, seed=1), 7 * random(m, dims // 2, seed=2)
    expected = reference_decoder.norm_and_rotate(x, weight, 1e-5, np.cos(angles), np.sin(angles))
    norm_and_rotate(x, weight, 1e-5, np.cos(angles), np.sin(angles))
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)
