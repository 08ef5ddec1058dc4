"""Building blocks of all vector code: LLVM IR's loads, loops and constants, and the table of float32 tiles.

How a kernel gets its instructions: numba compiles the loops around a tile from Python. The tile itself is an
*intrinsic*: a Python function that runs once, while the kernel is compiled, and appends instructions to `builder`;
numba puts them in place of the call. So a Python loop in here unrolls code, and `loop` emits one that runs.

    Python              LLVM IR that it appends
    load(...)           %1 = load <8 x float>, ptr %a, align 4
    multiply_add(...)   %4 = call <8 x float> @llvm.fmuladd.v8f32(<8 x float> %1, <8 x float> %2, <8 x float> %3)
    loop(...)           a block with a phi node for the counter and for each value that is carried in a register

Why IR and not loops: without reassociation LLVM vectorises no reduction, and it keeps a tile of sums in registers
over a whole loop only when told to. Vectors are generic (`<W x float>`), so the code is correct on every instruction
set: LLVM splits what the machine lacks into what it has.

Arrays are flat; an intrinsic takes an array and an offset in elements, and `element_at` turns both into an address.
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


# By the names of `machine.ISAS`. In a step the tile takes `vectors` vectors of one operand and, row by row, one
# number of the other, copied into all lanes. AVX2's tile, in its 16 registers of 8 float32:
#
#              operand 0   operand 1                 2 registers of operands
#     row 0    sum 0,0     sum 0,1
#     ...      ...         ...                      12 registers of sums
#     row 5    sum 5,0     sum 5,1
#     the row's number, copied                       1 register; 1 is left
#
# rows · vectors sums + vectors operands + at least 1 copy fit into the registers (16 in AVX2 and SSE, 32 in AVX-512
# and NEON), and there are enough sums to cover latency times issue rate (8 on x86 with FMA, up to 16 on big ARM
# cores): a multiply-add takes 4 cycles, two can start in each, so fewer than 8 independent ones leave units idle.
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

BIT = ir.IntType(1)
BYTE = ir.IntType(8)
SHORT = ir.IntType(16)
INT = ir.IntType(32)
INDEX = ir.IntType(64)
FLOAT = ir.FloatType()
VECTOR = ir.VectorType(FLOAT, TILE.width)


# --- values -------------------------------------------------------------------------------------------------


def constant(type_: ir.Type, value: float) -> ir.Constant:
    """Make a constant of a scalar type, or a vector with the same constant in all lanes."""
    if isinstance(type_, ir.VectorType):
        return ir.Constant(type_, [ir.Constant(type_.element, value)] * type_.count)
    return ir.Constant(type_, value)


def index(value: int) -> ir.Constant:
    """Make a constant of the type of offsets and counters."""
    return ir.Constant(INDEX, value)


def splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int = TILE.width) -> ir.Value:
    """Copy a scalar of any type into all lanes of a vector."""
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    lane = builder.insert_element(undefined, scalar, ir.Constant(INT, 0))
    return builder.shuffle_vector(lane, undefined, ir.Constant(ir.VectorType(INT, lanes), [0] * lanes))


def call(builder: ir.IRBuilder, name: str, returns: ir.Type, arguments: Sequence[ir.Value]) -> ir.Value:
    """Call one of LLVM's intrinsics: `llvm.x86.…` and `llvm.aarch64.…` are single instructions."""
    function_type = ir.FunctionType(returns, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """Emit a · b + c, fused where the machine can (`llvm.fma` would call the C library where it cannot)."""
    suffix = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
    return call(builder, f"llvm.fmuladd.{suffix}", a.type, [a, b, c])


def larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Emit max(a, b); b where a is NaN, as the x86 instruction does."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


# --- memory -------------------------------------------------------------------------------------------------


def address_of(builder: ir.IRBuilder, array: ir.Value, *offsets: ir.Value, element: ir.Type = FLOAT) -> ir.Value:
    """Emit the address of an element of a flat array: offsets, in elements, are added up."""
    for offset in offsets:
        array = builder.gep(array, [offset], source_etype=element)
    return array


def load(builder: ir.IRBuilder, address: ir.Value, type_: ir.Type = VECTOR, align: int = 4) -> ir.Value:
    """Load a scalar or a vector from an address that need only be aligned for a float."""
    value = builder.load(builder.bitcast(address, type_.as_pointer()))
    value.align = align
    return value


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, align: int = 4) -> None:
    """Store a scalar or a vector, as `load` loads it."""
    builder.store(value, builder.bitcast(address, value.type.as_pointer())).align = align


def lanes_below(builder: ir.IRBuilder, n: ir.Value, lanes: int) -> ir.Value:
    """Emit the mask of the first n of so many lanes."""
    places = ir.Constant(ir.VectorType(INT, lanes), list(range(lanes)))
    return builder.icmp_signed("<", places, splat(builder, builder.trunc(n, INT), lanes))


def masked_load(builder: ir.IRBuilder, address: ir.Value, mask: ir.Value) -> ir.Value:
    """Load a vector of float32; 0 where the mask is off, and nothing is read there."""
    vector = ir.VectorType(FLOAT, mask.type.count)
    arguments = [builder.bitcast(address, vector.as_pointer()), ir.Constant(INT, 4), mask, constant(vector, 0.0)]
    return call(builder, f"llvm.masked.load.v{mask.type.count}f32.p0", vector, arguments)


def masked_store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, mask: ir.Value) -> None:
    """Store the elements of a vector, float32 or int16, where the mask is on."""
    letter, size = ("f", 32) if value.type.element == FLOAT else ("i", 16)
    pointer = builder.bitcast(address, value.type.as_pointer())
    arguments = [value, pointer, ir.Constant(INT, size // 8), mask]
    call(builder, f"llvm.masked.store.v{mask.type.count}{letter}{size}.p0", ir.VoidType(), arguments)


# --- loops --------------------------------------------------------------------------------------------------

Body = Callable[[ir.Value, Sequence[ir.Value]], Sequence[ir.Value]]
"""(counter, values carried so far) → values carried on."""


def loop(
    builder: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int, initial: Sequence[ir.Value], body: Body
) -> list[ir.Value]:
    """Emit `for i in range(start, stop, step)` carrying values in registers; return their last values.

    before:     ...                                  branch to head
    loop.head:  i = phi [start, before], [i + step, body]; carried likewise
                i < stop ? to body : to end
    loop.body:  what `body` emits                    branch to head
    loop.end:   ...
    """
    before = builder.block
    head = builder.append_basic_block("loop.head")
    inside = builder.append_basic_block("loop.body")
    after = builder.append_basic_block("loop.end")
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(INDEX)
    carried = [builder.phi(value.type) for value in initial]
    builder.cbranch(builder.icmp_signed("<", i, stop), inside, after)
    builder.position_at_end(inside)
    results = body(i, carried)
    following = builder.add(i, index(step))
    end = builder.block  # not `inside`, where the body has blocks of its own
    builder.branch(head)
    i.add_incoming(start, before)
    i.add_incoming(following, end)
    for phi, first, result in zip(carried, initial, results, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(result, end)
    builder.position_at_end(after)
    return carried


def each_vector(builder: ir.IRBuilder, n: ir.Value, emit: Callable[[ir.Value, ir.Type], None]) -> None:
    """Emit `emit(j, type)` for all of n elements: vectors of float32 first, then the rest one by one."""
    whole = builder.mul(builder.sdiv(n, index(TILE.width)), index(TILE.width))
    for start, stop, step, type_ in ((index(0), whole, TILE.width, VECTOR), (whole, n, 1, FLOAT)):

        def body(j: ir.Value, _: Sequence[ir.Value], type_: ir.Type = type_) -> Sequence[ir.Value]:
            emit(j, type_)
            return []

        loop(builder, start, stop, step, [], body)


# --- arguments ----------------------------------------------------------------------------------------------


def data_of(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value], position: int) -> ir.Value:
    """Take the data pointer of the array argument at `position` (of any element type)."""
    array = cgutils.create_struct_proxy(signature.args[position])(context, builder, value=args[position])
    return array.data


def element_at(
    context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value], position: int
) -> ir.Value:
    """Take the address of an array's element: the argument after the array, at `position`, is the offset."""
    array = data_of(context, builder, signature, args, position)
    element = ir.IntType(signature.args[position].dtype.bitwidth)
    return address_of(builder, array, args[position + 1], element=element)


def elements_at(
    context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value], positions: Sequence[int]
) -> list[ir.Value]:
    """Do as `element_at` for several array arguments."""
    return [element_at(context, builder, signature, args, position) for position in positions]


def signature_of(*arguments: Any, returns: Any = types.none) -> Any:
    """Build an intrinsic's signature: arrays keep the type they come with, integers become int64."""
    return returns(*(a if isinstance(a, types.Array) else types.int64 for a in arguments))


# --- for numba ----------------------------------------------------------------------------------------------


@intrinsic
def take_ticket(typing_context, counter):
    """Return counter[0] and increment it, atomically: how workers share the tasks."""

    def generate(context, builder, signature, args):
        array = cgutils.create_struct_proxy(signature.args[0])(context, builder, value=args[0])
        return builder.atomic_rmw("add", array.data, index(1), "monotonic")

    return types.int64(counter), generate
