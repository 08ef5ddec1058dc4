"""A few rows in 8 bits × outputs as they lie in the file, as LLVM IR: a block of an output in each lane.

Weights are multiplied as they are unpacked and never leave the registers: a panel of them would be stored and loaded
for one to four rows. Sums are integers, and blocks are added up in the order of a tile (`simd.gguf_int8`), so a row
has the same bits on either way.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_kernels.simd.amx import prefetch
from edge_kernels.simd.gguf_int8 import dot, fixed, pairs_of_bytes
from edge_kernels.simd.gguf_layout import (
    DOT_ROWS,
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
from edge_kernels.simd.ir import BYTE, FLOAT, INT, SHORT, constant, index, load, multiply_add

_INTS, _FLOATS = ir.VectorType(INT, LANES), ir.VectorType(FLOAT, LANES)
_WORDS, _BYTES = ir.VectorType(SHORT, 2 * LANES), ir.VectorType(BYTE, 4 * LANES)


class _Products:
    """What is unpacked of LANES blocks meets the row's numbers at once.

    Parameters
    ----------
    rows : for each row the address of its blocks that belong to the lanes, four bytes of each in turn.
    """

    def __init__(self, builder: ir.IRBuilder, kind: Kind, rows: Sequence[ir.Value]) -> None:
        self._builder, self._kind, self._rows = builder, kind, rows
        self._steps = kind.group // 4
        self._scales: dict[int, ir.Value] = {}
        self._minima: dict[int, ir.Value] = {}
        self._factors: dict[int, ir.Value] = {}
        # By group, as far as its steps have come: how many, and their sums, in 16 bits and in 32.
        self._done: dict[int, int] = {}
        self._words: dict[int, list[ir.Value]] = {}
        self._sums: dict[int, list[ir.Value]] = {}
        # By row, what whole groups have come to.
        self._totals, self._offsets = ([constant(_INTS, 0)] * len(rows) for _ in range(2))
        self._values, self._next = [constant(_FLOATS, 0.0)] * len(rows), 0

    def _of_rows(self, place: int, type_: ir.Type) -> list[ir.Value]:
        return [load(self._builder, byte_at(self._builder, row, place * LANES), type_) for row in self._rows]

    def put_scale(self, value: ir.Value, group: int) -> None:
        self._scales[group] = value

    def put_minima(self, value: ir.Value, pair: int) -> None:
        if self._kind.is_float:
            self._minima[pair] = value
            return
        builder, minima = self._builder, self._builder.bitcast(value, _WORDS)
        sums = self._of_rows((SUMS_16_AT if self._kind.group == 16 else SUMS_32_AT) + 4 * pair, _WORDS)
        self._offsets = [
            multiply_pairs(builder, offset, minima, each) for offset, each in zip(self._offsets, sums, strict=True)
        ]

    def put_factor(self, value: ir.Value, which: int) -> None:
        self._factors[which] = value

    def put_step(self, value: ir.Value, step: int) -> None:
        group, builder = step // self._steps, self._builder
        weights, numbers = builder.bitcast(value, _BYTES), self._of_rows(4 * step, _BYTES)
        sums = self._sums.setdefault(group, [constant(_INTS, 0)] * len(self._rows))
        done = self._done[group] = self._done.get(group, 0) + 1
        if MADDUBS:
            is_signed = self._kind.meet == 1
            words = [pairs_of_bytes(builder, weights, number, is_signed=is_signed) for number in numbers]
            before = self._words.pop(group, [])
            if before:
                words = [fixed(builder, builder.add(a, b)) for a, b in zip(before, words, strict=True)]
            if done % self._kind.meet:
                self._words[group] = words
            else:
                is_scaled = not self._kind.is_float
                scale = builder.bitcast(self._scales[group], _WORDS) if is_scaled else constant(_WORDS, 1)
                sums[:] = [multiply_pairs(builder, a, b, scale) for a, b in zip(sums, words, strict=True)]
        else:
            sums[:] = [dot(builder, a, weights, number) for a, number in zip(sums, numbers, strict=True)]
        if done == self._steps:
            self._finish(group)

    def _finish(self, group: int) -> None:
        """Add a whole group."""
        builder, sums, scale = self._builder, self._sums.pop(group), self._scales[group]
        if not self._kind.is_float:
            scaled = sums if MADDUBS else [builder.mul(each, scale) for each in sums]
            self._totals = [builder.add(a, b) for a, b in zip(self._totals, scaled, strict=True)]
            return
        assert group == self._next, "floats are added in order"
        self._next += 1
        factors = self._of_rows(ROW_SCALES_AT + 4 * group, _FLOATS)
        for r, (each, factor) in enumerate(zip(sums, factors, strict=True)):
            value = builder.fmul(builder.sitofp(each, _FLOATS), scale)
            self._values[r] = multiply_add(builder, value, factor, self._values[r])
        if self._kind.has_minima:
            for r, numbers_sum in enumerate(self._of_rows(ROW_SUMS_AT + 4 * group, _FLOATS)):
                self._values[r] = multiply_add(builder, self._minima[group], numbers_sum, self._values[r])

    def values(self) -> list[tuple[ir.Value, ir.Value]]:
        """Emit what each block adds to the output of each row, as two factors."""
        if self._kind.is_float:
            return [(value, constant(_FLOATS, 1.0)) for value in self._values]
        builder, scales, found = self._builder, self._of_rows(ROW_SCALE_AT, _FLOATS), []
        for total, offset, scale in zip(self._totals, self._offsets, scales, strict=True):
            if self._kind.group == 16:  # its minima are 32 times the scales, and have the same factor
                difference = builder.sitofp(builder.sub(total, offset), _FLOATS)
                value = builder.fmul(self._factors[0], difference)
            else:
                below = builder.fneg(builder.fmul(self._factors[1], builder.sitofp(offset, _FLOATS)))
                value = multiply_add(builder, self._factors[0], builder.sitofp(total, _FLOATS), below)
            found.append((value, scale))
        return found


def _dot_product(name: str, n_rows: int):
    """Make an intrinsic that multiplies some rows by LANES successive blocks of one output."""
    kind, emit, totals_type = KINDS[name], EMITTERS[name], types.UniTuple(types.float32, n_rows)

    @intrinsic
    def dot_blocks(typing_context, blocks, ahead, rows, row_bytes, totals):
        """Return totals + the products, added block by block: tuples of float32, one for each row.

        `blocks` is the first block's address, `rows` where the first row's blocks lie side by side, four bytes of
        each in turn; those of the next are `row_bytes` further on. Meanwhile as many bytes as the blocks have are
        prefetched from `ahead`.
        """

        def generate(context, builder, signature, args):
            first, ahead, row = (pointer(builder, args[i]) for i in range(3))
            for line in range(0, kind.block_bytes * LANES, LINE):
                prefetch(builder, byte_at(builder, ahead, line), cache=2)
            rows = [byte_at(builder, row, builder.mul(args[3], index(r))) for r in range(n_rows)]
            products = _Products(builder, kind, rows)
            emit(builder, [byte_at(builder, first, lane * kind.block_bytes) for lane in range(LANES)], products)
            totals = []
            for r, (value, scale) in enumerate(products.values()):
                total = builder.extract_value(args[4], r)
                for lane in range(LANES):
                    a, b = (builder.extract_element(x, ir.Constant(INT, lane)) for x in (value, scale))
                    total = multiply_add(builder, a, b, total)
                totals.append(total)
            return context.make_tuple(builder, totals_type, totals)

        return totals_type(*[types.int64] * 4, totals_type), generate

    return dot_blocks


dots = {(name, n): _dot_product(name, n) for name in KINDS for n in DOT_ROWS}
"""By type and number of rows: dots[type, n](address of LANES blocks, where to prefetch, the rows' blocks, bytes from
row to row, totals)."""
