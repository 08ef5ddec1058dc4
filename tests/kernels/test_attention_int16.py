"""int16 attention against its reference, the reference against float64, and the code that LLVM makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from llvmlite import ir

from assembly import ARM, X86, assemble, spills
from edge_kernels import machine
from edge_kernels.attention.int16 import GAINS, QUERY_BLOCK, attention_int16
from edge_kernels.reference import attention as reference_attention
from edge_kernels.reference.attention import KEYS_PER_BLOCK, LARGEST_POWER, LARGEST_VALUE, score_limit
from edge_kernels.simd import int16 as simd_int16
from edge_kernels.simd.int16 import PAIR_NR
from edge_kernels.simd.ir import TILES
from edge_kernels.threads import set_threads
from kernel_checks import U, offsets, random

pytestmark = pytest.mark.every_core


def inputs(heads, d, q_lengths, kv_lengths, seed=0):
    n_q, n_kv = sum(q_lengths), sum(kv_lengths)
    q, k, v = (random(n, heads * d, seed=seed + i) for i, n in enumerate((n_q, n_kv, n_kv)))
    return q, k, v, heads, d**-0.5, offsets(*q_lengths), offsets(*kv_lengths)


def heads_of(arguments):
    """Give (place in the output, q, k, v in float64) of each sequence and head that has keys."""
    q, k, v, heads, _, q_offsets, kv_offsets = arguments
    d = q.shape[1] // heads
    for s in range(len(q_offsets) - 1):
        rows, keys = slice(*q_offsets[s : s + 2]), slice(*kv_offsets[s : s + 2])
        for h in range(heads if keys.stop > keys.start else 0):
            columns = slice(h * d, (h + 1) * d)
            yield (rows, columns), *(np.float64(a) for a in (q[rows, columns], k[keys, columns], v[keys, columns]))


def softmax64(q, k, scale):
    scores = q @ k.T * scale
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores, weights / weights.sum(axis=1, keepdims=True)


def attention64(arguments):
    out = np.zeros(arguments[0].shape)
    for place, q, k, v in heads_of(arguments):
        out[place] = softmax64(q, k, arguments[4])[1] @ v
    return out


def bounds(arguments):
    """Bound two errors, element by element: of one step in each power, and of the quantisation as a whole.

    A weighted mean moves by Σ |change of a weight| · |value - mean|. A step of a power is a LARGEST_POWER-th of the
    largest weight in its block of keys. The whole is half a step of each power; half a step of each element of a
    query and a key, which changes a score by at most E and a weight by a factor exp(±2 E); half a step of each
    value. Both with the roundings of float32: of the scores, a few of their own size, and of the mean.
    """
    one_step, whole = np.zeros(arguments[0].shape), np.zeros(arguments[0].shape)
    scale = arguments[4]
    for place, q, k, v in heads_of(arguments):
        scores, weights = softmax64(q, k, scale)
        q_half, k_half = (0.5 * np.abs(a).max(axis=1) / score_limit(q.shape[1]) for a in (q, k))
        q_size, k_size = (np.abs(a).sum(axis=1) for a in (q, k))
        score_error = np.outer(q_half, k_size + q.shape[1] * k_half) + np.outer(q_size, k_half)
        relative = np.expm1(2 * abs(scale) * score_error.max(axis=1, keepdims=True))
        rounding = 8 * U * (1 + np.abs(scores).max(axis=1, keepdims=True))
        steps = np.empty_like(weights)
        value_error = np.zeros((len(q), v.shape[1]))
        for first in range(0, len(k), KEYS_PER_BLOCK):
            block = slice(first, first + KEYS_PER_BLOCK)
            steps[:, block] = weights[:, block].max(axis=1, keepdims=True) / LARGEST_POWER
            half = 0.5 * np.abs(v[block]).max(axis=0) / LARGEST_VALUE
            value_error += weights[:, block].sum(axis=1, keepdims=True) * half
        mean = weights @ v
        distance = np.abs(v[None] - mean[:, None])  # [query, key, column]
        noise = rounding * (np.einsum("qk,qkc->qc", weights, distance) + np.abs(v).max())
        one_step[place] = np.einsum("qk,qkc->qc", steps, distance) + noise
        spread = np.einsum("qk,qkc->qc", 0.5 * steps + relative * weights, distance)
        whole[place] = 1.02 * (spread + value_error) + noise  # products of two errors
    return one_step, whole


def check(actual, expected, tolerance):
    """Compare, and say where and by how much it is off."""
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    error = np.abs(actual.astype(np.float64) - expected)
    excess = np.where(np.isnan(error), np.inf, error - tolerance)
    if actual.size and excess.max() > 0:
        at = np.unravel_index(np.argmax(excess), actual.shape)
        pytest.fail(
            f"off at {tuple(map(int, at))}: {actual[at]!r}, expected {expected[at]!r}, tolerance "
            f"{tolerance[at]:.3g}; error max {error.max():.3g}, mean {error.mean():.3g}"
        )


def check_all(arguments):
    """The kernel against the reference, and both against float64."""
    one_step, whole = bounds(arguments)
    expected, result = reference_attention.attention_int16(*arguments), attention_int16(*arguments)
    check(result, expected, one_step)
    exact = attention64(arguments)
    check(expected, exact, whole)
    check(result, exact, whole + one_step)


# --- the numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 7, 8, 72, 128])
@pytest.mark.parametrize(
    "q_lengths, kv_lengths",
    [
        ((1,), (1,)),
        ((17, 1, 40), (17, 1, 2)),
        ((5, 50), (400, 3)),
        ((30, 31, 20), (KEYS_PER_BLOCK - 1, KEYS_PER_BLOCK, KEYS_PER_BLOCK + 1)),
        ((QUERY_BLOCK + 1, 2), (150, 7)),
    ],
)
def test_attention_int16_against_reference(d, q_lengths, kv_lengths):
    check_all(inputs(3, d, q_lengths, kv_lengths))


def test_attention_int16_of_model_shapes_against_reference():
    check_all(inputs(2, 72, (260,), (260,)))
    check_all(inputs(2, 128, (64, 64), (300, 253)))


def test_attention_int16_without_queries_or_keys():
    check_all(inputs(2, 16, (0, 3, 4), (5, 0, 2)))
    check_all(inputs(2, 16, (0,), (0,)))
    assert attention_int16(*[random(3, 8)] * 3, 2, 0.5, offsets(), offsets()).shape == (3, 8)
    result = attention_int16(*inputs(2, 16, (3, 4, 2), (5, 0, 2)))
    assert not result[3:7].any()
    assert np.abs(result).sum(axis=1).astype(bool).tolist() == [True] * 3 + [False] * 4 + [True] * 2


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_attention_int16_with_large_scores_against_reference(size):
    """Softmax is nearly a choice; what rounding of the scores does is in the bound."""
    q, k, v, heads, _, *rest = inputs(2, 48, (37,), (411,))
    largest = max(np.abs(q[:, c : c + 48] @ k[:, c : c + 48].T).max() for c in (0, 48))
    arguments = (q, k, v, heads, float(size / largest), *rest)
    check(attention_int16(*arguments), reference_attention.attention_int16(*arguments), bounds(arguments)[0])


def test_attention_int16_whose_scores_grow_from_block_to_block_against_reference():
    """The maximum rises in every block, by more than the range of exp in some."""
    n = 4 * KEYS_PER_BLOCK + 5
    k = np.repeat(np.linspace(-400, 400, n, dtype=np.float32)[:, None], 8, axis=1)
    for sign in (1, -1):
        check_all((np.ones((20, 8), np.float32), sign * k, random(n, 8), 1, 0.125, offsets(20), offsets(n)))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-30])
def test_attention_int16_takes_any_scale_against_reference(scale):
    q, k, v, heads, _, *rest = inputs(2, 9, (21,), (133,))
    check_all((q, k, v, heads, scale, *rest))


@pytest.mark.parametrize("d", [1, 2, 7, 72, 128, 1000])
def test_the_largest_integers_do_not_overflow_against_reference(d):
    """All integers at their limits, of either sign: equal values come out as they are, whatever the weights."""
    limit = score_limit(d)
    assert d * limit**2 < 2**31
    assert KEYS_PER_BLOCK * LARGEST_POWER * LARGEST_VALUE < 2**31
    n = 2 * KEYS_PER_BLOCK + 3
    for q_sign, k_sign, v_sign in ((1, 1, 1), (1, -1, 1), (-1, -1, -1), (1, 1, -1)):
        q, k, v = (np.full((n, d), sign, np.float32) for sign in (q_sign, k_sign, v_sign))
        arguments = (q, k, v, 1, d**-0.5, offsets(n), offsets(n))
        for result in (attention_int16(*arguments), reference_attention.attention_int16(*arguments)):
            np.testing.assert_allclose(result, v, rtol=8 * U, atol=0)
    # One key against all others: its score is d, theirs -d, which only right sums tell.
    k = np.full((n, d), -1, np.float32)
    k[-2] = 1
    v = np.arange(n, dtype=np.float32)[:, None] * np.ones(d, np.float32)
    result = attention_int16(np.ones((3, d), np.float32), k, v, 1, 60 / d, offsets(3), offsets(n))
    np.testing.assert_allclose(result, n - 2, rtol=1e-3)


def distribution(kind):
    """One head of 72, 300 queries and 1024 keys."""
    generator = np.random.default_rng(7)
    q, k, v = (generator.standard_normal((n, 72)).astype(np.float32) for n in (300, 1024, 1024))
    scale = 72**-0.5
    if kind == "peaked":
        scale *= 8
    elif kind == "sink":  # key 517 has 90 % of the weight of every query, the others what is left in equal parts
        k *= np.float32(0.02)
        q[:, 0], k[:, 0] = 3, 0
        k[517] = 0
        k[517, 0] = np.log(9 * 1024) / scale / 3
        v += np.float32(0.5)
    elif kind == "outliers":
        v[generator.integers(0, 1024, 20), generator.integers(0, 72, 20)] *= 30
    return q, k, v, 1, scale, offsets(300), offsets(1024)


# Errors relative to the root mean square of the exact result: their own root mean square, and the largest. Measured:
# 0.8e-3 and 4e-3, 1.0e-3 and 9e-3, 1.5e-3 and 4e-3, 1.6e-3 and 35e-3.
@pytest.mark.parametrize(
    "kind, typical, largest",
    [("normal", 1.5e-3, 8e-3), ("peaked", 1.5e-3, 2e-2), ("sink", 2.5e-3, 8e-3), ("outliers", 2.5e-3, 6e-2)],
)
def test_accuracy_of_attention_int16_against_reference(kind, typical, largest):
    arguments = distribution(kind)
    exact = attention64(arguments)
    size = np.sqrt(np.mean(exact**2))
    for run in (reference_attention.attention_int16, attention_int16):
        error = (run(*arguments) - exact) / size
        assert np.sqrt(np.mean(error**2)) <= typical
        assert np.abs(error).max() <= largest


@numba.njit
def powers_of(scores, cells, state, powers):
    simd_int16.powers_panel(scores, 0, cells, state, 0, powers, 0)


def test_powers_are_within_a_step_of_the_formula_against_reference():
    cells, sharpness = 4000, random(PAIR_NR) ** 2
    scores = -np.abs(random(2 * cells, PAIR_NR, scale=6))
    scores[0] = 0
    scores[7] = -np.inf
    state = np.zeros((simd_int16.STATE_ROWS, PAIR_NR), np.float32)
    state[simd_int16.QUERY_SCALE] = sharpness
    state[simd_int16.MAXIMUM] = simd_int16.LOWEST
    powers = np.empty(cells * PAIR_NR, np.int32)
    powers_of(scores.reshape(-1), cells, state.reshape(-1), powers)
    found = powers.view(np.int16).reshape(cells, PAIR_NR, 2).transpose(0, 2, 1).reshape(2 * cells, PAIR_NR)
    exact = LARGEST_POWER * np.exp2(scores * sharpness.astype(np.float64))
    assert found.min() == 0
    assert found.max() == LARGEST_POWER
    assert (np.abs(found - exact) <= 0.5 + 0.1).all()  # the polynomial errs by a twentieth, the exponent as much
    np.testing.assert_allclose(state[simd_int16.TOTAL], found.sum(axis=0, dtype=np.int64), rtol=2 * U)


# --- what is not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", [0, 3, KEYS_PER_BLOCK + 12])
def test_what_is_not_finite_becomes_nan_in_all_that_depends_on_it(bad, key):
    q_lengths, kv_lengths, d = (20, 5), (KEYS_PER_BLOCK + 13, 4), 9
    q, k, v, *rest = inputs(2, d, q_lengths, kv_lengths)
    clean = attention_int16(q, k, v, *rest)

    def run(**changed):
        arguments = {"q": q, "k": k, "v": v} | changed
        result = attention_int16(*arguments.values(), *rest)
        np.testing.assert_array_equal(
            np.isnan(result), np.isnan(reference_attention.attention_int16(*arguments.values(), *rest))
        )
        np.testing.assert_array_equal(result[~np.isnan(result)], clean[~np.isnan(result)])
        return np.isnan(result)

    spoiled = q.copy()
    spoiled[4, 1] = bad
    assert np.argwhere(run(q=spoiled)).tolist() == [[4, c] for c in range(d)]
    spoiled = k.copy()
    spoiled[key, d + 8] = bad
    expected = np.zeros(q.shape, bool)
    expected[:20, d:] = True
    np.testing.assert_array_equal(run(k=spoiled), expected)
    spoiled = v.copy()
    spoiled[key, 5] = bad
    expected = np.zeros(q.shape, bool)
    expected[:20, 5] = True
    np.testing.assert_array_equal(run(v=spoiled), expected)


def test_scores_that_overflow_become_nan():
    q, k, v, heads, _, *rest = inputs(1, 8, (5,), (140,))
    result = attention_int16(q, k * np.float32(1e38), v, heads, 1e38, *rest)
    assert np.isnan(result).all()
    assert np.isfinite(attention_int16(q * np.float32(1e15), k * np.float32(1e15), v, heads, 1.0, *rest)).all()


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e30])
def test_attention_int16_of_extreme_sizes(size):
    q, k, v, heads, scale, *rest = inputs(1, 8, (5,), (140,))
    tiny = np.float32(size)
    mean = v.astype(np.float64).mean(axis=0)
    if size < 1:
        result = attention_int16(q * tiny, k * tiny, v, heads, scale, *rest)
        np.testing.assert_allclose(result, np.tile(mean, (5, 1)), rtol=0, atol=2e-3)
    result = attention_int16(q * 0, k, v * tiny, heads, scale, *rest)
    np.testing.assert_allclose(result, np.tile(mean, (5, 1)) * size, rtol=0, atol=2e-3 * size + 1e-35)


def test_heads_too_wide_for_the_sums_are_refused():
    widest = (2**31 - 1) // 127**2
    assert score_limit(widest) == 127
    assert score_limit(1) == 2**15 - 1
    wide = np.zeros((1, widest + 1), np.float32)
    with pytest.raises(ValueError, match=f"heads of {widest + 1} columns"):
        attention_int16(wide, wide, wide, 1, 1.0, offsets(1), offsets(1))


# --- arguments, rows, threads -------------------------------------------------------------------------------


def test_attention_int16_takes_any_layout():
    q, k, v, *rest = inputs(3, 32, (50, 20), (45, 25))
    expected = attention_int16(q, k, v, *rest)
    together = np.concatenate([q, k, v], axis=1)
    frozen = q.copy()
    frozen.flags.writeable = False
    for one, two, three in (
        np.split(together, 3, axis=1),
        (frozen, np.asfortranarray(k), v.astype(np.float64)),
    ):
        np.testing.assert_array_equal(attention_int16(one, two, three, *rest), expected)


def test_attention_int16_sequences_do_not_depend_on_each_other():
    lengths, keys = (QUERY_BLOCK + 40, 50), (257, 43)
    q, k, v, heads, scale, *ends = inputs(2, 40, lengths, keys)
    together = attention_int16(q, k, v, heads, scale, *ends)
    first, second = slice(0, lengths[0]), slice(lengths[0], None)
    for rows, kv in ((first, slice(0, 257)), (second, slice(257, None)), (slice(7, 8), slice(0, 257))):
        n_q, n_kv = len(q[rows]), len(k[kv])
        alone = attention_int16(q[rows], k[kv], v[kv], heads, scale, offsets(n_q), offsets(n_kv))
        np.testing.assert_array_equal(alone, together[rows])


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one CPU only")
def test_attention_int16_does_not_depend_on_the_number_of_threads():
    arguments = inputs(4, 40, (QUERY_BLOCK + 31, 100), (297, 3))
    results = []
    try:
        for n in range(1, min(numba.config.NUMBA_NUM_THREADS, 8) + 1):
            set_threads(n)
            results.append(attention_int16(*arguments))
    finally:
        set_threads(None)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


# --- machines -----------------------------------------------------------------------------------------------


def test_every_instruction_set_has_its_pair_tile():
    assert list(simd_int16.PAIR_TILES) == list(machine.ISAS)
    assert simd_int16.PAIR_TILES[machine.isa()].gains == GAINS
    for name, tile in simd_int16.PAIR_TILES.items():
        registers = 32 if name.startswith(("amx", "avx512", "neon")) else 16
        assert tile.rows * tile.vectors + tile.vectors + 2 <= registers
        assert tile.width == TILES[name].width, "float32 and int32 vectors are one size"


def assembly(name, triple, features):
    """Compile the sums of a tile by themselves for some machine; gives the instructions."""
    tile = simd_int16.PAIR_TILES[name]
    module = ir.Module()
    word, index = ir.IntType(32).as_pointer(), ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [word, index, index, word, index, word]), "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    matrix, row_stride, cell_stride, panel, cells, out = function.args
    starts = [builder.gep(matrix, [builder.mul(row_stride, ir.Constant(index, i))]) for i in range(tile.rows)]
    for s, sums in enumerate(simd_int16.emit_pair_sums(builder, tile, starts, cell_stride, panel, cells)):
        address = builder.gep(out, [ir.Constant(index, s * tile.width)])
        builder.store(sums, builder.bitcast(address, sums.type.as_pointer())).align = 4
    builder.ret_void()
    return assemble(module, triple, features)


@pytest.mark.parametrize(
    "name, triple, features, mnemonic, register",
    [
        ("avx512vnni", X86, "+avx512f,+avx512bw,+avx512vnni", "vpdpwssds", "%zmm"),
        ("avxvnni", X86, "+avx2,+fma,+avxvnni", "vpdpwssds", "%ymm"),
        ("avx512", X86, "+avx512f,+avx512bw", "vpmaddwd", "%zmm"),
        ("avx2", X86, "+avx2,+fma", "vpmaddwd", "%ymm"),
        ("portable", X86, "", "pmaddwd", "%xmm"),
        ("neon", ARM, "+neon", "smull", ".4s"),
        ("neon-dot", ARM, "+neon,+dotprod", "smull", ".4s"),
    ],
)
def test_the_sums_compile_to_their_instruction(name, triple, features, mnemonic, register):
    """Machines that are not here: the code is made and read, not run."""
    tile = simd_int16.PAIR_TILES[name]
    lines = assembly(name, triple, features)
    found = [line for line in lines if mnemonic in line and register in line]
    assert len(found) >= tile.rows * tile.vectors
    assert len(spills(lines)) <= 16, "sums are spilled:\n" + "\n".join(spills(lines))


OTHERS = [n for n, f in machine.ISAS.items() if f <= machine.cpu_features() and n != machine.isa()]


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHERS)
def test_the_other_instruction_sets_of_this_machine_pass_too(isa):
    """Run the comparisons of this file once more on each."""
    environment = os.environ | {"EDGE_RUNTIME_ISA": isa, "PYTHONPATH": str(Path(machine.__file__).parent.parent)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "against_reference"]
    result = subprocess.run(
        [*command, str(Path(__file__))], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
