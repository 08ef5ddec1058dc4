"""int16 attention as LLVM IR: quantised rows, score and value tiles, powers as integers.

What enters: flat arrays with element offsets, inside compiled code. What leaves: numba intrinsics that
`attention_int16` puts its loops around, and the table that says which machine gets which tile and whether it gains.

Integers lie in *pairs*: int32 words of two int16, the one with the smaller index in the lower half. One instruction
multiplies pair by pair and sums each pair into an int32 lane (pmaddwd and an addition; vpdpwssds does both), so a
register tile takes words where that of `simd.float32` takes floats. `reference.attention.attention_int16` defines
the numbers.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_kernels.machine import isa
from edge_kernels.reference.attention import LARGEST_POWER
from edge_kernels.simd.float32 import ROUND, ROUND_TO_EXPONENT, emit_exp2
from edge_kernels.simd.int8 import multiply_pairs
from edge_kernels.simd.ir import (
    FLOAT,
    INT,
    SHORT,
    TILE,
    VECTOR,
    Body,
    address_of,
    call,
    constant,
    data_of,
    each_vector,
    element_at,
    elements_at,
    index,
    larger,
    load,
    loop,
    multiply_add,
    signature_of,
    splat,
    store,
)


class PairTile(NamedTuple):
    """A tile of `rows` × (`vectors` · `width`) int32 sums of pairs; `gains`: it beats the float32 tile."""

    instruction: str
    rows: int
    vectors: int
    width: int
    gains: bool


# By the names of `machine.ISAS`; registers as in `simd.int8.DOT_TILES`, widths as in `ir.TILES`. Where it gains:
# a vector of pairs holds twice as many products as one of float32. With VNNI they take one instruction, as there;
# without, pmaddwd and an addition, which pays where more units add integers than multiply floats: 256-bit units of
# AMD and Intel (measured on Zen 3), not the two of AVX-512 (counted). NEON's smlal takes four products, as fmla does.
PAIR_TILES: dict[str, PairTile] = {
    **dict.fromkeys(("amx", "avx512vnni"), PairTile("vpdpwssds", rows=8, vectors=3, width=16, gains=True)),
    "avx512": PairTile("pairs", rows=8, vectors=3, width=16, gains=False),
    "avxvnni": PairTile("vpdpwssds", rows=6, vectors=2, width=8, gains=True),
    "avx2": PairTile("pairs", rows=6, vectors=2, width=8, gains=True),
    **dict.fromkeys(("neon-i8mm", "neon-dot", "neon", "portable"), PairTile("pairs", 4, 2, 4, gains=False)),
}
PAIR_TILE = PAIR_TILES[isa()]

PAIR_MR = PAIR_TILE.rows
PAIR_NR = PAIR_TILE.vectors * PAIR_TILE.width

# Rows of PAIR_NR float32 that describe the softmax of a panel.
STATE_ROWS = 6
MAXIMUM, TOTAL, QUERY_SCALE, BLOCK_MAXIMUM, KEEP, TAKE = range(STATE_ROWS)

_INTS = ir.VectorType(INT, TILE.width)
LOWEST = float(np.finfo(np.float32).min)  # where maxima start: finite, since (-inf - maximum) · 0 would be NaN

# exp2 on [-1/2, 1/2]: minimax in relative error, 2.9e-6 (a twentieth of a step at LARGEST_POWER).
_POWER_POLYNOMIAL = (0.00958285294, 0.0559064262, 0.240240991, 0.693124175)


# --- building blocks ----------------------------------------------------------------------------------------


def _bits(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Reinterpret a float, or each of a vector, as int32."""
    return builder.bitcast(value, _INTS if isinstance(value.type, ir.VectorType) else INT)


def _rounded(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Round to an integer within int16, halves to even; it is the lower half of the word."""
    return _bits(builder, builder.fadd(value, constant(value.type, ROUND)))


def _pair(builder: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    """Put the lower halves of two words into one."""
    upper = builder.shl(second, constant(first.type, 16))
    return builder.or_(builder.and_(first, constant(first.type, 0xFFFF)), upper)


def _magnitude(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Emit the bits of |value|: as integers they keep the order, infinity above all numbers and NaN above that."""
    bits = _bits(builder, value)
    return builder.and_(bits, constant(bits.type, 0x7FFFFFFF))


def _larger_int(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Emit max(a, b) of int32."""
    return builder.select(builder.icmp_signed(">", a, b), a, b)


def _power(builder: ir.IRBuilder, difference: ir.Value, scale: ir.Value) -> ir.Value:
    """Emit LARGEST_POWER · 2^(difference · scale) for a vector of differences ≤ 0 and scales ≥ 0, rounded.

    The result is in the lower 16 bits of each word, at most LARGEST_POWER; NaN gives 0.
    """
    # LARGEST_POWER goes into the exponent. Anything below 2^-2 rounds to 0 anyway.
    x = multiply_add(builder, difference, scale, constant(VECTOR, math.log2(LARGEST_POWER)))
    x = larger(builder, x, constant(VECTOR, -2.0))
    shifted = builder.fadd(x, constant(VECTOR, ROUND_TO_EXPONENT))
    rest = builder.fsub(x, builder.fsub(shifted, constant(VECTOR, ROUND_TO_EXPONENT)))  # exact, in [-1/2, 1/2]
    result = constant(VECTOR, _POWER_POLYNOMIAL[0])
    for coefficient in (*_POWER_POLYNOMIAL[1:], 1.0):
        result = multiply_add(builder, result, rest, constant(VECTOR, coefficient))
    exponent = builder.bitcast(builder.shl(_bits(builder, shifted), constant(_INTS, 23)), VECTOR)
    return _bits(builder, multiply_add(builder, result, exponent, constant(VECTOR, ROUND)))


def _add_pairs(builder: ir.IRBuilder, tile: PairTile, sums: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """Emit sums + the products of the pairs in the words of a and b."""
    if tile.instruction == "vpdpwssds":
        # The saturating one: no sum comes near the limits, and LLVM does not split it again, as it does vpdpwssd on
        # processors where that has a longer latency.
        return call(builder, f"llvm.x86.avx512.vpdpwssds.{32 * tile.width}", sums.type, [sums, a, b])
    shorts = ir.VectorType(SHORT, 2 * tile.width)
    return multiply_pairs(builder, sums, builder.bitcast(a, shorts), builder.bitcast(b, shorts))


def emit_pair_sums(
    builder: ir.IRBuilder, tile: PairTile, row_starts: Sequence[ir.Value], cell_stride: ir.Value, panel: ir.Value,
    cells: ir.Value,
) -> list[ir.Value]:  # fmt: skip
    """Emit the hot loop: int32 sums over `cells` pairs, [row][vector], from addresses of words."""
    ints = ir.VectorType(INT, tile.width)

    def step(cell: ir.Value, carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
        sums, at = list(carried[:-1]), carried[-1]
        start = address_of(builder, panel, builder.mul(cell, index(tile.vectors * tile.width)), element=INT)
        at_vector = (address_of(builder, start, index(v * tile.width), element=INT) for v in range(tile.vectors))
        operands = [load(builder, address, ints) for address in at_vector]
        for i, row_start in enumerate(row_starts):
            word = load(builder, address_of(builder, row_start, at, element=INT), INT)
            factor = splat(builder, word, tile.width)
            for v, operand in enumerate(operands):
                sums[i * tile.vectors + v] = _add_pairs(builder, tile, sums[i * tile.vectors + v], factor, operand)
        return [*sums, builder.add(at, cell_stride)]

    zeros = [constant(ints, 0)] * (len(row_starts) * tile.vectors)
    return loop(builder, index(0), cells, 1, [*zeros, index(0)], step)[:-1]


def _scaled_sums(
    builder: ir.IRBuilder, matrix: ir.Value, row_stride: ir.Value, cell_stride: ir.Value, rows: ir.Value,
    panel: ir.Value, cells: ir.Value, scales: ir.Value,
) -> list[ir.Value]:  # fmt: skip
    """Emit the sums of PAIR_MR rows in float32, each times the scale of its row, [row][vector].

    Where the matrix is shorter (`rows` < PAIR_MR), its last row is repeated, so nothing outside is read.
    """
    last = builder.sub(rows, index(1))
    indices = [builder.select(builder.icmp_signed("<", index(i), last), index(i), last) for i in range(PAIR_MR)]
    starts = [address_of(builder, matrix, builder.mul(i, row_stride), element=INT) for i in indices]
    sums = [builder.sitofp(s, VECTOR) for s in emit_pair_sums(builder, PAIR_TILE, starts, cell_stride, panel, cells)]
    factors = [splat(builder, load(builder, address_of(builder, scales, i), FLOAT)) for i in indices]
    return [builder.fmul(sum_, factors[s // PAIR_TILE.vectors]) for s, sum_ in enumerate(sums)]


def _state_row(builder: ir.IRBuilder, state: ir.Value, row: int) -> list[ir.Value]:
    """Return the addresses of the vectors of a row of a panel's state."""
    return [address_of(builder, state, index(row * PAIR_NR + v * TILE.width)) for v in range(PAIR_TILE.vectors)]


# --- quantising ---------------------------------------------------------------------------------------------


@intrinsic
def largest_magnitude(typing_context, x, offset, n):
    """Return the largest |value| of x[offset : offset + n]; infinity or NaN where a value is not finite."""

    def generate(context, builder, signature, args):
        row, n = element_at(context, builder, signature, args, 0), args[2]

        def take(type_: ir.Type) -> Body:
            def run(j: ir.Value, largest: Sequence[ir.Value]) -> Sequence[ir.Value]:
                value = load(builder, address_of(builder, row, j), type_)
                return [_larger_int(builder, _magnitude(builder, value), largest[0])]

            return run

        whole = builder.mul(builder.sdiv(n, index(TILE.width)), index(TILE.width))
        (vector,) = loop(builder, index(0), whole, TILE.width, [constant(_INTS, 0)], take(VECTOR))
        largest = ir.Constant(INT, 0)
        for lane in range(TILE.width):
            largest = _larger_int(builder, largest, builder.extract_element(vector, ir.Constant(INT, lane)))
        (largest,) = loop(builder, whole, n, 1, [largest], take(FLOAT))
        return builder.bitcast(largest, FLOAT)

    return signature_of(x, offset, n, returns=types.float32), generate


@intrinsic
def raise_magnitudes(typing_context, largest, largest_offset, x, offset, n):
    """Raise largest[largest_offset + j] to |x[offset + j]| for j < n; infinity stays, and NaN even over infinity."""

    def generate(context, builder, signature, args):
        out, row = elements_at(context, builder, signature, args, (0, 2))

        def emit(j: ir.Value, type_: ir.Type) -> None:
            at = address_of(builder, out, j)
            magnitude = _magnitude(builder, load(builder, address_of(builder, row, j), type_))
            store(builder, _larger_int(builder, magnitude, load(builder, at, magnitude.type)), at)

        each_vector(builder, args[4], emit)
        return context.get_dummy_value()

    return signature_of(largest, largest_offset, x, offset, n), generate


@intrinsic
def quantize_row_pairs(typing_context, x, offset, n, factor, pairs, pairs_offset):
    """Write x[offset + j] · factor for j < n, rounded, as pairs of successive j.

    If n is odd, the upper half of the last word is left alone. Values beyond ±32767 and NaN give any integer.
    """

    def generate(context, builder, signature, args):
        row, (n, factor) = element_at(context, builder, signature, args, 0), args[2:4]
        words = element_at(context, builder, signature, args, 4)
        kinds = {FLOAT: (factor, SHORT), VECTOR: (splat(builder, factor), ir.VectorType(SHORT, TILE.width))}

        def emit(j: ir.Value, type_: ir.Type) -> None:
            by, shorts = kinds[type_]
            result = _rounded(builder, builder.fmul(load(builder, address_of(builder, row, j), type_), by))
            store(builder, builder.trunc(result, shorts), address_of(builder, words, j, element=SHORT), 2)

        each_vector(builder, n, emit)
        return context.get_dummy_value()

    return types.none(x, types.int64, types.int64, types.float32, pairs, types.int64), generate


@intrinsic
def quantize_column_pairs(typing_context, x, first, second, n, factors, factors_offset, pairs, pairs_offset):
    """Write x[first + j] and x[second + j], both times factors[factors_offset + j] and rounded, as pair j < n."""

    def generate(context, builder, signature, args):
        x = data_of(context, builder, signature, args, 0)
        rows = [address_of(builder, x, start) for start in args[1:3]]
        factors = element_at(context, builder, signature, args, 4)
        words = element_at(context, builder, signature, args, 6)

        def emit(j: ir.Value, type_: ir.Type) -> None:
            factor = load(builder, address_of(builder, factors, j), type_)
            values = (load(builder, address_of(builder, row, j), type_) for row in rows)
            pair = _pair(builder, *(_rounded(builder, builder.fmul(value, factor)) for value in values))
            store(builder, pair, address_of(builder, words, j, element=INT))

        each_vector(builder, args[3], emit)
        return context.get_dummy_value()

    return signature_of(x, first, second, n, factors, factors_offset, pairs, pairs_offset), generate


# --- products and softmax -----------------------------------------------------------------------------------


@intrinsic
def score_tile(
    typing_context, keys, keys_offset, row_stride, rows, queries, queries_offset, cells, scales, scales_offset,
    state, state_offset, scores, scores_offset,
):  # fmt: skip
    """Multiply PAIR_MR keys with a panel of queries, and raise the panel's BLOCK_MAXIMUM to the results.

    scores[i, j] = float32(Σ over c < cells of keys[i · row_stride + c] · queries[c · PAIR_NR + j]) · scales[i]

    for i < PAIR_MR, where rows from `rows` on repeat the last: without the queries' scales.
    """

    def generate(context, builder, signature, args):
        _, _, row_stride, rows, _, _, cells, *_ = args
        keys, queries = elements_at(context, builder, signature, args, (0, 4))
        scales, state, scores = elements_at(context, builder, signature, args, (7, 9, 11))
        results = _scaled_sums(builder, keys, row_stride, index(1), rows, queries, cells, scales)
        for s, score in enumerate(results):
            store(builder, score, address_of(builder, scores, index(s * TILE.width)))
        for v, at in enumerate(_state_row(builder, state, BLOCK_MAXIMUM)):
            maximum = load(builder, at)
            for score in results[v :: PAIR_TILE.vectors]:
                maximum = larger(builder, score, maximum)
            store(builder, maximum, at)
        return context.get_dummy_value()

    return signature_of(
        keys, keys_offset, row_stride, rows, queries, queries_offset, cells, scales, scales_offset,
        state, state_offset, scores, scores_offset,
    ), generate  # fmt: skip


@intrinsic
def powers_panel(typing_context, scores, scores_offset, cells, state, state_offset, powers, powers_offset):
    """Turn the scores of a block of keys into integers 0 to LARGEST_POWER, as pairs of successive keys.

    LARGEST_POWER · 2^((score - BLOCK_MAXIMUM) · QUERY_SCALE), rounded, off by 1 at most; 0 where NaN. `cells` counts
    pairs. Includes the block in MAXIMUM and TOTAL of `state`, and sets KEEP and TAKE to the factors of the sums so
    far and of this block's.
    """

    def generate(context, builder, signature, args):
        cells = args[2]
        scores, state = elements_at(context, builder, signature, args, (0, 3))
        powers = element_at(context, builder, signature, args, 5)

        # Vector by vector, not a whole row at once, so that everything fits the registers.
        def generate_vector(v: int, at: Sequence[ir.Value]) -> None:
            before, total, scale, maximum = (load(builder, address) for address in at[:KEEP])

            def step(cell: ir.Value, counts: Sequence[ir.Value]) -> Sequence[ir.Value]:
                start = address_of(builder, scores, builder.mul(cell, index(2 * PAIR_NR)))
                both = [address_of(builder, start, index(key * PAIR_NR + v * TILE.width)) for key in (0, 1)]
                differences = [builder.fsub(load(builder, score), maximum) for score in both]
                pair = _pair(builder, *(_power(builder, difference, scale) for difference in differences))
                out = address_of(builder, powers, builder.mul(cell, index(PAIR_NR)), element=INT)
                store(builder, pair, address_of(builder, out, index(v * TILE.width), element=INT))
                return [_add_pairs(builder, PAIR_TILE, counts[0], pair, constant(_INTS, 0x00010001))]

            (count,) = loop(builder, index(0), cells, 1, [constant(_INTS, 0)], step)
            now = larger(builder, maximum, before)
            keep, take = (emit_exp2(builder, builder.fmul(builder.fsub(m, now), scale)) for m in (before, maximum))
            total = multiply_add(builder, total, keep, builder.fmul(builder.sitofp(count, VECTOR), take))
            for row, value in ((MAXIMUM, now), (TOTAL, total), (KEEP, keep), (TAKE, take)):
                store(builder, value, at[row])

        for v, at in enumerate(zip(*(_state_row(builder, state, row) for row in range(STATE_ROWS)), strict=True)):
            generate_vector(v, at)
        return context.get_dummy_value()

    return signature_of(scores, scores_offset, cells, state, state_offset, powers, powers_offset), generate


@intrinsic
def value_tile(
    typing_context, values, values_offset, cell_stride, rows, powers, powers_offset, cells, scales, scales_offset,
    state, state_offset, sums, sums_offset,
):  # fmt: skip
    """Multiply PAIR_MR columns of values by the powers of a panel, and add them to the sums.

    block[i, j] = float32(Σ over c < cells of values[i + c · cell_stride] · powers[c · PAIR_NR + j])
    sums[i, j] = sums[i, j] · KEEP[j] + block[i, j] · scales[i] · TAKE[j]

    for i < PAIR_MR, where rows from `rows` on repeat the last.
    """

    def generate(context, builder, signature, args):
        _, _, cell_stride, rows, _, _, cells, *_ = args
        values, powers = elements_at(context, builder, signature, args, (0, 4))
        scales, state, out = elements_at(context, builder, signature, args, (7, 9, 11))
        results = _scaled_sums(builder, values, index(1), cell_stride, rows, powers, cells, scales)
        keep, take = ([load(builder, at) for at in _state_row(builder, state, row)] for row in (KEEP, TAKE))
        for s, result in enumerate(results):
            v, at = s % PAIR_TILE.vectors, address_of(builder, out, index(s * TILE.width))
            store(builder, multiply_add(builder, load(builder, at), keep[v], builder.fmul(result, take[v])), at)
        return context.get_dummy_value()

    return signature_of(
        values, values_offset, cell_stride, rows, powers, powers_offset, cells, scales, scales_offset,
        state, state_offset, sums, sums_offset,
    ), generate  # fmt: skip
