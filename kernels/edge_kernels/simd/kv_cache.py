"""float16 keys and values of a KV cache as LLVM IR: brought into the order of AMX's tiles.

A float16 is the sum of two bfloat16: 8 bits of its significand, and the other 3 (it has 11, the first of them not
stored; bfloat16 has 8, and the larger exponents). Keys are used in both parts, values in the first. Keys are left
operands as stored; values are transposed, so that the sum runs over positions. Scores become pairs of powers. Tiles
are those of `simd.gguf_blocks`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

import functools
from collections.abc import Sequence

from llvmlite import ir
from numba.extending import intrinsic

from edge_kernels.simd.amx import ROW_BYTES, ROWS, STEP
from edge_kernels.simd.bf16 import FLOATS, INTS, LANES, SHORTS, rounded_bits, transposed
from edge_kernels.simd.float32 import emit_exp2
from edge_kernels.simd.gguf_blocks import STEP_ELEMENTS
from edge_kernels.simd.ir import (
    INT,
    SHORT,
    address_of,
    constant,
    elements_at,
    index,
    larger,
    load,
    loop,
    signature_of,
    store,
)

_UPPER = ~0xFFFF
_HALVES = ir.VectorType(ir.HalfType(), LANES)


def _halves(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Emit 16 float16 as float32."""
    return builder.fpext(load(builder, address, _HALVES, 2), FLOATS)


def _shorts(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """Emit the upper halves of 16 words."""
    return builder.trunc(builder.lshr(bits, constant(INTS, 16)), SHORTS)


@intrinsic
def split_key(typing_context, x, offset, high, high_offset, low, low_offset):
    """Write 32 float16 (uint16) of a key as a row of a tile (int16), and their remainders as a row of another."""

    def generate(context, builder, signature, args):
        x, high, low = elements_at(context, builder, signature, args, (0, 2, 4))
        for first in (0, LANES):
            value = _halves(builder, address_of(builder, x, index(first), element=SHORT))
            bits = builder.and_(rounded_bits(builder, value), constant(INTS, _UPPER))
            rest = builder.fsub(value, builder.bitcast(bits, FLOATS))
            for part, out in ((bits, high), (rounded_bits(builder, rest), low)):
                store(builder, _shorts(builder, part), address_of(builder, out, index(first), element=SHORT), 32)
        return context.get_dummy_value()

    return signature_of(x, offset, high, high_offset, low, low_offset), generate


@intrinsic
def turn_values(typing_context, x, offset, stride, n_rows, out, out_offset):
    """Write 16 numbers of each of up to 32 positions, `stride` apart, as a tile: a row for each number.

    x: float16 (uint16), out: int16; positions from `n_rows` on become 0.
    """

    def generate(context, builder, signature, args):
        x, out = elements_at(context, builder, signature, args, (0, 4))
        stride, n_rows = args[2], args[3]
        sides = []
        for first in (0, ROWS):
            rows = []
            for i in range(first, first + ROWS):
                inside = builder.icmp_signed("<", index(i), n_rows)
                place = builder.select(inside, builder.mul(stride, index(i)), index(0))
                bits = rounded_bits(builder, _halves(builder, address_of(builder, x, place, element=SHORT)))
                rows.append(builder.select(inside, bits, constant(INTS, 0)))
            sides.append([_shorts(builder, line) for line in transposed(builder, rows)])
        for number, (one, other) in enumerate(zip(*sides, strict=True)):
            for line, first in ((one, 0), (other, ROWS)):
                at = address_of(builder, out, index(number * STEP + first), element=SHORT)
                store(builder, line, at, ROW_BYTES // 2)
        return context.get_dummy_value()

    return signature_of(x, offset, stride, n_rows, out, out_offset), generate


@intrinsic
def softmax_pairs(typing_context, scores, offset, keys, pairs, pairs_offset, sums, sums_offset):
    """Write 2^(score - the largest) of 16 queries as pairs of keys in bfloat16, and their sums in float32.

    scores: float32 [key][32], of which it takes 16; keys: a multiple of 4; pairs: int32 words, [32 keys][half of the
    queries][16 pairs][16].
    """

    def generate(context, builder, signature, args):
        scores, pairs, sums = elements_at(context, builder, signature, args, (0, 3, 5))
        chains = 4

        def score(key: ir.Value, more: int) -> ir.Value:
            row = builder.mul(key, index(2 * LANES))
            return load(builder, address_of(builder, scores, row, index(more * 2 * LANES)), FLOATS)

        found = loop(
            builder, index(0), args[2], chains, [constant(FLOATS, float("-inf"))] * chains,
            lambda key, state: [larger(builder, score(key, more), state[more]) for more in range(chains)],
        )  # fmt: skip
        largest = functools.reduce(lambda one, other: larger(builder, one, other), found)

        def pair(key: ir.Value, state: Sequence[ir.Value]) -> Sequence[ir.Value]:
            powers = [emit_exp2(builder, builder.fsub(score(key, more), largest)) for more in range(2)]
            first, second = (rounded_bits(builder, power) for power in powers)
            word = builder.or_(builder.lshr(first, constant(INTS, 16)), builder.and_(second, constant(INTS, _UPPER)))
            number = builder.sdiv(key, index(2))
            tile = builder.mul(builder.sdiv(number, index(ROWS)), index(STEP_ELEMENTS // 2))
            line = builder.mul(builder.srem(number, index(ROWS)), index(LANES))
            store(builder, word, address_of(builder, pairs, tile, line, element=INT))
            return [builder.fadd(total, power) for total, power in zip(state, powers, strict=True)]

        totals = loop(builder, index(0), args[2], 2, [constant(FLOATS, 0.0)] * 2, pair)
        store(builder, builder.fadd(*totals), sums)
        return context.get_dummy_value()

    return signature_of(scores, offset, keys, pairs, pairs_offset, sums, sums_offset), generate
