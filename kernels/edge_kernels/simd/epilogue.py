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

from edge_kernels.simd.float32 import (
    _FLOAT,
    _INT,
    _VECTOR,
    TILE,
    _address,
    _constant,
    _floats,
    _gelu,
    _index,
    _larger,
    _load,
    _loop,
    _multiply_add,
    _splat,
    _store,
    _takes,
)
from edge_kernels.simd.int8 import DOT_NR, DOT_TILE

# 1.5 · 2^23: adding it rounds to an integer (halves to even), which is then in the low bits.
_ROUND = 12582912.0

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
            value = _load(builder, _address(builder, row, j, _index(v * TILE.width)))
            results += take(value, states[size * v : size * (v + 1)])
        return results

    def scalar(j: ir.Value, state: Sequence[ir.Value]) -> Sequence[ir.Value]:
        return take(_load(builder, _address(builder, row, j), _FLOAT), state)

    whole = builder.mul(builder.sdiv(n, _index(chunk)), _index(chunk))
    first = [_constant(_VECTOR, value) for value in initial]
    flat = _loop(builder, _index(0), whole, chunk, first * _CHAINS, vectors)
    state = functools.reduce(merge, (flat[size * v : size * (v + 1)] for v in range(_CHAINS)))
    lanes = ([builder.extract_element(part, ir.Constant(_INT, lane)) for part in state] for lane in range(TILE.width))
    return _loop(builder, whole, n, 1, functools.reduce(merge, lanes), scalar)


def _poison(builder: ir.IRBuilder, value: ir.Value, sum_: ir.Value) -> ir.Value:
    """Emit a sum that stays 0, or is NaN once a value was not finite."""
    return builder.fadd(sum_, builder.fmul(value, _constant(value.type, 0.0)))


@intrinsic
def row_range(typing_context, x, offset, n):
    """Return (max + min) / 2 and (max - min) / 2 of x[offset : offset + n], n ≥ 1.

    Both are NaN where the row has NaN or infinity. No intermediate result overflows.
    """

    def generate(context, builder, signature, args):
        row = _address(builder, _floats(context, builder, signature, args, 0), args[1])

        def smaller(a: ir.Value, b: ir.Value) -> ir.Value:
            return builder.select(builder.fcmp_ordered("<", a, b), a, b)

        def take(value: ir.Value, state: Sequence[ir.Value]) -> State:
            return [
                smaller(value, state[0]),
                _larger(builder, value, state[1]),
                _poison(builder, value, state[2]),
            ]

        def merge(a: Sequence[ir.Value], b: Sequence[ir.Value]) -> State:
            return [smaller(a[0], b[0]), _larger(builder, a[1], b[1]), builder.fadd(a[2], b[2])]

        initial = (float("inf"), float("-inf"), 0.0)
        low, high, broken = _reduce_row(builder, row, args[2], initial, take, merge)
        low, high = (builder.fmul(value, _constant(_FLOAT, 0.5)) for value in (low, high))
        middle, half = (builder.fadd(value, broken) for value in (builder.fadd(high, low), builder.fsub(high, low)))
        return context.make_tuple(builder, signature.return_type, [middle, half])

    return types.UniTuple(types.float32, 2)(x, types.int64, types.int64), generate


@intrinsic
def row_magnitude(typing_context, x, offset, n):
    """Return the largest |value| of x[offset : offset + n]; NaN where the row has NaN or infinity."""

    def generate(context, builder, signature, args):
        row = _address(builder, _floats(context, builder, signature, args, 0), args[1])

        def take(value: ir.Value, state: Sequence[ir.Value]) -> State:
            magnitude = _larger(builder, value, builder.fneg(value))
            return [_larger(builder, magnitude, state[0]), _poison(builder, value, state[1])]

        def merge(a: Sequence[ir.Value], b: Sequence[ir.Value]) -> State:
            return [_larger(builder, a[0], b[0]), builder.fadd(a[1], b[1])]

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
        row = _address(builder, _floats(context, builder, signature, args, 0), offset)
        out = _address(builder, _floats(context, builder, signature, args, 5), q_offset, element=element)

        def emit(j: ir.Value, type_: ir.Type) -> None:
            ints: ir.Type = _INT
            narrow: ir.Type = element
            m, f = middle, factor
            if isinstance(type_, ir.VectorType):
                ints, narrow = ir.VectorType(_INT, type_.count), ir.VectorType(element, type_.count)
                m, f = (_splat(builder, value) for value in (m, f))
            value = builder.fmul(builder.fsub(_load(builder, _address(builder, row, j), type_), m), f)
            value = _larger(builder, value, _constant(type_, -127.0))
            limit = _constant(type_, 127.0)
            value = builder.select(builder.fcmp_ordered("<", value, limit), value, limit)
            bits = builder.bitcast(builder.fadd(value, _constant(type_, _ROUND)), ints)
            _store(builder, builder.trunc(bits, narrow), _address(builder, out, j, element=element), 1)

        def vectors(j: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            emit(j, _VECTOR)
            return []

        def scalar(j: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            emit(j, _FLOAT)
            return []

        whole = builder.mul(builder.sdiv(n, _index(TILE.width)), _index(TILE.width))
        _loop(builder, _index(0), whole, TILE.width, [], vectors)
        _loop(builder, whole, n, 1, [], scalar)
        return context.get_dummy_value()

    index, real = types.int64, types.float32
    return types.none(x, index, index, real, real, q, index), generate


_INTS = ir.VectorType(_INT, TILE.width)


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
            def element(position: int, offset: int, type_: ir.Type = _FLOAT) -> ir.Value:
                return _address(
                    builder, _floats(context, builder, signature, args, position), args[offset], element=type_
                )

            sums, rows = element(0, 1, _INT), args[2]
            scales, offsets = element(3, 4), element(5, 4)
            columns = [element(position, column) for position, column in ((6, 7), (8, 9), (11, 12))]
            whole, start, out = element(10, 12, _INT), element(13, 14), element(16, 17)
            start_stride, out_stride = args[15], args[18]
            parts = range(0, DOT_NR, TILE.width)
            by_column = [[_load(builder, _address(builder, array, _index(j))) for array in columns] for j in parts]
            excess = [
                builder.mul(
                    _load(builder, _address(builder, whole, _index(j), element=_INT), _INTS),
                    _constant(_INTS, DOT_TILE.row_zero),
                )
                for j in parts
            ]

            def body(i: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
                scale, offset = (
                    _splat(builder, _load(builder, _address(builder, array, i), _FLOAT))
                    for array in (scales, offsets)
                )
                of_sums = _address(builder, sums, builder.mul(i, _index(DOT_NR)), element=_INT)
                of_start = _address(builder, start, builder.mul(i, start_stride))
                to = _address(builder, out, builder.mul(i, out_stride))
                for j, (weight_scale, summand, shift), more in zip(parts, by_column, excess, strict=True):
                    total = _load(builder, _address(builder, of_sums, _index(j), element=_INT), _INTS)
                    if DOT_TILE.row_zero:
                        total = builder.sub(total, more)
                    value = builder.fmul(builder.sitofp(total, _VECTOR), weight_scale)
                    value = _multiply_add(builder, scale, value, _multiply_add(builder, offset, shift, summand))
                    value = builder.fadd(_load(builder, _address(builder, of_start, _index(j))), value)
                    _store(builder, after(builder, value), _address(builder, to, _index(j)))
                return []

            _loop(builder, _index(0), rows, 1, [], body)
            return context.get_dummy_value()

        return _takes(
            sums, sums_offset, rows, scales, scales_offset, offsets, weight_scales, column, bias, bias_offset,
            weight_sums, shifts, group_column, start, start_offset, start_stride, out, out_offset, out_stride,
        ), generate  # fmt: skip

    return scale


scale_tile, scale_gelu_tile = _scaler(lambda _, value: value), _scaler(_gelu)


@intrinsic
def move_step(typing_context, cells, offset, out, out_offset):
    """Copy the cells of a step, which lie together, as one vector; for rows that are kept as they are."""

    def generate(context, builder, signature, args):
        element = ir.IntType(signature.args[0].dtype.bitwidth)
        vector = ir.VectorType(element, DOT_TILE.step_cells)
        source, to = (
            _address(
                builder, _floats(context, builder, signature, args, position), args[position + 1], element=element
            )
            for position in (0, 2)
        )
        _store(builder, _load(builder, source, vector, 1), to, 1)
        return context.get_dummy_value()

    return _takes(cells, offset, out, out_offset), generate
