"""Where things lie in products of ggml's blocks and rows in 8 bits: instruction by machine, panels, quantised rows.

A block of 256 weights of one output is a stream of bits in the file. For a *panel* of BLOCK_NR outputs it is unpacked
into bytes, four successive k of an output side by side, so that one lane of a vector belongs to one output:

    file      output 0: |block 0|block 1| …     panel   step 0: k0…k3 of output 0 | of output 1 | … of the last
              output 1: |block 0|block 1| …             step 1: k4…k7 of output 0 | …
              …                                         … 64 steps, then scales and minima, output by output

`simd.gguf_panels` unpacks, `simd.gguf_rows` quantises rows, `simd.gguf_int8` multiplies.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from edge_kernels.machine import isa
from edge_kernels.simd.ir import (
    BYTE,
    FLOAT,
    INT,
    SHORT,
    address_of,
    index,
)


class BlockTile(NamedTuple):
    """A panel of `vectors` · `width` outputs, multiplied by `instruction`."""

    instruction: str
    vectors: int
    width: int


# By the names of `machine.ISAS`. A tile has up to BLOCK_MR rows: 6 × 2 sums fit into AVX2's 16 registers beside two
# vectors of weights and a row's number. AVX-512 without VNNI takes AVX2's: it has no vpsignb.
BLOCK_TILES: dict[str, BlockTile] = {
    **dict.fromkeys(("amx", "avx512vnni"), BlockTile("vpdpbusd", vectors=2, width=16)),
    **dict.fromkeys(("avx512", "avx2"), BlockTile("vpmaddubsw", vectors=2, width=8)),
    "avxvnni": BlockTile("vpdpbusd", vectors=2, width=8),
    "neon-i8mm": BlockTile("smmla", vectors=4, width=4),
    "neon-dot": BlockTile("sdot", vectors=4, width=4),
    **dict.fromkeys(("neon", "portable"), BlockTile("pairs", vectors=2, width=4)),
}
BLOCK_TILE = BLOCK_TILES[isa()]
BLOCK_MR = 6
BLOCK_NR = BLOCK_TILE.vectors * BLOCK_TILE.width

VECTORS, WIDTH = BLOCK_TILE.vectors, BLOCK_TILE.width
LANES = min(WIDTH, 8)
"""Blocks of an output at a time, one in each lane, where there are few rows. With 16 of them Zen 4 reads memory a
third slower."""
DOT_ROWS = (2, 1) if isa() in ("avx512", "avxvnni", "avx2", "portable") else (4, 2, 1)
"""Rows that are then multiplied together: as many as 16 or 32 registers have room for."""
MADDUBS = BLOCK_TILE.instruction == "vpmaddubsw"
UNSIGNED = BLOCK_TILE.instruction == "vpdpbusd"  # 8-bit weights carry +128 there

BLOCK = 256
LINE = 64
"""Bytes of a cache line."""
STEP_BYTES = 4 * BLOCK_NR
"""Bytes of a step of four k of a panel."""

INTS, FLOATS = ir.VectorType(INT, WIDTH), ir.VectorType(FLOAT, WIDTH)
WORDS, BYTES = ir.VectorType(SHORT, 2 * WIDTH), ir.VectorType(BYTE, 4 * WIDTH)


class Kind(NamedTuple):
    """A type of weights: how its blocks look, and what of them a tile takes.

    Attributes
    ----------
    block_bytes : int
        Bytes of 256 weights.
    group : int
        Weights with a scale of their own.
    meet : int
        Instructions whose sums meet in 16 bits (vpmaddubsw).
    is_float : bool
        The scale of a group is a float16 of its own, and rows have a scale per 32 numbers. Otherwise it is an
        integer, the block has one float16, and rows have a scale per 256.
    has_minima : bool
        Something is subtracted from every weight of a group.
    """

    block_bytes: int
    group: int
    meet: int
    is_float: bool
    has_minima: bool


KINDS: dict[str, Kind] = {
    "Q4_K": Kind(144, 32, 8, is_float=False, has_minima=True),
    "Q5_K": Kind(176, 32, 4, is_float=False, has_minima=True),
    "Q6_K": Kind(210, 16, 2, is_float=False, has_minima=True),
    "Q4_0": Kind(144, 32, 8, is_float=True, has_minima=True),
    "Q4_1": Kind(160, 32, 8, is_float=True, has_minima=True),
    "Q8_0": Kind(272, 32, 1, is_float=True, has_minima=UNSIGNED),
    "IQ4_NL": Kind(144, 32, 1, is_float=True, has_minima=UNSIGNED),
}

# Bytes of an unpacked block of a panel, and where its parts begin: weights, then for each group a number per output
# (a scale), for each two groups a number (minima; floats: for each group), at last d and m of the block.
SCALES_AT = BLOCK * BLOCK_NR
NUMBERS = 4 * BLOCK_NR  # bytes of a number per output
MINIMA_AT = SCALES_AT + 16 * NUMBERS
FACTORS_AT = MINIMA_AT + 8 * NUMBERS
UNPACKED_BYTES = FACTORS_AT + 2 * NUMBERS

# Bytes of 256 quantised numbers of a row, and where their parts begin: five cache lines.
#
#     integer scales   256 bytes | 16 sums of 16 numbers: int16 | 8 sums of 32: int16 | scale: float32 | nothing
#     float scales     256 bytes | 8 scales of 32 numbers: float32 | 8 sums of 32, scaled: float32
#
# A tile reads the same four bytes of each of its rows, one row after the other. So its rows lie interleaved, and it
# reads every line once, from first to last: byte 4 · i of row r of n is at 4 · (i · n + r).
ROW_BYTES = 320
SUMS_16_AT, SUMS_32_AT, ROW_SCALE_AT = 256, 288, 304
ROW_SCALES_AT, ROW_SUMS_AT = 256, 288


def byte_at(builder: ir.IRBuilder, address: ir.Value, *offsets: int | ir.Value) -> ir.Value:
    """Emit the address some bytes after another."""
    return address_of(
        builder, address, *(index(o) if isinstance(o, int) else o for o in offsets if o != 0), element=BYTE
    )


def pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Emit an address, an int64, as a pointer."""
    return builder.inttoptr(address, BYTE.as_pointer())
