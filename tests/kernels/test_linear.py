"""The float32 product and all that may follow it, against `edge_kernels.reference`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_kernels import reference, simd
from edge_kernels.linear import COLUMN_BLOCK, K_BLOCK, ROW_BLOCK, linear, pack_weight
from kernel_checks import check, linear_tolerance, random


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
