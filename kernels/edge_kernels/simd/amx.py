"""AMX: products of whole matrix tiles as LLVM IR, for the int8 family and for attention in bfloat16.

A tile register holds 16 rows of 64 bytes. One instruction multiplies a tile of 16 rows × 64 bytes of k with one of
16 outputs, which lie as the other families' cells do, [k / group][output][group] with groups of 4 bytes, and adds to
16 × 16 sums of 4 bytes. Eight registers, named by number: four of sums, two and two of operands.

    tdpbssd     int8, signed × signed, 64 k a step, int32 sums
    tdpbf16ps   bfloat16, 32 k a step, float32 sums

A tile that does not begin on a cache line is loaded at a third of the speed, so panels are aligned and lie in whole
tiles of 1 KiB. The shape of the registers is a thread's own state: `begin_tiles` sets it, `end_tiles` clears it.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edge_kernels.machine import isa
from edge_kernels.simd.ir import BYTE, INT, address_of, call, index, loop

HAS_TILES = isa() == "amx"

ROWS = 16  # of a tile register
ROW_BYTES = 64
TILE_BYTES = ROWS * ROW_BYTES

_POINTER = BYTE.as_pointer()

# Intel's manual, "ldtilecfg": palette 1; bytes per row as 16-bit numbers from byte 16, rows from byte 48.
_CONFIGURATION = bytearray(64)
_CONFIGURATION[0] = 1
for _register in range(8):
    _CONFIGURATION[16 + 2 * _register] = ROW_BYTES
    _CONFIGURATION[48 + _register] = ROWS


def _call(builder: ir.IRBuilder, name: str, arguments: Sequence[ir.Value]) -> None:
    call(builder, f"llvm.x86.{name}", ir.VoidType(), arguments)


def _register_number(number: int) -> ir.Constant:
    return ir.Constant(BYTE, number)


def zero_tile(builder: ir.IRBuilder, register: int) -> None:
    """Emit register = 0."""
    _call(builder, "tilezero", [_register_number(register)])


def load_tile(builder: ir.IRBuilder, register: int, address: ir.Value, stride: int = ROW_BYTES) -> None:
    """Emit the load of a register; `stride` is the distance of its rows in bytes."""
    pointer = builder.bitcast(address, _POINTER)
    _call(builder, "tileloadd64", [_register_number(register), pointer, index(stride)])


def store_tile(builder: ir.IRBuilder, register: int, address: ir.Value, stride: int = ROW_BYTES) -> None:
    """Emit the store of a register."""
    pointer = builder.bitcast(address, _POINTER)
    _call(builder, "tilestored64", [_register_number(register), pointer, index(stride)])


def multiply_tiles(builder: ir.IRBuilder, instruction: str, sums: int, a: int, b: int) -> None:
    """Emit sums += a · b."""
    _call(builder, instruction, [_register_number(number) for number in (sums, a, b)])


def prefetch(builder: ir.IRBuilder, address: ir.Value, cache: int) -> None:
    """Emit a request for a line, into the first or second cache; an address that is not there is no error."""
    arguments = [builder.bitcast(address, _POINTER), INT(0), INT(4 - cache), INT(1)]  # to read; how near; data
    call(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)


def emit_tile_product(
    builder: ir.IRBuilder, a: ir.Value, b: ir.Value, cells: ir.Value, c: ir.Value, accumulate: ir.Value
) -> None:
    """Emit the dot tile of `simd_int8`: 32 rows × 32 outputs; a and b advance by two tiles in a step of 16 cells.

    Rows lie [step][row][64], weights [step][half of the outputs][cell][output][4], sums [row][32].
    """
    places = [
        address_of(builder, c, index((half * ROWS * 2 * ROW_BYTES) + part * ROW_BYTES), element=BYTE)
        for half in range(2)
        for part in range(2)
    ]
    with builder.if_else(builder.icmp_signed("!=", accumulate, index(0))) as (then, otherwise):
        with then:
            for register, place in enumerate(places):
                load_tile(builder, register, place, 2 * ROW_BYTES)
        with otherwise:
            for register in range(4):
                zero_tile(builder, register)

    def step(i: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
        start = builder.mul(i, index(TILE_BYTES * 2 // ROWS))
        rows, outputs = (address_of(builder, panel, start, element=BYTE) for panel in (a, b))
        load_tile(builder, 4, rows)
        load_tile(builder, 6, outputs)
        load_tile(builder, 7, address_of(builder, outputs, index(TILE_BYTES), element=BYTE))
        load_tile(builder, 5, address_of(builder, rows, index(TILE_BYTES), element=BYTE))
        for register in range(4):
            multiply_tiles(builder, "tdpbssd", register, 4 + register // 2, 6 + register % 2)
            # The next step's rows, while this one is multiplied: outputs are in the first cache, rows in the second.
            for line in range(register * 8, register * 8 + 8):
                ahead = index(2 * TILE_BYTES + line * ROW_BYTES)
                prefetch(builder, address_of(builder, rows, ahead, element=BYTE), cache=1)
        return []

    loop(builder, index(0), cells, ROWS, [], step)
    for register, place in enumerate(places):
        store_tile(builder, register, place, 2 * ROW_BYTES)


# --- for numba ----------------------------------------------------------------------------------------------


@intrinsic
def begin_tiles(typing_context):
    """Set up this thread's tile registers; nothing where there are none."""

    def generate(context, builder, signature, args):
        if HAS_TILES:
            configuration = cgutils.global_constant(
                builder, "edge_kernels.tiles", ir.Constant(ir.ArrayType(BYTE, 64), _CONFIGURATION)
            )
            _call(builder, "ldtilecfg", [builder.bitcast(configuration, _POINTER)])
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def end_tiles(typing_context):
    """Give the tile registers back: a thread that holds some has more to save at every switch."""

    def generate(context, builder, signature, args):
        if HAS_TILES:
            _call(builder, "tilerelease", [])
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def keep_awake(typing_context):
    """Multiply what happens to be in two registers into a third, 7, which every product loads before it uses it.

    After some 300 ns without a product the unit falls asleep, and the next one slows the whole core down for the
    better part of a microsecond: vector instructions and scalar ones, too. So long stretches without tiles have one
    of these in between.
    """

    def generate(context, builder, signature, args):
        if HAS_TILES:
            multiply_tiles(builder, "tdpbf16ps", 7, 4, 6)
        return context.get_dummy_value()

    return types.none(), generate
