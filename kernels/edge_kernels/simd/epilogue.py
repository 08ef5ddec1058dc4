"""Passes over one row as LLVM IR: its range, its integers, what becomes of the sums of a product.

What enters and what leaves: as in `simd`, for what surrounds the integer products.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_kernels.simd.float32 import emit_gelu
from edge_kernels.simd.int8 import DOT_NR, DOT_TILE
from edge_kernels.simd.ir import (
    FLOAT,
    INT,
    TILE,
    VECTOR,
    address_of,
    constant,
    data_of,
    each_vector,
    index,
    larger,
    load,
    loop,
    multiply_add,
    signature_of,
    splat,
    store,
)

# 1.5 · 2^23: adding it rounds to an integer (halves to even), which is then in the low bits.
ROUND = 12582912.0

_CHAINS = 4  # vectors of partial results: enough to hide the latency of a comparison

State = list[ir.Value]


def _reduce_row(
    builder: ir.IRBuilder,
    row: ir.Value,
    n: ir.Value,
    initial: Sequence[float],
    take: Callable[[ir.Value, Sequence[ir.Value]], State],
    merge: Callable[[Sequence[ir.Value], Sequence[ir.Value]], State],
) -> State:
    """Emit the reduction of a row's values: vectors first, then the rest one by one.

    `take` is (value, state) → state and `merge` (state, state) → state, of vectors as of scalars.
    """
    size, chunk = len(initial), _CHAINS * TILE.width

    def vectors(j: ir.Value, states: Sequence[ir.Value]) -> Sequence[ir.Value]:
        results = []
        for v in range(_CHAINS):
            value = load(builder, address_of(builder, row, j, index(v * TILE.width)))
            results += take(value, states[size * v : size * (v + 1)])
        return results

    def scalar(j: ir.Value, state: Sequence[ir.Value]) -> Sequence[ir.Value]:
        return take(load(builder, address_of(builder, row, j), FLOAT), state)

    whole = builder.mul(builder.sdiv(n, index(chunk)), index(chunk))
    first = [constant(VECTOR, value) for value in initial]
    flat = loop(builder, index(0), whole, chunk, first * _CHAINS, vectors)
    state = functools.reduce(merge, (flat[size * v : size * (v + 1)] for v in range(_CHAINS)))
    lanes = ([builder.extract_element(part, ir.Constant(INT, lane)) for part in state] for lane in range(TILE.width))
    return loop(builder, whole, n, 1, functools.reduce(merge, lanes), scalar)


def _poison(builder: ir.IRBuilder, value: ir.Value, sum_: ir.Value) -> ir.Value:
    """Emit a sum that stays 0, or is NaN once a value was not finite."""
    return builder.fadd(sum_, builder.fmul(value, constant(value.type, 0.0)))


@intrinsic
def row_range(typing_context, x, offset, n):
    """Return (max + min) / 2 and (max - min) / 2 of x[offset : offset + n], n ≥ 1.

    Both are NaN where the row has NaN or infinity. No intermediate result overflows.
    """

    def generate(context, builder, signature, args):
        row = address_of(builder, data_of(context, builder, signature, args, 0), args[1])

        def smaller(a: ir.Value, b: ir.Value) -> ir.Value:
            return builder.select(builder.fcmp_ordered("<", a, b), a, b)

        def take(value: ir.Value, state: Sequence[ir.Value]) -> State:
            return [
                smaller(value, state[0]),
                larger(builder, value, state[1]),
                _poison(builder, value, state[2]),
            ]

        def merge(a: Sequence[ir.Value], b: Sequence[ir.Value]) -> State:
            return [smaller(a[0], b[0]), larger(builder, a[1], b[1]), builder.fadd(a[2], b[2])]

        initial = (float("inf"), float("-inf"), 0.0)
        low, high, broken = _reduce_row(builder, row, args[2], initial, take, merge)
        low, high = (builder.fmul(value, constant(FLOAT, 0.5)) for value in (low, high))
        middle, half = (builder.fadd(value, broken) for value in (builder.fadd(high, low), builder.fsub(high, low)))
        return context.make_tuple(builder, signature.return_type, [middle, half])

    return types.UniTuple(types.float32, 2)(x, types.int64, types.int64), generate


@intrinsic
def row_magnitude(typing_context, x, offset, n):
    """Return the largest |value| of x[offset : offset + n]; NaN where the row has NaN or infinity."""

    def generate(context, builder, signature, args):
        row = address_of(builder, data_of(context, builder, signature, args, 0), args[1])

        def take(value: ir.Value, state: Sequence[ir.Value]) -> State:
            magnitude = larger(builder, value, builder.fneg(value))
            return [larger(builder, magnitude, state[0]), _poison(builder, value, state[1])]

        def merge(a: Sequence[ir.Value], b: Sequence[ir.Value]) -> State:
            return [larger(builder, a[0], b[0]), builder.fadd(a[1], b[1])]

        largest, broken = _reduce_row(builder, row, args[2], (0.0, 0.0), take, merge)
        return builder.fadd(largest, broken)

    return types.float32(x, types.int64, types.int64), generate


@intrinsic
def quantize_row(typing_context, x, offset, n, middle, factor, q, q_offset):
    """Write (x - middle) · factor to q (int8 or int16), rounded (halves to even) and kept within ±127.

    Of n elements. NaN becomes some integer in that range.
    """
    element = ir.IntType(q.dtype.bitwidth)

    def generate(context, builder, signature, args):
        _, offset, n, middle, factor, _, q_offset = args
        row = address_of(builder, data_of(context, builder, signature, args, 0), offset)
        out = address_of(builder, data_of(context, builder, signature, args, 5), q_offset, element=element)

        def emit(j: ir.Value, type_: ir.Type) -> None:
            ints: ir.Type = INT
            narrow: ir.Type = element
            m, f = middle, factor
            if isinstance(type_, ir.VectorType):
                ints, narrow = ir.VectorType(INT, type_.count), ir.VectorType(element, type_.count)
                m, f = (splat(builder, value) for value in (m, f))
            value = builder.fmul(builder.fsub(load(builder, address_of(builder, row, j), type_), m), f)
            value = larger(builder, value, constant(type_, -127.0))
            limit = constant(type_, 127.0)
            value = builder.select(builder.fcmp_ordered("<", value, limit), value, limit)
            bits = builder.bitcast(builder.fadd(value, constant(type_, ROUND)), ints)
            store(builder, builder.trunc(bits, narrow), address_of(builder, out, j, element=element), 1)

        each_vector(builder, n, emit)
        return context.get_dummy_value()

    whole, real = types.int64, types.float32
    return types.none(x, whole, whole, real, real, q, whole), generate


_INTS = ir.VectorType(INT, TILE.width)


def _scaler(after):
    """Make an intrinsic that turns rows of DOT_NR sums into float32 and adds them to what `start` has.

    out[i, j] = after(start[i, j] + (bias[j] + offsets[i] · shifts[group_column + j]
                                     + scales[i] · (weight_scales[column + j] · total)))

    for i < rows, where total is sums[i, j], less what rows kept as unsigned have too much: row_zero ·
    weight_sums[group_column + j]. `scales` and `offsets` begin at `scales_offset`; `start` and `out` have rows that
    lie `start_stride` and `out_stride` elements apart.
    """

    @intrinsic
    def scale(
        typing_context, sums, sums_offset, rows, scales, scales_offset, offsets, weight_scales, column, bias,
        bias_offset, weight_sums, shifts, group_column, start, start_offset, start_stride, out, out_offset,
        out_stride,
    ):  # fmt: skip
        def generate(context, builder, signature, args):
            def element(position: int, offset: int, type_: ir.Type = FLOAT) -> ir.Value:
                return address_of(
                    builder, data_of(context, builder, signature, args, position), args[offset], element=type_
                )

            sums, rows = element(0, 1, INT), args[2]
            scales, offsets = element(3, 4), element(5, 4)
            columns = [element(position, column) for position, column in ((6, 7), (8, 9), (11, 12))]
            whole, start, out = element(10, 12, INT), element(13, 14), element(16, 17)
            start_stride, out_stride = args[15], args[18]
            parts = range(0, DOT_NR, TILE.width)
            by_column = [[load(builder, address_of(builder, array, index(j))) for array in columns] for j in parts]
            excess = [
                builder.mul(
                    load(builder, address_of(builder, whole, index(j), element=INT), _INTS),
                    constant(_INTS, DOT_TILE.row_zero),
                )
                for j in parts
            ]

            def body(i: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
                scale, offset = (
                    splat(builder, load(builder, address_of(builder, array, i), FLOAT)) for array in (scales, offsets)
                )
                of_sums = address_of(builder, sums, builder.mul(i, index(DOT_NR)), element=INT)
                of_start = address_of(builder, start, builder.mul(i, start_stride))
                to = address_of(builder, out, builder.mul(i, out_stride))
                for j, (weight_scale, summand, shift), more in zip(parts, by_column, excess, strict=True):
                    total = load(builder, address_of(builder, of_sums, index(j), element=INT), _INTS)
                    if DOT_TILE.row_zero:
                        total = builder.sub(total, more)
                    value = builder.fmul(builder.sitofp(total, VECTOR), weight_scale)
                    value = multiply_add(builder, scale, value, multiply_add(builder, offset, shift, summand))
                    value = builder.fadd(load(builder, address_of(builder, of_start, index(j))), value)
                    store(builder, after(builder, value), address_of(builder, to, index(j)))
                return []

            loop(builder, index(0), rows, 1, [], body)
            return context.get_dummy_value()

        return signature_of(
            sums, sums_offset, rows, scales, scales_offset, offsets, weight_scales, column, bias, bias_offset,
            weight_sums, shifts, group_column, start, start_offset, start_stride, out, out_offset, out_stride,
        ), generate  # fmt: skip

    return scale


scale_tile, scale_gelu_tile = _scaler(lambda _, value: value), _scaler(emit_gelu)


@intrinsic
def move_step(typing_context, cells, offset, out, out_offset):
    """Copy the cells of a step, which lie together, as one vector; for rows that are kept as they are."""

    def generate(context, builder, signature, args):
        element = ir.IntType(signature.args[0].dtype.bitwidth)
        vector = ir.VectorType(element, DOT_TILE.step_cells)
        source, to = (
            address_of(
                builder, data_of(context, builder, signature, args, position), args[position + 1], element=element
            )
            for position in (0, 2)
        )
        store(builder, load(builder, source, vector, 1), to, 1)
        return context.get_dummy_value()

    return signature_of(cells, offset, out, out_offset), generate
