"""float32 products out of bfloat16 tiles as LLVM IR.

A float32 is the sum of three bfloat16: 8 bits of its significand each, the upper ones first. So a product of float32
is one of six of bfloat16, with the sums in float32 as ever; the three smallest of the nine, below 2^-26 of the
product, are left out. AMX multiplies bfloat16 more than ten times as fast as AVX-512 multiplies float32.

Tiles are those of `simd_amx`. Rows lie [step of 32 k][part][half][16 rows][32], weights [step][part][half of 32
outputs][16 pairs of k][16 outputs][2]; sums [row][32].

Source: Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
Computations" (2019).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from edge_kernels.simd.amx import ROW_BYTES, ROWS, TILE_BYTES, load_tile, multiply_tiles, store_tile, zero_tile
from edge_kernels.simd.bf16 import (
    _FLOATS,
    _INTS,
    _SHORT,
    _SHORTS,
    _UPPER_HALF,
    LANES,
    _lanes_below,
    _masked_load,
    _masked_store,
    _rounded_bits,
    _start,
    _transposed,
)
from edge_kernels.simd.float32 import _INT, _address, _constant, _gelu, _index, _load, _loop, _store, _takes

PARTS = 3
SPLIT_ROWS = 2 * ROWS
"""Rows and outputs of a tile of sums."""
STEP = ROW_BYTES // 2
"""k of a tile."""
TILE = TILE_BYTES // 2  # in elements of bfloat16

# (part of the rows, part of the weight), such that only what changes is loaded anew.
_ORDER = ((0, 0), (0, 1), (1, 1), (1, 0), (2, 0), (0, 2))


def _split(builder: ir.IRBuilder, value: ir.Value) -> list[ir.Value]:
    """Emit the bits of three vectors of bfloat16, in upper halves, whose sum the value is."""
    parts = []
    for _ in range(PARTS):
        bits = builder.and_(_rounded_bits(builder, value), _constant(_INTS, _UPPER_HALF))
        value = builder.fsub(value, builder.bitcast(bits, _FLOATS))
        parts.append(bits)
    return parts


def _multiply_parts(
    builder: ir.IRBuilder, rows: ir.Value, outputs: ir.Value, order: Sequence[tuple[int, int]]
) -> None:
    """Emit the products of one step, part by part; a part that is in the registers already stays there."""
    before = (-1, -1)
    for pair in order:
        for side, start in enumerate((rows, outputs)):
            for half in range(2) if pair[side] != before[side] else ():
                at = _address(builder, start, _index((2 * pair[side] + half) * TILE), element=_SHORT)
                load_tile(builder, 4 + 2 * side + half, at)
        before = pair
        for register in range(4):
            multiply_tiles(builder, "tdpbf16ps", register, 4 + register // 2, 6 + register % 2)


@intrinsic
def split_rows(typing_context, x, offset, out, out_offset):
    """Write 32 float32 of a row, to its place in a half of part 0 of a step (int16); the other parts lie behind."""

    def generate(context, builder, signature, args):
        x, out = (_start(context, builder, signature, args, position) for position in (0, 2))
        for first in (0, LANES):
            for part, bits in enumerate(
                _split(builder, _load(builder, _address(builder, x, _index(first)), _FLOATS))
            ):
                halves = builder.trunc(builder.lshr(bits, _constant(_INTS, 16)), _SHORTS)
                at = _address(builder, out, _index(part * 2 * TILE + first), element=_SHORT)
                _store(builder, halves, at, 2)
        return context.get_dummy_value()

    return _takes(x, offset, out, out_offset), generate


@intrinsic
def split_outputs(typing_context, weight, offset, stride, out, out_offset):
    """Write 32 float32 of each of 16 outputs, `stride` apart, as pairs: half of part 0 of a step, the others behind.

    weight: float32, out: int32 words of two.
    """

    def generate(context, builder, signature, args):
        weight, out = (_start(context, builder, signature, args, position) for position in (0, 3))
        even, odd = (ir.Constant(_INTS, [2 * lane + which for lane in range(LANES)]) for which in (0, 1))
        rows: list[list[ir.Value]] = [[] for _ in range(PARTS)]
        for output in range(ROWS):
            row = _address(builder, weight, builder.mul(args[2], _index(output)))
            low, high = (
                _split(builder, _load(builder, _address(builder, row, _index(first)), _FLOATS))
                for first in (0, LANES)
            )
            for part in range(PARTS):
                first, second = (builder.shuffle_vector(low[part], high[part], mask) for mask in (even, odd))
                rows[part].append(builder.or_(builder.lshr(first, _constant(_INTS, 16)), second))
        for part in range(PARTS):
            for pair, words in enumerate(_transposed(builder, rows[part])):
                at = _address(builder, out, _index(part * TILE + pair * LANES), element=_INT)
                _store(builder, words, at)
        return context.get_dummy_value()

    return _takes(weight, offset, stride, out, out_offset), generate


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
    added up outside the tiles, so that no more than a block's products meet in one chain of roundings.
    """

    def generate(context, builder, signature, args):
        rows, weight, block, sums = (_start(context, builder, signature, args, position) for position in (0, 2, 6, 8))
        parts, steps, add = args[4], args[5], args[10]
        for register in range(4):
            zero_tile(builder, register)

        def loop(n_parts: int) -> None:
            def step(i: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
                row = _address(builder, rows, builder.mul(i, _index(PARTS * 2 * TILE)), element=_SHORT)
                output = _address(builder, weight, builder.mul(i, _index(n_parts * 2 * TILE)), element=_SHORT)
                _multiply_parts(builder, row, output, [pair for pair in _ORDER if pair[1] < n_parts])
                return []

            _loop(builder, _index(0), steps, 1, [], step)

        with builder.if_else(builder.icmp_signed("==", parts, _index(PARTS))) as (then, otherwise):
            with then:
                loop(PARTS)
            with otherwise:
                loop(PARTS - 1)

        def store(to: ir.Value) -> None:
            for register in range(4):
                at = register // 2 * ROWS * SPLIT_ROWS + register % 2 * ROWS
                store_tile(builder, register, _address(builder, to, _index(at)), 4 * SPLIT_ROWS)

        with builder.if_else(builder.icmp_signed("==", add, _index(0))) as (then, otherwise):
            with then:
                store(sums)
            with otherwise:
                store(block)

                def more(i: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
                    for first in range(0, 4 * LANES, LANES):
                        one, other = (_address(builder, part, i, _index(first)) for part in (sums, block))
                        total = builder.fadd(_load(builder, one, _FLOATS), _load(builder, other, _FLOATS))
                        _store(builder, total, one)
                    return []

                _loop(builder, _index(0), _index(SPLIT_ROWS * SPLIT_ROWS), 4 * LANES, [], more)
        return context.get_dummy_value()

    return _takes(
        rows, rows_offset, weight, weight_offset, parts, steps, block, block_offset, sums, sums_offset, add
    ), generate  # fmt: skip


@intrinsic
def finish_tile(
    typing_context, sums, sums_offset, bias, bias_offset, with_gelu, residual, residual_offset, residual_stride,
    out, out_offset, out_stride, n_rows, width,
):  # fmt: skip
    """Write gelu(sums + bias) + residual of n_rows × width of a tile; without GELU where `with_gelu` is 0.

    An empty residual adds nothing. `bias` has 32 elements there, whatever the width.
    """

    def generate(context, builder, signature, args):
        sums, bias, residual, out = (_start(context, builder, signature, args, position) for position in (0, 2, 5, 8))
        with_gelu, residual_stride, out_stride, n_rows, width = (args[position] for position in (4, 7, 10, 11, 12))
        residual_array = cgutils.create_struct_proxy(signature.args[5])(context, builder, value=args[5])
        has_residual = builder.icmp_signed("!=", residual_array.nitems, _index(0))
        wants_gelu = builder.icmp_signed("!=", with_gelu, _index(0))
        wanted = [_lanes_below(builder, builder.sub(width, _index(first))) for first in (0, LANES)]
        nothing = _constant(wanted[0].type, 0)
        added = [builder.select(has_residual, mask, nothing) for mask in wanted]
        summands = [_load(builder, _address(builder, bias, _index(first)), _FLOATS) for first in (0, LANES)]

        def rows(emit_gelu: bool) -> None:
            def row(i: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
                for side, first in enumerate((0, LANES)):
                    line = _address(builder, sums, builder.mul(i, _index(SPLIT_ROWS)), _index(first))
                    value = builder.fadd(_load(builder, line, _FLOATS), summands[side])
                    if emit_gelu:
                        value = _gelu(builder, value)
                    more = _address(builder, residual, builder.mul(i, residual_stride), _index(first))
                    value = builder.fadd(value, _masked_load(builder, more, added[side]))
                    to = _address(builder, out, builder.mul(i, out_stride), _index(first))
                    _masked_store(builder, value, to, wanted[side])
                return []

            _loop(builder, _index(0), n_rows, 1, [], row)

        with builder.if_else(wants_gelu) as (then, otherwise):
            with then:
                rows(True)
            with otherwise:
                rows(False)
        return context.get_dummy_value()

    return _takes(
        sums, sums_offset, bias, bias_offset, with_gelu, residual, residual_offset, residual_stride,
        out, out_offset, out_stride, n_rows, width,
    ), generate  # fmt: skip
