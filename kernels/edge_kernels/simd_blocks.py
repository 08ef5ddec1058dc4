"""Weights in ggml's blocks as LLVM IR: unpacked to bfloat16 in the order of AMX's tiles, and multiplied there.

A tile of weights is a *left* operand here: 16 outputs of 32 k, which are the 64 bytes that one group of a block
becomes, so nothing is transposed. Rows of activations are the right operand, as pairs of k. The sums come out with
outputs as rows, and are turned round when they are written.

    weights   [step of 32 k][half of 32 outputs][16 outputs][32]      bfloat16, unpacked for each task
    rows      [step of 32 k][half of 32 rows][16 pairs][16 rows][2]   bfloat16
    sums      [32 outputs][32 rows]                                   float32

What a block holds: ggml's `ggml-common.h` and `dequantize_row_*`; `edge_runtime.blocks` has the same in NumPy.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from edge_kernels.simd import _FLOAT, _INT, _address, _constant, _index, _load, _loop, _multiply_add, _store, _takes
from edge_kernels.simd_amx import (
    ROW_BYTES,
    ROWS,
    TILE_BYTES,
    load_tile,
    multiply_tiles,
    prefetch,
    store_tile,
    zero_tile,
)
from edge_kernels.simd_bf16 import (
    _FLOATS,
    _INTS,
    _SHORT,
    LANES,
    _lanes_below,
    _masked_load,
    _masked_store,
    _rounded_bits,
    _start,
    _transposed,
)

SIDE = 2 * ROWS
"""Rows and outputs of a square of sums."""
STEP = ROW_BYTES // 2
"""k of a tile."""
TILE = TILE_BYTES // 2  # in elements of bfloat16
STEP_ELEMENTS = 2 * TILE
"""From one step to the next, of rows as of weights."""
GROUP = 32  # weights of a block that share a scale, and a row of a tile


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_BYTE = ir.IntType(8)
_HALF = ir.HalfType()
_BYTES = ir.VectorType(_BYTE, GROUP)
_WORDS = ir.VectorType(_SHORT, GROUP // 2)
_WIDE = ir.VectorType(_INT, GROUP)
_WIDE_FLOATS = ir.VectorType(_FLOAT, GROUP)
_SIXTEEN = ir.VectorType(_FLOAT, 16)


# --- building blocks ----------------------------------------------------------------------------------------


def _bytes_at(builder: ir.IRBuilder, block: ir.Value, first: int, type_: ir.Type) -> ir.Value:
    return _load(builder, _address(builder, block, _index(first), element=_BYTE), type_, 1)


def _half_at(builder: ir.IRBuilder, block: ir.Value, first: int) -> ir.Value:
    """Emit a float16 of a block as float32."""
    return builder.fpext(_bytes_at(builder, block, first, _HALF), _FLOAT)


def _spread(builder: ir.IRBuilder, values: ir.Value, lanes: Sequence[int]) -> ir.Value:
    """Emit a vector of 32 whose lanes are these lanes of another."""
    mask = ir.Constant(_WIDE, list(lanes))
    return builder.shuffle_vector(values, values, mask)


def _write_group(builder: ir.IRBuilder, values: ir.Value, out: ir.Value, group: int) -> None:
    """Emit the store of 32 float32 as a row of the tile of its step, rounded to the nearest, ties to even."""
    # One instruction of AVX512_BF16, which every processor with AMX has; with integers, rounding takes ten.
    lower, upper = (
        builder.shuffle_vector(values, values, ir.Constant(_INTS, list(range(first, first + LANES))))
        for first in (0, LANES)
    )
    function_type = ir.FunctionType(ir.VectorType(_BFloat(), GROUP), [_FLOATS, _FLOATS])
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    rounded = builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [upper, lower])
    words = builder.bitcast(rounded, _INTS)
    _store(builder, words, _address(builder, out, _index(group * STEP_ELEMENTS), element=_SHORT), ROW_BYTES)


def _low(builder: ir.IRBuilder, values: ir.Value, mask: int) -> ir.Value:
    return builder.and_(values, _constant(_BYTES, mask))


def _shifted(builder: ir.IRBuilder, values: ir.Value, n: int, mask: int) -> ir.Value:
    """Emit bits n and up of bytes: as words, which is what the machine can shift."""
    words = builder.bitcast(values, _WORDS)
    return _low(builder, builder.bitcast(builder.lshr(words, _constant(_WORDS, n)), _BYTES), mask)


def _scales_and_minima(builder: ir.IRBuilder, block: ir.Value) -> ir.Value:
    """Emit the 8 scales and then the 8 minima of a Q4_K or Q5_K block, d and dmin multiplied in.

    Twelve bytes hold 16 numbers of 6 bits: the first four of each whole, the others in 4 and 2 bits.
    """
    first, second, third = (_bytes_at(builder, block, 4 + 4 * i, _INT) for i in range(3))

    def bits(word: ir.Value, shift: int, mask: int) -> ir.Value:
        moved = builder.lshr(word, ir.Constant(_INT, shift)) if shift else word
        return builder.and_(moved, ir.Constant(_INT, mask))

    def joined(low: ir.Value, high: ir.Value) -> ir.Value:
        return builder.or_(low, builder.shl(high, ir.Constant(_INT, 4)))

    words = (
        bits(first, 0, 0x3F3F3F3F),
        joined(bits(third, 0, 0x0F0F0F0F), bits(first, 6, 0x03030303)),
        bits(second, 0, 0x3F3F3F3F),
        joined(bits(third, 4, 0x0F0F0F0F), bits(second, 6, 0x03030303)),
    )
    packed = ir.Constant(ir.VectorType(_INT, 4), ir.Undefined)
    for lane, word in enumerate(words):
        packed = builder.insert_element(packed, word, ir.Constant(_INT, lane))
    numbers = builder.zext(builder.bitcast(packed, ir.VectorType(_BYTE, 16)), ir.VectorType(_INT, 16))
    factors = ir.Constant(_SIXTEEN, ir.Undefined)
    factors = builder.insert_element(factors, _half_at(builder, block, 0), ir.Constant(_INT, 0))
    factors = builder.insert_element(factors, _half_at(builder, block, 2), ir.Constant(_INT, 1))
    lanes = ir.Constant(ir.VectorType(_INT, 16), [0] * 8 + [1] * 8)
    return builder.fmul(builder.uitofp(numbers, _SIXTEEN), builder.shuffle_vector(factors, factors, lanes))


def _write_with_minimum(
    builder: ir.IRBuilder, numbers: ir.Value, scales: ir.Value, group: int, out: ir.Value
) -> None:
    """Emit number · scale - minimum of a group."""
    floats = builder.uitofp(builder.zext(numbers, _WIDE), _WIDE_FLOATS)
    scale, minimum = (_spread(builder, scales, [lane] * GROUP) for lane in (group, 8 + group))
    _write_group(builder, _multiply_add(builder, floats, scale, builder.fneg(minimum)), out, group)


def _unpack_q4_k(builder: ir.IRBuilder, block: ir.Value, out: ir.Value) -> None:
    scales = _scales_and_minima(builder, block)
    for pair in range(4):
        numbers = _bytes_at(builder, block, 16 + GROUP * pair, _BYTES)
        _write_with_minimum(builder, _low(builder, numbers, 15), scales, 2 * pair, out)
        _write_with_minimum(builder, _shifted(builder, numbers, 4, 15), scales, 2 * pair + 1, out)


def _unpack_q5_k(builder: ir.IRBuilder, block: ir.Value, out: ir.Value) -> None:
    scales = _scales_and_minima(builder, block)
    high = _bytes_at(builder, block, 16, _BYTES)
    for group in range(8):
        numbers = _bytes_at(builder, block, 48 + GROUP * (group // 2), _BYTES)
        numbers = _shifted(builder, numbers, 4, 15) if group % 2 else _low(builder, numbers, 15)
        fifth = _low(builder, _shifted(builder, high, group, 1) if group else high, 1)
        words = builder.shl(builder.bitcast(fifth, _WORDS), _constant(_WORDS, 4))
        _write_with_minimum(builder, builder.or_(numbers, builder.bitcast(words, _BYTES)), scales, group, out)


def _unpack_q6_k(builder: ir.IRBuilder, block: ir.Value, out: ir.Value) -> None:
    signed = builder.sext(_bytes_at(builder, block, 192, ir.VectorType(_BYTE, 16)), ir.VectorType(_INT, 16))
    d = builder.insert_element(ir.Constant(_SIXTEEN, ir.Undefined), _half_at(builder, block, 208), _INT(0))
    factor = builder.shuffle_vector(d, d, ir.Constant(ir.VectorType(_INT, 16), [0] * 16))
    scales = builder.fmul(builder.sitofp(signed, _SIXTEEN), factor)
    for half in range(2):
        lower = [_bytes_at(builder, block, 64 * half + GROUP * i, _BYTES) for i in range(2)]
        upper = _bytes_at(builder, block, 128 + GROUP * half, _BYTES)
        for group in range(4):
            low = lower[group % 2]
            low = _shifted(builder, low, 4, 15) if group // 2 else _low(builder, low, 15)
            two = _low(builder, _shifted(builder, upper, 2 * group, 3) if group else upper, 3)
            four = builder.bitcast(builder.shl(builder.bitcast(two, _WORDS), _constant(_WORDS, 4)), _BYTES)
            numbers = builder.sub(builder.zext(builder.or_(low, four), _WIDE), _constant(_WIDE, 32))
            first = 8 * half + 2 * group
            scale = _spread(builder, scales, [first] * 16 + [first + 1] * 16)
            values = builder.fmul(builder.sitofp(numbers, _WIDE_FLOATS), scale)
            _write_group(builder, values, out, 4 * half + group)


def _unpack_q8_0(builder: ir.IRBuilder, block: ir.Value, out: ir.Value) -> None:
    """Emit eight blocks of 32, one after the other."""
    for group in range(8):
        first = group * 34
        d = builder.insert_element(ir.Constant(_SIXTEEN, ir.Undefined), _half_at(builder, block, first), _INT(0))
        numbers = builder.sext(_bytes_at(builder, block, first + 2, _BYTES), _WIDE)
        values = builder.fmul(builder.sitofp(numbers, _WIDE_FLOATS), _spread(builder, d, [0] * GROUP))
        _write_group(builder, values, out, group)


# --- for numba ----------------------------------------------------------------------------------------------


def _unpacker(emit, n_bytes):
    """Make an intrinsic that unpacks 256 weights of an output to its rows of eight tiles.

    Blocks of 32 outputs are far apart in a file, too many streams for the processor to see them coming. So each asks
    for the one that is as far behind as those that it belongs to are wide.
    """

    @intrinsic
    def unpack(typing_context, blocks, offset, ahead, out, out_offset):
        def generate(context, builder, signature, args):
            block, to = (_start(context, builder, signature, args, position) for position in (0, 3))
            for line in range(0, n_bytes, ROW_BYTES):
                prefetch(builder, _address(builder, block, args[2], _index(line), element=_BYTE), cache=2)
            emit(builder, block, to)
            return context.get_dummy_value()

        return _takes(blocks, offset, ahead, out, out_offset), generate

    return unpack


unpack_q4_k, unpack_q5_k = _unpacker(_unpack_q4_k, 144), _unpacker(_unpack_q5_k, 176)
unpack_q6_k, unpack_q8_0 = _unpacker(_unpack_q6_k, 210), _unpacker(_unpack_q8_0, 272)


@intrinsic
def pack_pairs(typing_context, x, offset, stride, n_rows, out, out_offset):
    """Write 32 k of up to 16 rows, `stride` apart, as the pairs of a tile: bfloat16, in int32 words of two."""

    def generate(context, builder, signature, args):
        x, out = (_start(context, builder, signature, args, position) for position in (0, 4))
        stride, n_rows = args[2], args[3]
        even, odd = (ir.Constant(_INTS, [2 * lane + which for lane in range(LANES)]) for which in (0, 1))
        words = []
        for i in range(ROWS):
            inside = builder.icmp_signed("<", _index(i), n_rows)
            row = _address(builder, x, builder.select(inside, builder.mul(stride, _index(i)), _index(0)))
            low, high = (
                _rounded_bits(builder, _load(builder, _address(builder, row, _index(first)), _FLOATS))
                for first in (0, LANES)
            )
            first, second = (builder.shuffle_vector(low, high, mask) for mask in (even, odd))
            upper = builder.and_(second, _constant(_INTS, ~0xFFFF))
            word = builder.or_(builder.lshr(first, _constant(_INTS, 16)), upper)
            words.append(builder.select(inside, word, _constant(_INTS, 0)))
        for pair, line in enumerate(_transposed(builder, words)):
            _store(builder, line, _address(builder, out, _index(pair * LANES), element=_INT))
        return context.get_dummy_value()

    return _takes(x, offset, stride, n_rows, out, out_offset), generate


@intrinsic
def blocks_tile(typing_context, weight, weight_offset, rows, rows_offset, steps, sums, sums_offset, add):
    """Multiply 32 outputs with 32 rows: sums (float32) = the products, or += where `add` is not 0."""

    def generate(context, builder, signature, args):
        weight, rows, sums = (_start(context, builder, signature, args, position) for position in (0, 2, 5))
        steps, add = args[4], args[7]
        places = [
            _address(builder, sums, _index(half * ROWS * SIDE + part * ROWS)) for half in (0, 1) for part in (0, 1)
        ]
        with builder.if_else(builder.icmp_signed("!=", add, _index(0))) as (then, otherwise):
            with then:
                for register, place in enumerate(places):
                    load_tile(builder, register, place, 4 * SIDE)
            with otherwise:
                for register in range(4):
                    zero_tile(builder, register)

        def step(i: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            start = builder.mul(i, _index(STEP_ELEMENTS))
            for side, panel in enumerate((weight, rows)):
                for half in range(2):
                    at = _address(builder, panel, start, _index(half * TILE), element=_SHORT)
                    load_tile(builder, 4 + 2 * side + half, at)
            for register in range(4):
                multiply_tiles(builder, "tdpbf16ps", register, 4 + register // 2, 6 + register % 2)
            return []

        _loop(builder, _index(0), steps, 1, [], step)
        for register, place in enumerate(places):
            store_tile(builder, register, place, 4 * SIDE)
        return context.get_dummy_value()

    return _takes(weight, weight_offset, rows, rows_offset, steps, sums, sums_offset, add), generate


@intrinsic
def finish_turned(
    typing_context, sums, sums_offset, residual, residual_offset, residual_stride, with_residual, out, out_offset,
    out_stride, n_rows, width,
):  # fmt: skip
    """Write a square of sums, turned round, plus a residual: `n_rows` rows of `width` outputs."""

    def generate(context, builder, signature, args):
        sums, residual, out = (_start(context, builder, signature, args, position) for position in (0, 2, 6))
        residual_stride, with_residual, out_stride, n_rows, width = (args[position] for position in (4, 5, 8, 9, 10))
        adds = builder.icmp_signed("!=", with_residual, _index(0))
        for column in (0, ROWS):
            wanted = _lanes_below(builder, builder.sub(width, _index(column)))
            added = builder.select(adds, wanted, _constant(wanted.type, 0))
            for half in (0, ROWS):
                lines = [
                    _load(builder, _address(builder, sums, _index((column + i) * SIDE + half)), _FLOATS)
                    for i in range(ROWS)
                ]
                for i, line in enumerate(_transposed(builder, lines)):
                    with builder.if_then(builder.icmp_signed("<", _index(half + i), n_rows)):
                        place = builder.mul(_index(half + i), residual_stride)
                        more = _masked_load(builder, _address(builder, residual, place, _index(column)), added)
                        to = _address(builder, out, builder.mul(_index(half + i), out_stride), _index(column))
                        _masked_store(builder, builder.fadd(line, more), to, wanted)
        return context.get_dummy_value()

    return _takes(
        sums, sums_offset, residual, residual_offset, residual_stride, with_residual, out, out_offset, out_stride,
        n_rows, width,
    ), generate  # fmt: skip
