"""AMX: products of whole matrix tiles as LLVM IR, for the int8 family and for attention in bfloat16.

A tile register holds 16 rows of 64 bytes. One instruction multiplies a tile of 16 rows × 64 bytes of k with one of
16 outputs, which lie as the other families' cells do, [k / group][output][group] with groups of 4 bytes, and adds to
16 × 16 sums of 4 bytes. Eight registers, named by number: four of sums, two and two of operands.

        left: 16 rows               right: 16 groups of k           sums: 16 × 16 of 4 bytes
        ┌─────────────────┐         ┌──────┬──────┬─ … ─┬──────┐    ┌──────────────┐
    row │ k0 k1 k2 … k63  │  group  │ out0 │ out1 │     │out15 │    │ row · output │
        │                 │  k0…k3  │ 4 B  │ 4 B  │     │ 4 B  │    │              │
        └─────────────────┘         └──────┴──────┴─ … ─┴──────┘    └──────────────┘

    4 bytes of a group are 4 int8, or 2 bfloat16 (a *pair*, the smaller k in the lower half of the word).

    tdpbssd     int8, signed × signed, 64 k a step, int32 sums
    tdpbf16ps   bfloat16, 32 k a step, float32 sums

A tile that does not start on a cache line is loaded at a third of the speed, so panels are aligned and consist of
whole tiles of 1 KiB. The shape of the registers is per-thread state: `begin_tiles` sets it, `end_tiles` clears it.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

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

SIDE = 2 * ROWS
"""Rows and columns of a square of 2 × 2 tiles of sums."""
STEP = ROW_BYTES // 2
"""k of a tile of bfloat16."""
TILE = TILE_BYTES // 2
"""Elements of a tile of bfloat16."""

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
    """Emit a prefetch of a line into the first or second cache; an invalid address is not an error."""
    arguments = [builder.bitcast(address, _POINTER), INT(0), INT(4 - cache), INT(1)]  # to read; how near; data
    call(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)


# --- the square of 2 × 2 tiles ------------------------------------------------------------------------------


class Sums(NamedTuple):
    """Where the registers of sums are stored.

    Attributes
    ----------
    places : dict
        Register (0 to 3, see `emit_square`) → address of its first row.
    stride : int
        Distance of rows in bytes.
    """

    places: dict[int, ir.Value]
    stride: int = ROW_BYTES


def zero_sums(builder: ir.IRBuilder, registers: Iterable[int] = range(4)) -> None:
    """Emit registers of sums = 0."""
    for register in registers:
        zero_tile(builder, register)


def multiply_square(
    builder: ir.IRBuilder,
    instruction: str,
    registers: Iterable[int] = range(4),
    after_each: Callable[[int], None] | None = None,
) -> None:
    """Emit the products of a step; `after_each` emits other work for while a register is multiplied."""
    for register in registers:
        multiply_tiles(builder, instruction, register, 4 + register // 2, 6 + register % 2)
        if after_each:
            after_each(register)


def store_sums(builder: ir.IRBuilder, sums: Sums) -> None:
    """Emit the stores of all registers of sums."""
    for register, place in sums.places.items():
        store_tile(builder, register, place, sums.stride)


def emit_square(
    builder: ir.IRBuilder,
    instruction: str,
    steps: ir.Value,
    operands: Callable[[ir.Value], dict[int, ir.Value]],
    sums: Sums,
    *,
    add: ir.Value | None = None,
    counted_by: int = 1,
    after_each: Callable[[ir.Value, int], None] | None = None,
) -> None:
    """Emit the hot loop of every product on AMX: four tiles of sums from two and two operands.

                        right 6     right 7
            left 4      sums 0      sums 1           Every operand that is loaded is used twice: 4 loads for
            left 5      sums 2      sums 3           4 products. With one tile each it would be 2 for 1.

    Parameters
    ----------
    instruction : "tdpbssd" or "tdpbf16ps".
    steps, counted_by
        The counter goes from 0 to below `steps` in steps of `counted_by`.
    operands
        Counter → {register: address}, in the order of loading. 4, 6, 7, 5 lets the first product start after two
        loads. Without 7 there are only the sums 0 and 2.
    sums
        Where they are stored, and first loaded from if `add`, at run time, is not 0; without `add` they start at 0.
    after_each
        Emits, given counter and register of sums, work to do beside a product.
    """
    if add is None:
        zero_sums(builder, sums.places)
    else:
        with builder.if_else(builder.icmp_signed("!=", add, index(0))) as (then, otherwise):
            with then:
                for register, place in sums.places.items():
                    load_tile(builder, register, place, sums.stride)
            with otherwise:
                zero_sums(builder, sums.places)

    def step(i: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
        for register, address in operands(i).items():
            load_tile(builder, register, address)
        multiply_square(builder, instruction, sums.places, partial(after_each, i) if after_each else None)
        return []

    loop(builder, index(0), steps, counted_by, [], step)
    store_sums(builder, sums)


def emit_tile_product(
    builder: ir.IRBuilder, a: ir.Value, b: ir.Value, cells: ir.Value, c: ir.Value, accumulate: ir.Value
) -> None:
    """Emit the dot tile of `simd.int8`: 32 rows × 32 outputs; a and b advance by two tiles in a step of 16 cells.

    Rows lie [step][row][64], weights [step][half of the outputs][cell][output][4], sums [row][32].
    """
    places = {
        2 * half + part: address_of(builder, c, index((half * ROWS * 2 + part) * ROW_BYTES), element=BYTE)
        for half in range(2)
        for part in range(2)
    }

    def at(panel: ir.Value, cell: ir.Value, ahead: int) -> ir.Value:
        start = builder.mul(cell, index(TILE_BYTES * 2 // ROWS))
        return address_of(builder, panel, start, index(ahead), element=BYTE)

    def operands(cell: ir.Value) -> dict[int, ir.Value]:
        return {4: at(a, cell, 0), 6: at(b, cell, 0), 7: at(b, cell, TILE_BYTES), 5: at(a, cell, TILE_BYTES)}

    def fetch_rows(cell: ir.Value, register: int) -> None:
        # Prefetch the next step's rows during this one: outputs are in the first cache, rows in the second.
        for line in range(register * 8, register * 8 + 8):
            prefetch(builder, at(a, cell, 2 * TILE_BYTES + line * ROW_BYTES), cache=1)

    emit_square(
        builder, "tdpbssd", cells, operands, Sums(places, 2 * ROW_BYTES), add=accumulate, counted_by=ROWS,
        after_each=fetch_rows,
    )  # fmt: skip


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
    """Release the tile registers: a thread that holds some has more to save at every context switch."""

    def generate(context, builder, signature, args):
        if HAS_TILES:
            _call(builder, "tilerelease", [])
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def keep_awake(typing_context):
    """Multiply whatever is in two registers into a third, 7, which every product loads before it uses it.

    After some 300 ns without a product the unit falls asleep, and the next product slows down the whole core, vector
    and scalar instructions included, for the better part of a microsecond. So long stretches of code without tiles
    have one of these in between.
    """

    def generate(context, builder, signature, args):
        if HAS_TILES:
            multiply_tiles(builder, "tdpbf16ps", 7, 4, 6)
        return context.get_dummy_value()

    return types.none(), generate
