"""float32 attention against `edge_kernels.reference.operations`."""

from __future__ import annotations

import numpy as np
import pytest

from edge_kernels.attention.float32 import KEY_BLOCK, QUERY_BLOCK, attention
from edge_kernels.reference import operations as reference
from kernel_checks import ATTENTION_PER_VALUE, U, check, offsets, random, score_tolerance

pytestmark = pytest.mark.every_core


def check_attention(heads, d, q_lengths, kv_lengths):
    n_q, n_kv = sum(q_lengths), sum(kv_lengths)
    q, k, v = random(n_q, heads * d), random(n_kv, heads * d, seed=1), random(n_kv, heads * d, seed=2)
    arguments = (q, k, v, heads, d**-0.5, offsets(*q_lengths), offsets(*kv_lengths))
    largest = np.abs(v).max() if v.size else 0
    # Scores of normal data stay below 6; `score_tolerance` takes the worst case of aligned vectors, far too
    # much here.
    check(attention(*arguments), reference.attention(*arguments), ATTENTION_PER_VALUE * largest)


@pytest.mark.parametrize("d", [40, 48, 64, 72, 128, 1, 7])
@pytest.mark.parametrize(
    "q_lengths, kv_lengths",
    [
        ((1,), (1,)),
        ((17, 1, 64), (17, 1, 64)),
        ((5, 131), (700, 3)),
        ((64, 64, 64), (33, 129, KEY_BLOCK + 1)),
        ((QUERY_BLOCK + 1,), (2 * KEY_BLOCK,)),
    ],
)
def test_attention_against_reference(d, q_lengths, kv_lengths):
    check_attention(4, d, q_lengths, kv_lengths)


def test_attention_of_model_shapes_against_reference():
    check_attention(16, 72, (300,), (300,))
    check_attention(32, 128, (64, 64), (300, 253))


def test_attention_without_queries_or_keys():
    check_attention(2, 16, (0, 3, 4), (5, 0, 2))
    check_attention(2, 16, (0,), (0,))
    assert attention(*[random(3, 8)] * 3, 2, 0.5, offsets(), offsets()).shape == (3, 8)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_attention_with_large_scores(size):
    """Scores up to ±size: softmax is nearly a choice, and rounding of the scores is the error that counts."""
    heads, d = 2, 48
    q, k, v = random(37, heads * d), random(411, heads * d, seed=1), random(411, heads * d, seed=2)
    largest = max(np.abs(q[:, c : c + d] @ k[:, c : c + d].T).max() for c in (0, d))
    scale = float(size / largest)
    arguments = (q, k, v, heads, scale, offsets(37), offsets(411))
    expected = reference.attention(*arguments)
    result = attention(*arguments)
    assert np.isfinite(result).all()
    # A score is a sum of d products of either sign, of the size of the score itself: √d roundings of it.
    tolerance = (2 * np.sqrt(d) * U * size + ATTENTION_PER_VALUE) * 2 * np.abs(v).max()
    check(result, expected, tolerance)


def test_attention_whose_scores_grow_from_block_to_block():
    """The running maximum rises in every block, by more than the range of exp in some."""
    n = 4 * KEY_BLOCK + 5
    q = np.ones((20, 8), np.float32)
    k = np.repeat(np.linspace(-400, 400, n, dtype=np.float32)[:, None], 8, axis=1)
    v = random(n, 8)
    arguments = (q, k, v, 1, 0.125, offsets(20), offsets(n))
    check(
        attention(*arguments),
        reference.attention(*arguments),
        score_tolerance(q, k, 0.125, 1, np.abs(v).max()),
    )


def test_attention_lets_nan_through():
    q, k, v = random(20, 8), random(30, 8, seed=1), random(30, 8, seed=2)
    q[4, 1] = np.nan
    result = attention(q, k, v, 1, 0.3, offsets(20), offsets(30))
    assert np.isnan(result[4]).all()
    assert np.isfinite(np.delete(result, 4, axis=0)).all()


def test_attention_takes_any_layout():
    q, k, v = random(50, 96), random(70, 96, seed=1), random(70, 96, seed=2)
    rest = (4, 0.2, offsets(20, 30), offsets(50, 20))
    expected = attention(q, k, v, *rest)
    together = np.concatenate([random(70, 11), k, v], axis=1)
    frozen = q.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(attention(frozen, together[:, 11:107], together[:, 107:], *rest), expected)
    np.testing.assert_array_equal(attention(np.asfortranarray(q), k.astype(np.float64), v, *rest), expected)


def test_attention_sequences_do_not_depend_on_each_other():
    q, k, v = random(90, 80), random(300, 80, seed=1), random(300, 80, seed=2)
    together = attention(q, k, v, 2, 0.2, offsets(40, 50), offsets(257, 43))
    np.testing.assert_array_equal(
        attention(q[:40], k[:257], v[:257], 2, 0.2, offsets(40), offsets(257)), together[:40]
    )
    np.testing.assert_array_equal(
        attention(q[40:], k[257:], v[257:], 2, 0.2, offsets(50), offsets(43)), together[40:]
    )
    np.testing.assert_array_equal(
        attention(q[7:8], k[:257], v[:257], 2, 0.2, offsets(1), offsets(257)), together[7:8]
    )
