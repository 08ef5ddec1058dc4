"""Softmax of a panel, block by block of keys, in which blocks leave no trace in the bits, as LLVM IR.

A running softmax shrinks what it has added up whenever it meets a larger score. Here the running maximum is a *whole*
number (scores are in units of log2(e)), so that everything is shrunk by a power of 2, exactly; and a power's exponent
is an integer of its own, the maximum is subtracted from that:

    2^(score - maximum) = 2^(score - n) · 2^(n - maximum),  n = score rounded; the polynomial sees no maximum

Powers are added up with compensation (Kahan), as there may be thousands: the sum's error is that of one addition.

So a column's results depend on its scores and their order alone, not on where blocks begin; and scores of -infinity,
whose powers are 0, may be left out.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

import struct
from collections.abc import Sequence

from llvmlite import ir
from numba.extending import intrinsic

from edge_kernels.simd.float32 import EXP2_POLYNOMIAL, ROUND, ROUND_TO_EXPONENT, emit_exp2
from edge_kernels.simd.ir import (
    INT,
    TILE,
    VECTOR,
    address_of,
    call,
    constant,
    data_of,
    index,
    larger,
    load,
    loop,
    multiply_add,
    signature_of,
    store,
)

LOWEST_MAXIMUM = -float(1 << 20)
"""The maximum of a column that has seen no key: its scores would be the lowest that count."""
STATE_ROWS = 4
"""Rows of a panel's state; the last has the factors."""
_LOWEST, _HIGHEST = -float(1 << 21), float(1 << 21)  # beyond, adding ROUND does not round to an integer
_ROUND_BITS = struct.unpack("<i", struct.pack("<f", ROUND))[0]
_INTS = ir.VectorType(INT, TILE.width)


def _power(builder: ir.IRBuilder, score: ir.Value, base: ir.Value) -> ir.Value:
    """Emit 2^(score - maximum); base: the maximum, and the bits of ROUND. NaN above _HIGHEST: it shall be seen."""
    low, high = constant(VECTOR, _LOWEST), constant(VECTOR, _HIGHEST)
    score = builder.select(builder.fcmp_ordered("<", score, low), low, score)
    score = builder.select(builder.fcmp_ordered(">", score, high), constant(VECTOR, float("nan")), score)
    shifted = builder.fadd(score, constant(VECTOR, ROUND_TO_EXPONENT))
    rest = builder.fsub(score, builder.fsub(shifted, constant(VECTOR, ROUND_TO_EXPONENT)))  # exact, in [-1/2, 1/2]
    result = constant(VECTOR, EXP2_POLYNOMIAL[0])
    for coefficient in (*EXP2_POLYNOMIAL[1:], 1.0):
        result = multiply_add(builder, result, rest, constant(VECTOR, coefficient))
    exponent = builder.sub(builder.bitcast(shifted, _INTS), base)
    zero = constant(_INTS, 0)
    exponent = builder.select(builder.icmp_signed(">", exponent, zero), exponent, zero)
    return builder.fmul(result, builder.bitcast(builder.shl(exponent, constant(_INTS, 23)), VECTOR))


def whole_softmax(vectors: int):
    """Make the softmax of a panel of `vectors` vectors."""
    width = vectors * TILE.width

    @intrinsic
    def softmax(typing_context, scores, offset, rows, state, state_offset):
        """Add `rows` further rows of scores to a running softmax over the rows, one per column of the panel.

        scores[offset + r · width + j] becomes 2^(score - maximum so far). `state` holds STATE_ROWS rows of `width`:
        the maxima (start with LOWEST_MAXIMUM), the sums of the powers and what rounding has added to them (both start
        with 0), and, written here, the factors by which everything that was accumulated before shrinks.
        """

        def generate(context, builder, signature, args):
            _, offset, rows, _, state_offset = args
            scores = address_of(builder, data_of(context, builder, signature, args, 0), offset)
            state = address_of(builder, data_of(context, builder, signature, args, 3), state_offset)
            starts = [index(v * TILE.width) for v in range(vectors)]
            maxima_at, sums_at, excess_at, factors_at = (
                [address_of(builder, state, index(part * width), start) for start in starts]
                for part in range(STATE_ROWS)
            )

            def cells(row: ir.Value) -> list[ir.Value]:
                return [address_of(builder, scores, builder.mul(row, index(width)), start) for start in starts]

            def find(row: ir.Value, maxima: Sequence[ir.Value]) -> Sequence[ir.Value]:
                return [larger(builder, load(builder, cell), m) for cell, m in zip(cells(row), maxima, strict=True)]

            before = [load(builder, address) for address in maxima_at]
            maxima, bases = [], []
            for found in loop(builder, index(0), rows, 1, before, find):
                high = constant(VECTOR, _HIGHEST)
                bounded = builder.select(builder.fcmp_ordered("<", found, high), found, high)
                maxima.append(call(builder, f"llvm.rint.v{TILE.width}f32", VECTOR, [bounded]))
                bases.append(builder.add(builder.fptosi(maxima[-1], _INTS), constant(_INTS, _ROUND_BITS)))
            factors = [emit_exp2(builder, builder.fsub(old, new)) for old, new in zip(before, maxima, strict=True)]
            totals = [
                builder.fmul(load(builder, at), factor)
                for places in (sums_at, excess_at)
                for at, factor in zip(places, factors, strict=True)
            ]

            def raise_(row: ir.Value, totals: Sequence[ir.Value]) -> Sequence[ir.Value]:
                sums, excess = [], []
                for cell, base, total, rounded in zip(
                    cells(row), bases, totals[:vectors], totals[vectors:], strict=True
                ):
                    power = _power(builder, load(builder, cell), base)
                    store(builder, power, cell)
                    wanted = builder.fsub(power, rounded)
                    sums.append(builder.fadd(total, wanted))
                    excess.append(builder.fsub(builder.fsub(sums[-1], total), wanted))
                return [*sums, *excess]

            totals = loop(builder, index(0), rows, 1, totals, raise_)
            found = (maxima, totals[:vectors], totals[vectors:], factors)
            for values, addresses in zip(found, (maxima_at, sums_at, excess_at, factors_at), strict=True):
                for value, address in zip(values, addresses, strict=True):
                    store(builder, value, address)
            return context.get_dummy_value()

        return signature_of(scores, offset, rows, state, state_offset), generate

    return softmax
