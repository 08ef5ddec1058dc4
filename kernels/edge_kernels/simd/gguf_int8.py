"""Panels of weights in ggml's types × rows in 8 bits, as LLVM IR: exact integer sums, one order of float32 additions.

Rows are quantised to 8 bits, 256 numbers at a time (see `QuantizedRow`), and a product takes four k of a row, copied
into all lanes, with four k of each output:

    vpdpbusd    AVX-512 VNNI, AVX-VNNI   unsigned × signed bytes, four products into an int32 lane
    vpmaddubsw  AVX2, AVX-512            unsigned × signed bytes, two products into an int16 lane
    sdot        ARMv8.2 dotprod          signed bytes, four products into an int32 lane
    smmla       ARMv8.6 i8mm             signed bytes, 8 k of two rows × two outputs into four int32 lanes
    pairs       all others               bytes widened to int16, two products into an int32 lane

Without VNNI a 4-bit weight has room to spare in 16 bits: two products are at most 2 · 15 · 127 = 3,810, so *eight*
instructions can meet there before the sums are widened, and the instruction that widens (vpmaddwd) multiplies by the
scale of the group as well. 5-bit weights let four meet, 6-bit weights two. Weights of 8 bits let none, and vpsignb
makes them unsigned.

smmla takes two rows at a time, and 8 k of an output side by side, of which the panel has four: the vectors of two
steps are zipped, and so are two rows' numbers. One row alone is multiplied with sdot.

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

from edge_kernels.simd.amx import prefetch
from edge_kernels.simd.gguf_layout import (
    BLOCK,
    BLOCK_NR,
    BLOCK_TILE,
    BYTES,
    FACTORS_AT,
    FLOATS,
    INTS,
    KINDS,
    LINE,
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
from edge_kernels.simd.int8 import matrix_product, multiply_pairs, rows_of_blocks
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


def pairs_of_bytes(builder: ir.IRBuilder, weights: ir.Value, numbers: ir.Value, *, is_signed: bool) -> ir.Value:
    """Emit the sums of each two products of weights and a row's numbers, in 16 bits (vpmaddubsw)."""
    if is_signed:
        numbers = call(builder, "llvm.x86.avx2.psign.b", BYTES, [numbers, weights])
        weights = call(builder, "llvm.abs.v32i8", BYTES, [weights, ir.Constant(BIT, 0)])
    return call(builder, "llvm.x86.avx2.pmadd.ub.sw", WORDS, [weights, numbers])


def dot(builder: ir.IRBuilder, sums: ir.Value, weights: ir.Value, numbers: ir.Value) -> ir.Value:
    """Emit sums + the products of four weights and four of the row's numbers in each lane."""
    if BLOCK_TILE.instruction == "vpdpbusd":
        operands = [builder.bitcast(value, sums.type) for value in (weights, numbers)]
        return call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * sums.type.count}", sums.type, [sums, *operands])
    if BLOCK_TILE.instruction in ("sdot", "smmla"):
        return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", INTS, [sums, weights, numbers])
    wide = ir.VectorType(SHORT, 4 * WIDTH)
    a, b = builder.sext(weights, wide), builder.sext(numbers, wide)
    for half in ((0, 1), (2, 3)):
        mask = ir.Constant(_WORDS_MASK, [4 * lane + place for lane in range(WIDTH) for place in half])
        sums = multiply_pairs(builder, sums, builder.shuffle_vector(a, a, mask), builder.shuffle_vector(b, b, mask))
    return sums


_WORDS_MASK = ir.VectorType(INT, 2 * WIDTH)


class _Block(NamedTuple):
    """A block at hand: addresses of the unpacked weights, and of the numbers of the tile's rows.

    Lanes are outputs, in `vectors` vectors, and a row's number is copied into all of them.
    """

    kind: Kind
    panel: ir.Value
    rows: ir.Value
    n_rows: int
    vectors: int = VECTORS
    ahead: ir.Value | None = None
    """Where as many bytes begin as the block had in the file, to be prefetched meanwhile; 0: nowhere."""

    def prefetch(self, builder: ir.IRBuilder, group: ir.Value) -> None:
        """Emit a group's share of the prefetches: spread out, since the core has room for two dozen requests."""
        if self.ahead is None:
            return
        n_lines = -(-self.kind.block_bytes * BLOCK_NR * self.kind.group // (BLOCK * LINE))
        with builder.if_then(builder.icmp_signed("!=", self.ahead, index(0))):
            first = builder.add(self.ahead, builder.mul(group, index(n_lines * LINE)))
            for line in range(n_lines):
                prefetch(builder, byte_at(builder, pointer(builder, first), line * LINE), cache=2)

    @property
    def n_sums(self) -> int:
        """Sums in the tile."""
        return self.n_rows * self.vectors

    def of_panel(self, builder: ir.IRBuilder, type_: ir.Type, *places: int | ir.Value) -> list[ir.Value]:
        """Emit the vectors of the panel at so many bytes."""
        at = byte_at(builder, self.panel, *places)
        return [load(builder, byte_at(builder, at, v * 4 * WIDTH), type_) for v in range(self.vectors)]

    def of_rows(self, builder: ir.IRBuilder, first: int, type_: ir.Type, *places: int | ir.Value) -> ir.Value:
        """Emit the four bytes at so many bytes of the blocks of rows from `first` on, side by side."""
        places = tuple(p * self.n_rows if isinstance(p, int) else builder.mul(p, index(self.n_rows)) for p in places)
        return load(builder, byte_at(builder, self.rows, *places, 4 * first), type_)

    def of_row(self, builder: ir.IRBuilder, row: int, type_: ir.Type, *places: int | ir.Value) -> ir.Value:
        """Emit the four bytes at so many bytes of a row's block, in all lanes."""
        return splat(builder, self.of_rows(builder, row, type_, *places), WIDTH)


def _words_sums(builder: ir.IRBuilder, block: _Block, place: ir.Value, step: ir.Value, meet: int) -> list[ir.Value]:
    """Emit the int16 sums of `meet` steps: the first sum of each lane beside the second.

    `place` is where the steps' numbers begin in each row, `step` where their weights begin in the panel.
    """
    sums: list[ir.Value] = []
    is_signed = meet == 1
    for s in range(meet):
        weights, products = block.of_panel(builder, BYTES, step, s * STEP_BYTES), []
        for row in range(block.n_rows):
            number = builder.bitcast(block.of_row(builder, row, INT, place, 4 * s), BYTES)
            products += [pairs_of_bytes(builder, w, number, is_signed=is_signed) for w in weights]
        sums = [fixed(builder, builder.add(a, b)) for a, b in zip(sums, products, strict=True)] if sums else products
    return sums


def fixed(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Emit a value that LLVM must have at this point: an instruction of nothing that takes and returns it.

    Otherwise LLVM, for which the order of integer sums does not matter, first adds products to each other and so has
    twice as many values as there are registers.
    """
    nothing = ir.InlineAsm(ir.FunctionType(value.type, [value.type]), "", "=x,0")
    return builder.call(nothing, [value])


BIT = ir.IntType(1)


def _matrix_sums(builder: ir.IRBuilder, block: _Block, place: ir.Value, step: ir.Value, steps: int) -> list[ir.Value]:
    """Emit the int32 sums of so many steps with smmla; `place` and `step` as for `_words_sums`."""
    pairs, two = block.n_rows // 2, ir.VectorType(INT, 2)
    masks = [ir.Constant(INTS, places) for places in ([0, 4, 1, 5], [2, 6, 3, 7])]
    sums: list[ir.Value] = [constant(INTS, 0)] * (pairs * 2 * block.vectors)
    for s in range(0, steps, 2):
        now, following = (block.of_panel(builder, INTS, step, (s + more) * STEP_BYTES) for more in range(2))
        outputs = [
            builder.bitcast(builder.shuffle_vector(a, b, mask), BYTES)
            for a, b in zip(now, following, strict=True)
            for mask in masks
        ]
        for p in range(pairs):
            a, b = (block.of_rows(builder, 2 * p, two, place, 4 * (s + more)) for more in range(2))
            rows = builder.bitcast(builder.shuffle_vector(a, b, ir.Constant(INTS, [0, 2, 1, 3])), BYTES)
            for i, output in enumerate(outputs, p * len(outputs)):
                sums[i] = matrix_product(builder, sums[i], rows, output)
    return rows_of_blocks(builder, block.n_rows, block.vectors, sums)


def _group_sums(builder: ir.IRBuilder, block: _Block, group: ir.Value, scales: Sequence[ir.Value]) -> list[ir.Value]:
    """Emit the int32 sums of a group, multiplied by its scales where these are integers."""
    steps = block.kind.group // 4
    place, step = builder.mul(group, index(4 * steps)), builder.mul(group, index(steps * STEP_BYTES))
    sums: list[ir.Value] = [constant(INTS, 0)] * block.n_sums
    if MADDUBS:
        factors = [builder.bitcast(scale, WORDS) for scale in scales] or [constant(WORDS, 1)] * block.vectors
        for first in range(0, steps, block.kind.meet):
            at, panel = _sum(builder, place, 4 * first), _sum(builder, step, first * STEP_BYTES)
            words = _words_sums(builder, block, at, panel, block.kind.meet)
            sums = [
                multiply_pairs(builder, s, w, factors[i % block.vectors])
                for i, (s, w) in enumerate(zip(sums, words, strict=True))
            ]
        return sums
    if BLOCK_TILE.instruction == "smmla" and block.n_rows % 2 == 0:
        sums = _matrix_sums(builder, block, place, step, steps)
        return [builder.mul(s, scales[i % block.vectors]) for i, s in enumerate(sums)] if scales else sums
    for s in range(steps):
        weights = block.of_panel(builder, BYTES, step, s * STEP_BYTES)
        for r in range(block.n_rows):
            number = builder.bitcast(block.of_row(builder, r, INT, place, 4 * s), BYTES)
            for v, weight in enumerate(weights, r * block.vectors):
                sums[v] = dot(builder, sums[v], weight, number)
    return [builder.mul(s, scales[i % block.vectors]) for i, s in enumerate(sums)] if scales else sums


def _sum(builder: ir.IRBuilder, value: ir.Value, n: int) -> ir.Value:
    return builder.add(value, index(n)) if n else value


def _integer_block(builder: ir.IRBuilder, block: _Block) -> list[ir.Value]:
    """Emit d · Σ scale · sum - m · Σ minimum · sum of the row's numbers, for each row and vector."""
    groups = BLOCK // block.kind.group
    is_q6 = block.kind.group == 16  # its minima are 32 times the scales, and have the same factor

    def add_group(group: ir.Value, sums: Sequence[ir.Value]) -> Sequence[ir.Value]:
        block.prefetch(builder, group)
        scales = block.of_panel(builder, INTS, builder.mul(group, index(NUMBERS)), SCALES_AT)
        return [builder.add(a, b) for a, b in zip(sums, _group_sums(builder, block, group, scales), strict=True)]

    def add_minima(pair: ir.Value, sums: Sequence[ir.Value]) -> Sequence[ir.Value]:
        minima = block.of_panel(builder, INTS, builder.mul(pair, index(NUMBERS)), MINIMA_AT)
        result = []
        for r in range(block.n_rows):
            place = builder.mul(pair, index(4))
            number = block.of_row(builder, r, INT, place, SUMS_16_AT if is_q6 else SUMS_32_AT)
            pairs = builder.bitcast(number, WORDS)
            for v, minimum in enumerate(minima, r * block.vectors):
                result.append(multiply_pairs(builder, sums[v], builder.bitcast(minimum, WORDS), pairs))
        return result

    zeros = [constant(INTS, 0)] * block.n_sums
    sums = loop(builder, index(0), index(groups), 1, zeros, add_group)
    offsets = loop(builder, index(0), index(groups // 2), 1, zeros, add_minima)
    factors = block.of_panel(builder, FLOATS, FACTORS_AT)
    others = factors if is_q6 else block.of_panel(builder, FLOATS, FACTORS_AT + NUMBERS)
    result = []
    for i, (total, offset) in enumerate(zip(sums, offsets, strict=True)):
        d, m = factors[i % block.vectors], others[i % block.vectors]
        if is_q6:
            result.append(builder.fmul(d, builder.sitofp(builder.sub(total, offset), FLOATS)))
        else:
            below = builder.fneg(builder.fmul(m, builder.sitofp(offset, FLOATS)))
            result.append(multiply_add(builder, d, builder.sitofp(total, FLOATS), below))
    return result


def _float_block(builder: ir.IRBuilder, block: _Block) -> list[ir.Value]:
    """Emit Σ of the groups: scale of the row · scale · sum + minimum · scaled sum of the row's numbers."""

    def add_group(group: ir.Value, totals: Sequence[ir.Value]) -> Sequence[ir.Value]:
        block.prefetch(builder, group)
        numbers, place = builder.mul(group, index(NUMBERS)), builder.mul(group, index(4))
        scales = block.of_panel(builder, FLOATS, numbers, SCALES_AT)
        minima = block.of_panel(builder, FLOATS, numbers, MINIMA_AT) if block.kind.has_minima else []
        result = []
        for i, total in enumerate(_group_sums(builder, block, group, [])):
            r, v = divmod(i, block.vectors)
            value = builder.fmul(builder.sitofp(total, FLOATS), scales[v])
            scale = block.of_row(builder, r, FLOAT, place, ROW_SCALES_AT)
            result.append(multiply_add(builder, value, scale, totals[i]))
            if minima:
                numbers_sum = block.of_row(builder, r, FLOAT, place, ROW_SUMS_AT)
                result[i] = multiply_add(builder, minima[v], numbers_sum, result[i])
        return result

    zeros = [constant(FLOATS, 0.0)] * block.n_sums
    return loop(builder, index(0), index(BLOCK // block.kind.group), 1, zeros, add_group)


def _block_values(builder: ir.IRBuilder, block: _Block) -> list[tuple[ir.Value, ir.Value]]:
    """Emit what a block adds to the totals, as two factors, for each row and vector."""
    if block.kind.is_float:
        return [(value, constant(FLOATS, 1.0)) for value in _float_block(builder, block)]
    scales = [block.of_row(builder, r, FLOAT, ROW_SCALE_AT) for r in range(block.n_rows)]
    return [(value, scales[i // block.vectors]) for i, value in enumerate(_integer_block(builder, block))]


def _tile(kind: Kind, n_rows: int):
    """Make an intrinsic that multiplies `n_rows` rows by some unpacked blocks of a panel."""

    @intrinsic
    def tile(typing_context, panel, n_blocks, rows, totals, ahead):
        """Add products to totals [row][output], float32; all are addresses.

        Meanwhile as many bytes as the blocks had in the file are prefetched from `ahead`, if it is not 0.
        """

        def generate(context, builder, signature, args):
            panel, rows, totals = (pointer(builder, args[i]) for i in (0, 2, 3))
            places = [byte_at(builder, totals, i * 4 * WIDTH) for i in range(n_rows * VECTORS)]

            def add_block(b: ir.Value, sums: Sequence[ir.Value]) -> Sequence[ir.Value]:
                at = byte_at(builder, panel, builder.mul(b, index(UNPACKED_BYTES)))
                numbers = byte_at(builder, rows, builder.mul(b, index(n_rows * ROW_BYTES)))
                n_bytes = builder.mul(b, index(kind.block_bytes * BLOCK_NR))
                is_there = builder.icmp_signed("!=", args[4], index(0))
                ahead = builder.select(is_there, builder.add(args[4], n_bytes), index(0))
                block = _Block(kind, at, numbers, n_rows, ahead=ahead)
                values = _block_values(builder, block)
                return [multiply_add(builder, *pair, total) for pair, total in zip(values, sums, strict=True)]

            before = [load(builder, place, FLOATS) for place in places]
            for value, place in zip(loop(builder, index(0), args[1], 1, before, add_block), places, strict=True):
                store(builder, value, place)
            return context.get_dummy_value()

        return types.none(*[types.int64] * 5), generate

    return tile


TILE_ROWS = (6, 4, 2, 1)
tiles = {(name, n): _tile(kind, n) for name, kind in KINDS.items() for n in TILE_ROWS}
"""By type and number of rows."""
