"""Panels of weights in ggml's types × rows in 8 bits, as LLVM IR: exact integer sums, one order of float32 additions.

Rows are quantised to 8 bits, 256 numbers at a time (see `QuantizedRow`), and a product takes four k of a row, copied
into all lanes, with four k of each output:

    vpdpbusd    AVX-512 VNNI, AVX-VNNI   unsigned × signed bytes, four products into an int32 lane
    vpmaddubsw  AVX2, AVX-512            unsigned × signed bytes, two products into an int16 lane
    sdot        ARMv8.2 dotprod          signed bytes, four products into an int32 lane
    pairs       all others               bytes widened to int16, two products into an int32 lane

Without VNNI a 4-bit weight has room to spare in 16 bits: two products are at most 2 · 15 · 127 = 3,810, so *eight*
instructions can meet there before the sums are widened, and the instruction that widens (vpmaddwd) multiplies by the
scale of the group as well. 5-bit weights let four meet, 6-bit weights two. Weights of 8 bits let none, and vpsignb
makes them unsigned.

Integers are exact on every instruction set, and what follows in float32 has one order; so a row's result depends
neither on the other rows of the call nor on the number of threads. `reference.gguf_blocks` describes the blocks
and defines the numbers.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_kernels.simd.gguf_layout import (
    BLOCK,
    BLOCK_TILE,
    BYTES,
    FACTORS_AT,
    FLOATS,
    INTS,
    KINDS,
    MADDUBS,
    MINIMA_AT,
    NUMBERS,
    ROW_BYTES,
    ROW_SCALE_AT,
    ROW_SCALES_AT,
    ROW_SUMS_AT,
    SCALES_AT,
    STEP_BYTES,
    SUMS_16_AT,
    SUMS_32_AT,
    UNPACKED_BYTES,
    VECTORS,
    WIDTH,
    WORDS,
    Kind,
    byte_at,
    pointer,
)
from edge_kernels.simd.int8 import multiply_pairs
from edge_kernels.simd.ir import (
    FLOAT,
    INT,
    SHORT,
    call,
    constant,
    index,
    load,
    loop,
    multiply_add,
    splat,
    store,
)


def _maddubs(builder: ir.IRBuilder, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
    return call(builder, "llvm.x86.avx2.pmadd.ub.sw", WORDS, [unsigned, signed])


def _dot(builder: ir.IRBuilder, sums: ir.Value, weights: ir.Value, numbers: ir.Value) -> ir.Value:
    """Emit sums + the products of four weights and four of the row's numbers in each lane."""
    if BLOCK_TILE.instruction == "vpdpbusd":
        operands = [builder.bitcast(value, INTS) for value in (weights, numbers)]
        return call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * WIDTH}", INTS, [sums, *operands])
    if BLOCK_TILE.instruction == "sdot":
        return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", INTS, [sums, weights, numbers])
    wide = ir.VectorType(SHORT, 4 * WIDTH)
    a, b = builder.sext(weights, wide), builder.sext(numbers, wide)
    for half in ((0, 1), (2, 3)):
        mask = ir.Constant(_WORDS_MASK, [4 * lane + place for lane in range(WIDTH) for place in half])
        sums = multiply_pairs(builder, sums, builder.shuffle_vector(a, a, mask), builder.shuffle_vector(b, b, mask))
    return sums


_WORDS_MASK = ir.VectorType(INT, 2 * WIDTH)


class _Block(NamedTuple):
    """A block at hand: addresses of the unpacked weights, and of a row's numbers for each row of the tile."""

    kind: Kind
    panel: ir.Value
    rows: Sequence[ir.Value]

    def sums_of(self) -> int:
        """Sums in the tile."""
        return len(self.rows) * VECTORS


def _vectors(builder: ir.IRBuilder, address: ir.Value, type_: ir.Type) -> list[ir.Value]:
    return [load(builder, byte_at(builder, address, v * 4 * WIDTH), type_) for v in range(VECTORS)]


def _number(builder: ir.IRBuilder, row: ir.Value, place: int | ir.Value, type_: ir.Type) -> ir.Value:
    """Emit four bytes of a row, copied into all lanes."""
    return splat(builder, load(builder, byte_at(builder, row, place), type_), WIDTH)


def _words_sums(builder: ir.IRBuilder, block: _Block, place: ir.Value, step: ir.Value, meet: int) -> list[ir.Value]:
    """Emit the int16 sums of `meet` steps: the first sum of each lane beside the second.

    `place` is where the steps' numbers begin in each row, `step` where their weights begin in the panel.
    """
    sums: list[ir.Value] = []
    is_signed = meet == 1
    for s in range(meet):
        weights = _vectors(builder, byte_at(builder, block.panel, step, s * STEP_BYTES), BYTES)
        factors = (
            [call(builder, "llvm.abs.v32i8", BYTES, [w, ir.Constant(BIT, 0)]) for w in weights]
            if is_signed
            else weights
        )
        products = []
        for row in block.rows:
            number = builder.bitcast(_number(builder, byte_at(builder, row, place), 4 * s, INT), BYTES)
            for weight, factor in zip(weights, factors, strict=True):
                signed = call(builder, "llvm.x86.avx2.psign.b", BYTES, [number, weight]) if is_signed else number
                products.append(_maddubs(builder, factor, signed))
        sums = [_fixed(builder, builder.add(a, b)) for a, b in zip(sums, products, strict=True)] if sums else products
    return sums


def _fixed(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Emit a value that LLVM must have at this point: an instruction of nothing that takes and returns it.

    Otherwise LLVM, for which the order of integer sums does not matter, first adds products to each other and so has
    twice as many values as there are registers.
    """
    nothing = ir.InlineAsm(ir.FunctionType(value.type, [value.type]), "", "=x,0")
    return builder.call(nothing, [value])


BIT = ir.IntType(1)


def _group_sums(builder: ir.IRBuilder, block: _Block, group: ir.Value, scales: Sequence[ir.Value]) -> list[ir.Value]:
    """Emit the int32 sums of a group, multiplied by its scales where these are integers."""
    steps = block.kind.group // 4
    place, step = builder.mul(group, index(4 * steps)), builder.mul(group, index(steps * STEP_BYTES))
    sums: list[ir.Value] = [constant(INTS, 0)] * block.sums_of()
    if MADDUBS:
        factors = [builder.bitcast(scale, WORDS) for scale in scales] or [constant(WORDS, 1)] * VECTORS
        for first in range(0, steps, block.kind.meet):
            at, panel = _sum(builder, place, 4 * first), _sum(builder, step, first * STEP_BYTES)
            words = _words_sums(builder, block, at, panel, block.kind.meet)
            sums = [
                multiply_pairs(builder, s, w, factors[i % VECTORS])
                for i, (s, w) in enumerate(zip(sums, words, strict=True))
            ]
        return sums
    for s in range(steps):
        weights = _vectors(builder, byte_at(builder, block.panel, step, s * STEP_BYTES), BYTES)
        for r, row in enumerate(block.rows):
            number = builder.bitcast(_number(builder, byte_at(builder, row, place), 4 * s, INT), BYTES)
            for v in range(VECTORS):
                sums[r * VECTORS + v] = _dot(builder, sums[r * VECTORS + v], weights[v], number)
    return [builder.mul(s, scales[i % VECTORS]) for i, s in enumerate(sums)] if scales else sums


def _sum(builder: ir.IRBuilder, value: ir.Value, n: int) -> ir.Value:
    return builder.add(value, index(n)) if n else value


def _add_integer_block(builder: ir.IRBuilder, block: _Block, totals: Sequence[ir.Value]) -> list[ir.Value]:
    """Emit totals + scale of the row · (d · Σ scale · sum - m · Σ minimum · sum of the row's numbers)."""
    groups, n = BLOCK // block.kind.group, block.sums_of()
    is_q6 = block.kind.group == 16  # its minima are 32 times the scales, and have the same factor

    def add_group(group: ir.Value, sums: Sequence[ir.Value]) -> Sequence[ir.Value]:
        at = byte_at(builder, block.panel, builder.mul(group, index(NUMBERS)), SCALES_AT)
        found = _group_sums(builder, block, group, _vectors(builder, at, INTS))
        return [builder.add(a, b) for a, b in zip(sums, found, strict=True)]

    zeros = [constant(INTS, 0)] * n
    sums = loop(builder, index(0), index(groups), 1, zeros, add_group)

    def add_minima(pair: ir.Value, sums: Sequence[ir.Value]) -> Sequence[ir.Value]:
        at = byte_at(builder, block.panel, builder.mul(pair, index(NUMBERS)), MINIMA_AT)
        minima = [builder.bitcast(m, WORDS) for m in _vectors(builder, at, INTS)]
        result = []
        for r, row in enumerate(block.rows):
            place = builder.mul(pair, index(4))
            number = _number(builder, byte_at(builder, row, place), SUMS_16_AT if is_q6 else SUMS_32_AT, INT)
            pairs = builder.bitcast(number, WORDS)
            result += [multiply_pairs(builder, sums[r * VECTORS + v], minima[v], pairs) for v in range(VECTORS)]
        return result

    offsets = loop(builder, index(0), index(groups // 2), 1, zeros, add_minima)
    factors = _vectors(builder, byte_at(builder, block.panel, FACTORS_AT), FLOATS)
    others = factors if is_q6 else _vectors(builder, byte_at(builder, block.panel, FACTORS_AT + NUMBERS), FLOATS)
    result = []
    for r, row in enumerate(block.rows):
        scale = _number(builder, row, ROW_SCALE_AT, FLOAT)
        for v in range(VECTORS):
            i = r * VECTORS + v
            if is_q6:
                value = builder.fmul(factors[v], builder.sitofp(builder.sub(sums[i], offsets[i]), FLOATS))
            else:
                below = builder.fneg(builder.fmul(others[v], builder.sitofp(offsets[i], FLOATS)))
                value = multiply_add(builder, factors[v], builder.sitofp(sums[i], FLOATS), below)
            result.append(multiply_add(builder, value, scale, totals[i]))
    return result


def _add_float_block(builder: ir.IRBuilder, block: _Block, totals: Sequence[ir.Value]) -> list[ir.Value]:
    """Emit totals + Σ of the groups: scale of the row · scale · sum + minimum · scaled sum of the row's numbers."""

    def add_group(group: ir.Value, totals: Sequence[ir.Value]) -> Sequence[ir.Value]:
        numbers, place = builder.mul(group, index(NUMBERS)), builder.mul(group, index(4))
        scales = _vectors(builder, byte_at(builder, block.panel, numbers, SCALES_AT), FLOATS)
        sums = _group_sums(builder, block, group, [])
        result = []
        for r, row in enumerate(block.rows):
            scale = _number(builder, byte_at(builder, row, place), ROW_SCALES_AT, FLOAT)
            for v in range(VECTORS):
                value = builder.fmul(builder.sitofp(sums[r * VECTORS + v], FLOATS), scales[v])
                result.append(multiply_add(builder, value, scale, totals[r * VECTORS + v]))
        if block.kind.has_minima:
            minima = _vectors(builder, byte_at(builder, block.panel, numbers, MINIMA_AT), FLOATS)
            for r, row in enumerate(block.rows):
                total = _number(builder, byte_at(builder, row, place), ROW_SUMS_AT, FLOAT)
                for v in range(VECTORS):
                    result[r * VECTORS + v] = multiply_add(builder, minima[v], total, result[r * VECTORS + v])
        return result

    return loop(builder, index(0), index(BLOCK // block.kind.group), 1, totals, add_group)


def _tile(kind: Kind, n_rows: int):
    """Make an intrinsic that multiplies `n_rows` rows by some unpacked blocks of a panel."""

    @intrinsic
    def tile(typing_context, panel, n_blocks, rows, row_stride, totals):
        """Add products to totals [row][output], float32; all are addresses, `row_stride` is in bytes."""

        def generate(context, builder, signature, args):
            panel, rows, totals = (pointer(builder, args[i]) for i in (0, 2, 4))
            starts = [rows]
            for _ in range(1, n_rows):
                starts.append(byte_at(builder, starts[-1], args[3]))
            places = [byte_at(builder, totals, i * 4 * WIDTH) for i in range(n_rows * VECTORS)]

            def add_block(b: ir.Value, sums: Sequence[ir.Value]) -> Sequence[ir.Value]:
                at = byte_at(builder, panel, builder.mul(b, index(UNPACKED_BYTES)))
                in_row = builder.mul(b, index(ROW_BYTES))
                block = _Block(kind, at, [byte_at(builder, start, in_row) for start in starts])
                return (_add_float_block if kind.is_float else _add_integer_block)(builder, block, sums)

            before = [load(builder, place, FLOATS) for place in places]
            for value, place in zip(loop(builder, index(0), args[1], 1, before, add_block), places, strict=True):
                store(builder, value, place)
            return context.get_dummy_value()

        return types.none(*[types.int64] * 5), generate

    return tile


TILE_ROWS = (6, 4, 2, 1)
tiles = {(name, n): _tile(kind, n) for name, kind in KINDS.items() for n in TILE_ROWS}
"""By type and number of rows."""
