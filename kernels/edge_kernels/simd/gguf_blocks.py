"""Weights in ggml's blocks as LLVM IR: unpacked to bfloat16 in the order of AMX's tiles, and multiplied there.

A tile of weights is a *left* operand here: 16 outputs of 32 k, the 64 bytes that one group of a block becomes, so
nothing is transposed. Rows of activations are the right operand, as pairs of k. The sums have outputs as rows, and
are transposed when they are written.

    weights   [step of 32 k][half of 32 outputs][16 outputs][32]      bfloat16, unpacked for each task
    rows      [step of 32 k][half of 32 rows][16 pairs][16 rows][2]   bfloat16
    sums      [32 outputs][32 rows]                                   float32

Layout of a block: ggml's `ggml-common.h` and `dequantize_row_*`; `reference.gguf_blocks` has the same in NumPy.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir
from numba.extending import intrinsic

from edge_kernels.simd.amx import ROW_BYTES, ROWS, SIDE, TILE, Sums, emit_square, prefetch
from edge_kernels.simd.bf16 import (
    FLOATS,
    INTS,
    LANES,
    rounded_bits,
    transposed,
)
from edge_kernels.simd.ir import (
    BYTE,
    FLOAT,
    INT,
    SHORT,
    address_of,
    call,
    constant,
    elements_at,
    index,
    load,
    multiply_add,
    signature_of,
    splat,
    store,
)

STEP_ELEMENTS = 2 * TILE
"""Elements from one step to the next, of rows and of weights."""
NUMBERS = 32
"""Space for the numbers needed to unpack an output's block."""
GROUP = 32  # weights of a block that share a scale, and a row of a tile


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_HALF = ir.HalfType()
_BYTES = ir.VectorType(BYTE, GROUP)
_WORDS = ir.VectorType(SHORT, GROUP // 2)
_GROUP_WORDS = ir.VectorType(SHORT, GROUP)
_SIXTEEN = ir.VectorType(FLOAT, 16)


# --- building blocks ----------------------------------------------------------------------------------------


def _bytes_at(builder: ir.IRBuilder, block: ir.Value, first: int, type_: ir.Type) -> ir.Value:
    return load(builder, address_of(builder, block, index(first), element=BYTE), type_, 1)


def _half_at(builder: ir.IRBuilder, block: ir.Value, first: int) -> ir.Value:
    """Emit a float16 of a block as float32."""
    return builder.fpext(_bytes_at(builder, block, first, _HALF), FLOAT)


def _rounded(builder: ir.IRBuilder, lower: ir.Value, upper: ir.Value) -> ir.Value:
    """Emit 16 and 16 float32 as 32 bfloat16, rounded to the nearest, ties to even."""
    # One instruction of AVX512_BF16, which every processor with AMX has; with integers, rounding takes ten.
    name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    return call(builder, name, ir.VectorType(_BFloat(), GROUP), [upper, lower])


def _write(builder: ir.IRBuilder, rounded: ir.Value, out: ir.Value, group: int) -> None:
    """Emit the store of 32 bfloat16 as a row of the tile of their group."""
    to = address_of(builder, out, index(group * STEP_ELEMENTS), element=SHORT)
    store(builder, builder.bitcast(rounded, INTS), to, ROW_BYTES)


def _shifted(builder: ir.IRBuilder, values: ir.Value, n: int, mask: int) -> ir.Value:
    """Emit bytes' bits shifted n places down, or -n up: as words, since the machine cannot shift bytes."""
    if n:
        words = builder.bitcast(values, _WORDS)
        moved = (builder.lshr if n > 0 else builder.shl)(words, constant(_WORDS, abs(n)))
        values = builder.bitcast(moved, _BYTES)
    return builder.and_(values, constant(_BYTES, mask))


def _nibbles(builder: ir.IRBuilder, block: ir.Value, first: int, group: int) -> ir.Value:
    """Emit the upper or lower halves of 32 bytes, which two groups share, in words."""
    return builder.zext(
        _shifted(builder, _bytes_at(builder, block, first + GROUP * (group // 2), _BYTES), group % 2 * 4, 15),
        _GROUP_WORDS,
    )


def _scales_and_minima(builder: ir.IRBuilder, block: ir.Value) -> ir.Value:
    """Emit the 8 scales and then the 8 minima of a Q4_K or Q5_K block, d and dmin multiplied in.

    Twelve bytes hold 16 numbers of 6 bits: the first four of each whole, the others in 4 and 2 bits.
    """
    first, second, third = (_bytes_at(builder, block, 4 + 4 * i, INT) for i in range(3))

    def bits(word: ir.Value, shift: int, mask: int) -> ir.Value:
        moved = builder.lshr(word, ir.Constant(INT, shift)) if shift else word
        return builder.and_(moved, ir.Constant(INT, mask))

    def joined(low: ir.Value, high: ir.Value) -> ir.Value:
        return builder.or_(low, builder.shl(high, ir.Constant(INT, 4)))

    words = (
        bits(first, 0, 0x3F3F3F3F),
        joined(bits(third, 0, 0x0F0F0F0F), bits(first, 6, 0x03030303)),
        bits(second, 0, 0x3F3F3F3F),
        joined(bits(third, 4, 0x0F0F0F0F), bits(second, 6, 0x03030303)),
    )
    packed = ir.Constant(ir.VectorType(INT, 4), ir.Undefined)
    for lane, word in enumerate(words):
        packed = builder.insert_element(packed, word, ir.Constant(INT, lane))
    numbers = builder.zext(builder.bitcast(packed, ir.VectorType(BYTE, 16)), ir.VectorType(INT, 16))
    factors = ir.Constant(_SIXTEEN, ir.Undefined)
    factors = builder.insert_element(factors, _half_at(builder, block, 0), ir.Constant(INT, 0))
    factors = builder.insert_element(factors, _half_at(builder, block, 2), ir.Constant(INT, 1))
    lanes = ir.Constant(ir.VectorType(INT, 16), [0] * 8 + [1] * 8)
    return builder.fmul(builder.uitofp(numbers, _SIXTEEN), builder.shuffle_vector(factors, factors, lanes))


def _number(builder: ir.IRBuilder, numbers: ir.Value, at: int) -> ir.Value:
    """Emit one of a block's numbers in all lanes: from memory, which costs no vector instruction."""
    return splat(builder, load(builder, address_of(builder, numbers, index(at)), FLOAT), LANES)


def _table(builder: ir.IRBuilder, numbers: ir.Value, group: int, first: int) -> ir.Value:
    """Emit the values of `first` to `first` + 15 in a group: number · scale - minimum."""
    ramp = ir.Constant(FLOATS, [float(first + lane) for lane in range(LANES)])
    scale, minimum = _number(builder, numbers, group), _number(builder, numbers, 8 + group)
    return multiply_add(builder, ramp, scale, builder.fneg(minimum))


def _look_up(builder: ir.IRBuilder, table: Sequence[ir.Value], places: ir.Value, out: ir.Value, group: int) -> None:
    """Emit the store of 32 numbers of a table of two vectors, rounded, as a row of the tile of their group."""
    words = builder.bitcast(_rounded(builder, *table), _GROUP_WORDS)
    found = call(builder, "llvm.x86.avx512.permvar.hi.512", _GROUP_WORDS, [words, places])
    _write(builder, found, out, group)


def _unpack_q4_k(builder: ir.IRBuilder, block: ir.Value, numbers: ir.Value, out: ir.Value) -> None:
    """Emit look-ups in a table of two groups, the odd one first: its numbers need no mask, the others get 16."""
    for pair in range(4):
        table = [_table(builder, numbers, 2 * pair + which, 0) for which in (1, 0)]
        words = builder.zext(_bytes_at(builder, block, 16 + GROUP * pair, _BYTES), _GROUP_WORDS)
        even = builder.or_(builder.and_(words, constant(_GROUP_WORDS, 15)), constant(_GROUP_WORDS, LANES))
        _look_up(builder, table, even, out, 2 * pair)
        _look_up(builder, table, builder.lshr(words, constant(_GROUP_WORDS, 4)), out, 2 * pair + 1)


def _unpack_q5_k(builder: ir.IRBuilder, block: ir.Value, numbers: ir.Value, out: ir.Value) -> None:
    fifths = _bytes_at(builder, block, 16, _BYTES)
    for group in range(8):
        fifth = builder.zext(_shifted(builder, fifths, group - 4, 16), _GROUP_WORDS)
        places = builder.or_(_nibbles(builder, block, 48, group), fifth)
        _look_up(builder, [_table(builder, numbers, group, first) for first in (0, LANES)], places, out, group)


def _unpack_q6_k(builder: ir.IRBuilder, block: ir.Value, numbers: ir.Value, out: ir.Value) -> None:
    for group in range(8):
        half, quarter = divmod(group, 4)
        lower = _bytes_at(builder, block, 64 * half + GROUP * (quarter % 2), _BYTES)
        upper = _bytes_at(builder, block, 128 + GROUP * half, _BYTES)
        integers = builder.or_(
            _shifted(builder, lower, quarter // 2 * 4, 15), _shifted(builder, upper, 2 * quarter - 4, 48)
        )
        values = []
        for part in range(2):
            mask = ir.Constant(INTS, list(range(part * LANES, (part + 1) * LANES)))
            few = builder.zext(builder.shuffle_vector(integers, integers, mask), INTS)
            scale, minimum = (_number(builder, numbers, first + 2 * group + part) for first in (0, 16))
            values.append(multiply_add(builder, builder.uitofp(few, FLOATS), scale, minimum))
        _write(builder, _rounded(builder, *values), out, group)


def _unpack_q8_0(builder: ir.IRBuilder, block: ir.Value, _: ir.Value, out: ir.Value) -> None:
    """Emit eight blocks of 32, one after the other, each with its own scale."""
    for group in range(8):
        scale = splat(builder, _half_at(builder, block, group * 34), LANES)
        values = []
        for part in range(2):
            few = _bytes_at(builder, block, group * 34 + 2 + part * LANES, ir.VectorType(BYTE, LANES))
            values.append(builder.fmul(builder.sitofp(builder.sext(few, INTS), FLOATS), scale))
        _write(builder, _rounded(builder, *values), out, group)


def _write_minima(builder: ir.IRBuilder, block: ir.Value, out: ir.Value) -> None:
    store(builder, _scales_and_minima(builder, block), out, 4)


def _write_scales(builder: ir.IRBuilder, block: ir.Value, out: ir.Value) -> None:
    signed = builder.sext(_bytes_at(builder, block, 192, ir.VectorType(BYTE, LANES)), INTS)
    scales = builder.fmul(builder.sitofp(signed, FLOATS), splat(builder, _half_at(builder, block, 208), LANES))
    store(builder, scales, out, 4)
    store(builder, builder.fmul(scales, constant(FLOATS, -32.0)), address_of(builder, out, index(LANES)), 4)


# --- for numba ----------------------------------------------------------------------------------------------


def _reader(emit):
    """Make an intrinsic that writes the numbers needed to unpack a block to NUMBERS float32."""

    @intrinsic
    def read(typing_context, blocks, offset, numbers, numbers_offset):
        def generate(context, builder, signature, args):
            block, to = elements_at(context, builder, signature, args, (0, 2))
            emit(builder, block, to)
            return context.get_dummy_value()

        return signature_of(blocks, offset, numbers, numbers_offset), generate

    return read


read_minima, read_scales = _reader(_write_minima), _reader(_write_scales)
"""For Q4_K and Q5_K: 8 scales and 8 minima. For Q6_K: 16 scales, and -32 times each. Q8_0 needs none."""


def _unpacker(emit, n_bytes):
    """Make an intrinsic that unpacks 256 weights of an output to its rows of eight tiles.

    Blocks of 32 outputs are far apart in a file: too many streams for the hardware prefetcher. So unpacking a block
    prefetches the one `ahead` bytes after it, one by one: the core has room for only a dozen requests, and stalls on
    one more.
    """

    @intrinsic
    def unpack(typing_context, blocks, offset, ahead, numbers, numbers_offset, out, out_offset):
        def generate(context, builder, signature, args):
            block, taken, to = elements_at(context, builder, signature, args, (0, 3, 5))
            for line in range(0, n_bytes, ROW_BYTES):
                prefetch(builder, address_of(builder, block, args[2], index(line), element=BYTE), cache=2)
            emit(builder, block, taken, to)
            return context.get_dummy_value()

        return signature_of(blocks, offset, ahead, numbers, numbers_offset, out, out_offset), generate

    return unpack


unpack_q4_k, unpack_q5_k = _unpacker(_unpack_q4_k, 144), _unpacker(_unpack_q5_k, 176)
unpack_q6_k, unpack_q8_0 = _unpacker(_unpack_q6_k, 210), _unpacker(_unpack_q8_0, 272)


@intrinsic
def pack_pairs(typing_context, x, offset, stride, n_rows, out, out_offset):
    """Write 32 k of up to 16 rows, `stride` apart, as the pairs of a tile: bfloat16, in int32 words of two."""

    def generate(context, builder, signature, args):
        x, out = elements_at(context, builder, signature, args, (0, 4))
        stride, n_rows = args[2], args[3]
        even, odd = (ir.Constant(INTS, [2 * lane + which for lane in range(LANES)]) for which in (0, 1))
        words = []
        for i in range(ROWS):
            inside = builder.icmp_signed("<", index(i), n_rows)
            row = address_of(builder, x, builder.select(inside, builder.mul(stride, index(i)), index(0)))
            low, high = (
                rounded_bits(builder, load(builder, address_of(builder, row, index(first)), FLOATS))
                for first in (0, LANES)
            )
            first, second = (builder.shuffle_vector(low, high, mask) for mask in (even, odd))
            upper = builder.and_(second, constant(INTS, ~0xFFFF))
            word = builder.or_(builder.lshr(first, constant(INTS, 16)), upper)
            words.append(builder.select(inside, word, constant(INTS, 0)))
        for pair, line in enumerate(transposed(builder, words)):
            store(builder, line, address_of(builder, out, index(pair * LANES), element=INT))
        return context.get_dummy_value()

    return signature_of(x, offset, stride, n_rows, out, out_offset), generate


def _multiplier(row_tiles):
    """Make an intrinsic that multiplies 32 outputs with the first 16 · `row_tiles` of 32 rows."""

    @intrinsic
    def multiply(typing_context, weight, weight_offset, rows, rows_offset, steps, sums, sums_offset, add):
        """Write products to sums (float32), or add them where `add` is not 0."""

        def generate(context, builder, signature, args):
            weight, rows, sums = elements_at(context, builder, signature, args, (0, 2, 5))
            steps, add = args[4], args[7]
            places = {
                2 * left + right: address_of(builder, sums, index(left * ROWS * SIDE + right * ROWS))
                for left in range(2)
                for right in range(row_tiles)
            }

            def operands(i: ir.Value) -> dict[int, ir.Value]:
                start = builder.mul(i, index(STEP_ELEMENTS))
                return {
                    first + half: address_of(builder, panel, start, index(half * TILE), element=SHORT)
                    for first, panel, halves in ((4, weight, 2), (6, rows, row_tiles))
                    for half in range(halves)
                }

            emit_square(builder, "tdpbf16ps", steps, operands, Sums(places, 4 * SIDE), add=add)
            return context.get_dummy_value()

        return signature_of(weight, weight_offset, rows, rows_offset, steps, sums, sums_offset, add), generate

    return multiply


blocks_tile, blocks_half_tile = _multiplier(2), _multiplier(1)
