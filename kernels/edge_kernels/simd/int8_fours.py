"""Weights rounded in fours as LLVM IR, for tiles with multipliers; see `simd.int8`.

What enters: flat arrays, inside compiled code. What leaves: an intrinsic that `linear.int8_weights` puts its loops
around. `reference.operations.quantize_weight_in_fours` defines the numbers, bit by bit: nothing here may be fused or
reordered. In numba's own loops LLVM finds no vectors, and loading a full-size model would take seconds longer.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_kernels.reference.operations import FOUR_LIMIT, MULTIPLIERS_TRIED
from edge_kernels.simd.float32 import ROUND
from edge_kernels.simd.ir import (
    INT,
    address_of,
    constant,
    data_of,
    each_vector,
    larger,
    load,
    splat,
    store,
)


def _larger_side(builder: ir.IRBuilder, four: Sequence[ir.Value]) -> ir.Value:
    """Emit the sum of a four's positive values, or that of its negative ones if it is larger in magnitude."""
    zero = constant(four[0].type, 0.0)
    sides = []
    for values in (four, [builder.fneg(value) for value in four]):
        a, b, c, d = (larger(builder, value, zero) for value in values)
        sides.append(builder.fadd(builder.fadd(a, b), builder.fadd(c, d)))
    return larger(builder, *sides)


def _rounded_up(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Emit the smallest integer that is not below a value from 0 to 2^31."""
    ints = ir.VectorType(INT, value.type.count) if isinstance(value.type, ir.VectorType) else INT
    whole = builder.sitofp(builder.fptosi(value, ints), value.type)
    more = builder.fadd(whole, constant(value.type, 1.0))
    return builder.select(builder.fcmp_ordered("<", whole, value), more, whole)


def _round_with(
    builder: ir.IRBuilder, four: Sequence[ir.Value], multiplier: ir.Value, inverse: ir.Value
) -> tuple[list[ir.Value], ir.Value, ir.Value]:
    """Emit a four's integers with this multiplier, whether they fit, and what they lose."""
    factor, round_ = builder.fdiv(inverse, multiplier), constant(multiplier.type, ROUND)
    integers, squares = [], []
    for weight in four:
        value = builder.fmul(weight, factor)
        integer = builder.fsub(builder.fadd(value, round_), round_)
        rest = builder.fsub(value, integer)
        integers.append(integer)
        squares.append(builder.fmul(rest, rest))
    loss = builder.fadd(builder.fadd(squares[0], squares[1]), builder.fadd(squares[2], squares[3]))
    loss = builder.fmul(loss, builder.fmul(multiplier, multiplier))
    fits = builder.fcmp_ordered("<=", _larger_side(builder, integers), constant(multiplier.type, FOUR_LIMIT))
    return integers, fits, loss


def _best(builder: ir.IRBuilder, four: Sequence[ir.Value], inverse: ir.Value) -> list[ir.Value]:
    """Emit a four's integers with the best multiplier, that multiplier, and its product with their sum."""
    type_ = four[0].type
    limit = _larger_side(builder, [builder.fmul(weight, constant(type_, 0.25)) for weight in four])
    allowed = builder.fmul(limit, builder.fdiv(inverse, constant(type_, FOUR_LIMIT // 4)))
    multiplier = larger(builder, _rounded_up(builder, allowed), constant(type_, 1.0))
    best, least = [constant(type_, 0.0)] * 5, constant(type_, float("inf"))
    for _ in range(MULTIPLIERS_TRIED):
        integers, fits, loss = _round_with(builder, four, multiplier, inverse)
        better = builder.and_(fits, builder.fcmp_ordered("<", loss, least))
        least = builder.select(better, loss, least)
        best = [builder.select(better, new, old) for new, old in zip([*integers, multiplier], best, strict=True)]
        multiplier = builder.fadd(multiplier, constant(type_, 1.0))
    *integers, multiplier = best
    most = constant(type_, 127.0)  # a single integer can be 128
    integers = [builder.select(builder.fcmp_ordered("<", value, most), value, most) for value in integers]
    total = builder.fadd(builder.fadd(integers[0], integers[1]), builder.fadd(integers[2], integers[3]))
    return [*integers, multiplier, builder.fmul(total, multiplier)]


@intrinsic
def round_fours(typing_context, fours, n, inverse, rounded):
    """Round n fours, each with the multiplier that loses least of the smallest ones.

    `fours` is float32 [4][n], `inverse` 1 / scale; `rounded`, float32 [6][n], gets the integers, the multiplier, and
    the product of that with their sum.
    """

    def generate(context, builder, signature, args):
        fours, rounded = (data_of(context, builder, signature, args, position) for position in (0, 3))
        n, inverse = args[1:3]

        def at(array: ir.Value, part: int, j: ir.Value) -> ir.Value:
            return address_of(builder, array, builder.mul(n, ir.Constant(n.type, part)), j)

        def emit(j: ir.Value, type_: ir.Type) -> None:
            four = [load(builder, at(fours, part, j), type_) for part in range(4)]
            of_all = splat(builder, inverse) if isinstance(type_, ir.VectorType) else inverse
            for part, result in enumerate(_best(builder, four, of_all)):
                store(builder, result, at(rounded, part, j))

        each_vector(builder, n, emit)
        return context.get_dummy_value()

    return types.none(fours, types.int64, types.float32, rounded), generate
