"""Before and after the products, as LLVM IR: the range of a row, its integers, and the epilogues of sums.

What enters: flat arrays with element offsets, inside compiled code. What leaves: rows of integers, or of float32 with
bias, GELU and residual applied. Four kinds of sums have an epilogue here:

    finish_row          float32 [NR], any machine
    finish_square       float32 [32][32], AMX
    finish_transposed   float32 [32 outputs][32 rows], AMX, no bias and no GELU
    scale_tile          int32 [rows][DOT_NR], any machine: scales and offsets first; scale_gelu_tile with GELU
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edge_kernels.compile import leaf
from edge_kernels.simd.amx import ROWS, SIDE
from edge_kernels.simd.bf16 import FLOATS, LANES, transposed
from edge_kernels.simd.float32 import ROUND, emit_gelu
from edge_kernels.simd.int8 import DOT_NR, DOT_TILE
from edge_kernels.simd.ir import (
    FLOAT,
    INT,
    NR,
    TILE,
    VECTOR,
    address_of,
    constant,
    data_of,
    each_vector,
    elements_at,
    index,
    lanes_below,
    larger,
    load,
    loop,
    masked_load,
    masked_store,
    multiply_add,
    signature_of,
    splat,
    store,
)

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
    """Emit a sum that stays 0, or becomes NaN once a value is not finite."""
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
    """Write (x - middle) · factor, n elements, to q (int8 or int16), rounded (halves to even) and clamped to ±127.

    NaN becomes some integer in that range.
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

    for i < rows, where total is sums[i, j] less the excess of rows stored as unsigned, row_zero ·
    weight_sums[group_column + j]. `scales` and `offsets` start at `scales_offset`; `start` and `out` have rows that
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
    """Copy the cells of a step, which lie together, as one vector, with `row_zero` added to every byte."""

    def generate(context, builder, signature, args):
        element = ir.IntType(signature.args[0].dtype.bitwidth)
        vector = ir.VectorType(element, DOT_TILE.step_cells)
        source, to = (
            address_of(
                builder, data_of(context, builder, signature, args, position), args[position + 1], element=element
            )
            for position in (0, 2)
        )
        step = load(builder, source, vector, 1)
        if DOT_TILE.row_zero:  # an exclusive or, as bytes wrap
            zero = int.from_bytes([DOT_TILE.row_zero] * (element.width // 8), "little")
            step = builder.xor(step, constant(vector, zero))
        store(builder, step, to, 1)
        return context.get_dummy_value()

    return signature_of(cells, offset, out, out_offset), generate


# --- float32 sums → results ---------------------------------------------------------------------------------


@intrinsic
def activate(typing_context, sums, line, bias, column, with_gelu):
    """Make gelu(sums + bias) of NR sums, in place; without GELU where `with_gelu` is 0."""

    def generate(context, builder, signature, args):
        sums, bias = elements_at(context, builder, signature, args, (0, 2))
        starts = [index(v) for v in range(0, NR, TILE.width)]
        places = [address_of(builder, sums, start) for start in starts]
        values = [
            builder.fadd(load(builder, place), load(builder, address_of(builder, bias, start)))
            for place, start in zip(places, starts, strict=True)
        ]
        with builder.if_else(builder.icmp_signed("!=", args[4], index(0))) as (then, otherwise):
            with then:
                for place, value in zip(places, values, strict=True):
                    store(builder, emit_gelu(builder, value, divide=ir.IRBuilder.fdiv), place)
            with otherwise:
                for place, value in zip(places, values, strict=True):
                    store(builder, value, place)
        return context.get_dummy_value()

    return signature_of(sums, line, bias, column, with_gelu), generate


@leaf
def finish_row(sums, line, bias, column, with_gelu, residual, start_residual, out, start, width):
    """Write gelu(sums + bias) + residual of the first `width` of NR columns; without GELU where `with_gelu` is 0.

    An empty residual adds nothing. `bias` has NR elements there, whatever the width. The sums are overwritten.
    """
    # All NR first, as `bias` is padded: whole vectors, without a remainder. Written in IR: in an inlined loop LLVM no
    # longer sees that the arrays do not alias, and would process numbers one by one.
    activate(sums, line, bias, column, with_gelu)
    if residual.size > 0:
        for j in range(width):
            out[start + j] = sums[line + j] + residual[start_residual + j]
    else:
        for j in range(width):
            out[start + j] = sums[line + j]


def _with_residual(builder: ir.IRBuilder, value: ir.Value, residual: ir.Value, mask: ir.Value) -> ir.Value:
    """Emit value + the residual at this address where the mask is on, + 0 elsewhere."""
    return builder.fadd(value, masked_load(builder, residual, mask))


@intrinsic
def finish_square(
    typing_context, sums, sums_offset, bias, bias_offset, with_gelu, residual, residual_offset, residual_stride,
    out, out_offset, out_stride, n_rows, width,
):  # fmt: skip
    """Do as `finish_row` with n_rows × width of a square of SIDE × SIDE sums, for AMX: masks leave out the rest.

    `bias` has SIDE elements there, whatever the width.
    """

    def generate(context, builder, signature, args):
        sums, bias, residual, out = elements_at(context, builder, signature, args, (0, 2, 5, 8))
        with_gelu, residual_stride, out_stride, n_rows, width = (args[position] for position in (4, 7, 10, 11, 12))
        residual_array = cgutils.create_struct_proxy(signature.args[5])(context, builder, value=args[5])
        has_residual = builder.icmp_signed("!=", residual_array.nitems, index(0))
        wants_gelu = builder.icmp_signed("!=", with_gelu, index(0))
        wanted = [lanes_below(builder, builder.sub(width, index(first)), LANES) for first in (0, LANES)]
        nothing = constant(wanted[0].type, 0)
        added = [builder.select(has_residual, mask, nothing) for mask in wanted]
        summands = [load(builder, address_of(builder, bias, index(first)), FLOATS) for first in (0, LANES)]

        def rows(is_gelu: bool) -> None:
            def row(i: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
                for side, first in enumerate((0, LANES)):
                    line = address_of(builder, sums, builder.mul(i, index(SIDE)), index(first))
                    value = builder.fadd(load(builder, line, FLOATS), summands[side])
                    if is_gelu:
                        value = emit_gelu(builder, value)
                    more = address_of(builder, residual, builder.mul(i, residual_stride), index(first))
                    value = _with_residual(builder, value, more, added[side])
                    to = address_of(builder, out, builder.mul(i, out_stride), index(first))
                    masked_store(builder, value, to, wanted[side])
                return []

            loop(builder, index(0), n_rows, 1, [], row)

        with builder.if_else(wants_gelu) as (then, otherwise):
            with then:
                rows(True)
            with otherwise:
                rows(False)
        return context.get_dummy_value()

    return signature_of(
        sums, sums_offset, bias, bias_offset, with_gelu, residual, residual_offset, residual_stride,
        out, out_offset, out_stride, n_rows, width,
    ), generate  # fmt: skip


@intrinsic
def finish_transposed(
    typing_context, sums, sums_offset, residual, residual_offset, residual_stride, with_residual, out, out_offset,
    out_stride, n_rows, width,
):  # fmt: skip
    """Write a square of sums that lie [output][row], transposed, plus a residual: `n_rows` rows of `width` outputs.

        sums            16 × 16 at a time         out
        ┌────┬────┐                               ┌────┬────┐
        │ A  │ B  │     A  → transposed A         │ Aᵀ │ Cᵀ │
        ├────┼────┤     B  → transposed B ...     ├────┼────┤
        │ C  │ D  │                               │ Bᵀ │ Dᵀ │
        └────┴────┘                               └────┴────┘

    Where `with_residual` is 0, nothing is added.
    """

    def generate(context, builder, signature, args):
        sums, residual, out = elements_at(context, builder, signature, args, (0, 2, 6))
        residual_stride, with_residual, out_stride, n_rows, width = (args[position] for position in (4, 5, 8, 9, 10))
        adds = builder.icmp_signed("!=", with_residual, index(0))
        for column in (0, ROWS):
            wanted = lanes_below(builder, builder.sub(width, index(column)), LANES)
            added = builder.select(adds, wanted, constant(wanted.type, 0))
            for half in (0, ROWS):
                lines = [
                    load(builder, address_of(builder, sums, index((column + i) * SIDE + half)), FLOATS)
                    for i in range(ROWS)
                ]
                for i, line in enumerate(transposed(builder, lines)):
                    with builder.if_then(builder.icmp_signed("<", index(half + i), n_rows)):
                        place = builder.mul(index(half + i), residual_stride)
                        more = address_of(builder, residual, place, index(column))
                        value = _with_residual(builder, line, more, added)
                        to = address_of(builder, out, builder.mul(index(half + i), out_stride), index(column))
                        masked_store(builder, value, to, wanted)
        return context.get_dummy_value()

    return signature_of(
        sums, sums_offset, residual, residual_offset, residual_stride, with_residual, out, out_offset, out_stride,
        n_rows, width,
    ), generate  # fmt: skip
