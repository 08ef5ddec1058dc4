"""One row in 8 bits × outputs as they lie in the file, as LLVM IR: a block of an output in each lane.

Weights are multiplied as they are unpacked and never leave the registers: a panel of them would be stored and loaded
for a single row. Sums are integers, and blocks are added up in the order of a tile (`simd.gguf_int8`), so a row has
the same bits on either way.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_kernels.simd.amx import prefetch
from edge_kernels.simd.gguf_int8 import dot, fixed, pairs_of_bytes
from edge_kernels.simd.gguf_layout import (
    KINDS,
    LANES,
    LINE,
    MADDUBS,
    ROW_SCALE_AT,
    ROW_SCALES_AT,
    ROW_SUMS_AT,
    SUMS_16_AT,
    SUMS_32_AT,
    Kind,
    byte_at,
    pointer,
)
from edge_kernels.simd.gguf_panels import EMITTERS
from edge_kernels.simd.int8 import multiply_pairs
from edge_kernels.simd.ir import BYTE, FLOAT, INT, SHORT, constant, load, multiply_add

_INTS, _FLOATS = ir.VectorType(INT, LANES), ir.VectorType(FLOAT, LANES)
_WORDS, _BYTES = ir.VectorType(SHORT, 2 * LANES), ir.VectorType(BYTE, 4 * LANES)


class _Products:
    """What is unpacked of LANES blocks meets the row's numbers at once.

    Parameters
    ----------
    row : address of the row's blocks that belong to the lanes, four bytes of each in turn.
    """

    def __init__(self, builder: ir.IRBuilder, kind: Kind, row: ir.Value) -> None:
        self._builder, self._kind, self._row = builder, kind, row
        self._steps = kind.group // 4
        self._scales: dict[int, ir.Value] = {}
        self._minima: dict[int, ir.Value] = {}
        self._factors: dict[int, ir.Value] = {}
        # By group, as far as its steps have come: how many, and their sums, in 16 bits and in 32.
        self._done: dict[int, int] = {}
        self._words: dict[int, ir.Value] = {}
        self._sums: dict[int, ir.Value] = {}
        self._total, self._offset = constant(_INTS, 0), constant(_INTS, 0)
        self._value, self._next = constant(_FLOATS, 0.0), 0

    def _of_row(self, place: int, type_: ir.Type) -> ir.Value:
        return load(self._builder, byte_at(self._builder, self._row, place * LANES), type_)

    def put_scale(self, value: ir.Value, group: int) -> None:
        self._scales[group] = value

    def put_minima(self, value: ir.Value, pair: int) -> None:
        if self._kind.is_float:
            self._minima[pair] = value
            return
        sums = self._of_row((SUMS_16_AT if self._kind.group == 16 else SUMS_32_AT) + 4 * pair, _INTS)
        words = (self._builder.bitcast(each, _WORDS) for each in (value, sums))
        self._offset = multiply_pairs(self._builder, self._offset, *words)

    def put_factor(self, value: ir.Value, which: int) -> None:
        self._factors[which] = value

    def put_step(self, value: ir.Value, step: int) -> None:
        group, builder = step // self._steps, self._builder
        weights, number = builder.bitcast(value, _BYTES), self._of_row(4 * step, _BYTES)
        sums = self._sums.get(group, constant(_INTS, 0))
        done = self._done[group] = self._done.get(group, 0) + 1
        if MADDUBS:
            words = pairs_of_bytes(builder, weights, number, is_signed=self._kind.meet == 1)
            if group in self._words:
                words = fixed(builder, builder.add(self._words.pop(group), words))
            if done % self._kind.meet:
                self._words[group] = words
            else:
                scale = constant(_WORDS, 1)
                if not self._kind.is_float:
                    scale = builder.bitcast(self._scales[group], _WORDS)
                sums = multiply_pairs(builder, sums, words, scale)
        else:
            sums = dot(builder, sums, weights, number)
        self._sums[group] = sums
        if done == self._steps:
            self._finish(group)

    def _finish(self, group: int) -> None:
        """Add a whole group."""
        builder, sums = self._builder, self._sums.pop(group)
        if not self._kind.is_float:
            scaled = sums if MADDUBS else builder.mul(sums, self._scales[group])
            self._total = builder.add(self._total, scaled)
            return
        assert group == self._next, "floats are added in order"
        self._next += 1
        value = builder.fmul(builder.sitofp(sums, _FLOATS), self._scales[group])
        self._value = multiply_add(builder, value, self._of_row(ROW_SCALES_AT + 4 * group, _FLOATS), self._value)
        if self._kind.has_minima:
            numbers_sum = self._of_row(ROW_SUMS_AT + 4 * group, _FLOATS)
            self._value = multiply_add(builder, self._minima[group], numbers_sum, self._value)

    def values(self) -> tuple[ir.Value, ir.Value]:
        """Emit what each block adds to the output, as two factors."""
        if self._kind.is_float:
            return self._value, constant(_FLOATS, 1.0)
        builder, scale = self._builder, self._of_row(ROW_SCALE_AT, _FLOATS)
        if self._kind.group == 16:  # its minima are 32 times the scales, and have the same factor
            difference = builder.sub(self._total, self._offset)
            return builder.fmul(self._factors[0], builder.sitofp(difference, _FLOATS)), scale
        below = builder.fneg(builder.fmul(self._factors[1], builder.sitofp(self._offset, _FLOATS)))
        return multiply_add(builder, self._factors[0], builder.sitofp(self._total, _FLOATS), below), scale


def _dot_product(name: str):
    """Make an intrinsic that multiplies one row by LANES successive blocks of one output."""
    kind, emit = KINDS[name], EMITTERS[name]

    @intrinsic
    def dot_blocks(typing_context, blocks, ahead, row, total):
        """Return total + the products, added block by block.

        `blocks` is the first block's address, `row` where the row's blocks lie side by side, four bytes of each in
        turn. Meanwhile as many bytes as the blocks have are prefetched from `ahead`.
        """

        def generate(context, builder, signature, args):
            first, ahead, row = (pointer(builder, args[i]) for i in range(3))
            for line in range(0, kind.block_bytes * LANES, LINE):
                prefetch(builder, byte_at(builder, ahead, line), cache=2)
            products = _Products(builder, kind, row)
            emit(builder, [byte_at(builder, first, lane * kind.block_bytes) for lane in range(LANES)], products)
            value, scale = products.values()
            total = args[3]
            for lane in range(LANES):
                a, b = (builder.extract_element(x, ir.Constant(INT, lane)) for x in (value, scale))
                total = multiply_add(builder, a, b, total)
            return total

        return types.float32(types.int64, types.int64, types.int64, types.float32), generate

    return dot_blocks


dots = {name: _dot_product(name) for name in KINDS}
"""By type: dots[type](address of LANES blocks, where to prefetch, the row's blocks, total)."""
