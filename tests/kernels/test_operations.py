"""The reference against float64, the smaller operations against the reference, and all of them on threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numba
import numpy as np
import pytest

from edge_kernels.attention.float32 import attention
from edge_kernels.linear.dispatch import pack_float_weight
from edge_kernels.linear.float32 import linear, pack_weight
from edge_kernels.reference import operations as reference
from edge_kernels.rows.norm import layer_norm
from edge_kernels.rows.patch_embed import patch_embed
from edge_kernels.simd import float32 as simd
from edge_kernels.simd.ir import TILES
from edge_kernels.threads import set_threads
from kernel_checks import (
    ATTENTION_PER_VALUE,
    EXP2_RELATIVE,
    GELU_PER_X,
    NORM_PER_VALUE,
    U,
    check,
    linear_tolerance,
    offsets,
    random,
    score_tolerance,
)

pytestmark = pytest.mark.every_core

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
    whole = np.arange(-126, 128)
    # ldexp, not np.exp2: NumPy's float32 exp2 on AVX-512 machines is off by one rounding at 2^127.
    np.testing.assert_array_equal(exp2_of(whole.astype(np.float32)), np.ldexp(np.float32(1), whole))


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


# --- patch embedding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
def test_patch_embed_against_reference(with_bias):
    pixels, weight, table = random(37, 588), random(160, 588, seed=1, scale=588**-0.5), random(49, 160)
    table.flags.writeable = False
    ids = np.random.default_rng(0).integers(0, 49, 37)
    bias = random(160) if with_bias else None
    expected = reference.patch_embed(pixels, weight, bias, table, ids)
    actual = patch_embed(pixels, pack_float_weight(weight), bias, table, ids)
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
    for name, tile in TILES.items():
        available = 32 if name.startswith(("amx", "avx512", "neon")) else 16
        assert tile.rows * tile.vectors + tile.vectors + 1 <= available


FILES = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("operations", "linear", "attention")]


@pytest.mark.slow
def test_the_portable_tile_passes_too():
    """Run the comparisons of float32 once more on code for the plainest CPU of this architecture."""
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
    result = subprocess.run([*command, *FILES], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
