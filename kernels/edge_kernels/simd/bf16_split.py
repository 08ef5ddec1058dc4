"""float32 products from bfloat16 tiles as LLVM IR.

A float32 is the sum of three bfloat16: 8 bits of its significand each, the upper ones first. So a float32 product
becomes six bfloat16 products, summed in float32 as ever; the three smallest of the nine, below 2^-26 of the product,
are left out. AMX multiplies bfloat16 more than ten times as fast as AVX-512 multiplies float32.

Tiles are those of `simd.amx`. Rows lie [step of 32 k][part][half][16 rows][32], weights [step][part][half of 32
outputs][16 pairs of k][16 outputs][2]; sums [row][32].

Source: Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
Computations" (2019).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir
from numba.extending import intrinsic

from edge_kernels.simd.amx import (
    ROWS,
    SIDE,
    TILE,
    Sums,
    load_tile,
    multiply_square,
    store_sums,
    zero_sums,
)
from edge_kernels.simd.bf16 import (
    FLOATS,
    INTS,
    LANES,
    SHORTS,
    UPPER_HALF,
    rounded_bits,
    transposed,
)
from edge_kernels.simd.ir import INT, SHORT, address_of, constant, elements_at, index, load, loop, signature_of, store

PARTS = 3

# (part of the rows, part of the weight), in an order where only what changes is loaded.
_ORDER = ((0, 0), (0, 1), (1, 1), (1, 0), (2, 0), (0, 2))


def _split(builder: ir.IRBuilder, value: ir.Value) -> list[ir.Value]:
    """Emit the bits of three vectors of bfloat16, in upper halves, that add up to the value."""
    parts = []
    for _ in range(PARTS):
        bits = builder.and_(rounded_bits(builder, value), constant(INTS, UPPER_HALF))
        value = builder.fsub(value, builder.bitcast(bits, FLOATS))
        parts.append(bits)
    return parts


def _multiply_parts(
    builder: ir.IRBuilder, rows: ir.Value, outputs: ir.Value, order: Sequence[tuple[int, int]]
) -> None:
    """Emit the products of one step, part by part; a part that is already in the registers stays there."""
    before = (-1, -1)
    for pair in order:
        for side, start in enumerate((rows, outputs)):
            for half in range(2) if pair[side] != before[side] else ():
                at = address_of(builder, start, index((2 * pair[side] + half) * TILE), element=SHORT)
                load_tile(builder, 4 + 2 * side + half, at)
        before = pair
        multiply_square(builder, "tdpbf16ps")


@intrinsic
def split_rows(typing_context, x, offset, out, out_offset):
    """Write 32 float32 of a row to its place in a half of part 0 of a step (int16); the other parts follow."""

    def generate(context, builder, signature, args):
        x, out = elements_at(context, builder, signature, args, (0, 2))
        for first in (0, LANES):
            for part, bits in enumerate(_split(builder, load(builder, address_of(builder, x, index(first)), FLOATS))):
                halves = builder.trunc(builder.lshr(bits, constant(INTS, 16)), SHORTS)
                at = address_of(builder, out, index(part * 2 * TILE + first), element=SHORT)
                store(builder, halves, at, 2)
        return context.get_dummy_value()

    return signature_of(x, offset, out, out_offset), generate


@intrinsic
def split_outputs(typing_context, weight, offset, stride, out, out_offset):
    """Write 32 float32 of each of 16 outputs, `stride` apart, as pairs: half of part 0 of a step; the others follow.

    weight: float32, out: int32 words of two.
    """

    def generate(context, builder, signature, args):
        weight, out = elements_at(context, builder, signature, args, (0, 3))
        even, odd = (ir.Constant(INTS, [2 * lane + which for lane in range(LANES)]) for which in (0, 1))
        rows: list[list[ir.Value]] = [[] for _ in range(PARTS)]
        for output in range(ROWS):
            row = address_of(builder, weight, builder.mul(args[2], index(output)))
            low, high = (
                _split(builder, load(builder, address_of(builder, row, index(first)), FLOATS)) for first in (0, LANES)
            )
            for part in range(PARTS):
                first, second = (builder.shuffle_vector(low[part], high[part], mask) for mask in (even, odd))
                rows[part].append(builder.or_(builder.lshr(first, constant(INTS, 16)), second))
        for part in range(PARTS):
            for pair, words in enumerate(transposed(builder, rows[part])):
                at = address_of(builder, out, index(part * TILE + pair * LANES), element=INT)
                store(builder, words, at)
        return context.get_dummy_value()

    return signature_of(weight, offset, stride, out, out_offset), generate


@intrinsic
def split_tile(
    typing_context,
    rows,
    rows_offset,
    weight,
    weight_offset,
    parts,
    steps,
    block,
    block_offset,
    sums,
    sums_offset,
    add,
):
    """Multiply 32 rows with 32 outputs: sums (float32) = the products, or += where `add` is not 0.

    parts: of the weight, 3, or 2 where the third is 0 everywhere; block: 1024 float32 of scratch. Blocks of k are
    added up outside the tiles, so that one chain of roundings holds no more than a block's products.
    """

    def generate(context, builder, signature, args):
        rows, weight, block, sums = elements_at(context, builder, signature, args, (0, 2, 6, 8))
        parts, steps, add = args[4], args[5], args[10]
        zero_sums(builder)

        def multiply(n_parts: int) -> None:
            def step(i: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
                row = address_of(builder, rows, builder.mul(i, index(PARTS * 2 * TILE)), element=SHORT)
                output = address_of(builder, weight, builder.mul(i, index(n_parts * 2 * TILE)), element=SHORT)
                _multiply_parts(builder, row, output, [pair for pair in _ORDER if pair[1] < n_parts])
                return []

            loop(builder, index(0), steps, 1, [], step)

        with builder.if_else(builder.icmp_signed("==", parts, index(PARTS))) as (then, otherwise):
            with then:
                multiply(PARTS)
            with otherwise:
                multiply(PARTS - 1)

        def square(start: ir.Value) -> Sums:
            at = (register // 2 * ROWS * SIDE + register % 2 * ROWS for register in range(4))
            places = {register: address_of(builder, start, index(offset)) for register, offset in enumerate(at)}
            return Sums(places, 4 * SIDE)

        with builder.if_else(builder.icmp_signed("==", add, index(0))) as (then, otherwise):
            with then:
                store_sums(builder, square(sums))
            with otherwise:
                store_sums(builder, square(block))

                def more(i: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
                    for first in range(0, 4 * LANES, LANES):
                        one, other = (address_of(builder, part, i, index(first)) for part in (sums, block))
                        total = builder.fadd(load(builder, one, FLOATS), load(builder, other, FLOATS))
                        store(builder, total, one)
                    return []

                loop(builder, index(0), index(SIDE * SIDE), 4 * LANES, [], more)
        return context.get_dummy_value()

    return signature_of(
        rows, rows_offset, weight, weight_offset, parts, steps, block, block_offset, sums, sums_offset, add
    ), generate  # fmt: skip
