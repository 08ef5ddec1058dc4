"""float32 vector code as LLVM IR: the product tile, softmax of a panel, powers of 2, GELU, sums over a row.

What enters: flat float32 arrays with element offsets, inside compiled code. What leaves: numba intrinsics
(`*_tile`, `*_panel`, `*_row` and scalar functions) that the operation modules put their loops around. They
know nothing of blocking, threads or sequences. `simd.ir` explains how an intrinsic is written.

A power of 2 is taken from the two parts of a float32, without a table:

      31  30 … 23    22 … 0
    ┌───┬──────────┬──────────┐      2^x = 2^(x - n) · 2^n,  n = x rounded to an integer
    │ ± │ exponent │ mantissa │      2^n        n + 127, moved into the exponent field
    └───┴──────────┴──────────┘      2^(x - n)  a polynomial, as -1/2 ≤ x - n ≤ 1/2
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_kernels.machine import isa
from edge_kernels.simd.ir import (
    FLOAT,
    INT,
    MR,
    NR,
    SHORT,
    TILE,
    VECTOR,
    address_of,
    call,
    constant,
    data_of,
    index,
    larger,
    load,
    loop,
    multiply_add,
    signature_of,
    splat,
    store,
)

_HAS_ESTIMATE = isa() in ("amx", "avx512vnni", "avx512")

# exp2 on [-1/2, 1/2]: minimax in relative error, 1.6e-8 with the coefficients rounded to float32. Constant
# term 1.
EXP2_POLYNOMIAL = (0.00015353363, 0.0013398875, 0.009618437, 0.055503324, 0.24022648, 0.6931472)
# A float32 of 2^23 or more has no fraction bits. So adding 1.5 · 2^23 rounds to an integer, halves to even,
# and leaves it in the low bits of the mantissa; the .5 is there for negative numbers to borrow from. 127 more makes
# it a biased exponent: shifted up by 23, it is the float 2^integer.
ROUND = 12582912.0
ROUND_TO_EXPONENT = ROUND + 127.0

_LARGEST = 3.0e38

GELU_LINEAR = -2.302208198  # -2 √(2/π) log2(e): GELU as x / (1 + 2^(x (linear + cubic x²)))
GELU_CUBIC = GELU_LINEAR * 0.044715


# --- building blocks ----------------------------------------------------------------------------------------


def emit_exp2(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Emit 2^x for a float or a vector of floats.

    Relative error below 1.2e-7 for -126 ≤ x ≤ 127.5; exactly 0 below -126.5 (no subnormal results), infinity
    above 127.5; NaN stays NaN. No branch and no call, so a loop around it can be vectorised.
    """
    floats = x.type
    ints = ir.VectorType(INT, floats.count) if isinstance(floats, ir.VectorType) else INT
    low, high = constant(floats, -127.0), constant(floats, 128.0)
    # Comparisons with NaN are false, so NaN passes both clamps.
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    x = builder.select(builder.fcmp_ordered(">", x, high), high, x)
    shifted = builder.fadd(x, constant(floats, ROUND_TO_EXPONENT))
    rest = builder.fsub(x, builder.fsub(shifted, constant(floats, ROUND_TO_EXPONENT)))  # exact, in [-1/2, 1/2]
    result = constant(floats, EXP2_POLYNOMIAL[0])
    for coefficient in (*EXP2_POLYNOMIAL[1:], 1.0):
        result = multiply_add(builder, result, rest, constant(floats, coefficient))
    # Low mantissa bits 0..255 moved into the exponent field: 0 is the float 0, 255 is infinity.
    power = builder.bitcast(builder.shl(builder.bitcast(shifted, ints), constant(ints, 23)), floats)
    return builder.fmul(result, power)


def emit_gelu(
    builder: ir.IRBuilder, x: ir.Value, divide: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value] | None = None
) -> ir.Value:
    """Emit tanh-GELU of a float or a vector of floats; see `gelu`. `divide` is `_quotient` by default."""
    square = builder.fmul(x, x)
    slope = multiply_add(builder, square, constant(x.type, GELU_CUBIC), constant(x.type, GELU_LINEAR))
    power = emit_exp2(builder, builder.fmul(x, slope))
    return (divide or _quotient)(builder, x, builder.fadd(power, constant(x.type, 1.0)))


def _quotient(builder: ir.IRBuilder, dividend: ir.Value, x: ir.Value) -> ir.Value:
    """Emit dividend / x of floats or vectors of floats, x ≥ 1, to 2e-7 of it; 0 where x is infinite.

    AVX-512 divides 16 numbers in 16 cycles; an estimate of 14 bits and a step of Newton's method take 3.
    """
    if not (isinstance(x.type, ir.VectorType) and x.type.count == 16 and _HAS_ESTIMATE):
        return builder.fdiv(dividend, x)
    arguments = [x, constant(x.type, 0.0), ir.Constant(SHORT, 0xFFFF)]  # the mask: all lanes
    estimate = call(builder, "llvm.x86.avx512.rcp14.ps.512", x.type, arguments)
    largest = constant(x.type, _LARGEST)  # infinity times its estimate would not be a number
    finite = builder.select(builder.fcmp_ordered(">", x, largest), largest, x)
    error = multiply_add(builder, builder.fneg(finite), estimate, constant(x.type, 1.0))
    return builder.fmul(dividend, multiply_add(builder, estimate, error, estimate))


# --- for numba ----------------------------------------------------------------------------------------------


@intrinsic
def exp2(typing_context, x):
    """Return 2^x in float32; accuracy and limits as in `emit_exp2`."""

    def generate(context, builder, signature, args):
        return emit_exp2(builder, args[0])

    return types.float32(types.float32), generate


@intrinsic
def gelu(typing_context, x):
    """Return tanh-GELU of x in float32, by the identity (1 + tanh u) / 2 = 1 / (1 + exp(-2u)).

    Error below 2e-7 · |x|, and no cancellation for negative x, where the tanh form loses all
    digits.
    """

    def generate(context, builder, signature, args):
        return emit_gelu(builder, args[0])

    return types.float32(types.float32), generate


def product_of(mr: int, vectors: int, *, continues: bool = False):
    """Make the product of mr rows and one panel of `vectors` vectors; the hot loop of `linear` and `attention`.

    `continues`: sums go on from what c holds, product by product, whatever `accumulate` says; so cutting k into parts
    changes no bit.
    """
    width = vectors * TILE.width

    @intrinsic
    def product_tile(
        typing_context, a, a_offset, a_row_stride, a_k_stride, rows, b, b_offset, n_k, c, c_offset, accumulate
    ):
        """Multiply mr rows by one panel.

        c[i, j] (+)= Σ_k a[a_offset + min(i, rows - 1) · a_row_stride + k · a_k_stride] · b[b_offset + k · width + j]

        for i < mr, j < width. `c` has mr rows of `width` elements, all of which are written: when a is shorter
        (`rows` < mr), its last row is repeated, so nothing outside is read. `accumulate` 0 overwrites c, 1 adds to
        it. With a k stride of 1 `a` is a row-major matrix, with a row stride of 1 a transposed one; neither is
        packed.
        """

        def generate(context, builder, signature, args):
            _, a_offset, a_row_stride, a_k_stride, rows, _, b_offset, n_k, _, c_offset, accumulate = args
            a, b, c = (data_of(context, builder, signature, args, position) for position in (0, 5, 8))
            a, b, c = (
                address_of(builder, a, a_offset),
                address_of(builder, b, b_offset),
                address_of(builder, c, c_offset),
            )

            last = builder.sub(rows, index(1))
            row_starts = []
            for i in range(mr):
                row = builder.select(builder.icmp_signed("<", index(i), last), index(i), last)
                row_starts.append(address_of(builder, a, builder.mul(row, a_row_stride)))

            def step(k: ir.Value, carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
                sums, a_k = list(carried[:-1]), carried[-1]
                b_k = address_of(builder, b, builder.mul(k, index(width)))
                operands = [load(builder, address_of(builder, b_k, index(v * TILE.width))) for v in range(vectors)]
                for i in range(mr):
                    factor = splat(builder, load(builder, address_of(builder, row_starts[i], a_k), FLOAT))
                    for v in range(vectors):
                        s = i * vectors + v
                        sums[s] = multiply_add(builder, factor, operands[v], sums[s])
                return [*sums, builder.add(a_k, a_k_stride)]

            addresses = [address_of(builder, c, index(s * TILE.width)) for s in range(mr * vectors)]
            before = [load(builder, at) if continues else constant(VECTOR, 0.0) for at in addresses]
            *sums, _ = loop(builder, index(0), n_k, 1, [*before, index(0)], step)
            if continues:
                accumulate = index(0)
            with builder.if_else(builder.icmp_signed("!=", accumulate, index(0))) as (then, otherwise):
                with then:
                    for s, address in zip(sums, addresses, strict=True):
                        store(builder, builder.fadd(load(builder, address), s), address)
                with otherwise:
                    for s, address in zip(sums, addresses, strict=True):
                        store(builder, s, address)
            return context.get_dummy_value()

        signature = signature_of(
            a, a_offset, a_row_stride, a_k_stride, rows, b, b_offset, n_k, c, c_offset, accumulate
        )
        return signature, generate

    return product_tile


@intrinsic
def softmax_panel(typing_context, scores, offset, rows, state, state_offset):
    """Add `rows` further rows of scores to a running softmax over the rows, one per column of the panel.

    scores[offset + r · NR + j] becomes 2^(score - maximum so far). `state` holds three rows of NR: the maxima
    (start with -inf), the sums of the powers (start with 0), and, written here, the factors by which the new
    maximum shrinks everything accumulated before. Base 2 saves the multiplication inside exp: scores come scaled
    by log2(e).
    """

    def generate(context, builder, signature, args):
        _, offset, rows, _, state_offset = args
        scores = address_of(builder, data_of(context, builder, signature, args, 0), offset)
        state = address_of(builder, data_of(context, builder, signature, args, 3), state_offset)
        starts = [index(v * TILE.width) for v in range(TILE.vectors)]
        maxima_at, sums_at, factors_at = (
            [address_of(builder, state, index(part * NR), start) for start in starts] for part in range(3)
        )

        def cells(row: ir.Value) -> list[ir.Value]:
            return [address_of(builder, scores, builder.mul(row, index(NR)), start) for start in starts]

        def find(row: ir.Value, maxima: Sequence[ir.Value]) -> Sequence[ir.Value]:
            return [larger(builder, load(builder, cell), m) for cell, m in zip(cells(row), maxima, strict=True)]

        before = [load(builder, address) for address in maxima_at]
        maxima = loop(builder, index(0), rows, 1, before, find)
        factors = [emit_exp2(builder, builder.fsub(old, new)) for old, new in zip(before, maxima, strict=True)]
        sums = [builder.fmul(load(builder, at), factor) for at, factor in zip(sums_at, factors, strict=True)]

        def raise_(row: ir.Value, sums: Sequence[ir.Value]) -> Sequence[ir.Value]:
            results = []
            for cell, maximum, sum_ in zip(cells(row), maxima, sums, strict=True):
                power = emit_exp2(builder, builder.fsub(load(builder, cell), maximum))
                store(builder, power, cell)
                results.append(builder.fadd(sum_, power))
            return results

        sums = loop(builder, index(0), rows, 1, sums, raise_)
        for values, addresses in ((maxima, maxima_at), (sums, sums_at), (factors, factors_at)):
            for value, address in zip(values, addresses, strict=True):
                store(builder, value, address)
        return context.get_dummy_value()

    return signature_of(scores, offset, rows, state, state_offset), generate


def scale_of(vectors: int):
    """Make the scaling of a panel of `vectors` vectors."""
    width = vectors * TILE.width

    @intrinsic
    def scale_panel(typing_context, panel, offset, rows, factors, factors_offset):
        """Multiply each column of a panel of `rows` × `width` by its factor, in place."""

        def generate(context, builder, signature, args):
            _, offset, rows, _, factors_offset = args
            panel = address_of(builder, data_of(context, builder, signature, args, 0), offset)
            at = address_of(builder, data_of(context, builder, signature, args, 3), factors_offset)
            factors = [load(builder, address_of(builder, at, index(v * TILE.width))) for v in range(vectors)]

            def scale(row: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
                for v, factor in enumerate(factors):
                    cell = address_of(builder, panel, builder.mul(row, index(width)), index(v * TILE.width))
                    store(builder, builder.fmul(load(builder, cell), factor), cell)
                return []

            loop(builder, index(0), rows, 1, [], scale)
            return context.get_dummy_value()

        return signature_of(panel, offset, rows, factors, factors_offset), generate

    return scale_panel


product_tile, scale_panel = product_of(MR, TILE.vectors), scale_of(TILE.vectors)
"""For panels of NR columns."""


_SUMS = 4  # vectors of partial sums in a row reduction: enough to hide the latency of an addition


def _sum_row(
    builder: ir.IRBuilder, x: ir.Value, n: ir.Value, term: Callable[[ir.Value, ir.Value], ir.Value]
) -> ir.Value:
    """Emit the sum of term(x[j], partial sum) over a row: vectors first, then the rest one by one.

    `term` takes (value, sum so far) and returns the new sum, for vectors and scalars alike.
    """
    chunk = _SUMS * TILE.width
    whole = builder.mul(builder.sdiv(n, index(chunk)), index(chunk))

    def vectors(j: ir.Value, sums: Sequence[ir.Value]) -> Sequence[ir.Value]:
        at = [address_of(builder, x, j, index(v * TILE.width)) for v in range(_SUMS)]
        return [term(load(builder, address), s) for address, s in zip(at, sums, strict=True)]

    def scalar(j: ir.Value, sums: Sequence[ir.Value]) -> Sequence[ir.Value]:
        return [term(load(builder, address_of(builder, x, j), FLOAT), sums[0])]

    parts = loop(builder, index(0), whole, chunk, [constant(VECTOR, 0.0)] * _SUMS, vectors)
    while len(parts) > 1:
        parts = [builder.fadd(one, other) for one, other in zip(parts[::2], parts[1::2], strict=True)]
    lanes = [builder.extract_element(parts[0], ir.Constant(INT, lane)) for lane in range(TILE.width)]
    while len(lanes) > 1:
        lanes = [builder.fadd(one, other) for one, other in zip(lanes[::2], lanes[1::2], strict=True)]
    (total,) = loop(builder, whole, n, 1, lanes, scalar)
    return total


@intrinsic
def sum_row(typing_context, x, offset, n):
    """Return the sum of x[offset : offset + n]."""

    def generate(context, builder, signature, args):
        row = address_of(builder, data_of(context, builder, signature, args, 0), args[1])
        return _sum_row(builder, row, args[2], lambda value, total: builder.fadd(total, value))

    return signature_of(x, offset, n, returns=types.float32), generate


@intrinsic
def sum_squares_row(typing_context, x, offset, n, mean):
    """Return the sum of (value - mean)² over x[offset : offset + n]."""

    def generate(context, builder, signature, args):
        row = address_of(builder, data_of(context, builder, signature, args, 0), args[1])
        means = {FLOAT: args[3], VECTOR: splat(builder, args[3])}

        def term(value: ir.Value, total: ir.Value) -> ir.Value:
            difference = builder.fsub(value, means[value.type])
            return multiply_add(builder, difference, difference, total)

        return _sum_row(builder, row, args[2], term)

    return types.float32(x, types.int64, types.int64, types.float32), generate
