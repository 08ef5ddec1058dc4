"""The int8 family against `reference.operations`: integers exactly, the float32 part to a few roundings."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_kernels.linear.int8 import (
    COLUMN_BLOCK,
    K_BLOCK,
    ROW_BLOCK,
    linear_int8,
    linear_int8_quantized,
)
from edge_kernels.linear.int8_rows import ROW_ZERO, QuantizedRows, layer_norm_quantized, quantize_rows
from edge_kernels.linear.int8_weights import pack_weight_int8
from edge_kernels.reference import operations as reference
from edge_kernels.simd.int8 import DOT_MR, DOT_NR, DOT_TILE, GROUP, STEP_CELLS, n_cells
from edge_kernels.threads import set_threads
from kernel_checks import U, random

pytestmark = pytest.mark.every_core

# GELU as in test_operations: 3 U · |x| on either side.
GELU_PER_X = 6 * U
# The float32 part is three products and two sums of three terms; either side rounds each of them once at most.
EPILOGUE = 8 * U


def unpack(rows):
    """Bring quantised rows back into the order of the reference."""
    cells = n_cells(rows.k)
    q = rows.panels.reshape(-1, cells // STEP_CELLS, DOT_MR, STEP_CELLS * GROUP).swapaxes(1, 2)
    q = q.reshape(-1, cells * GROUP)
    q = (q.view(np.uint8).astype(np.int16) - ROW_ZERO).astype(np.int8) if ROW_ZERO else q.astype(np.int8)
    assert not q[:, rows.k :].any(), "padding"
    assert not q[rows.m :].any(), "padding"
    return q[: rows.m, : rows.k]


quantize_weight = reference.quantize_weight_in_fours if DOT_TILE.has_multipliers else reference.quantize_weight


def sums_of(rows, packed):
    """Run the product with all scales 1 and offsets 0: the sums themselves, as float32 has them."""
    ones, zeros = np.ones((1, rows.m), np.float32), np.zeros((1, rows.m), np.float32)
    plain = QuantizedRows(rows.panels, ones, zeros, rows.m, rows.k)
    return linear_int8(plain, packed._replace(scales=np.ones_like(packed.scales)))


def tolerance(x, q_weight, scale, bias, result):
    """EPILOGUE of the sum of the terms' magnitudes, after an activation of slope up to 1.13."""
    q, x_scale, x_offset = reference.quantize_rows(x)
    terms = np.abs(x_scale[:, None] * scale * reference.int8_sums(q, q_weight))
    terms += np.abs(x_offset[:, None] * scale * q_weight.sum(1, dtype=np.int32)) + np.abs(bias)
    return 1.2 * EPILOGUE * terms + (GELU_PER_X + U) * np.maximum(1, np.abs(result))


def check_linear_int8(m, n, k, *, with_bias=True, gelu=False, with_residual=False, seed=0):
    x, weight = random(m, k, seed=seed) + np.float32(0.3), random(n, k, seed=seed + 1, scale=k**-0.5)
    bias = random(n, seed=seed) if with_bias else None
    residual = random(m, n, seed=seed + 2) if with_residual else None
    q, scale, offset = reference.quantize_rows(x)
    q_weight, w_scale = quantize_weight(weight)

    rows, packed = quantize_rows(x), pack_weight_int8(weight)
    np.testing.assert_array_equal(unpack(rows), q)
    np.testing.assert_array_equal(rows.scale[0], scale)
    np.testing.assert_array_equal(rows.offset[0], offset)
    np.testing.assert_array_equal(packed.scales[:n], w_scale)
    np.testing.assert_array_equal(packed.sums[0, :n], q_weight.sum(1, dtype=np.int32))
    np.testing.assert_array_equal(sums_of(rows, packed), reference.int8_sums(q, q_weight).astype(np.float32))

    expected = reference.linear_int8(x, q_weight, w_scale, bias, gelu=gelu, residual=residual)
    actual = linear_int8(rows, packed, bias, gelu=gelu, residual=residual)
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    error = np.abs(actual - expected)
    allowed = tolerance(x, q_weight, w_scale, 0 if bias is None else bias, expected)
    at = np.unravel_index(np.argmax(error - allowed), error.shape)
    assert (error <= allowed).all(), (
        f"off at {at}: {actual[at]!r}, expected {expected[at]!r}; max {error.max():.3g}, mean {error.mean():.3g}"
    )


@pytest.mark.parametrize("k", [1, 3, 17, 304, 1152])
@pytest.mark.parametrize("n", [1, 15, 17, 100])
@pytest.mark.parametrize("m", [1, 5, 7, 131])
def test_linear_int8_against_reference(m, n, k):
    check_linear_int8(m, n, k)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_int8_epilogue_against_reference(with_bias, gelu, with_residual):
    check_linear_int8(131, 100, 304, with_bias=with_bias, gelu=gelu, with_residual=with_residual)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 2 * DOT_MR + 1),
    n=st.integers(1, 2 * DOT_NR + 1),
    k=st.integers(1, 40),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_linear_int8_of_any_small_size_against_reference(m, n, k, flags):
    check_linear_int8(m, n, k, with_bias=flags[0], gelu=flags[1], with_residual=flags[2])


@pytest.mark.parametrize(
    "m, n, k",
    [(ROW_BLOCK - 1, COLUMN_BLOCK, K_BLOCK + 1), (ROW_BLOCK + 1, COLUMN_BLOCK + 1, K_BLOCK), (2, 3, 2 * K_BLOCK + 3)],
)
def test_linear_int8_at_block_borders_against_reference(m, n, k):
    check_linear_int8(m, n, k, gelu=True, with_residual=True)


@pytest.mark.parametrize("with_factor", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("m, n", [(1, 1), (7, 575), (131, 577), (33, 1300)])
def test_a_product_quantised_as_it_is_made_against_reference(m, n, gelu, with_factor):
    x, weight, bias = random(m, 304) + np.float32(0.3), random(n, 304, seed=1, scale=304**-0.5), random(n)
    factor = np.abs(random(n, seed=3)) + np.float32(0.1) if with_factor else None
    q_weight, w_scale = quantize_weight(weight)
    q, scale, offset = reference.linear_int8_quantized(x, q_weight, w_scale, bias, gelu=gelu, factor=factor)
    rows = linear_int8_quantized(x, pack_weight_int8(weight), bias, gelu=gelu, factor=factor)
    found = unpack(rows)
    assert np.abs(found.astype(int) - q).max() <= 1
    assert np.mean(found != q) <= 0.01
    y = reference.linear_int8(x, q_weight, w_scale, bias, gelu=gelu)
    largest = (tolerance(x, q_weight, w_scale, np.abs(bias), y) * (1 if factor is None else factor)).max(1)
    assert (np.abs(rows.scale - scale) * 127 <= largest + 4 * U * scale * 127).all()
    assert (np.abs(rows.offset - offset) <= largest + 4 * U * np.abs(offset)).all()

    # What takes it sums group by group, each with its own scale.
    next_weight = random(40, n, seed=4, scale=n**-0.5)
    q_next, next_scale = quantize_weight(next_weight)
    packed = pack_weight_int8(next_weight, in_groups=True)
    residual = random(m, 40, seed=5)
    sums = np.add.reduceat(q_next, np.arange(0, n, reference.SCALE_COLUMNS), 1, np.int32)
    np.testing.assert_array_equal(packed.sums[:, :40], sums.T)
    exact = residual.astype(np.float64)
    magnitude = np.abs(exact)
    for group, first in enumerate(range(0, n, reference.SCALE_COLUMNS)):
        part = slice(first, first + reference.SCALE_COLUMNS)
        values = found[:, part] * rows.scale[group][:, None].astype(np.float64) + rows.offset[group][:, None]
        exact += values @ (q_next[:, part] * next_scale[:, None].astype(np.float64)).T
        magnitude += np.abs(values) @ np.abs(q_next[:, part] * next_scale[:, None]).T
    result = linear_int8(rows, packed, residual=residual)
    assert (np.abs(result - exact) <= EPILOGUE * magnitude).all()


@pytest.mark.parametrize("k", [4, 301, 4304])
def test_the_largest_integers_do_not_saturate_against_reference(k):
    """Rows and weights at their limits: sums of two or four products come close to what 16 bits hold."""
    for signs in ([1], [-1], [1, -1], [1, 1, -1, -1]):
        x = np.resize(np.array(signs, np.float32), k)
        x = np.stack([127 * x, -127 * x, np.resize(np.float32([127, -127]), k)])
        mixed = np.where(np.arange(k) % 3 < 2, 127, -127) * np.ones((DOT_NR + 1, 1))
        weight = np.concatenate([mixed, np.full((3, k), 127), np.full((2, k), -127), x]).astype(np.float32)
        if k > 1:
            x = np.concatenate([x, [np.resize(np.float32([127, 127, 127, -127]), k)]]).astype(np.float32)
        rows = quantize_rows(x)
        np.testing.assert_array_equal(unpack(rows), reference.quantize_rows(x)[0])
        integers, _ = quantize_weight(weight)
        expected = reference.int8_sums(unpack(rows), integers)
        np.testing.assert_array_equal(sums_of(rows, pack_weight_int8(weight)), expected.astype(np.float32))
        # The reference itself, in 64 bits.
        np.testing.assert_array_equal(expected, unpack(rows).astype(np.int64) @ integers.T.astype(np.int64))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 3000), spread=st.sampled_from([0.0, 0.5, 3.0]))
def test_fours_stay_within_their_limits(seed, k, spread):
    """Whatever the weights, no sum of a four reaches 16 bits, and none of a row 32."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((3, k)) * np.exp(spread * rng.standard_normal((3, k)))).astype(np.float32)
    weight[2] = np.abs(weight[0]).max()
    integers, scale = reference.quantize_weight_in_fours(weight)
    padded = np.zeros((3, -(-k // 8) * 8), np.int64)
    padded[:, :k] = integers
    fours = padded.reshape(3, -1, 2, 2, 2).swapaxes(2, 3).reshape(3, -1, 4)
    steps = np.gcd.reduce(fours, axis=2, keepdims=True)  # at least the multiplier
    q = fours // np.maximum(steps, 1)
    assert max(np.maximum(q, 0).sum(2).max(), np.maximum(-q, 0).sum(2).max()) <= reference.FOUR_LIMIT
    for side in (integers, -integers):
        assert 255 * np.maximum(side, 0).sum(1, dtype=np.int64).max() < 2**31
    # A four of equal weights is the coarsest: 32 steps each.
    largest = np.abs(weight).max(1, keepdims=True)
    error = np.abs(integers * scale[:, None].astype(np.float64) - weight)
    assert (error <= 0.5001 * (largest / 32 * 1.03 + 6 * scale[:, None])).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40), k=st.integers(1, 700), spread=st.sampled_from([0.5, 3.0])
)
def test_packing_any_weight_against_reference(seed, n, k, spread):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((n, k)) * np.exp(spread * rng.standard_normal((n, k)))).astype(np.float32)
    integers, scale = quantize_weight(weight)
    packed, rows = pack_weight_int8(weight), quantize_rows(np.eye(k, dtype=np.float32)[:20])
    np.testing.assert_array_equal(packed.scales[:n], scale)
    expected = reference.int8_sums(unpack(rows), integers)
    np.testing.assert_array_equal(sums_of(rows, packed), expected.astype(np.float32))


# --- quantising ---------------------------------------------------------------------------------------------


def test_quantised_rows_are_within_half_a_step():
    x = random(40, 333) * np.logspace(-20, 20, 40, dtype=np.float32)[:, None] + random(40, 1, seed=1)
    q, scale, offset = reference.quantize_rows(x)
    back = q.astype(np.float64) * scale[:, None] + offset[:, None]
    # The float32 offset may be off by half an ulp of the values, and with it the row's ends.
    assert (np.abs(back - x) <= 0.5001 * scale[:, None] + 4 * U * np.abs(x).max(1, keepdims=True)).all()
    weight = random(40, 333, seed=2)
    q, scale = reference.quantize_weight(weight)
    assert (np.abs(q * scale[:, None].astype(np.float64) - weight) <= 0.5001 * scale[:, None]).all()
    assert (np.abs(q).max(1) == 127).all()


EXTREME = np.array(
    [
        [7.0] * 37,
        [0.0] * 37,
        [-0.0] * 37,
        [3.4e38, -3.4e38] + [1e38] * 35,
        [1e-45, 0.0] + [1e-45] * 35,
        [1e-38, -1e-38] + [5e-39] * 35,
        [1e-30, -3e-30] + [2e-30] * 35,
        [np.nextafter(np.float32(1000), np.float32(2000)), 1000.0] + [1000.0] * 35,
        [*np.linspace(-127, 127, 37)],
        [
            *(np.arange(37) - 18.5),
        ][:37],
        [127.0, -127.0] + [0.5, 1.5, 2.5, -0.5, -1.5] * 7,
    ],
    np.float32,
)


def test_extreme_rows_against_reference():
    q, scale, offset = reference.quantize_rows(EXTREME)
    assert np.isfinite(scale).all()
    assert np.isfinite(offset).all()
    rows = quantize_rows(EXTREME)
    np.testing.assert_array_equal(unpack(rows), q)
    np.testing.assert_array_equal(rows.scale[0], scale)
    np.testing.assert_array_equal(rows.offset[0], offset)
    q, scale = quantize_weight(EXTREME)
    packed = pack_weight_int8(EXTREME)
    np.testing.assert_array_equal(packed.scales[: len(scale)], scale)
    np.testing.assert_array_equal(packed.sums[0, : len(scale)], q.sum(1, dtype=np.int32))


def test_constant_rows_are_exact():
    weight = random(20, 50)
    q_weight, scale = quantize_weight(weight)
    x = np.repeat(np.array([[7.0], [0.0], [-3.5]], np.float32), 50, axis=1)
    result = linear_int8(x, pack_weight_int8(weight))
    exact = x[:, :1].astype(np.float64) * (scale.astype(np.float64) * q_weight.sum(1))
    np.testing.assert_allclose(result, exact, rtol=4 * U, atol=0)


def test_nan_and_infinity_spoil_their_row_and_no_other():
    x, weight = random(9, 70), random(18, 70, seed=1)
    clean = linear_int8(x, pack_weight_int8(weight))
    x[3, 4], x[5, 69], x[6, 0] = np.nan, np.inf, -np.inf
    for gelu in (False, True):
        result = linear_int8(x, pack_weight_int8(weight), gelu=gelu)
        assert np.isnan(result[[3, 5, 6]]).all()
        assert np.isfinite(np.delete(result, [3, 5, 6], axis=0)).all()
    np.testing.assert_array_equal(
        np.delete(linear_int8(x, pack_weight_int8(weight)), [3, 5, 6], 0), clean[[0, 1, 2, 4, 7, 8]]
    )
    np.testing.assert_array_equal(unpack(quantize_rows(x)), reference.quantize_rows(x)[0])
    weight[2, 3] = np.nan
    result = linear_int8(np.delete(x, [3, 5, 6], axis=0), pack_weight_int8(weight))
    assert np.isnan(result[:, 2]).all()
    assert np.isfinite(np.delete(result, 2, axis=1)).all()


@pytest.mark.parametrize("e", [1, 17, 160, 1152])
@pytest.mark.parametrize("m", [1, 13])
def test_layer_norm_quantized_against_reference(m, e):
    x = random(m, e) + np.float32(3)
    q, scale, offset = reference.layer_norm_quantized(x, 1e-6)
    rows = layer_norm_quantized(x, 1e-6)
    assert np.abs(unpack(rows).astype(int) - q).max() <= 1
    assert np.mean(unpack(rows) != q) <= 0.01
    # As in test_operations: 8 U of |value| + 1, and the largest value is 127 steps and the offset.
    np.testing.assert_allclose(rows.scale[0] * 127, scale * 127, rtol=0, atol=8 * U * (np.abs(scale).max() * 127 + 4))
    np.testing.assert_allclose(rows.offset[0], offset, rtol=0, atol=8 * U * (np.abs(scale).max() * 127 + 4))


# --- arguments, rows, threads -------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "k"), [(1, 1), (7, 33), (13, 4304)])
def test_quantize_rows_after_a_factor_is_quantize_rows_of_the_product(m, k):
    x, factor = random(m, k), np.abs(random(k)) + np.float32(0.1)
    rows = quantize_rows(x, factor)
    q, scale, offset = reference.quantize_rows(x * factor)
    np.testing.assert_array_equal(unpack(rows), q)
    np.testing.assert_array_equal(rows.scale[0], scale)
    np.testing.assert_array_equal(rows.offset[0], offset)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 33), (40, 4304)])
def test_pack_weight_after_a_factor_is_pack_weight_of_the_product(n, k):
    weight, factor = random(n, k), np.abs(random(k)) + np.float32(0.1)
    for one, other in zip(pack_weight_int8(weight, factor=factor), pack_weight_int8(weight * factor), strict=True):
        np.testing.assert_array_equal(one, other)


def test_linear_int8_takes_any_layout():
    x, weight, bias, residual = random(31, 40), random(20, 40, seed=1), random(20), random(31, 20)
    expected = linear_int8(x, pack_weight_int8(weight), bias, residual=residual)
    wide, wide_residual = random(31, 100), random(31, 50)
    wide[:, 7:47], wide_residual[:, 3:23] = x, residual
    frozen = weight.copy()
    frozen.flags.writeable = False
    for packed in (
        pack_weight_int8(frozen),
        pack_weight_int8(np.asfortranarray(weight)),
        pack_weight_int8(weight.astype(np.float64)),
    ):
        np.testing.assert_array_equal(linear_int8(x, packed, bias, residual=residual), expected)
    for other in (wide[:, 7:47], np.asfortranarray(x), x.astype(np.float64), quantize_rows(x)):
        result = linear_int8(other, packed, bias, residual=wide_residual[:, 3:23])
        np.testing.assert_array_equal(result, expected)
    assert linear_int8(x, packed, bias, residual=residual, out=residual) is residual
    np.testing.assert_array_equal(residual, expected)
    assert linear_int8(x[:0], packed).shape == (0, 20)
    with pytest.raises(ValueError, match="C-contiguous"):
        linear_int8(x, packed, out=np.empty((20, 31), np.float32).T)


def test_linear_int8_rows_do_not_depend_on_each_other():
    x, weight = random(40, 300), pack_weight_int8(random(50, 300, seed=1))
    together = linear_int8(x, weight, gelu=True)
    for i in range(40):
        np.testing.assert_array_equal(linear_int8(x[i : i + 1], weight, gelu=True)[0], together[i])


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one CPU only")
def test_int8_results_do_not_depend_on_the_number_of_threads():
    x, weight, bias = random(131, 304), random(200, 304, seed=1), random(200)
    results = []
    try:
        for n in range(1, min(numba.config.NUMBA_NUM_THREADS, 8) + 1):
            set_threads(n)
            packed = pack_weight_int8(weight)
            rows = layer_norm_quantized(x, 1e-6)
            results.append([packed.panels, rows.panels, linear_int8(x, packed, bias, gelu=True)])
    finally:
        set_threads(None)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)
