"""bfloat16 attention on AMX against `edge_kernels.reference.operations`."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from edge_kernels.attention.bf16 import IS_POSSIBLE, attention_bf16
from edge_kernels.attention.qkv_fused import pack_heads, self_attention
from edge_kernels.linear.int8_rows import layer_norm_quantized, quantize_rows
from edge_kernels.reference import attention as reference_attention
from edge_kernels.reference import operations as reference
from edge_kernels.threads import set_threads
from kernel_checks import offsets, random

pytestmark = pytest.mark.every_core

needs_amx = pytest.mark.skipif(
    not IS_POSSIBLE, reason="this machine has no AMX, or EDGE_RUNTIME_ISA names another set"
)

HALF_STEP = 2.0**-9  # of bfloat16, relative


def spread(q, k, v, heads, scale, q_offsets, kv_offsets):
    """Root of the sum of squares of each result's terms: what independent errors of all terms add up to."""
    weights_squared = np.zeros(q.shape, np.float64)
    d = q.shape[1] // heads
    for s in range(len(q_offsets) - 1):
        rows, keys = slice(q_offsets[s], q_offsets[s + 1]), slice(kv_offsets[s], kv_offsets[s + 1])
        for h in range(heads if kv_offsets[s] < kv_offsets[s + 1] else 0):
            columns = slice(h * d, (h + 1) * d)
            scores = (q[rows, columns] @ k[keys, columns].T).astype(np.float64) * scale
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            weights_squared[rows, columns] = weights**2 @ (np.abs(v[keys, columns]) + np.abs(v).mean()) ** 2
    return np.sqrt(weights_squared)


CASES = [
    (1, 8, offsets(1), offsets(1)),
    (2, 24, offsets(70, 30), offsets(100, 31)),
    (3, 16, offsets(1, 0, 33), offsets(7, 5, 0)),
    (2, 72, offsets(64, 65), offsets(257, 1)),
    (1, 128, offsets(64), offsets(1000)),
    (2, 80, offsets(15, 17, 31), offsets(31, 32, 33)),
]


@needs_amx
@pytest.mark.parametrize("fine_scores", [False, True])
@pytest.mark.parametrize(("heads", "d", "q_offsets", "kv_offsets"), CASES)
def test_attention_bf16_against_reference(heads, d, q_offsets, kv_offsets, fine_scores):
    q, k, v = (random(o[-1], heads * d, seed=seed) for seed, o in enumerate((q_offsets, kv_offsets, kv_offsets)))
    arguments = q, k, v, heads, d**-0.5, q_offsets, kv_offsets
    expected = reference_attention.attention_bf16(*arguments, fine_scores=fine_scores)
    actual = attention_bf16(*arguments, fine_scores=fine_scores)
    assert actual.dtype == np.float32
    # A weight on the other side of a half is off by a whole step; few are. Four times what all of them would do.
    error = np.abs(actual - expected)
    assert (error <= 4 * HALF_STEP * spread(*arguments) + 1e-6).all(), error.max()
    # And in all, near float32: queries, keys, weights and values rounded, the first two with the size of the scores.
    exact = reference.attention(*arguments)
    share = np.linalg.norm(actual - exact) / max(np.linalg.norm(exact), 1e-9)
    assert share <= (0.004 if fine_scores else 0.006)


@needs_amx
def test_fine_scores_are_as_good_as_float32():
    """Keys that share a large part and differ in a small one, as those do that carry positions."""
    q, v = random(40, 64), random(300, 64, seed=2)
    k = random(1, 64, seed=3, scale=20) + random(300, 64, seed=1)
    arguments = q, k, v, 1, 64**-0.5, offsets(40), offsets(300)
    exact = reference.attention(*arguments)
    fine, coarse = (attention_bf16(*arguments, fine_scores=fine) for fine in (True, False))
    assert np.linalg.norm(fine - exact) < 0.01 * np.linalg.norm(exact)
    assert np.linalg.norm(coarse - exact) > 0.03 * np.linalg.norm(exact)


@needs_amx
def test_equal_values_come_out_as_they_are():
    q, k = random(33, 48), random(70, 48, seed=1, scale=3)
    v = np.tile(np.float32([1.5, -0.25, 3.0] * 16), (70, 1))
    result = attention_bf16(q, k, v, 2, 0.3, offsets(33), offsets(70))
    np.testing.assert_allclose(result, v[:33], rtol=1e-6)


@needs_amx
def test_what_is_not_finite_stays_where_it_is():
    q, k, v = random(40, 32), random(80, 32, seed=1), random(80, 32, seed=2)
    q_offsets, kv_offsets = offsets(20, 20), offsets(40, 40)
    q[3, 2], k[50, 20], v[10, 5] = np.nan, np.nan, np.inf
    result = attention_bf16(q, k, v, 2, 0.3, q_offsets, kv_offsets)
    spoiled = np.zeros(result.shape, bool)
    spoiled[3, :16] = True  # its query, in its head
    spoiled[20:, 16:] = True  # all that attend to the key
    spoiled[:20, 5] = True  # a column of values
    np.testing.assert_array_equal(~np.isfinite(result), spoiled)


@needs_amx
@pytest.mark.parametrize(
    ("heads", "d", "rows", "k"),
    [(1, 8, (1,), 3), (2, 24, (70, 30), 50), (3, 16, (7, 1, 33), 160), (4, 72, (131,), 288)],
)
def test_self_attention_against_reference(heads, d, rows, k):
    first = offsets(*rows)
    x, weight = random(first[-1], k) + np.float32(0.2), random(3 * heads * d, k, seed=1, scale=k**-0.5)
    bias, scale = random(3 * heads * d), d**-0.5
    q_weight, w_scale = reference.quantize_weight(weight)
    expected = reference_attention.self_attention(x, q_weight, w_scale, bias, heads, scale, first)
    actual = self_attention(quantize_rows(x), pack_heads(weight, bias, heads, scale), first)
    q, key, v = np.split(reference.linear_int8(x, q_weight, w_scale, bias), 3, axis=1)
    # Queries, keys and values that differ in the last bit fall on two sides of a half, too.
    assert (np.abs(actual - expected) <= 6 * HALF_STEP * spread(q, key, v, heads, scale, first, first) + 1e-5).all()


@needs_amx
def test_self_attention_folds_a_factor_into_its_weight():
    x, weight, bias = random(50, 96), random(144, 96, seed=1), random(144)
    factor = np.abs(random(96, seed=2)) + np.float32(0.1)
    rows = layer_norm_quantized(x, 1e-6)
    one = self_attention(rows, pack_heads(weight, bias, 2, 0.2, factor=factor), offsets(50))
    other = self_attention(rows, pack_heads(weight * factor, bias, 2, 0.2), offsets(50))
    np.testing.assert_array_equal(one, other)


@needs_amx
def test_sequences_do_not_depend_on_each_other():
    x, packed = random(97, 64), pack_heads(random(144, 64, seed=1), random(144), 2, 0.2)
    together = self_attention(quantize_rows(x), packed, offsets(40, 57))
    for rows in (slice(0, 40), slice(40, 97)):
        alone = self_attention(quantize_rows(x[rows]), packed, offsets(rows.stop - rows.start))
        np.testing.assert_array_equal(alone, together[rows])
    empty = self_attention(quantize_rows(x), packed, offsets(40, 0, 57))
    np.testing.assert_array_equal(empty, together)


@needs_amx
@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one CPU only")
def test_bf16_results_do_not_depend_on_the_number_of_threads():
    q, k, v = random(90, 48), random(200, 48, seed=1), random(200, 48, seed=2)
    rows, packed = quantize_rows(random(97, 64)), pack_heads(random(144, 64, seed=1), random(144), 2, 0.2)
    results = []
    try:
        for n in (1, 2):
            set_threads(n)
            results.append(attention_bf16(q, k, v, 2, 0.2, offsets(30, 60), offsets(150, 50)))
            results.append(self_attention(rows, packed, offsets(40, 57)))
    finally:
        set_threads(None)
    np.testing.assert_array_equal(results[0], results[2])
    np.testing.assert_array_equal(results[1], results[3])


def test_rounding_to_bf16():
    below = np.nextafter(np.float32(1.00390625), np.float32(0))
    x = np.float32([1.0, 1.00390625, below, -1.00390625, np.inf, -np.inf, np.nan, 0.0, -0.0])
    expected = np.float32([1.0, 1.0078125, 1.0, -1.0078125, np.inf, -np.inf, np.nan, 0.0, -0.0])
    np.testing.assert_array_equal(reference_attention.round_to_bf16(x), expected)
