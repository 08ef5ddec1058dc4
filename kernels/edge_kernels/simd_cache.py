"""float16 keys and values of a KV cache as LLVM IR: brought into the order of AMX's tiles.

A float16 is the sum of two bfloat16: 8 bits of its significand, and the other 3. Keys are taken in both parts, values
in the first. Keys are left operands as they lie; values are turned round, so that positions are what is summed over.
Tiles are those of `simd_blocks`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from llvmlite import ir
from numba.extending import intrinsic

from edge_kernels.simd import _INT, _address, _constant, _index, _load, _store, _takes
from edge_kernels.simd_amx import ROW_BYTES, ROWS
from edge_kernels.simd_bf16 import _FLOATS, _INTS, _SHORT, _SHORTS, LANES, _rounded_bits, _start, _transposed
from edge_kernels.simd_blocks import STEP

_UPPER = ~0xFFFF
_HALVES = ir.VectorType(ir.HalfType(), LANES)


def _halves(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Emit 16 float16 as float32."""
    return builder.fpext(_load(builder, address, _HALVES, 2), _FLOATS)


def _shorts(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """Emit the upper halves of 16 words."""
    return builder.trunc(builder.lshr(bits, _constant(_INTS, 16)), _SHORTS)


@intrinsic
def split_key(typing_context, x, offset, high, high_offset, low, low_offset):
    """Write 32 float16 (uint16) of a key as a row of a tile (int16), and what they are more as a row of another."""

    def generate(context, builder, signature, args):
        x, high, low = (_start(context, builder, signature, args, position) for position in (0, 2, 4))
        for first in (0, LANES):
            value = _halves(builder, _address(builder, x, _index(first), element=_SHORT))
            bits = builder.and_(_rounded_bits(builder, value), _constant(_INTS, _UPPER))
            rest = builder.fsub(value, builder.bitcast(bits, _FLOATS))
            for part, out in ((bits, high), (_rounded_bits(builder, rest), low)):
                _store(builder, _shorts(builder, part), _address(builder, out, _index(first), element=_SHORT), 32)
        return context.get_dummy_value()

    return _takes(x, offset, high, high_offset, low, low_offset), generate


@intrinsic
def turn_values(typing_context, x, offset, stride, n_rows, out, out_offset):
    """Write 16 numbers of each of up to 32 positions, `stride` apart, as a tile: a row for each number.

    x: float16 (uint16), out: int16; positions from `n_rows` on become 0.
    """

    def generate(context, builder, signature, args):
        x, out = (_start(context, builder, signature, args, position) for position in (0, 4))
        stride, n_rows = args[2], args[3]
        sides = []
        for first in (0, ROWS):
            rows = []
            for i in range(first, first + ROWS):
                inside = builder.icmp_signed("<", _index(i), n_rows)
                place = builder.select(inside, builder.mul(stride, _index(i)), _index(0))
                bits = _rounded_bits(builder, _halves(builder, _address(builder, x, place, element=_SHORT)))
                rows.append(builder.select(inside, bits, _constant(_INTS, 0)))
            sides.append([_shorts(builder, line) for line in _transposed(builder, rows)])
        for number, (one, other) in enumerate(zip(*sides, strict=True)):
            for line, first in ((one, 0), (other, ROWS)):
                at = _address(builder, out, _index(number * STEP + first), element=_SHORT)
                _store(builder, line, at, ROW_BYTES // 2)
        return context.get_dummy_value()

    return _takes(x, offset, stride, n_rows, out, out_offset), generate


@intrinsic
def pair_powers(typing_context, x, offset, out, out_offset):
    """Write two lines of 32 float32, one below the other, as a pair of bfloat16 for each column (int32 words)."""

    def generate(context, builder, signature, args):
        x, out = (_start(context, builder, signature, args, position) for position in (0, 2))
        for half in range(2):
            first, second = (
                _rounded_bits(builder, _load(builder, _address(builder, x, _index(line + half * LANES)), _FLOATS))
                for line in (0, 2 * LANES)
            )
            word = builder.or_(
                builder.lshr(first, _constant(_INTS, 16)), builder.and_(second, _constant(_INTS, _UPPER))
            )
            # Half of the columns are another tile: 16 lines of 16 words further on.
            _store(builder, word, _address(builder, out, _index(half * ROWS * LANES), element=_INT), ROW_BYTES)
        return context.get_dummy_value()

    return _takes(x, offset, out, out_offset), generate
