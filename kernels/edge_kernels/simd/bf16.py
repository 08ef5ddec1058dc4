"""bfloat16 attention on AMX as LLVM IR: rounding, transposing, score and value tiles, powers.

What enters: flat arrays with element offsets, inside compiled code. What leaves: numba intrinsics that
`attention_bf16` puts its loops around. All of it is made for vectors of 16 float32 and the tiles of `simd_amx`;
other machines may compile it, but not run it.

A float32 is rounded to bfloat16 by adding half a step to its bits and taking the upper 16 (halves away from zero);
two of them in one word make the *pairs* that a tile of right operands has.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edge_kernels.simd.amx import ROWS, TILE_BYTES, load_tile, multiply_tiles, store_tile, zero_tile
from edge_kernels.simd.float32 import (
    _FLOAT,
    _INT,
    _ROUND_TO_EXPONENT,
    _address,
    _constant,
    _floats,
    _index,
    _larger,
    _load,
    _loop,
    _multiply_add,
    _store,
    _takes,
)

LANES = 16
TILE_WORDS = TILE_BYTES // 4

_BIT = ir.IntType(1)
_SHORT = ir.IntType(16)
_FLOATS = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_INT, LANES)
_SHORTS = ir.VectorType(_SHORT, LANES)
_HALF_STEP = 0x8000
_UPPER_HALF = ~0xFFFF

# exp2 on [-1/2, 1/2]: minimax in relative error, 7.5e-5 (a twenty-fifth of half a step of bfloat16).
_POLYNOMIAL = (0.0551716685, 0.242611125, 0.693260968, 0.999928057)


# --- building blocks ----------------------------------------------------------------------------------------


def _start(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value], position: int) -> ir.Value:
    """Take the address of an array's element: the argument after it is the offset."""
    element = signature.args[position].dtype.bitwidth
    array = _floats(context, builder, signature, args, position)
    return _address(builder, array, args[position + 1], element=ir.IntType(element))


def _splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    """Copy a float into all lanes."""
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    lane = builder.insert_element(undefined, scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(lane, undefined, ir.Constant(_INTS, [0] * LANES))


def _rounded_bits(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Emit the bits of float32 values whose upper halves are the values in bfloat16; NaN stays NaN."""
    ints = _INTS if isinstance(value.type, ir.VectorType) else _INT
    rounded = builder.add(builder.bitcast(value, ints), _constant(ints, _HALF_STEP))
    return builder.select(builder.fcmp_unordered("uno", value, value), _constant(ints, 0x7FC00000), rounded)


def _transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Transpose 16 vectors of 16: four times, each of the first half is interleaved with one of the second."""
    lower, upper = (
        ir.Constant(ir.VectorType(_INT, LANES), [first + lane // 2 + LANES * (lane % 2) for lane in range(LANES)])
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
        bits = builder.and_(_rounded_bits(builder, args[0]), ir.Constant(_INT, _UPPER_HALF))
        return builder.bitcast(bits, _FLOAT)

    return types.float32(types.float32), generate


def _each(builder: ir.IRBuilder, n: ir.Value, emit: Callable[[ir.Value, ir.Value], None]) -> None:
    """Emit `emit(first, mask)` for n elements in vectors of 16; the last one's mask leaves out what is too much."""
    everything = ir.Constant(ir.VectorType(_BIT, LANES), [1] * LANES)

    def body(j: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
        emit(j, everything)
        return []

    whole = builder.and_(n, _index(-LANES))
    _loop(builder, _index(0), whole, LANES, [], body)
    with builder.if_then(builder.icmp_signed("!=", whole, n)):
        emit(whole, _lanes_below(builder, builder.sub(n, whole)))


def _lanes_below(builder: ir.IRBuilder, n: ir.Value) -> ir.Value:
    """Emit the mask of the first n of 16 lanes."""
    count = builder.insert_element(ir.Constant(_INTS, ir.Undefined), builder.trunc(n, _INT), ir.Constant(_INT, 0))
    spread = builder.shuffle_vector(count, count, ir.Constant(_INTS, [0] * LANES))
    return builder.icmp_signed("<", ir.Constant(_INTS, list(range(LANES))), spread)


def _masked_load(builder: ir.IRBuilder, address: ir.Value, mask: ir.Value) -> ir.Value:
    """Load 16 float32; 0 where the mask is off."""
    pointer = builder.bitcast(address, _FLOATS.as_pointer())
    function_type = ir.FunctionType(_FLOATS, [pointer.type, _INT, mask.type, _FLOATS])
    function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.masked.load.v16f32.p0")
    return builder.call(function, [pointer, ir.Constant(_INT, 4), mask, _constant(_FLOATS, 0.0)])


def _masked_store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, mask: ir.Value) -> None:
    """Store 16 elements where the mask is on."""
    pointer = builder.bitcast(address, value.type.as_pointer())
    letter, size = ("f", 32) if value.type == _FLOATS else ("i", 16)
    function_type = ir.FunctionType(ir.VoidType(), [value.type, pointer.type, _INT, mask.type])
    function = cgutils.get_or_insert_function(
        builder.module, function_type, f"llvm.masked.store.v16{letter}{size}.p0"
    )
    builder.call(function, [value, pointer, ir.Constant(_INT, size // 8), mask])


@intrinsic
def round_row(typing_context, x, offset, n, factor, out, out_offset):
    """Write x · factor, n elements of it, to out (int16) as bfloat16."""

    def generate(context, builder, signature, args):
        row, to = (_start(context, builder, signature, args, position) for position in (0, 4))
        factor = _splat(builder, args[3])

        def emit(j: ir.Value, mask: ir.Value) -> None:
            value = builder.fmul(_masked_load(builder, _address(builder, row, j), mask), factor)
            halves = builder.trunc(builder.lshr(_rounded_bits(builder, value), _constant(_INTS, 16)), _SHORTS)
            _masked_store(builder, halves, _address(builder, to, j, element=_SHORT), mask)

        _each(builder, args[2], emit)
        return context.get_dummy_value()

    index = types.int64
    return types.none(x, index, index, types.float32, out, index), generate


@intrinsic
def scale_row(typing_context, x, offset, n, factor, out, out_offset):
    """Write x · factor, n elements of it, to out."""

    def generate(context, builder, signature, args):
        row, to = (_start(context, builder, signature, args, position) for position in (0, 4))
        factor = _splat(builder, args[3])

        def emit(j: ir.Value, mask: ir.Value) -> None:
            value = builder.fmul(_masked_load(builder, _address(builder, row, j), mask), factor)
            _masked_store(builder, value, _address(builder, to, j), mask)

        _each(builder, args[2], emit)
        return context.get_dummy_value()

    index = types.int64
    return types.none(x, index, index, types.float32, out, index), generate


@intrinsic
def transpose_words(typing_context, x, offset, stride, out, out_offset, out_stride):
    """Transpose 16 rows of 16 words of 4 bytes, which lie `stride` and `out_stride` words apart."""

    def generate(context, builder, signature, args):
        x, out = (_start(context, builder, signature, args, position) for position in (0, 3))
        rows = [
            _load(builder, _address(builder, x, builder.mul(args[2], _index(i)), element=_INT), _INTS)
            for i in range(LANES)
        ]
        for i, row in enumerate(_transposed(builder, rows)):
            _store(builder, row, _address(builder, out, builder.mul(args[5], _index(i)), element=_INT))
        return context.get_dummy_value()

    return _takes(x, offset, stride, out, out_offset, out_stride), generate


@intrinsic
def transpose_rounded(typing_context, x, offset, stride, out, out_offset):
    """Transpose 16 rows of 16 float32, `stride` apart, into 16 rows of half a tile (int16), as bfloat16."""

    def generate(context, builder, signature, args):
        x, out = (_start(context, builder, signature, args, position) for position in (0, 3))
        rows = [_load(builder, _address(builder, x, builder.mul(args[2], _index(i))), _FLOATS) for i in range(LANES)]
        for i, row in enumerate(_transposed(builder, rows)):
            halves = builder.trunc(builder.lshr(_rounded_bits(builder, row), _constant(_INTS, 16)), _SHORTS)
            _store(builder, halves, _address(builder, out, _index(i * 2 * LANES), element=_SHORT), 2)
        return context.get_dummy_value()

    return _takes(x, offset, stride, out, out_offset), generate


@intrinsic
def score_tiles(typing_context, keys, keys_offset, queries, queries_offset, steps, scores, scores_offset, panel):
    """Multiply 32 keys with 32 queries.

    keys: [half][steps][tile], queries: [half][steps][tile] of pairs (both int32 words), scores: float32
    [half of the queries][key][16], the halves `panel` elements apart.
    """

    def generate(context, builder, signature, args):
        keys, queries, scores = (_start(context, builder, signature, args, position) for position in (0, 2, 5))
        steps, panel = args[4], args[7]
        half = builder.mul(steps, _index(TILE_WORDS))
        for register in range(4):
            zero_tile(builder, register)

        def step(i: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            at = builder.mul(i, _index(TILE_WORDS))
            load_tile(builder, 4, _address(builder, keys, at, element=_INT))
            load_tile(builder, 6, _address(builder, queries, at, element=_INT))
            load_tile(builder, 7, _address(builder, queries, at, half, element=_INT))
            load_tile(builder, 5, _address(builder, keys, at, half, element=_INT))
            for register in range(4):
                multiply_tiles(builder, "tdpbf16ps", register, 4 + register // 2, 6 + register % 2)
            return []

        _loop(builder, _index(0), steps, 1, [], step)
        for register in range(4):
            at = _address(builder, scores, _index(register // 2 * TILE_WORDS))
            if register % 2:
                at = _address(builder, at, panel)
            store_tile(builder, register, at)
        return context.get_dummy_value()

    return _takes(keys, keys_offset, queries, queries_offset, steps, scores, scores_offset, panel), generate


def _power(builder: ir.IRBuilder, difference: ir.Value) -> ir.Value:
    """Emit the bits of 2^difference, difference ≤ 0, rounded as `_rounded_bits` tells; 0 below -126.5."""
    low, magic = _constant(_FLOATS, -127.0), _constant(_FLOATS, _ROUND_TO_EXPONENT)
    x = builder.select(builder.fcmp_ordered("<", difference, low), low, difference)
    shifted = builder.fadd(x, magic)
    rest = builder.fsub(x, builder.fsub(shifted, magic))
    value = _constant(_FLOATS, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        value = _multiply_add(builder, value, rest, _constant(_FLOATS, coefficient))
    power = builder.bitcast(builder.shl(builder.bitcast(shifted, _INTS), _constant(_INTS, 23)), _FLOATS)
    return builder.add(builder.bitcast(builder.fmul(value, power), _INTS), _constant(_INTS, _HALF_STEP))


@intrinsic
def raise_maxima(typing_context, scores, offset, keys, maxima, maxima_offset):
    """Raise the maxima of 16 queries to their largest scores; scores: float32 [key][16]."""

    def generate(context, builder, signature, args):
        scores, maxima = (_start(context, builder, signature, args, position) for position in (0, 3))
        keys, chains = args[2], 4

        def score(key: ir.Value, more: int = 0) -> ir.Value:
            row = builder.mul(key, _index(LANES))
            return _load(builder, _address(builder, scores, row, _index(more * LANES)), _FLOATS)

        whole = builder.mul(builder.sdiv(keys, _index(chains)), _index(chains))
        found = _loop(
            builder, _index(0), whole, chains, [_load(builder, maxima, _FLOATS)] * chains,
            lambda key, state: [_larger(builder, score(key, more), state[more]) for more in range(chains)],
        )  # fmt: skip
        maximum = found[0]
        for other in found[1:]:
            maximum = _larger(builder, other, maximum)
        (maximum,) = _loop(
            builder, whole, keys, 1, [maximum], lambda key, state: [_larger(builder, score(key), state[0])]
        )
        _store(builder, maximum, maxima)
        return context.get_dummy_value()

    return _takes(scores, offset, keys, maxima, maxima_offset), generate


@intrinsic
def powers_bf16(typing_context, scores, offset, keys, maxima, maxima_offset, powers, powers_offset):
    """Write 2^(score - the column's maximum) of 16 queries as pairs of successive keys; NaN stays NaN.

    scores: float32 [key][16]; powers: int32 words [pair][16]. Behind an odd last key comes 0.
    """

    def generate(context, builder, signature, args):
        scores, maxima, powers = (_start(context, builder, signature, args, position) for position in (0, 3, 5))
        keys, maximum = args[2], _load(builder, maxima, _FLOATS)

        def power(key: ir.Value, more: int = 0) -> ir.Value:
            row = builder.mul(key, _index(LANES))
            score = _load(builder, _address(builder, scores, row, _index(more * LANES)), _FLOATS)
            return _power(builder, builder.fsub(score, maximum))

        def put(key: ir.Value, first: ir.Value, second: ir.Value | None) -> None:
            word = builder.lshr(first, _constant(_INTS, 16))
            if second is not None:
                word = builder.or_(word, builder.and_(second, _constant(_INTS, _UPPER_HALF)))
            row = builder.mul(builder.sdiv(key, _index(2)), _index(LANES))
            _store(builder, word, _address(builder, powers, row, element=_INT))

        def pair(key: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            put(key, power(key), power(key, 1))
            return []

        even = builder.and_(keys, _index(-2))
        _loop(builder, _index(0), even, 2, [], pair)
        with builder.if_then(builder.icmp_signed("!=", even, keys)):
            put(even, power(even), None)
        return context.get_dummy_value()

    return _takes(scores, offset, keys, maxima, maxima_offset, powers, powers_offset), generate


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
        values, powers, out = (_start(context, builder, signature, args, position) for position in (0, 3, 7))
        stride, panel, steps, out_panel = args[2], args[5], args[6], args[9]
        places = []
        for register in range(4):
            at = _address(builder, out, _index(register // 2 * ROWS * LANES))
            places.append(_address(builder, at, out_panel) if register % 2 else at)
        with builder.if_else(builder.icmp_signed("!=", args[10], _index(0))) as (then, otherwise):
            with then:
                for register, place in enumerate(places):
                    load_tile(builder, register, place)
            with otherwise:
                for register in range(4):
                    zero_tile(builder, register)

        def step(i: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            value = _address(builder, values, builder.mul(i, stride), element=_INT)
            power = _address(builder, powers, builder.mul(i, _index(TILE_WORDS)), element=_INT)
            load_tile(builder, 4, value)
            load_tile(builder, 6, power)
            load_tile(builder, 7, _address(builder, power, panel, element=_INT))
            load_tile(builder, 5, _address(builder, value, _index(TILE_WORDS), element=_INT))
            for register in range(4):
                multiply_tiles(builder, "tdpbf16ps", register, 4 + register // 2, 6 + register % 2)
            return []

        _loop(builder, _index(0), steps, 1, [], step)
        for register, place in enumerate(places):
            store_tile(builder, register, place)
        return context.get_dummy_value()

    return _takes(
        values, values_offset, stride, powers, powers_offset, panel, steps, out, out_offset, out_panel, add
    ), generate  # fmt: skip
