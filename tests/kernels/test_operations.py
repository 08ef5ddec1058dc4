"""Every compiled operation against `edge_kernels.reference`, and the reference against float64."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_kernels import reference, simd
from edge_kernels.attention import KEY_BLOCK, QUERY_BLOCK, attention
from edge_kernels.compile import set_threads
from edge_kernels.linear import COLUMN_BLOCK, K_BLOCK, ROW_BLOCK, linear, pack_weight
from edge_kernels.norm import layer_norm
from edge_kernels.patch_embed import patch_embed

# --- tolerances ---------------------------------------------------------------------------------------------

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


# --- the reference against float64 --------------------------------------------------------------------------


def gelu64(x):
    x = x.astype(np.float64)
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention64(q, k, v, heads, scale, q_offsets, kv_offsets):
    out = np.zeros(q.shape)
    d = q.shape[1] // heads
    for s in range(len(q_offsets) - 1):
        for row in range(q_offsets[s], q_offsets[s + 1]):
            for h in range(heads):
                columns = slice(h * d, (h + 1) * d)
                keys = slice(kv_offsets[s], kv_offsets[s + 1])
                scores = k[keys, columns].astype(np.float64) @ q[row, columns].astype(np.float64) * scale
                weights = np.exp(scores - scores.max())
                out[row, columns] = weights @ v[keys, columns].astype(np.float64) / weights.sum()
    return out


def test_the_reference_is_the_formula():
    x, weight, bias, residual = random(13, 160), random(24, 160, seed=1), random(24), random(13, 24)
    product = x.astype(np.float64) @ weight.astype(np.float64).T + bias
    check(reference.linear(x, weight, bias), product, linear_tolerance(x, weight, product))
    activated = gelu64(product) + residual
    check(
        reference.linear(x, weight, bias, gelu=True, residual=residual),
        activated,
        linear_tolerance(x, weight, activated),
    )

    spread = np.linspace(-12, 12, 4001, dtype=np.float32)
    check(reference.gelu_tanh(spread), gelu64(spread), GELU_PER_X * np.maximum(1, np.abs(spread)))

    x64 = x.astype(np.float64)
    gain, shift = random(160, seed=2), random(160, seed=3)
    normal = (x64 - x64.mean(1, keepdims=True)) / np.sqrt(x64.var(1, keepdims=True) + 1e-6)
    expected = normal * gain + shift
    check(
        reference.layer_norm(x, gain, shift, 1e-6),
        expected,
        NORM_PER_VALUE * (np.abs(expected) + np.abs(shift) + 1),
    )

    q, k, v = random(9, 80), random(21, 80, seed=1), random(21, 80, seed=2)
    arguments = (q, k, v, 2, 40**-0.5, offsets(4, 5), offsets(20, 1))
    tolerance = ATTENTION_PER_VALUE * np.abs(v).max() + score_tolerance(q, k, 40**-0.5, 2, np.abs(v).max())
    check(reference.attention(*arguments), attention64(*arguments), tolerance)

    pixels, table, ids = random(7, 588), random(25, 24), np.array([0, 24, 3, 3, 7, 1, 2])
    patch_weight = random(24, 588, seed=4)
    expected = pixels.astype(np.float64) @ patch_weight.astype(np.float64).T + bias + table[ids]
    actual = reference.patch_embed(pixels, patch_weight, bias, table, ids)
    check(actual, expected, linear_tolerance(pixels, patch_weight, expected))


# --- linear -------------------------------------------------------------------------------------------------


def check_linear(m, n, k, *, with_bias=True, gelu=False, with_residual=False, seed=0):
    x, weight = random(m, k, seed=seed), random(n, k, seed=seed + 1, scale=k**-0.5)
    bias = random(n, seed=seed) if with_bias else None
    residual = random(m, n, seed=seed + 2) if with_residual else None
    expected = reference.linear(x, weight, bias, gelu=gelu, residual=residual)
    actual = linear(x, pack_weight(weight), bias, gelu=gelu, residual=residual)
    check(actual, expected, linear_tolerance(x, weight, expected))


@pytest.mark.parametrize("k", [1, 3, 17, 160, 304, 1152])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 100, 304])
@pytest.mark.parametrize("m", [1, 5, 6, 7, 64, 131])
def test_linear_against_reference(m, n, k):
    check_linear(m, n, k)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_epilogue_against_reference(with_bias, gelu, with_residual):
    check_linear(131, 100, 304, with_bias=with_bias, gelu=gelu, with_residual=with_residual)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 2 * simd.MR + 1),
    n=st.integers(1, 2 * simd.NR + 1),
    k=st.integers(1, 40),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_linear_of_any_small_size_against_reference(m, n, k, flags):
    check_linear(m, n, k, with_bias=flags[0], gelu=flags[1], with_residual=flags[2])


@pytest.mark.parametrize("m", [ROW_BLOCK - 1, ROW_BLOCK + 1])
@pytest.mark.parametrize("n", [COLUMN_BLOCK, COLUMN_BLOCK + 1])
@pytest.mark.parametrize("k", [K_BLOCK, K_BLOCK + 1])
def test_linear_at_block_borders_against_reference(m, n, k):
    check_linear(m, n, k, gelu=True, with_residual=True)


def test_linear_writes_to_out_even_when_it_is_the_residual():
    x, weight, stream = random(70, 48), random(33, 48, seed=1), random(70, 33)
    expected = linear(x, pack_weight(weight), residual=stream)
    result = linear(x, pack_weight(weight), residual=stream, out=stream)
    assert result is stream
    np.testing.assert_array_equal(stream, expected)


def test_linear_refuses_an_out_it_would_have_to_copy():
    with pytest.raises(ValueError, match="C-contiguous"):
        linear(random(4, 8), pack_weight(random(6, 8)), out=np.empty((6, 4), np.float32).T)


def test_linear_takes_any_layout():
    x, weight, bias, residual = random(31, 40), random(20, 40, seed=1), random(20), random(31, 20)
    expected = linear(x, pack_weight(weight), bias, residual=residual)

    wide = random(31, 100)
    wide[:, 7:47] = x  # columns of a wider matrix: read in place
    spaced = np.zeros((62, 80), np.float32)
    spaced[::2, ::2] = x
    wide_residual = random(31, 50)
    wide_residual[:, 3:23] = residual
    frozen = weight.copy()
    frozen.flags.writeable = False
    frozen_bias = bias.copy()
    frozen_bias.flags.writeable = False
    swapped = x.astype(x.dtype.newbyteorder())
    shifted = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)  # unaligned
    for other in (
        wide[:, 7:47],
        spaced[::2, ::2],
        np.asfortranarray(x),
        x.astype(np.float64),
        swapped,
        shifted,
    ):
        np.testing.assert_array_equal(linear(other, pack_weight(weight), bias, residual=residual), expected)
    for other in (frozen, np.asfortranarray(weight), weight.astype(np.float64)):
        np.testing.assert_array_equal(linear(x, pack_weight(other), frozen_bias, residual=residual), expected)
    np.testing.assert_array_equal(linear(x, pack_weight(weight), bias, residual=wide_residual[:, 3:23]), expected)
    np.testing.assert_array_equal(linear(x[::-1], pack_weight(weight), bias, residual=residual[::-1])[::-1], expected)


def test_linear_of_no_rows_is_empty():
    assert linear(np.empty((0, 8), np.float32), pack_weight(random(6, 8))).shape == (0, 6)


def test_linear_rows_do_not_depend_on_each_other():
    x, weight = random(40, 300), pack_weight(random(50, 300, seed=1))
    together = linear(x, weight, gelu=True)
    for i in range(40):
        np.testing.assert_array_equal(linear(x[i : i + 1], weight, gelu=True)[0], together[i])


def test_linear_lets_nan_and_infinity_through():
    x, weight = np.abs(random(9, 20)), np.abs(random(18, 20, seed=1))
    x[3, 4], x[5, 6] = np.nan, np.inf
    for gelu in (False, True):
        result = linear(x, pack_weight(weight), gelu=gelu)
        assert np.isnan(result[3]).all()
        assert np.isposinf(result[5]).all()
        assert np.isfinite(np.delete(result, [3, 5], axis=0)).all()


# --- activation ---------------------------------------------------------------------------------------------


@numba.njit
def exp2_of(x):
    out = np.empty_like(x)
    for i in range(x.size):
        out[i] = simd.exp2(x[i])
    return out


def test_exp2_is_accurate_to_two_roundings():
    x = np.concatenate([np.linspace(-126, 127.4, 1 << 18), np.linspace(-1, 1, 1 << 16)]).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert np.max(np.abs(exp2_of(x) / exact - 1)) <= EXP2_RELATIVE
    whole = np.arange(-126, 128, dtype=np.float32)
    np.testing.assert_array_equal(exp2_of(whole), np.exp2(whole))


def test_exp2_at_its_limits():
    x = np.array([-127, -1e4, -3e38, -np.inf, 128, 1e4, 3e38, np.inf], np.float32)
    np.testing.assert_array_equal(exp2_of(x), np.array([0] * 4 + [np.inf] * 4, np.float32))
    assert np.isnan(exp2_of(np.array([np.nan, -np.nan], np.float32))).all()


def activate(x):
    """Run GELU alone: the product with the identity is exact."""
    return linear(x.reshape(-1, 1), pack_weight(np.ones((1, 1), np.float32)), gelu=True).ravel()


def test_gelu_against_reference():
    x = np.linspace(-12, 12, 40_001, dtype=np.float32)
    check(activate(x), reference.gelu_tanh(x), 2 * GELU_PER_X * np.maximum(1, np.abs(x)))
    check(activate(x), gelu64(x), GELU_PER_X * np.maximum(1, np.abs(x)))


def test_gelu_of_extreme_values():
    x = np.array([-3e38, -1e13, -50, -0.0, 0.0, 1e-30, 50, 1e13, 3e38], np.float32)
    expected = np.array([0, 0, 0, 0, 0, 5e-31, 50, 1e13, 3e38], np.float32)
    np.testing.assert_allclose(activate(x), expected, rtol=4 * U, atol=0)
    np.testing.assert_allclose(reference.gelu_tanh(x), expected, rtol=4 * U, atol=0)


# --- layer norm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("e", [1, 3, 17, 31, 64, 160, 1152])
@pytest.mark.parametrize("m", [1, 5, 17, 131])
def test_layer_norm_against_reference(m, e):
    x, gain, bias = random(m, e), random(e, seed=1), random(e, seed=2)
    expected = reference.layer_norm(x, gain, bias, 1e-6)
    check(
        layer_norm(x, gain, bias, 1e-6),
        expected,
        NORM_PER_VALUE * (np.abs(expected) + np.abs(bias) + np.abs(gain)),
    )


def test_layer_norm_with_a_large_mean_does_not_cancel():
    x = random(11, 300) + np.float32(1000)
    gain, bias = np.ones(300, np.float32), np.zeros(300, np.float32)
    x64 = x.astype(np.float64)
    expected = (x64 - x64.mean(1, keepdims=True)) / np.sqrt(x64.var(1, keepdims=True) + 1e-6)
    # The mean is a float32 near 1000: it may be off by a few U · 1000, and so is every centred value of size
    # 1.
    check(layer_norm(x, gain, bias, 1e-6), expected, 1000 * 8 * U)


def test_layer_norm_of_constant_rows_is_the_bias():
    x = np.full((3, 50), 7.0, np.float32)
    bias = random(50)
    check(layer_norm(x, random(50, seed=1), bias, 1e-6), np.tile(bias, (3, 1)), 1e-6)


def test_layer_norm_takes_any_layout_and_no_rows():
    x, gain, bias = random(12, 40), random(40), random(40, seed=1)
    expected = layer_norm(x, gain, bias, 1e-6)
    wide = random(12, 90)
    wide[:, 5:45] = x
    gain.flags.writeable = False
    for other in (wide[:, 5:45], np.asfortranarray(x), x.astype(np.float64)):
        np.testing.assert_array_equal(layer_norm(other, gain, bias, 1e-6), expected)
    assert layer_norm(x[:0], gain, bias, 1e-6).shape == (0, 40)


# --- attention ----------------------------------------------------------------------------------------------


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


# --- patch embedding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
def test_patch_embed_against_reference(with_bias):
    pixels, weight, table = random(37, 588), random(160, 588, seed=1, scale=588**-0.5), random(49, 160)
    table.flags.writeable = False
    ids = np.random.default_rng(0).integers(0, 49, 37)
    bias = random(160) if with_bias else None
    expected = reference.patch_embed(pixels, weight, bias, table, ids)
    actual = patch_embed(pixels, pack_weight(weight), bias, table, ids)
    check(actual, expected, linear_tolerance(pixels, weight, expected))


# --- threads and machines -----------------------------------------------------------------------------------


@pytest.fixture
def default_threads():
    yield
    set_threads(None)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one CPU only")
@pytest.mark.usefixtures("default_threads")
def test_results_do_not_depend_on_the_number_of_threads():
    x, weight, bias = random(131, 304), random(200, 304, seed=1), random(200)
    q, k, v = random(131, 160), random(300, 160, seed=1), random(300, 160, seed=2)

    def run():
        packed = pack_weight(weight)
        yield packed.panels
        yield linear(x, packed, bias, gelu=True)
        yield layer_norm(x, x[0], x[1], 1e-6)
        yield attention(q, k, v, 4, 0.2, offsets(31, 100), offsets(297, 3))

    results = []
    for n in range(1, min(numba.config.NUMBA_NUM_THREADS, 8) + 1):
        set_threads(n)
        results.append(list(run()))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_calls_from_several_python_threads_wait_for_each_other():
    x, weight = random(65, 304), pack_weight(random(100, 304, seed=1))
    expected = linear(x, weight)
    wrong = []

    def work():
        wrong.extend(1 for _ in range(50) if not np.array_equal(linear(x, weight), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_register_tiles_fit_the_registers():
    for name, tile in simd.TILES.items():
        available = 32 if name.startswith(("avx512", "neon")) else 16
        assert tile.rows * tile.vectors + tile.vectors + 1 <= available


@pytest.mark.slow
def test_the_portable_tile_passes_too():
    """Run the comparisons of this file once more on code for the plainest CPU of this architecture."""
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "EDGE_RUNTIME_ISA": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "exp2 or (against_reference and not linear_against)",
    ]
    result = subprocess.run(
        [*command, str(Path(__file__))], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
