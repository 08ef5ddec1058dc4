"""Keys, values and masks as they lie in llama.cpp's KV cache and graph, as LLVM IR: to float32, at addresses.

f16     a float16 each
q8_0    32 numbers: a float16 scale, 32 signed bytes                     34 bytes
q4_0    32 numbers: a float16 scale, 16 bytes, each with the number i in its lower and i + 16 in its upper half,
        both with 8 added                                                18 bytes
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (what numba compiles takes its types from the call)

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edge_kernels.simd.gguf_layout import byte_at, pointer
from edge_kernels.simd.ir import (
    BYTE,
    FLOAT,
    INT,
    SHORT,
    TILE,
    address_of,
    constant,
    element_at,
    index,
    load,
    loop,
    splat,
    store,
)

GROUP = 32
"""Numbers that are read at a time; heads are made of whole groups."""
GROUP_BYTES = {"F16": 2 * GROUP, "Q8_0": 34, "Q4_0": 18}
"""Bytes of a group, by ggml's name of the type."""

_WIDTH = min(TILE.width, 16)
_HALF = ir.HalfType()
_FLOATS, _INTS = ir.VectorType(FLOAT, _WIDTH), ir.VectorType(INT, _WIDTH)


def _f16(builder: ir.IRBuilder, at: ir.Value) -> list[ir.Value]:
    halves = ir.VectorType(_HALF, _WIDTH)
    return [
        builder.fpext(load(builder, byte_at(builder, at, 2 * i), halves, 2), _FLOATS) for i in range(0, GROUP, _WIDTH)
    ]


def _scale(builder: ir.IRBuilder, at: ir.Value) -> ir.Value:
    return splat(builder, builder.fpext(load(builder, at, _HALF, 2), FLOAT), _WIDTH)


def _scaled(builder: ir.IRBuilder, bytes_: ir.Value, scale: ir.Value) -> ir.Value:
    return builder.fmul(builder.sitofp(builder.sext(bytes_, _INTS), _FLOATS), scale)


def _q8_0(builder: ir.IRBuilder, at: ir.Value) -> list[ir.Value]:
    scale, bytes_ = _scale(builder, at), ir.VectorType(BYTE, _WIDTH)
    return [
        _scaled(builder, load(builder, byte_at(builder, at, 2 + i), bytes_, 1), scale)
        for i in range(0, GROUP, _WIDTH)
    ]


def _q4_0(builder: ir.IRBuilder, at: ir.Value) -> list[ir.Value]:
    scale, bytes_ = _scale(builder, at), ir.VectorType(BYTE, _WIDTH)
    pairs = [load(builder, byte_at(builder, at, 2 + i), bytes_, 1) for i in range(0, GROUP // 2, _WIDTH)]
    lower = [builder.and_(pair, constant(bytes_, 15)) for pair in pairs]
    upper = [builder.lshr(pair, constant(bytes_, 4)) for pair in pairs]
    return [_scaled(builder, builder.sub(part, constant(bytes_, 8)), scale) for part in (*lower, *upper)]


def _reader(emit: Callable[[ir.IRBuilder, ir.Value], list[ir.Value]], group_bytes: int):
    @intrinsic
    def read(typing_context, address, n, out, offset):
        """Write n numbers, whole groups, at an address to out (float32) as float32."""

        def generate(context, builder, signature, args):
            source, out = pointer(builder, args[0]), element_at(context, builder, signature, args, 2)

            def group(g: ir.Value, _: Sequence[ir.Value]) -> Sequence[ir.Value]:
                at = byte_at(builder, source, builder.mul(g, index(group_bytes)))
                to = address_of(builder, out, builder.mul(g, index(GROUP)))
                for i, values in enumerate(emit(builder, at)):
                    store(builder, values, address_of(builder, to, index(i * _WIDTH)))
                return []

            loop(builder, index(0), builder.sdiv(args[1], index(GROUP)), 1, [], group)
            return context.get_dummy_value()

        return types.none(types.int64, types.int64, out, types.int64), generate

    return read


read_f16, read_q8_0, read_q4_0 = (
    _reader(emit, GROUP_BYTES[name]) for name, emit in (("F16", _f16), ("Q8_0", _q8_0), ("Q4_0", _q4_0))
)


@intrinsic
def read_float(typing_context, address):
    """Return the float32 at an address."""

    def generate(context, builder, signature, args):
        return load(builder, pointer(builder, args[0]), FLOAT)

    return types.float32(types.int64), generate


@intrinsic
def read_half(typing_context, address):
    """Return the float16 at an address as float32."""

    def generate(context, builder, signature, args):
        return builder.fpext(load(builder, pointer(builder, args[0]), _HALF, 2), FLOAT)

    return types.float32(types.int64), generate


@intrinsic
def read_bits(typing_context, address):
    """Return the bits of the float16 at an address."""

    def generate(context, builder, signature, args):
        return builder.zext(load(builder, pointer(builder, args[0]), SHORT, 2), INT)

    return types.int32(types.int64), generate
