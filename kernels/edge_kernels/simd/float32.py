"""Vector code as LLVM IR, and the one table that says which machine gets which register tile.

What enters: flat float32 arrays with element offsets, inside compiled code. What leaves: numba intrinsics
(`*_tile`, `*_panel`, `*_row` and scalar functions) that the operation modules put their loops around. They
know nothing of blocking, threads or sequences.

Why IR and not loops: without reassociation LLVM vectorises no reduction, and it keeps a tile of sums in
registers over a whole loop only when told so. The IR uses generic vectors (`<W x float>`) and `llvm.fmuladd`,
so it is right on every instruction set: what the machine does not have, LLVM splits into what it has.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edge_kernels.machine import isa


class Tile(NamedTuple):
    """A tile of sums held in registers: `rows` × (`vectors` · `width`) float32."""

    rows: int
    vectors: int
    width: int


# By the names of `compile.ISAS`. rows · vectors sums + vectors operands + at least 1 broadcast fit into the
# registers (16 in AVX2 and SSE, 32 in AVX-512 and NEON), and there are enough sums to cover latency times issue
# rate (8 on x86 with FMA, up to 16 on big ARM cores).
TILES: dict[str, Tile] = {
    **dict.fromkeys(("amx", "avx512vnni", "avx512"), Tile(rows=8, vectors=3, width=16)),
    "avxvnni": Tile(rows=6, vectors=2, width=8),
    "avx2": Tile(rows=6, vectors=2, width=8),
    "neon-i8mm": Tile(rows=6, vectors=4, width=4),
    "neon-dot": Tile(rows=6, vectors=4, width=4),
    "neon": Tile(rows=6, vectors=4, width=4),
    "portable": Tile(rows=4, vectors=2, width=4),
}
TILE = TILES[isa()]

MR = TILE.rows  # rows of a register tile
NR = TILE.vectors * TILE.width  # columns of a register tile, and of a panel

_HAS_ESTIMATE = isa() in ("amx", "avx512vnni", "avx512")
_FLOAT = ir.FloatType()
_INT = ir.IntType(32)
_INDEX = ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, TILE.width)

# exp2 on [-1/2, 1/2]: minimax in relative error, 1.6e-8 with the coefficients rounded to float32. Constant
# term 1.
_EXP2_POLYNOMIAL = (0.00015353363, 0.0013398875, 0.009618437, 0.055503324, 0.24022648, 0.6931472)
# Adding 1.5 · 2^23 rounds to an integer and leaves it in the low mantissa bits; 127 more makes it a biased
# exponent.
_ROUND_TO_EXPONENT = 12582912.0 + 127.0

_LARGEST = 3.0e38

GELU_LINEAR = -2.302208198  # -2 √(2/π) log2(e): GELU as x / (1 + 2^(x (linear + cubic x²)))
GELU_CUBIC = GELU_LINEAR * 0.044715


# --- building blocks ----------------------------------------------------------------------------------------


def _constant(type_: ir.Type, value: float) -> ir.Constant:
    """Make a constant of a scalar type, or a vector with the same constant in all lanes."""
    if isinstance(type_, ir.VectorType):
        return ir.Constant(type_, [ir.Constant(type_.element, value)] * type_.count)
    return ir.Constant(type_, value)


def _splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    """Copy a scalar into all lanes of a vector."""
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    lane = builder.insert_element(undefined, scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(lane, undefined, ir.Constant(ir.VectorType(_INT, TILE.width), [0] * TILE.width))


def _multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """Emit a · b + c, fused where the machine can (`llvm.fma` would call the C library where it cannot)."""
    name = f"llvm.fmuladd.v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "llvm.fmuladd.f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


def _larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Emit max(a, b); b where a is NaN, as the x86 instruction does."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _address(builder: ir.IRBuilder, array: ir.Value, *offsets: ir.Value, element: ir.Type = _FLOAT) -> ir.Value:
    """Emit the address of an element of a flat array."""
    for offset in offsets:
        array = builder.gep(array, [offset], source_etype=element)
    return array


def _load(builder: ir.IRBuilder, address: ir.Value, type_: ir.Type = _VECTOR, align: int = 4) -> ir.Value:
    """Load a scalar or a vector from an address that need only be aligned for a float."""
    value = builder.load(builder.bitcast(address, type_.as_pointer()))
    value.align = align
    return value


def _store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, align: int = 4) -> None:
    """Store a scalar or a vector, as `_load` loads it."""
    builder.store(value, builder.bitcast(address, value.type.as_pointer())).align = align


def _index(value: int) -> ir.Constant:
    return ir.Constant(_INDEX, value)


Body = Callable[[ir.Value, Sequence[ir.Value]], Sequence[ir.Value]]


def _loop(
    builder: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int, initial: Sequence[ir.Value], body: Body
) -> list[ir.Value]:
    """Emit `for i in range(start, stop, step)` carrying values in registers; give the last of them."""
    before = builder.block
    head = builder.append_basic_block("loop.head")
    inside = builder.append_basic_block("loop.body")
    after = builder.append_basic_block("loop.end")
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(_INDEX)
    carried = [builder.phi(value.type) for value in initial]
    builder.cbranch(builder.icmp_signed("<", i, stop), inside, after)
    builder.position_at_end(inside)
    results = body(i, carried)
    following = builder.add(i, _index(step))
    end = builder.block
    builder.branch(head)
    i.add_incoming(start, before)
    i.add_incoming(following, end)
    for phi, first, result in zip(carried, initial, results, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(result, end)
    builder.position_at_end(after)
    return carried


def _exp2(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Emit 2^x for a float or a vector of floats.

    Relative error below 1.2e-7 for -126 ≤ x ≤ 127.5; exactly 0 below -126.5 (no subnormal results), infinity
    above 127.5; NaN stays NaN. No branch and no call, so a loop around it can be vectorised.
    """
    floats = x.type
    ints = ir.VectorType(_INT, floats.count) if isinstance(floats, ir.VectorType) else _INT
    low, high = _constant(floats, -127.0), _constant(floats, 128.0)
    # Comparisons with NaN are false, so NaN passes both clamps.
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    x = builder.select(builder.fcmp_ordered(">", x, high), high, x)
    shifted = builder.fadd(x, _constant(floats, _ROUND_TO_EXPONENT))
    rest = builder.fsub(x, builder.fsub(shifted, _constant(floats, _ROUND_TO_EXPONENT)))  # exact, in [-1/2, 1/2]
    result = _constant(floats, _EXP2_POLYNOMIAL[0])
    for coefficient in (*_EXP2_POLYNOMIAL[1:], 1.0):
        result = _multiply_add(builder, result, rest, _constant(floats, coefficient))
    # Low mantissa bits 0..255 moved into the exponent field: 0 is the float 0, 255 is infinity.
    power = builder.bitcast(builder.shl(builder.bitcast(shifted, ints), _constant(ints, 23)), floats)
    return builder.fmul(result, power)


def _gelu(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Emit tanh-GELU of a float or a vector of floats; see `gelu`."""
    square = builder.fmul(x, x)
    slope = _multiply_add(builder, square, _constant(x.type, GELU_CUBIC), _constant(x.type, GELU_LINEAR))
    power = _exp2(builder, builder.fmul(x, slope))
    return _quotient(builder, x, builder.fadd(power, _constant(x.type, 1.0)))


def _quotient(builder: ir.IRBuilder, dividend: ir.Value, x: ir.Value) -> ir.Value:
    """Emit dividend / x of floats or vectors of floats, x ≥ 1, to 2e-7 of it; 0 where x is infinite.

    AVX-512 divides 16 numbers in 16 cycles; an estimate of 14 bits and a step of Newton's method take 3.
    """
    if not (isinstance(x.type, ir.VectorType) and x.type.count == 16 and _HAS_ESTIMATE):
        return builder.fdiv(dividend, x)
    mask = ir.IntType(16)
    function_type = ir.FunctionType(x.type, [x.type, x.type, mask])
    function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.x86.avx512.rcp14.ps.512")
    estimate = builder.call(function, [x, _constant(x.type, 0.0), ir.Constant(mask, 0xFFFF)])
    largest = _constant(x.type, _LARGEST)  # infinity times its estimate would not be a number
    finite = builder.select(builder.fcmp_ordered(">", x, largest), largest, x)
    error = _multiply_add(builder, builder.fneg(finite), estimate, _constant(x.type, 1.0))
    return builder.fmul(dividend, _multiply_add(builder, estimate, error, estimate))


# --- for numba ----------------------------------------------------------------------------------------------


def _floats(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value], position: int) -> ir.Value:
    """Take the data pointer of the array argument at `position` (of any element type)."""
    array = cgutils.create_struct_proxy(signature.args[position])(context, builder, value=args[position])
    return array.data


def _takes(*arguments: Any, returns: Any = types.none) -> Any:
    """Build an intrinsic's signature: arrays keep the type they come with, integers become int64."""
    return returns(*(a if isinstance(a, types.Array) else types.int64 for a in arguments))


@intrinsic
def exp2(typing_context, x):
    """Return 2^x in float32; accuracy and limits as told in `_exp2`."""

    def generate(context, builder, signature, args):
        return _exp2(builder, args[0])

    return types.float32(types.float32), generate


@intrinsic
def gelu(typing_context, x):
    """Return tanh-GELU of x in float32, by the identity (1 + tanh u) / 2 = 1 / (1 + exp(-2u)).

    Error below 2e-7 · |x|, and no cancellation for negative x, where the tanh form loses all
    digits.
    """

    def generate(context, builder, signature, args):
        return _gelu(builder, args[0])

    return types.float32(types.float32), generate


@intrinsic
def take_ticket(typing_context, counter):
    """Return counter[0] and increment it, atomically: how workers share out tasks."""

    def generate(context, builder, signature, args):
        array = cgutils.create_struct_proxy(signature.args[0])(context, builder, value=args[0])
        return builder.atomic_rmw("add", array.data, _index(1), "monotonic")

    return types.int64(counter), generate


@intrinsic
def product_tile(
    typing_context, a, a_offset, a_row_stride, a_k_stride, rows, b, b_offset, n_k, c, c_offset, accumulate
):
    """Multiply MR rows with one panel; this loop is where the time of `linear` and `attention` goes.

    c[i, j] (+)= Σ_k a[a_offset + min(i, rows - 1) · a_row_stride + k · a_k_stride] · b[b_offset + k · NR + j]

    for i < MR, j < NR. `c` has MR rows of NR elements, all of which are written: when a is shorter (`rows` <
    MR), its last row is repeated, so nothing outside is read. `accumulate` 0 overwrites c, 1 adds to it. With
    a k stride of 1 `a` is a row-major matrix, with a row stride of 1 a transposed one; neither is packed.
    """

    def generate(context, builder, signature, args):
        _, a_offset, a_row_stride, a_k_stride, rows, _, b_offset, n_k, _, c_offset, accumulate = args
        a, b, c = (_floats(context, builder, signature, args, position) for position in (0, 5, 8))
        a, b, c = (
            _address(builder, a, a_offset),
            _address(builder, b, b_offset),
            _address(builder, c, c_offset),
        )

        last = builder.sub(rows, _index(1))
        row_starts = []
        for i in range(MR):
            row = builder.select(builder.icmp_signed("<", _index(i), last), _index(i), last)
            row_starts.append(_address(builder, a, builder.mul(row, a_row_stride)))

        def step(k: ir.Value, carried: Sequence[ir.Value]) -> Sequence[ir.Value]:
            sums, a_k = list(carried[:-1]), carried[-1]
            b_k = _address(builder, b, builder.mul(k, _index(NR)))
            operands = [_load(builder, _address(builder, b_k, _index(v * TILE.width))) for v in range(TILE.vectors)]
            for i in range(MR):
                factor = _splat(builder, _load(builder, _address(builder, row_starts[i], a_k), _FLOAT))
                for v in range(TILE.vectors):
                    s = i * TILE.vectors + v
                    sums[s] = _multiply_add(builder, factor, operands[v], sums[s])
            return [*sums, builder.add(a_k, a_k_stride)]

        zeros = [_constant(_VECTOR, 0.0)] * (MR * TILE.vectors)
        *sums, _ = _loop(builder, _index(0), n_k, 1, [*zeros, _index(0)], step)

        addresses = [_address(builder, c, _index(s * TILE.width)) for s in range(len(sums))]
        with builder.if_else(builder.icmp_signed("!=", accumulate, _index(0))) as (then, otherwise):
            with then:
                for s, address in zip(sums, addresses, strict=True):
                    _store(builder, builder.fadd(_load(builder, address), s), address)
            with otherwise:
                for s, address in zip(sums, addresses, strict=True):
                    _store(builder, s, address)
        return context.get_dummy_value()

    signature = _takes(a, a_offset, a_row_stride, a_k_stride, rows, b, b_offset, n_k, c, c_offset, accumulate)
    return signature, generate


@intrinsic
def softmax_panel(typing_context, scores, offset, rows, state, state_offset):
    """Take `rows` further rows of scores into a running softmax over the rows, one per column of the panel.

    scores[offset + r · NR + j] becomes 2^(score - maximum so far). `state` holds three rows of NR: the maxima
    (start with -inf), the sums of the powers (start with 0), and, written here, the factors by which the
    change of the maximum shrinks all that was accumulated before. Base 2 saves the multiplication inside exp:
    scores come scaled by log2(e).
    """

    def generate(context, builder, signature, args):
        _, offset, rows, _, state_offset = args
        scores = _address(builder, _floats(context, builder, signature, args, 0), offset)
        state = _address(builder, _floats(context, builder, signature, args, 3), state_offset)
        starts = [_index(v * TILE.width) for v in range(TILE.vectors)]
        maxima_at, sums_at, factors_at = (
            [_address(builder, state, _index(part * NR), start) for start in starts] for part in range(3)
        )

        def cells(row: ir.Value) -> list[ir.Value]:
            return [_address(builder, scores, builder.mul(row, _index(NR)), start) for start in starts]

        def find(row: ir.Value, maxima: Sequence[ir.Value]) -> Sequence[ir.Value]:
            return [_larger(builder, _load(builder, cell), m) for cell, m in zip(cells(row), maxima, strict=True)]

        before = [_load(builder, address) for address in maxima_at]
        maxima = _loop(builder, _index(0), rows, 1, before, find)
        factors = [_exp2(builder, builder.fsub(old, new)) for old, new in zip(before, maxima, strict=True)]
        sums = [builder.fmul(_load(builder, at), factor) for at, factor in zip(sums_at, factors, strict=True)]

        def raise_(row: ir.Value, sums: Sequence[ir.Value]) -> Sequence[ir.Value]:
            results = []
            for cell, maximum, sum_ in zip(cells(row), maxima, sums, strict=True):
                power = _exp2(builder, builder.fsub(_load(builder, cell), maximum))
                _store(builder, power, cell)
                results.append(builder.fadd(sum_, power))
            return results

        sums = _loop(builder, _index(0), rows, 1, sums, raise_)
        for values, addresses in ((maxima, maxima_at), (sums, sums_at), (factors, factors_at)):
            for value, address in zip(values, addresses, strict=True):
                _store(builder, value, address)
        return context.get_dummy_value()

    return _takes(scores, offset, rows, state, state_offset), generate


@intrinsic
def scale_panel(typing_context, panel, offset, rows, factors, factors_offset):
    """Multiply each column of a panel of `rows` × NR by its factor, in place."""

    def generate(context, builder, signature, args):
        _, offset, rows, _, factors_offset = args
        panel = _address(builder, _floats(context, builder, signature, args, 0), offset)
        at = _address(builder, _floats(context, builder, signature, args, 3), factors_offset)
        factors = [_load(builder, _address(builder, at, _index(v * TILE.width))) for v in range(TILE.vectors)]

        def scale(row: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
            for v, factor in enumerate(factors):
                cell = _address(builder, panel, builder.mul(row, _index(NR)), _index(v * TILE.width))
                _store(builder, builder.fmul(_load(builder, cell), factor), cell)
            return []

        _loop(builder, _index(0), rows, 1, [], scale)
        return context.get_dummy_value()

    return _takes(panel, offset, rows, factors, factors_offset), generate


_SUMS = 4  # vectors of partial sums in a row reduction: enough to hide the latency of an addition


def _sum_row(
    builder: ir.IRBuilder, x: ir.Value, n: ir.Value, term: Callable[[ir.Value, ir.Value], ir.Value]
) -> ir.Value:
    """Emit the sum of term(x[j], partial sum) over a row: vectors first, then the rest one by one.

    `term` gets (value, sum so far) and gives the new sum, for vectors as for scalars.
    """
    chunk = _SUMS * TILE.width
    whole = builder.mul(builder.sdiv(n, _index(chunk)), _index(chunk))

    def vectors(j: ir.Value, sums: Sequence[ir.Value]) -> Sequence[ir.Value]:
        at = [_address(builder, x, j, _index(v * TILE.width)) for v in range(_SUMS)]
        return [term(_load(builder, address), s) for address, s in zip(at, sums, strict=True)]

    def scalar(j: ir.Value, sums: Sequence[ir.Value]) -> Sequence[ir.Value]:
        return [term(_load(builder, _address(builder, x, j), _FLOAT), sums[0])]

    parts = _loop(builder, _index(0), whole, chunk, [_constant(_VECTOR, 0.0)] * _SUMS, vectors)
    while len(parts) > 1:
        parts = [builder.fadd(one, other) for one, other in zip(parts[::2], parts[1::2], strict=True)]
    lanes = [builder.extract_element(parts[0], ir.Constant(_INT, lane)) for lane in range(TILE.width)]
    while len(lanes) > 1:
        lanes = [builder.fadd(one, other) for one, other in zip(lanes[::2], lanes[1::2], strict=True)]
    (total,) = _loop(builder, whole, n, 1, lanes, scalar)
    return total


@intrinsic
def sum_row(typing_context, x, offset, n):
    """Return the sum of x[offset : offset + n]."""

    def generate(context, builder, signature, args):
        row = _address(builder, _floats(context, builder, signature, args, 0), args[1])
        return _sum_row(builder, row, args[2], lambda value, total: builder.fadd(total, value))

    return _takes(x, offset, n, returns=types.float32), generate


@intrinsic
def sum_squares_row(typing_context, x, offset, n, mean):
    """Return the sum of (value - mean)² over x[offset : offset + n]."""

    def generate(context, builder, signature, args):
        row = _address(builder, _floats(context, builder, signature, args, 0), args[1])
        means = {_FLOAT: args[3], _VECTOR: _splat(builder, args[3])}

        def term(value: ir.Value, total: ir.Value) -> ir.Value:
            difference = builder.fsub(value, means[value.type])
            return _multiply_add(builder, difference, difference, total)

        return _sum_row(builder, row, args[2], term)

    return types.float32(x, types.int64, types.int64, types.float32), generate
