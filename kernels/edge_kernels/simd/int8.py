"""Integer dot products as LLVM IR, and the table that says which machine gets which int8 register tile.

What enters and what leaves: as in `simd.float32`, for the int8 family. The operands of a tile lie in *cells* of
`group` successive k, [k / group][row or output][group], so that one lane of a vector holds one cell and one
instruction sums over it:

    vpdpbusd   AVX-512 VNNI, AVX-VNNI  4 products of unsigned × signed bytes into an int32 lane: rows carry +128
    pmaddubsw  AVX2, AVX-512           8 products of unsigned × signed bytes into an int32 lane, in two steps, below
    sdot       ARMv8.2 dotprod         4 products of signed bytes into an int32 lane
    smmla      ARMv8.6 i8mm            2 rows × 2 outputs × 8 products of signed bytes into four int32 lanes
    tdpbssd    AMX                     16 rows × 16 outputs × 64 products of signed bytes (see `simd.amx`)
    pairs      all others              2 products of int16 into an int32 lane (pmaddwd on x86)

    panel of rows                    panel of outputs                    sums, int32
    [k / group][row][group]          [k / group][output][group]

      cell of row i, copied into     ┌───────┬───────┬─ … ─┬───────┐     lane j += the products of the cell of
      every lane of a vector   ×     │ out 0 │ out 1 │     │ out W │     row i with the cell of output j
      ┌─────────────┐                │k0…k3  │k0…k3  │     │k0…k3  │
      │ k0 k1 k2 k3 │                └───────┴───────┴─ … ─┴───────┘
      └─────────────┘

pmaddubsw multiplies bytes and adds two neighbouring products in 16 bits, where they saturate. So weights are rounded
in *fours*, whose positive integers sum to at most 128, and whose negative ones to at least -128: four products with
rows of 0 to 255 stay within ±32,640, whatever the rows are. Each four has a multiplier of its own, which costs
nothing, since the pmaddwd that widens the sums to 32 bits multiplies anyway, and rounds a four of small weights more
finely than one scale per output would. Three multiplying instructions make 64 products; int16 takes four.

    two cells of a row     r0 r1 r2 r3 │ r4 r5 r6 r7
    of an output           w0 w1 w2 w3 │ w4 w5 w6 w7
    pmaddubsw, each cell   r0w0 + r1w1, r2w2 + r3w3 │ r4w4 + r5w5, r6w6 + r7w7     16 bits
    paddw                  four A: r0w0 + r1w1 + r4w4 + r5w5, four B: the others    16 bits
    pmaddwd                A · multiplier of A + B · multiplier of B                32 bits

Where several cells of a row are taken at once (AMX: 16, pmaddubsw: 2), these lie together: [k / step][row][step] and
[k / step][vector of outputs][cell][output][group], padded with zeros to whole steps; `row_cell` and `output_cell` say
where a cell is.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llvmlite import ir
from numba.extending import intrinsic

from edge_kernels.compile import helper, leaf
from edge_kernels.machine import isa
from edge_kernels.simd.amx import emit_tile_product
from edge_kernels.simd.ir import (
    BYTE,
    INT,
    SHORT,
    address_of,
    call,
    constant,
    data_of,
    index,
    load,
    loop,
    signature_of,
    splat,
    store,
)


class DotTile(NamedTuple):
    """A tile of int32 sums held in registers: `rows` × (`vectors` · `width`), made by `instruction`.

    With smmla a vector of sums covers 2 rows × 2 outputs, so `rows` is even, and `vectors` · `width` outputs take
    2 · `vectors` vectors of weights. AMX has registers of its own: 2 × 2 tiles of 16 × 16 sums.
    """

    instruction: str
    rows: int
    vectors: int
    width: int

    @property
    def group(self) -> int:
        """Successive k in a cell."""
        return {"smmla": 8, "pairs": 2}.get(self.instruction, 4)

    @property
    def step_cells(self) -> int:
        """Cells that are taken at once."""
        return {"tdpbssd": 16, "pmaddubsw": 2}.get(self.instruction, 1)

    @property
    def row_bits(self) -> int:
        """Width of the integers that rows are stored in."""
        return 16 if self.instruction == "pairs" else 8

    @property
    def row_zero(self) -> int:
        """Added to the integers of the rows to make them unsigned."""
        return 128 if self.instruction in ("vpdpbusd", "pmaddubsw") else 0

    @property
    def has_multipliers(self) -> bool:
        """Whether weights are rounded in fours, see `reference.operations.quantize_weight_in_fours`."""
        return self.instruction == "pmaddubsw"


# By the names of `machine.ISAS`; registers as in `ir.TILES`, and for `pairs` one more for the product. With pmaddubsw
# there are weights of two cells, multipliers, and a product. Whole products of SigLIP's sizes on Zen 3, against
# 6 × 2 `pairs`: 12 × 1 is 1.43 times as fast, 10 × 1 1.42, 5 × 2 (which keeps three sums in memory) 1.40.
DOT_TILES: dict[str, DotTile] = {
    "amx": DotTile("tdpbssd", rows=32, vectors=2, width=16),
    "avx512vnni": DotTile("vpdpbusd", rows=8, vectors=3, width=16),
    "avx512": DotTile("pmaddubsw", rows=10, vectors=2, width=16),
    "avxvnni": DotTile("vpdpbusd", rows=6, vectors=2, width=8),
    "avx2": DotTile("pmaddubsw", rows=12, vectors=1, width=8),
    "neon-i8mm": DotTile("smmla", rows=8, vectors=3, width=4),
    "neon-dot": DotTile("sdot", rows=6, vectors=4, width=4),
    "neon": DotTile("pairs", rows=4, vectors=2, width=4),
    "portable": DotTile("pairs", rows=4, vectors=2, width=4),
}
DOT_TILE = DOT_TILES[isa()]

DOT_MR = DOT_TILE.rows
DOT_NR = DOT_TILE.vectors * DOT_TILE.width
GROUP = DOT_TILE.group
STEP_CELLS = DOT_TILE.step_cells
HAS_MULTIPLIERS = DOT_TILE.has_multipliers
_OUTPUTS_TOGETHER = DOT_TILE.width if STEP_CELLS > 1 else DOT_NR  # whose cells of one k lie side by side


def n_cells(k):
    """Cells of k columns, padded to whole steps."""
    return (k + GROUP * STEP_CELLS - 1) // (GROUP * STEP_CELLS) * STEP_CELLS


cells_of = helper(n_cells)
"""`n_cells` for compiled code."""


@leaf
def row_cell(cell, row):
    """Place of a cell of one row, within its panel of DOT_MR rows, in cells."""
    return (cell // STEP_CELLS * DOT_MR + row) * STEP_CELLS + cell % STEP_CELLS


@leaf
def output_cell(cell, output):
    """Place of a cell of one output, within its panel of DOT_NR outputs, in cells."""
    vectors, width = DOT_NR // _OUTPUTS_TOGETHER, _OUTPUTS_TOGETHER
    return (
        (cell // STEP_CELLS * vectors + output // width) * STEP_CELLS + cell % STEP_CELLS
    ) * width + output % width


# --- one step of a tile -------------------------------------------------------------------------------------


def multiply_pairs(builder: ir.IRBuilder, sums: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """Emit sums + a[even] · b[even] + a[odd] · b[odd] for int16, in the form that LLVM recognises as pmaddwd."""
    n = sums.type.count
    wide = ir.VectorType(INT, 2 * n)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even, odd = (
        builder.shuffle_vector(products, products, ir.Constant(ir.VectorType(INT, n), list(range(first, 2 * n, 2))))
        for first in (0, 1)
    )
    return builder.add(sums, builder.add(even, odd))


def _cell_step(
    builder: ir.IRBuilder, tile: DotTile, a: ir.Value, b: ir.Value, sums: Sequence[ir.Value]
) -> list[ir.Value]:
    """Add the products of one cell of each row and each output; sums lie [row][vector]."""
    lanes = tile.width * tile.group
    operands = []
    for v in range(tile.vectors):
        at = address_of(builder, b, index(v * lanes), element=BYTE)
        weight = load(builder, at, ir.VectorType(BYTE, lanes), 1)
        if tile.instruction == "pairs":
            operands.append(builder.sext(weight, ir.VectorType(SHORT, lanes)))
        elif tile.instruction == "vpdpbusd":
            # As older LLVM declares it, in int32 lanes; newer LLVM accepts this, too, and converts it to bytes.
            operands.append(builder.bitcast(weight, ir.VectorType(INT, tile.width)))
        else:
            operands.append(weight)
    results = []
    for i in range(tile.rows):
        cell = load(builder, address_of(builder, a, index(4 * i), element=BYTE), INT)
        factor = builder.bitcast(splat(builder, cell, tile.width), operands[0].type)
        for v in range(tile.vectors):
            s = sums[i * tile.vectors + v]
            if tile.instruction == "pairs":
                results.append(multiply_pairs(builder, s, factor, operands[v]))
            elif tile.instruction == "vpdpbusd":
                name = f"llvm.x86.avx512.vpdpbusd.{32 * tile.width}"
                results.append(call(builder, name, s.type, [s, factor, operands[v]]))
            else:
                results.append(call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", s.type, [s, factor, operands[v]]))
    return results


def _fours_step(
    builder: ir.IRBuilder, tile: DotTile, a: ir.Value, b: ir.Value, multipliers: ir.Value, sums: Sequence[ir.Value]
) -> list[ir.Value]:
    """Add the products of two cells of each row and each output, with pmaddubsw."""
    lanes = 4 * tile.width
    bytes_, shorts = ir.VectorType(BYTE, lanes), ir.VectorType(SHORT, lanes // 2)
    multiply = f"llvm.x86.{'avx2.pmadd.ub.sw' if tile.width == 8 else 'avx512.pmaddubs.w.512'}"

    def vector(start: ir.Value, number: int, type_: ir.VectorType) -> ir.Value:
        at = address_of(builder, start, index(number * type_.count), element=BYTE)
        return load(builder, at, ir.VectorType(BYTE, type_.count), 1)

    weights = [[vector(b, 2 * v + cell, bytes_) for cell in range(2)] for v in range(tile.vectors)]
    factors = [builder.zext(vector(multipliers, v, shorts), shorts) for v in range(tile.vectors)]
    results = []
    for i in range(tile.rows):
        at = (address_of(builder, a, index(8 * i + 4 * cell), element=BYTE) for cell in range(2))
        row = [builder.bitcast(splat(builder, load(builder, cell, INT), tile.width), bytes_) for cell in at]
        for v, (first, second) in enumerate(weights):
            fours = builder.add(
                call(builder, multiply, shorts, [row[0], first]), call(builder, multiply, shorts, [row[1], second])
            )
            results.append(multiply_pairs(builder, sums[i * tile.vectors + v], fours, factors[v]))
    return results


def matrix_product(builder: ir.IRBuilder, sums: ir.Value, rows: ir.Value, outputs: ir.Value) -> ir.Value:
    """Emit sums + the products of two rows with two outputs, 8 signed bytes of each: smmla."""
    return call(builder, "llvm.aarch64.neon.smmla.v4i32.v16i8", sums.type, [sums, rows, outputs])


def _matrix_step(
    builder: ir.IRBuilder, tile: DotTile, a: ir.Value, b: ir.Value, sums: Sequence[ir.Value]
) -> list[ir.Value]:
    """Do as `_cell_step` with 2 × 2 blocks of sums, which lie [pair of rows][pair of outputs]."""
    bytes_ = ir.VectorType(BYTE, 16)  # two cells
    row_pairs, output_pairs = tile.rows // 2, tile.vectors * tile.width // 2
    operands = [
        load(builder, address_of(builder, b, index(16 * j), element=BYTE), bytes_, 1) for j in range(output_pairs)
    ]
    results = []
    for i in range(row_pairs):
        factor = load(builder, address_of(builder, a, index(16 * i), element=BYTE), bytes_, 1)
        for j, operand in enumerate(operands):
            s = sums[i * output_pairs + j]
            results.append(matrix_product(builder, s, factor, operand))
    return results


def rows_of_blocks(builder: ir.IRBuilder, rows: int, vectors: int, sums: Sequence[ir.Value]) -> list[ir.Value]:
    """Turn 2 × 2 blocks, [pair of rows][pair of outputs], into rows, [row][vector]: a vector is two side by side."""
    result = []
    for row in range(rows):
        half = [0, 1, 4, 5] if row % 2 == 0 else [2, 3, 6, 7]
        mask = ir.Constant(ir.VectorType(INT, 4), half)
        for v in range(vectors):
            s = row // 2 * 2 * vectors + 2 * v
            result.append(builder.shuffle_vector(sums[s], sums[s + 1], mask))
    return result


def emit_dot_tile(
    builder: ir.IRBuilder, tile: DotTile, a: ir.Value, b: ir.Value, multipliers: ir.Value, cells: ir.Value,
    c: ir.Value, accumulate: ir.Value,
) -> None:  # fmt: skip
    """Emit `dot_tile` for any tile, from addresses: a, b, multipliers and c point at the first element."""
    if tile.instruction == "tdpbssd":
        emit_tile_product(builder, a, b, cells, c, accumulate)
        return
    outputs = tile.vectors * tile.width
    a_cell, b_cell = tile.rows * tile.group * tile.row_bits // 8, outputs * tile.group
    matrix = tile.instruction == "smmla"
    vector = ir.VectorType(INT, tile.width)

    def step(i: ir.Value, sums: Sequence[ir.Value]) -> Sequence[ir.Value]:
        at_a = address_of(builder, a, builder.mul(i, index(a_cell)), element=BYTE)
        at_b = address_of(builder, b, builder.mul(i, index(b_cell)), element=BYTE)
        if tile.has_multipliers:  # two fours in two cells
            at = address_of(builder, multipliers, builder.mul(i, index(outputs)), element=BYTE)
            return _fours_step(builder, tile, at_a, at_b, at, sums)
        return (_matrix_step if matrix else _cell_step)(builder, tile, at_a, at_b, sums)

    sums = loop(builder, index(0), cells, tile.step_cells, [constant(vector, 0)] * (tile.rows * tile.vectors), step)
    if matrix:
        sums = rows_of_blocks(builder, tile.rows, tile.vectors, sums)
    addresses = [address_of(builder, c, index(s * tile.width), element=INT) for s in range(len(sums))]
    with builder.if_else(builder.icmp_signed("!=", accumulate, index(0))) as (then, otherwise):
        with then:
            for s, address in zip(sums, addresses, strict=True):
                store(builder, builder.add(load(builder, address, vector), s), address)
        with otherwise:
            for s, address in zip(sums, addresses, strict=True):
                store(builder, s, address)


# --- for numba ----------------------------------------------------------------------------------------------


@intrinsic
def dot_tile(typing_context, a, a_offset, b, b_offset, multipliers, cells, c, c_offset, accumulate):
    """Multiply DOT_MR rows by one panel; the hot loop of `linear_int8`.

    c[i, j] (+)= Σ a[a_offset + row_cell(g, i) · GROUP + l] · b[b_offset + output_cell(g, j) · GROUP + l]

    over g < cells and l < GROUP, in int32, each product times the multiplier of its four, if there are any.
    `cells` is a multiple of STEP_CELLS. `a` is int8 (unsigned where `row_zero` is 128) or int16, `b` int8,
    `multipliers` uint8 [step][output][four], as many as b has fours. `c` has DOT_MR rows of DOT_NR elements, all of
    which are written; `accumulate` 0 overwrites it, 1 adds to it.
    """

    def generate(context, builder, signature, args):
        _, a_offset, _, b_offset, _, cells, _, c_offset, accumulate = args
        a, b, multipliers, c = (data_of(context, builder, signature, args, position) for position in (0, 2, 4, 6))
        a = address_of(builder, a, a_offset, element=ir.IntType(DOT_TILE.row_bits))
        b = address_of(builder, b, b_offset, element=BYTE)
        c = address_of(builder, c, c_offset, element=INT)
        if DOT_TILE.has_multipliers:
            multipliers = address_of(builder, multipliers, builder.sdiv(b_offset, index(4)), element=BYTE)
        emit_dot_tile(builder, DOT_TILE, a, b, multipliers, cells, c, accumulate)
        return context.get_dummy_value()

    return signature_of(a, a_offset, b, b_offset, multipliers, cells, c, c_offset, accumulate), generate
