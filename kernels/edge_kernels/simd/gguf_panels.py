"""Blocks of weights as they lie in a GGUF file → panels of bytes, as LLVM IR.

A lane per block, of several outputs or of one: blocks are transposed while they are unpacked, 4 × 4 dwords at a time.
Where things lie, on either side: `reference.gguf_blocks` and `simd.gguf_layout`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_kernels.reference.gguf_blocks import IQ4_NL_VALUES
from edge_kernels.simd.gguf_layout import (
    BLOCK_TILE,
    FACTORS_AT,
    MADDUBS,
    MINIMA_AT,
    NUMBERS,
    SCALES_AT,
    STEP_BYTES,
    UNSIGNED,
    WIDTH,
    byte_at,
    pointer,
)
from edge_kernels.simd.ir import (
    BYTE,
    FLOAT,
    INT,
    SHORT,
    call,
    constant,
    index,
    load,
    loop,
    store,
)


def _unpacked(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, width: int, upper: bool) -> ir.Value:
    """Emit elements of `width` dwords, one of a and one of b in turn, from the lower or upper half of each quarter.

    A quarter is four dwords: these are x86's vpunpck instructions and NEON's zip.
    """
    mask, lanes = [], a.type.count
    for quarter in range(0, lanes, 4):
        first = quarter + (2 if upper else 0)
        if width == 1:
            mask += [first, first + lanes, first + 1, first + 1 + lanes]
        else:
            mask += [first, first + 1, first + lanes, first + 1 + lanes]
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, lanes), mask))


def _joined(builder: ir.IRBuilder, parts: Sequence[ir.Value]) -> ir.Value:
    """Emit vectors of four dwords as one."""
    values = [*parts]
    while len(values) > 1:
        n = 2 * values[0].type.count
        mask = ir.Constant(ir.VectorType(INT, n), list(range(n)))
        values = [builder.shuffle_vector(a, b, mask) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _columns(builder: ir.IRBuilder, blocks: Sequence[ir.Value], first: int) -> list[ir.Value]:
    """Emit the four dwords from byte `first` of every block, as four vectors with a lane per block.

    Quarters of vectors are loaded from different outputs, so that 4 × 4 dwords are transposed inside each:

        vector i    dwords of output i | of output i + 4 | …        for i = 0…3
    """
    quarter = ir.VectorType(INT, 4)
    a, b, c, d = (
        _joined(builder, [load(builder, byte_at(builder, block, first), quarter, 1) for block in blocks[i::4]])
        for i in range(4)
    )
    low, high = (_unpacked(builder, a, b, 1, upper) for upper in (False, True))
    low_2, high_2 = (_unpacked(builder, c, d, 1, upper) for upper in (False, True))
    return [
        _unpacked(builder, one, other, 2, upper)
        for one, other in ((low, low_2), (high, high_2))
        for upper in (False, True)
    ]


def _halves(builder: ir.IRBuilder, blocks: Sequence[ir.Value], first: int) -> ir.Value:
    """Emit the float16 at byte `first` of every output's block as float32."""
    words = ir.Constant(ir.VectorType(SHORT, len(blocks)), ir.Undefined)
    for lane, block in enumerate(blocks):
        words = builder.insert_element(
            words, load(builder, byte_at(builder, block, first), SHORT, 1), ir.Constant(INT, lane)
        )
    return _as_float32(builder, words)


def _as_float32(builder: ir.IRBuilder, words: ir.Value) -> ir.Value:
    """Emit float16 as float32."""
    halves, floats = (ir.VectorType(type_, words.type.count) for type_ in (ir.HalfType(), FLOAT))
    return builder.fpext(builder.bitcast(words, halves), floats)


def _masked(builder: ir.IRBuilder, words: ir.Value, shift: int, mask: int) -> ir.Value:
    """Emit dwords shifted down, or up where `shift` is negative, and with each byte's bits of `mask` alone."""
    if shift:
        words = (builder.lshr if shift > 0 else builder.shl)(words, constant(words.type, abs(shift)))
    return builder.and_(words, constant(words.type, mask * 0x01010101))


def _picked(builder: ir.IRBuilder, words: ir.Value, places: Sequence[int | None]) -> ir.Value:
    """Emit dwords with the bytes at these places of each dword; 0 for None."""
    n = 4 * words.type.count
    type_ = ir.VectorType(BYTE, n)
    mask = [n if place is None else lane + place for lane in range(0, n, 4) for place in places]
    chosen = builder.shuffle_vector(
        builder.bitcast(words, type_), constant(type_, 0), ir.Constant(ir.VectorType(INT, n), mask)
    )
    return builder.bitcast(chosen, words.type)


def _shifted_words(builder: ir.IRBuilder, dwords: ir.Value, n: int) -> ir.Value:
    """Emit dwords with each of their signed words shifted down."""
    type_ = ir.VectorType(SHORT, 2 * dwords.type.count)
    return builder.bitcast(builder.ashr(builder.bitcast(dwords, type_), constant(type_, n)), dwords.type)


def _scale_of(builder: ir.IRBuilder, words: ir.Value, byte: int, signed: bool) -> ir.Value:
    """Emit a byte of each dword as the scale that the product takes: an int32, or twice an int16 (vpmaddubsw)."""
    if not signed:
        return _picked(builder, words, [byte, None] * 2 if MADDUBS else [byte, None, None, None])
    if MADDUBS:
        return _shifted_words(builder, _picked(builder, words, [None, byte] * 2), 8)
    return builder.ashr(_picked(builder, words, [None, None, None, byte]), constant(words.type, 24))


class Parts(Protocol):
    """Takes what is unpacked of the blocks of a vector: four weights, a scale or minima of each, in dwords."""

    def put_step(self, value: ir.Value, step: int) -> None:
        """Take four weights of each block."""

    def put_scale(self, value: ir.Value, group: int) -> None:
        """Take the scale of a group: before its weights."""

    def put_minima(self, value: ir.Value, pair: int) -> None:
        """Take the minima of two groups; floats: of one."""

    def put_factor(self, value: ir.Value, which: int) -> None:
        """Take d or m, float32."""


class _Panel(NamedTuple):
    """Where the outputs of a vector are unpacked to."""

    builder: ir.IRBuilder
    address: ir.Value

    def put(self, value: ir.Value, place: int) -> None:
        store(self.builder, value, byte_at(self.builder, self.address, place))

    def put_step(self, value: ir.Value, step: int) -> None:
        self.put(value, step * STEP_BYTES)

    def put_scale(self, value: ir.Value, group: int) -> None:
        self.put(value, SCALES_AT + group * NUMBERS)

    def put_minima(self, value: ir.Value, pair: int) -> None:
        self.put(value, MINIMA_AT + pair * NUMBERS)

    def put_factor(self, value: ir.Value, which: int) -> None:
        self.put(value, FACTORS_AT + which * NUMBERS)


def _unpack_head(builder: ir.IRBuilder, blocks: Sequence[ir.Value], panel: Parts) -> None:
    """Emit d, m, scales and minima of Q4_K and Q5_K: see `reference.gguf_blocks` for their bits."""
    halves, first, second, third = _columns(builder, blocks, 0)
    words = ir.VectorType(SHORT, len(blocks))
    for which, shift in ((0, 0), (1, 16)):
        bits = builder.trunc(builder.lshr(halves, constant(halves.type, shift)), words)
        panel.put_factor(_as_float32(builder, bits), which)
    for n, (low, shift) in enumerate(((first, 0), (second, 4))):
        upper = builder.or_(
            _masked(builder, third, shift, 0x0F), _masked(builder, _masked(builder, low, 2, 0x30), 0, 0x30)
        )
        for half, numbers in enumerate((_masked(builder, low, 0, 0x3F), upper)):
            for byte in range(4):
                if n == 0:
                    panel.put_scale(_scale_of(builder, numbers, byte, signed=False), 4 * half + byte)
                elif byte % 2 == 0:
                    panel.put_minima(_picked(builder, numbers, [byte, None, byte + 1, None]), 2 * half + byte // 2)


def _unpack_q4_k(builder: ir.IRBuilder, blocks: Sequence[ir.Value], panel: Parts) -> None:
    _unpack_head(builder, blocks, panel)
    for quad in range(8):  # 16 of the 128 bytes
        for i, words in enumerate(_columns(builder, blocks, 16 + 16 * quad)):
            step = quad // 2 * 16 + quad % 2 * 4 + i
            panel.put_step(_masked(builder, words, 0, 0x0F), step)
            panel.put_step(_masked(builder, words, 4, 0x0F), step + 8)


def _unpack_q5_k(builder: ir.IRBuilder, blocks: Sequence[ir.Value], panel: Parts) -> None:
    _unpack_head(builder, blocks, panel)
    for part in range(2):  # 16 of the 32 bytes of fifth bits
        fifths = _columns(builder, blocks, 16 + 16 * part)
        for pair in range(4):
            for i, words in enumerate(_columns(builder, blocks, 48 + 32 * pair + 16 * part)):
                for half in range(2):
                    group = 2 * pair + half
                    fifth = _masked(builder, fifths[i], group - 4, 0x10)
                    value = builder.or_(_masked(builder, words, 4 * half, 0x0F), fifth)
                    panel.put_step(value, 8 * group + 4 * part + i)


def _unpack_q6_k(builder: ir.IRBuilder, blocks: Sequence[ir.Value], panel: Parts) -> None:
    factor = _halves(builder, blocks, 208)
    panel.put_factor(factor, 0)
    for quad, words in enumerate(_columns(builder, blocks, 192)):
        for byte in range(4):
            panel.put_scale(_scale_of(builder, words, byte, signed=True), 4 * quad + byte)
            if byte % 2 == 0:
                # 32 · scale: a byte in the upper half of a word is 256 times it.
                minima = _shifted_words(builder, _picked(builder, words, [None, byte, None, byte + 1]), 3)
                panel.put_minima(minima, 2 * quad + byte // 2)
    for half in range(2):
        for part in range(2):
            upper_bits = _columns(builder, blocks, 128 + 32 * half + 16 * part)
            for which in range(2):
                for i, words in enumerate(_columns(builder, blocks, 64 * half + 32 * which + 16 * part)):
                    for nibble in range(2):
                        quarter = 2 * nibble + which
                        upper = _masked(builder, upper_bits[i], 2 * quarter - 4, 0x30)
                        value = builder.or_(_masked(builder, words, 4 * nibble, 0x0F), upper)
                        panel.put_step(value, 8 * (4 * half + quarter) + 4 * part + i)


def _unpack_q4_0(builder: ir.IRBuilder, blocks: Sequence[ir.Value], panel: Parts) -> None:
    for group in range(8):
        factor = _halves(builder, blocks, 18 * group)
        panel.put_scale(factor, group)
        panel.put_minima(builder.fmul(factor, constant(factor.type, -8.0)), group)
        for i, words in enumerate(_columns(builder, blocks, 18 * group + 2)):
            panel.put_step(_masked(builder, words, 0, 0x0F), 8 * group + i)
            panel.put_step(_masked(builder, words, 4, 0x0F), 8 * group + 4 + i)


def _unpack_q4_1(builder: ir.IRBuilder, blocks: Sequence[ir.Value], panel: Parts) -> None:
    for group in range(8):
        panel.put_scale(_halves(builder, blocks, 20 * group), group)
        panel.put_minima(_halves(builder, blocks, 20 * group + 2), group)
        for i, words in enumerate(_columns(builder, blocks, 20 * group + 4)):
            panel.put_step(_masked(builder, words, 0, 0x0F), 8 * group + i)
            panel.put_step(_masked(builder, words, 4, 0x0F), 8 * group + 4 + i)


def _put_signed(builder: ir.IRBuilder, words: ir.Value, panel: Parts, step: int) -> None:
    """Emit the store of four weights of 8 bits, with +128 where the product wants them unsigned."""
    panel.put_step(builder.xor(words, constant(words.type, 0x80808080)) if UNSIGNED else words, step)


def _put_signed_factor(builder: ir.IRBuilder, factor: ir.Value, panel: Parts, group: int) -> None:
    panel.put_scale(factor, group)
    if UNSIGNED:
        panel.put_minima(builder.fmul(factor, constant(factor.type, -128.0)), group)


def _unpack_q8_0(builder: ir.IRBuilder, blocks: Sequence[ir.Value], panel: Parts) -> None:
    for group in range(8):
        _put_signed_factor(builder, _halves(builder, blocks, 34 * group), panel, group)
        for half in range(2):
            for i, words in enumerate(_columns(builder, blocks, 34 * group + 2 + 16 * half)):
                _put_signed(builder, words, panel, 8 * group + 4 * half + i)


def _looked_up(builder: ir.IRBuilder, nibbles: ir.Value) -> ir.Value:
    """Emit the values of four nibbles a lane: bit by bit, halves of the table are chosen."""
    lanes = nibbles.type.count
    type_ = ir.VectorType(BYTE, 4 * lanes)
    if BLOCK_TILE.instruction in ("sdot", "smmla"):
        table = ir.Constant(ir.VectorType(BYTE, 16), [v & 255 for v in IQ4_NL_VALUES])
        found = call(
            builder, "llvm.aarch64.neon.tbl1.v16i8", table.type, [table, builder.bitcast(nibbles, table.type)]
        )
        return builder.bitcast(found, nibbles.type)
    if BLOCK_TILE.instruction in ("vpmaddubsw", "vpdpbusd"):
        name = {8: "llvm.x86.avx2.pshuf.b", 16: "llvm.x86.avx512.pshuf.b.512"}[lanes]
        table = ir.Constant(type_, [v & 255 for v in IQ4_NL_VALUES] * (lanes // 4))
        return builder.bitcast(call(builder, name, type_, [table, builder.bitcast(nibbles, type_)]), nibbles.type)
    places = builder.bitcast(nibbles, type_)
    values = [constant(type_, v & 255) for v in IQ4_NL_VALUES]
    for bit in range(4):
        is_set = builder.icmp_unsigned("!=", builder.and_(places, constant(type_, 1 << bit)), constant(type_, 0))
        values = [builder.select(is_set, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)]
    return builder.bitcast(values[0], nibbles.type)


def _unpack_iq4_nl(builder: ir.IRBuilder, blocks: Sequence[ir.Value], panel: Parts) -> None:
    for group in range(8):
        _put_signed_factor(builder, _halves(builder, blocks, 18 * group), panel, group)
        for i, words in enumerate(_columns(builder, blocks, 18 * group + 2)):
            for half in range(2):
                value = _looked_up(builder, _masked(builder, words, 4 * half, 0x0F))
                _put_signed(builder, value, panel, 8 * group + 4 * half + i)


def _unpacker(emit: Callable[[ir.IRBuilder, Sequence[ir.Value], Parts], None]):
    """Make an intrinsic that unpacks a block of a panel's outputs."""

    @intrinsic
    def unpack(typing_context, blocks, row_bytes, panel, vectors):
        def generate(context, builder, signature, args):
            first, row_bytes, out = pointer(builder, args[0]), args[1], pointer(builder, args[2])

            def vector(v: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
                begin = byte_at(builder, first, builder.mul(v, builder.mul(row_bytes, index(WIDTH))))
                outputs = [begin]
                for _lane in range(1, WIDTH):
                    outputs.append(byte_at(builder, outputs[-1], row_bytes))
                emit(builder, outputs, _Panel(builder, byte_at(builder, out, builder.mul(v, index(4 * WIDTH)))))
                return []

            loop(builder, index(0), args[3], 1, [], vector)
            return context.get_dummy_value()

        return types.none(*[types.int64] * 4), generate

    return unpack


EMITTERS: dict[str, Callable[[ir.IRBuilder, Sequence[ir.Value], Parts], None]] = {
    "Q4_K": _unpack_q4_k,
    "Q5_K": _unpack_q5_k,
    "Q6_K": _unpack_q6_k,
    "Q4_0": _unpack_q4_0,
    "Q4_1": _unpack_q4_1,
    "Q8_0": _unpack_q8_0,
    "IQ4_NL": _unpack_iq4_nl,
}
"""By type: emits the unpacking of a block of each of WIDTH outputs."""
unpackers = {name: _unpacker(emit) for name, emit in EMITTERS.items()}
"""By type: unpack(address of the first output's block, bytes from output to output, the panel's address, vectors of
outputs)."""
