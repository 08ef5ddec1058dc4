"""Rows of float32 → 8 bits with a scale per 256 numbers or per 32, and results back into rows, as LLVM IR."""

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
    BLOCK_NR,
    FLOATS,
    LANES,
    ROW_BYTES,
    ROW_SCALE_AT,
    ROW_SCALES_AT,
    ROW_SUMS_AT,
    SUMS_16_AT,
    SUMS_32_AT,
    VECTORS,
    WIDTH,
    byte_at,
    pointer,
)
from edge_kernels.simd.ir import (
    BYTE,
    FLOAT,
    INT,
    address_of,
    call,
    constant,
    index,
    larger,
    load,
    loop,
    multiply_add,
    splat,
    store,
)

_ROW_WIDTH = min(WIDTH, 8)
_ROW_FLOATS, _ROW_INTS = ir.VectorType(FLOAT, _ROW_WIDTH), ir.VectorType(INT, _ROW_WIDTH)


def _horizontal(builder: ir.IRBuilder, name: str, value: ir.Value) -> ir.Value:
    suffix = f"v{value.type.count}{'f32' if value.type.element == FLOAT else 'i32'}"
    return call(builder, f"llvm.vector.reduce.{name}.{suffix}", value.type.element, [value])


def _absolute(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return call(builder, f"llvm.fabs.v{_ROW_WIDTH}f32", _ROW_FLOATS, [value])


class _Row(NamedTuple):
    """Where a row's quantised block goes: the address of its first dword, and the number of rows in its tile."""

    builder: ir.IRBuilder
    address: ir.Value
    n_rows: ir.Value

    def after(self, place: ir.Value) -> _Row:
        """The same row, so many bytes further on in its block."""
        address = byte_at(self.builder, self.address, self.builder.mul(place, self.n_rows))
        return _Row(self.builder, address, self.n_rows)

    def put(self, value: ir.Value, place: int) -> None:
        """Emit the store of a number of 32 bits that belongs at so many bytes of the block."""
        store(self.builder, value, self.after(index(place)).address)

    def put_bytes(self, values: ir.Value, place: int) -> None:
        """Emit the stores of a vector of bytes, four by four."""
        n = values.type.count // 4
        dwords = self.builder.bitcast(values, ir.VectorType(INT, n))
        for i in range(n):
            self.put(self.builder.extract_element(dwords, ir.Constant(INT, i)), place + 4 * i)

    def put_words(self, values: Sequence[ir.Value], place: int) -> None:
        """Emit the stores of integers as int16, two by two."""
        for i, (first, second) in enumerate(zip(values[::2], values[1::2], strict=True)):
            lower = self.builder.and_(first, ir.Constant(INT, 0xFFFF))
            upper = self.builder.shl(second, ir.Constant(INT, 16))
            self.put(self.builder.or_(lower, upper), place + 4 * i)


def _quantize(builder: ir.IRBuilder, x: ir.Value, row: _Row, n: int) -> tuple[ir.Value, list[ir.Value]]:
    """Emit n numbers as bytes, 127 for the largest; return the scale, and the sums of 16 bytes each.

    The scale is NaN where a number is NaN or infinite, so that it is seen in the result.
    """
    values = [load(builder, address_of(builder, x, index(i)), _ROW_FLOATS) for i in range(0, n, _ROW_WIDTH)]
    largest = [_absolute(builder, v) for v in values]
    while len(largest) > 1:
        pairs = zip(largest[::2], largest[1::2], strict=True)
        largest = [larger(builder, a, b) for a, b in pairs]
    most = _horizontal(builder, "fmax", largest[0])
    spoilt = constant(_ROW_FLOATS, 0.0)
    for value in values:
        spoilt = multiply_add(builder, value, constant(_ROW_FLOATS, 0.0), spoilt)
    extra = ir.Constant(FLOAT, -0.0)
    nothing = call(builder, f"llvm.vector.reduce.fadd.v{_ROW_WIDTH}f32", FLOAT, [extra, spoilt])
    scale = builder.fadd(builder.fdiv(most, ir.Constant(FLOAT, 127.0)), nothing)
    inverse = builder.fdiv(ir.Constant(FLOAT, 127.0), most)
    is_finite = builder.fcmp_ordered("<", builder.fadd(inverse, nothing), ir.Constant(FLOAT, float("inf")))
    factor = splat(builder, builder.select(is_finite, inverse, ir.Constant(FLOAT, 0.0)), _ROW_WIDTH)
    zero, sums = constant(_ROW_FLOATS, 0.0), []
    for i, value in enumerate(values):
        scaled = builder.fmul(value, factor)
        scaled = builder.select(builder.fcmp_ordered("ord", scaled, zero), scaled, zero)
        rounded = call(builder, f"llvm.rint.v{_ROW_WIDTH}f32", _ROW_FLOATS, [scaled])
        integers = builder.fptosi(rounded, _ROW_INTS)
        bytes_ = builder.trunc(integers, ir.VectorType(BYTE, _ROW_WIDTH))
        row.put_bytes(bytes_, i * _ROW_WIDTH)
        if i * _ROW_WIDTH % 16 == 0:
            sums.append(integers)
        else:
            sums[-1] = builder.add(sums[-1], integers)
    return scale, [_horizontal(builder, "add", s) for s in sums]


@intrinsic
def quantize_integer(typing_context, x, out, n_rows):
    """Quantise 256 float32 at address x, with one scale, to the row at `out` in a tile of `n_rows`."""

    def generate(context, builder, signature, args):
        x, row = pointer(builder, args[0]), _Row(builder, pointer(builder, args[1]), args[2])
        scale, sums = _quantize(builder, x, row, BLOCK)
        row.put(scale, ROW_SCALE_AT)
        row.put_words(sums, SUMS_16_AT)
        row.put_words([builder.add(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)], SUMS_32_AT)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 3), generate


@intrinsic
def quantize_float(typing_context, x, out, n_rows):
    """Quantise 256 float32 at address x, with a scale per 32, to the row at `out` in a tile of `n_rows`."""

    def generate(context, builder, signature, args):
        x, row = pointer(builder, args[0]), _Row(builder, pointer(builder, args[1]), args[2])

        def group(g: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            first = builder.mul(g, index(32))
            scale, (a, b) = _quantize(builder, address_of(builder, x, first), row.after(first), 32)
            in_group = row.after(builder.mul(g, index(4)))
            in_group.put(scale, ROW_SCALES_AT)
            in_group.put(builder.fmul(scale, builder.sitofp(builder.add(a, b), FLOAT)), ROW_SUMS_AT)
            return []

        loop(builder, index(0), index(8), 1, [], group)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 3), generate


@intrinsic
def write_rows(typing_context, totals, n_rows, out, out_stride):
    """Copy n_rows × BLOCK_NR float32 to rows `out_stride` bytes apart; the others are addresses."""

    def generate(context, builder, signature, args):
        totals, out = pointer(builder, args[0]), pointer(builder, args[2])

        def row(r: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            source = byte_at(builder, totals, builder.mul(r, index(4 * BLOCK_NR)))
            to = byte_at(builder, out, builder.mul(r, args[3]))
            for v in range(VECTORS):
                value = load(builder, byte_at(builder, source, v * 4 * WIDTH), FLOATS)
                store(builder, value, byte_at(builder, to, v * 4 * WIDTH))
            return []

        loop(builder, index(0), args[1], 1, [], row)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 4), generate


@intrinsic
def lay_side_by_side(typing_context, blocks, out):
    """Write LANES quantised blocks of a row so that four bytes of each lie side by side; both are addresses."""

    def generate(context, builder, signature, args):
        blocks, out = (pointer(builder, a) for a in args)

        def word(i: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            place = builder.mul(i, index(4))
            for lane in range(LANES):
                value = load(builder, byte_at(builder, blocks, place, lane * ROW_BYTES), INT)
                store(builder, value, byte_at(builder, out, builder.mul(place, index(LANES)), 4 * lane))
            return []

        loop(builder, index(0), index(ROW_BYTES // 4), 1, [], word)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), generate


@intrinsic
def write_float(typing_context, address, value):
    """Write a float32 to an address."""

    def generate(context, builder, signature, args):
        store(builder, args[1], pointer(builder, args[0]))
        return context.get_dummy_value()

    return types.none(types.int64, types.float32), generate
