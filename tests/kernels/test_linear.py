"""The float32 products and all that may follow them, against `edge_kernels.reference.operations`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_kernels.linear import bf16_split as split_blocks
from edge_kernels.linear import float32 as blocks
from edge_kernels.linear.bf16_split import IS_POSSIBLE, linear_split, pack_split
from edge_kernels.linear.float32 import linear, pack_weight
from edge_kernels.reference import operations as reference
from edge_kernels.simd.ir import MR, NR
from kernel_checks import check, linear_tolerance, random

pytestmark = pytest.mark.every_core

needs_amx = pytest.mark.skipif(
    not IS_POSSIBLE, reason="this machine has no AMX, or EDGE_RUNTIME_ISA names another set"
)

each_product = pytest.mark.parametrize(
    ("pack", "multiply"),
    [
        pytest.param(pack_weight, linear, id="float32"),
        pytest.param(pack_split, linear_split, id="split", marks=needs_amx),
    ],
)


def check_linear(pack, multiply, m, n, k, *, with_bias=True, gelu=False, with_residual=False, seed=0):
    x, weight = random(m, k, seed=seed), random(n, k, seed=seed + 1, scale=k**-0.5)
    bias = random(n, seed=seed) if with_bias else None
    residual = random(m, n, seed=seed + 2) if with_residual else None
    expected = reference.linear(x, weight, bias, gelu=gelu, residual=residual)
    actual = multiply(x, pack(weight), bias, gelu=gelu, residual=residual)
    check(actual, expected, linear_tolerance(x, weight, expected))


@each_product
@pytest.mark.parametrize("k", [1, 3, 17, 160, 304, 1152])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 100, 304])
@pytest.mark.parametrize("m", [1, 5, 6, 7, 64, 131])
def test_linear_against_reference(pack, multiply, m, n, k):
    check_linear(pack, multiply, m, n, k)


@each_product
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_epilogue_against_reference(pack, multiply, with_bias, gelu, with_residual):
    check_linear(pack, multiply, 131, 100, 304, with_bias=with_bias, gelu=gelu, with_residual=with_residual)


@each_product
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 2 * MR + 1),
    n=st.integers(1, 2 * NR + 1),
    k=st.integers(1, 40),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_linear_of_any_small_size_against_reference(pack, multiply, m, n, k, flags):
    check_linear(pack, multiply, m, n, k, with_bias=flags[0], gelu=flags[1], with_residual=flags[2])


@pytest.mark.parametrize(
    ("pack", "multiply", "m", "n", "k"),
    [
        pytest.param(
            *product, module.ROW_BLOCK + more_m, module.COLUMN_BLOCK + more_n, module.K_BLOCK + more_k, marks=marks
        )
        for product, module, marks in (
            ((pack_weight, linear), blocks, ()),
            ((pack_split, linear_split), split_blocks, needs_amx),
        )
        for more_m in (-1, 1)
        for more_n in (0, 1)
        for more_k in (0, 1)
    ],
)
def test_linear_at_block_borders_against_reference(pack, multiply, m, n, k):
    check_linear(pack, multiply, m, n, k, gelu=True, with_residual=True)


@each_product
def test_linear_writes_to_out_even_when_it_is_the_residual(pack, multiply):
    x, weight, stream = random(70, 48), random(33, 48, seed=1), random(70, 33)
    expected = multiply(x, pack(weight), residual=stream)
    result = multiply(x, pack(weight), residual=stream, out=stream)
    assert result is stream
    np.testing.assert_array_equal(stream, expected)


@each_product
def test_linear_refuses_an_out_it_would_have_to_copy(pack, multiply):
    with pytest.raises(ValueError, match="C-contiguous"):
        multiply(random(4, 8), pack(random(6, 8)), out=np.empty((6, 4), np.float32).T)


@each_product
def test_linear_takes_any_layout(pack, multiply):
    x, weight, bias, residual = random(31, 40), random(20, 40, seed=1), random(20), random(31, 20)
    expected = multiply(x, pack(weight), bias, residual=residual)

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
        np.testing.assert_array_equal(multiply(other, pack(weight), bias, residual=residual), expected)
    for other in (frozen, np.asfortranarray(weight), weight.astype(np.float64)):
        np.testing.assert_array_equal(multiply(x, pack(other), frozen_bias, residual=residual), expected)
    np.testing.assert_array_equal(multiply(x, pack(weight), bias, residual=wide_residual[:, 3:23]), expected)
    np.testing.assert_array_equal(multiply(x[::-1], pack(weight), bias, residual=residual[::-1])[::-1], expected)


@each_product
def test_linear_of_no_rows_is_empty(pack, multiply):
    assert multiply(np.empty((0, 8), np.float32), pack(random(6, 8))).shape == (0, 6)


@each_product
def test_linear_rows_do_not_depend_on_each_other(pack, multiply):
    x, weight = random(40, 300), pack(random(50, 300, seed=1))
    together = multiply(x, weight, gelu=True)
    for i in range(40):
        np.testing.assert_array_equal(multiply(x[i : i + 1], weight, gelu=True)[0], together[i])


def test_linear_lets_nan_and_infinity_through():
    x, weight = np.abs(random(9, 20)), np.abs(random(18, 20, seed=1))
    x[3, 4], x[5, 6] = np.nan, np.inf
    for gelu in (False, True):
        result = linear(x, pack_weight(weight), gelu=gelu)
        assert np.isnan(result[3]).all()
        assert np.isposinf(result[5]).all()
        assert np.isfinite(np.delete(result, [3, 5], axis=0)).all()


@needs_amx
@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e20])
def test_three_parts_are_the_number(factor):
    x, one = random(70, 64) * np.float32(factor), np.eye(64, dtype=np.float32)
    np.testing.assert_array_equal(linear_split(x, pack_split(one)), x)
    np.testing.assert_array_equal(linear_split(one, pack_split(x)), x.T)


@needs_amx
def test_weights_of_sixteen_bits_have_two_parts():
    weight = random(40, 70)
    assert pack_split(weight).parts == 3
    assert pack_split(weight.astype(np.float16).astype(np.float32)).parts == 2
    mixed = weight.astype(np.float16).astype(np.float32)
    mixed[39, 69] = np.float32(1 + 2**-12 + 2**-23)  # the first row does not tell
    packed = pack_split(mixed)
    assert packed.parts == 3
    x = random(5, 70, seed=1)
    check(linear_split(x, packed), reference.linear(x, mixed), linear_tolerance(x, mixed, reference.linear(x, mixed)))


@needs_amx
@pytest.mark.parametrize("k", [256, 1152, 4304])
def test_split_products_are_as_near_to_the_true_ones_as_float32(k):
    x, weight = random(200, k), random(150, k, seed=1, scale=k**-0.5)
    true = x.astype(np.float64) @ weight.astype(np.float64).T
    errors = [
        np.sqrt(np.mean(np.square(y - true)))
        for y in (linear_split(x, pack_split(weight)), linear(x, pack_weight(weight)))
    ]
    assert errors[0] <= errors[1], errors


@needs_amx
def test_split_products_do_not_hide_what_is_not_finite():
    x, weight = np.abs(random(9, 20)), np.abs(random(18, 20, seed=1))
    x[3, 4], x[5, 6] = np.nan, np.inf
    result = linear_split(x, pack_split(weight))
    assert not np.isfinite(result[[3, 5]]).any()
    assert np.isfinite(np.delete(result, [3, 5], axis=0)).all()
