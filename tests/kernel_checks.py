"""How operations are compared with `reference.operations`: tolerances from roundings, and random arrays."""

from __future__ import annotations

import numpy as np
import pytest

U = 2.0**-24  # unit roundoff of float32: one rounding errs by at most U · |result|

# 2^x: polynomial 0.3 U, its Horner steps at most 1 U, the last product 0.5 U; measured 1.3 U.
EXP2_RELATIVE = 2 * U
# GELU: roundings of the exponent t = x · slope count |t| ln 2 times, but where t is large the sigmoid is
# flat; then a sum and a quotient. Measured 2.0 U · |x|; the reference, whose 1 + tanh cancels, 1.9 U · |x|.
GELU_PER_X = 3 * U
# LayerNorm, in units of |value| + |gain| + |bias|: the root, three products, a sum, and the error of mean and
# root of variance, which blocked sums keep at a few U. Measured 3.2 U between the two sides.
NORM_PER_VALUE = 8 * U
# Attention, in units of the largest |value|: an average, so a few roundings of one value, and the weights'
# relative error: scores of normal data stay below 6 and err by as many U. Measured 2.7 U between the two
# sides.
ATTENTION_PER_VALUE = 8 * U
# A product of K terms, in units of S = Σ |terms|: with random signs partial sums grow as √k σ, so K roundings
# of them add up to U √K √(K/2) σ ≈ 1.1 U S on average, whatever K is. The worst of some ten thousand elements
# is four times that; measured 4.1 U. (Blocked sums are better; the worst case, all terms of one sign, is K U
# S.)
LINEAR_PER_SUM = 6 * U


def linear_tolerance(x, weight, result):
    """Tolerance of products of random signs, after an activation (slope up to 1.13) and a last sum."""
    sums = np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T
    return 1.2 * LINEAR_PER_SUM * sums + (GELU_PER_X + U) * np.maximum(1, np.abs(result))


def score_tolerance(q, k, scale, heads, spread):
    """Relative error of a softmax weight from rounding of its score.

    A score is a sum of D products, scaled: (√D + 2) U of the sum of |products|. exp makes that a relative
    error of the weight, and a weighted mean of values with the given spread moves by it, from both sides.
    """
    d = q.shape[1] // heads
    largest = float(np.abs(q).max() * np.abs(k).max()) * d * abs(scale)
    return 2 * (np.sqrt(d) + 2) * U * largest * spread


def check(actual, expected, tolerance):
    """Compare, and say where and by how much it is off."""
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    error = np.abs(actual.astype(np.float64) - expected)
    excess = error - tolerance
    if actual.size and not np.all(excess <= 0):
        at = np.unravel_index(np.nanargmax(np.where(np.isnan(excess), np.inf, excess)), actual.shape)
        pytest.fail(
            f"off at {tuple(map(int, at))}: {actual[at]!r}, expected {expected[at]!r}, "
            f"tolerance {np.broadcast_to(tolerance, actual.shape)[at]:.3g}; "
            f"error max {error.max():.3g}, mean {error.mean():.3g}"
        )


def random(*shape, seed=0, scale=1.0):
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)


def offsets(*lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
