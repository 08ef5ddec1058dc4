"""bfloat16 attention on AMX as LLVM IR: rounding, transposing, score and value tiles, powers.

What enters: flat arrays with element offsets, inside compiled code. What leaves: numba intrinsics that
`attention_bf16` puts its loops around. All of it is made for vectors of 16 float32 and the tiles of `simd.amx`;
other machines can compile it, but not run it.

A float32 is rounded to bfloat16 by adding half a step to its bits and taking the upper 16 (halves away from zero);
two of them in one word make the *pairs* that a tile of right operands consists of.

    float32    │± eeeeeeee mmmmmmm│mmmmmmmmmmmmmmmm│      bfloat16 is the left part. A carry out of the mantissa
             +                     1000000000000000       goes into the exponent, as rounding up requires.

    pair       │ bfloat16 of k + 1 │ bfloat16 of k  │      bits 31 … 16 and 15 … 0
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_kernels.simd.amx import TILE_BYTES, Sums, emit_square
from edge_kernels.simd.float32 import ROUND_TO_EXPONENT
from edge_kernels.simd.ir import (
    BIT,
    FLOAT,
    INT,
    SHORT,
    address_of,
    constant,
    elements_at,
    index,
    lanes_below,
    larger,
    load,
    loop,
    masked_load,
    masked_store,
    multiply_add,
    signature_of,
    splat,
    store,
)

LANES = 16
TILE_WORDS = TILE_BYTES // 4

FLOATS = ir.VectorType(FLOAT, LANES)
INTS = ir.VectorType(INT, LANES)
SHORTS = ir.VectorType(SHORT, LANES)
_HALF_STEP = 0x8000
UPPER_HALF = ~0xFFFF

# exp2 on [-1/2, 1/2]: minimax in relative error, 7.5e-5 (a twenty-fifth of half a step of bfloat16).
_POLYNOMIAL = (0.0551716685, 0.242611125, 0.693260968, 0.999928057)


# --- building blocks ----------------------------------------------------------------------------------------


def rounded_bits(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Emit the bits of float32 values whose upper halves are the values in bfloat16; NaN stays NaN."""
    ints = INTS if isinstance(value.type, ir.VectorType) else INT
    rounded = builder.add(builder.bitcast(value, ints), constant(ints, _HALF_STEP))
    return builder.select(builder.fcmp_unordered("uno", value, value), constant(ints, 0x7FC00000), rounded)


def transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Transpose 16 vectors of 16: four times, each of the first half is interleaved with one of the second."""
    lower, upper = (
        ir.Constant(ir.VectorType(INT, LANES), [first + lane // 2 + LANES * (lane % 2) for lane in range(LANES)])
        for first in (0, LANES // 2)
    )
    for _ in range(4):
        pairs = zip(rows[: LANES // 2], rows[LANES // 2 :], strict=True)
        rows = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in (lower, upper)]
    return rows


# --- for numba ----------------------------------------------------------------------------------------------


@intrinsic
def as_bf16(typing_context, x):
    """Return x rounded to bfloat16, as float32."""

    def generate(context, builder, signature, args):
        bits = builder.and_(rounded_bits(builder, args[0]), ir.Constant(INT, UPPER_HALF))
        return builder.bitcast(bits, FLOAT)

    return types.float32(types.float32), generate


def _each(builder: ir.IRBuilder, n: ir.Value, emit: Callable[[ir.Value, ir.Value], None]) -> None:
    """Emit `emit(first, mask)` for n elements in vectors of 16; the last one's mask leaves out the excess."""
    everything = ir.Constant(ir.VectorType(BIT, LANES), [1] * LANES)

    def body(j: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
        emit(j, everything)
        return []

    whole = builder.and_(n, index(-LANES))
    loop(builder, index(0), whole, LANES, [], body)
    with builder.if_then(builder.icmp_signed("!=", whole, n)):
        emit(whole, lanes_below(builder, builder.sub(n, whole), LANES))


@intrinsic
def round_row(typing_context, x, offset, n, factor, out, out_offset):
    """Write n elements of x · factor to out (int16) as bfloat16."""

    def generate(context, builder, signature, args):
        row, to = elements_at(context, builder, signature, args, (0, 4))
        factor = splat(builder, args[3], LANES)

        def emit(j: ir.Value, mask: ir.Value) -> None:
            value = builder.fmul(masked_load(builder, address_of(builder, row, j), mask), factor)
            halves = builder.trunc(builder.lshr(rounded_bits(builder, value), constant(INTS, 16)), SHORTS)
            masked_store(builder, halves, address_of(builder, to, j, element=SHORT), mask)

        _each(builder, args[2], emit)
        return context.get_dummy_value()

    return types.none(x, types.int64, types.int64, types.float32, out, types.int64), generate


@intrinsic
def scale_row(typing_context, x, offset, n, factor, out, out_offset):
    """Write n elements of x · factor to out."""

    def generate(context, builder, signature, args):
        row, to = elements_at(context, builder, signature, args, (0, 4))
        factor = splat(builder, args[3], LANES)

        def emit(j: ir.Value, mask: ir.Value) -> None:
            value = builder.fmul(masked_load(builder, address_of(builder, row, j), mask), factor)
            masked_store(builder, value, address_of(builder, to, j), mask)

        _each(builder, args[2], emit)
        return context.get_dummy_value()

    return types.none(x, types.int64, types.int64, types.float32, out, types.int64), generate


@intrinsic
def transpose_words(typing_context, x, offset, stride, out, out_offset, out_stride):
    """Transpose 16 rows of 16 words of 4 bytes, which lie `stride` and `out_stride` words apart."""

    def generate(context, builder, signature, args):
        x, out = elements_at(context, builder, signature, args, (0, 3))
        rows = [
            load(builder, address_of(builder, x, builder.mul(args[2], index(i)), element=INT), INTS)
            for i in range(LANES)
        ]
        for i, row in enumerate(transposed(builder, rows)):
            store(builder, row, address_of(builder, out, builder.mul(args[5], index(i)), element=INT))
        return context.get_dummy_value()

    return signature_of(x, offset, stride, out, out_offset, out_stride), generate


@intrinsic
def transpose_rounded(typing_context, x, offset, stride, out, out_offset):
    """Transpose 16 rows of 16 float32, `stride` apart, into 16 rows of half a tile (int16), as bfloat16."""

    def generate(context, builder, signature, args):
        x, out = elements_at(context, builder, signature, args, (0, 3))
        rows = [load(builder, address_of(builder, x, builder.mul(args[2], index(i))), FLOATS) for i in range(LANES)]
        for i, row in enumerate(transposed(builder, rows)):
            halves = builder.trunc(builder.lshr(rounded_bits(builder, row), constant(INTS, 16)), SHORTS)
            store(builder, halves, address_of(builder, out, index(i * 2 * LANES), element=SHORT), 2)
        return context.get_dummy_value()

    return signature_of(x, offset, stride, out, out_offset), generate


def _panels(builder: ir.IRBuilder, start: ir.Value, panel: ir.Value) -> Sums:
    """Place a square of sums in two panels of 16 columns, `panel` elements apart: tiles 0 and 2 in the first.

    start → [32 rows][16]      start + panel → [32 rows][16]
             0                                   1               rows 0 to 15
             2                                   3               rows 16 to 31
    """
    places = {}
    for register in range(4):
        at = address_of(builder, start, index(register // 2 * TILE_WORDS))
        places[register] = address_of(builder, at, panel) if register % 2 else at
    return Sums(places)


@intrinsic
def score_tiles(typing_context, keys, keys_offset, queries, queries_offset, steps, scores, scores_offset, panel):
    """Multiply 32 keys with 32 queries.

    keys: [half][steps][tile], queries: [half][steps][tile] of pairs (both int32 words), scores: float32
    [half of the queries][key][16], the halves `panel` elements apart.
    """

    def generate(context, builder, signature, args):
        keys, queries, scores = elements_at(context, builder, signature, args, (0, 2, 5))
        steps, panel = args[4], args[7]
        half = builder.mul(steps, index(TILE_WORDS))

        def operands(i: ir.Value) -> dict[int, ir.Value]:
            at = builder.mul(i, index(TILE_WORDS))
            return {
                4: address_of(builder, keys, at, element=INT),
                6: address_of(builder, queries, at, element=INT),
                7: address_of(builder, queries, at, half, element=INT),
                5: address_of(builder, keys, at, half, element=INT),
            }

        emit_square(builder, "tdpbf16ps", steps, operands, _panels(builder, scores, panel))
        return context.get_dummy_value()

    return signature_of(keys, keys_offset, queries, queries_offset, steps, scores, scores_offset, panel), generate


def _power(builder: ir.IRBuilder, difference: ir.Value) -> ir.Value:
    """Emit the bits of 2^difference, difference ≤ 0, rounded as in `rounded_bits`; 0 below -126.5."""
    low, magic = constant(FLOATS, -127.0), constant(FLOATS, ROUND_TO_EXPONENT)
    x = builder.select(builder.fcmp_ordered("<", difference, low), low, difference)
    shifted = builder.fadd(x, magic)
    rest = builder.fsub(x, builder.fsub(shifted, magic))
    value = constant(FLOATS, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        value = multiply_add(builder, value, rest, constant(FLOATS, coefficient))
    power = builder.bitcast(builder.shl(builder.bitcast(shifted, INTS), constant(INTS, 23)), FLOATS)
    return builder.add(builder.bitcast(builder.fmul(value, power), INTS), constant(INTS, _HALF_STEP))


@intrinsic
def raise_maxima(typing_context, scores, offset, keys, maxima, maxima_offset):
    """Raise the maxima of 16 queries to their largest scores; scores: float32 [key][16]."""

    def generate(context, builder, signature, args):
        scores, maxima = elements_at(context, builder, signature, args, (0, 3))
        keys, chains = args[2], 4

        def score(key: ir.Value, more: int = 0) -> ir.Value:
            row = builder.mul(key, index(LANES))
            return load(builder, address_of(builder, scores, row, index(more * LANES)), FLOATS)

        whole = builder.mul(builder.sdiv(keys, index(chains)), index(chains))
        found = loop(
            builder, index(0), whole, chains, [load(builder, maxima, FLOATS)] * chains,
            lambda key, state: [larger(builder, score(key, more), state[more]) for more in range(chains)],
        )  # fmt: skip
        maximum = found[0]
        for other in found[1:]:
            maximum = larger(builder, other, maximum)
        (maximum,) = loop(
            builder, whole, keys, 1, [maximum], lambda key, state: [larger(builder, score(key), state[0])]
        )
        store(builder, maximum, maxima)
        return context.get_dummy_value()

    return signature_of(scores, offset, keys, maxima, maxima_offset), generate


@intrinsic
def powers_bf16(typing_context, scores, offset, keys, maxima, maxima_offset, powers, powers_offset):
    """Write 2^(score - the column's maximum) of 16 queries as pairs of successive keys; NaN stays NaN.

    scores: float32 [key][16]; powers: int32 words [pair][16]. An odd last key is paired with 0.
    """

    def generate(context, builder, signature, args):
        scores, maxima, powers = elements_at(context, builder, signature, args, (0, 3, 5))
        keys, maximum = args[2], load(builder, maxima, FLOATS)

        def power(key: ir.Value, more: int = 0) -> ir.Value:
            row = builder.mul(key, index(LANES))
            score = load(builder, address_of(builder, scores, row, index(more * LANES)), FLOATS)
            return _power(builder, builder.fsub(score, maximum))

        def put(key: ir.Value, first: ir.Value, second: ir.Value | None) -> None:
            word = builder.lshr(first, constant(INTS, 16))
            if second is not None:
                word = builder.or_(word, builder.and_(second, constant(INTS, UPPER_HALF)))
            row = builder.mul(builder.sdiv(key, index(2)), index(LANES))
            store(builder, word, address_of(builder, powers, row, element=INT))

        def pair(key: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            put(key, power(key), power(key, 1))
            return []

        even = builder.and_(keys, index(-2))
        loop(builder, index(0), even, 2, [], pair)
        with builder.if_then(builder.icmp_signed("!=", even, keys)):
            put(even, power(even), None)
        return context.get_dummy_value()

    return signature_of(scores, offset, keys, maxima, maxima_offset, powers, powers_offset), generate


@intrinsic
def value_tiles(
    typing_context, values, values_offset, stride, powers, powers_offset, panel, steps, out, out_offset, out_panel,
    add,
):  # fmt: skip
    """Multiply 32 columns of values with the powers of 32 queries.

    values: [step] tiles of 16 columns × 32 keys, the second 16 columns a tile further, steps `stride` words apart;
    powers: [step] tiles of pairs, the second 16 queries `panel` words further; out: float32 [column][16], the
    second 16 queries `out_panel` elements further; where `add` is not 0, the products are added to it.
    """

    def generate(context, builder, signature, args):
        values, powers, out = elements_at(context, builder, signature, args, (0, 3, 7))
        stride, panel, steps, out_panel = args[2], args[5], args[6], args[9]

        def operands(i: ir.Value) -> dict[int, ir.Value]:
            value = address_of(builder, values, builder.mul(i, stride), element=INT)
            power = address_of(builder, powers, builder.mul(i, index(TILE_WORDS)), element=INT)
            return {
                4: value,
                6: power,
                7: address_of(builder, power, panel, element=INT),
                5: address_of(builder, value, index(TILE_WORDS), element=INT),
            }

        emit_square(builder, "tdpbf16ps", steps, operands, _panels(builder, out, out_panel), add=args[10])
        return context.get_dummy_value()

    return signature_of(
        values, values_offset, stride, powers, powers_offset, panel, steps, out, out_offset, out_panel, add
    ), generate  # fmt: skip
