"""bitsandbytes' 4-bit matrices (NF4 and FP4, with or without double quantisation) as tensors of a checkpoint.

A matrix W [o, i] is cut, row after row, into blocks of 64 values. Each value is one of 16 numbers times its block's
absolute maximum; with double quantisation the maxima are in turn one of 256 numbers each, times the maximum of 256 of
them, plus a common offset:

    W.weight                                  uint8 [o·i/2, 1]   the even value in the HIGH half of a byte
    W.weight.quant_map                        f32 [16]
    W.weight.absmax                           uint8 [o·i/64], or f32 without double quantisation
    W.weight.nested_absmax, .nested_quant_map f32 [⌈o·i/64/256⌉], f32 [256]
    W.weight.quant_state.bitsandbytes__nf4    uint8: JSON with shape, blocksize, nested_blocksize, nested_offset

Values are float32. Before it multiplies, bitsandbytes rounds them to its compute type, float16 in the official int4
checkpoint; so an intermediate file keeps them as float16.
Source of the layout: bitsandbytes `functional.QuantState`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_converters.sources.safetensors import Float32, SourceTensor, StoredTensor
from edge_runtime.errors import CheckpointError

STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class BlockMaxima:
    """The absolute maximum of every block: as stored, or in 8 bits with scales of their own."""

    stored: StoredTensor
    scales: Float32 | None = None
    """ndarray [shape=(scales,), float32], or None when `stored` is float32."""
    numbers: Float32 | None = None
    """ndarray [shape=(256,), float32]"""
    offset: float = 0.0
    per_scale: int = 1

    def read(self, start: int, stop: int) -> Float32:
        """Maxima of blocks [start, stop): ndarray [shape=(stop - start,), float32]."""
        if self.scales is None or self.numbers is None:
            return np.frombuffer(self.stored.raw(4 * start, 4 * stop), "<f4")
        codes = np.frombuffer(self.stored.raw(start, stop), np.uint8)
        scales = self.scales[np.arange(start, stop) // self.per_scale]
        return self.numbers[codes] * scales + np.float32(self.offset)


@dataclass(frozen=True, eq=False)
class FourBitMatrix(SourceTensor):
    """A matrix of 4-bit indices into a table."""

    packed: StoredTensor
    table: Float32
    """ndarray [shape=(16,), float32]"""
    maxima: BlockMaxima
    block: int

    @cached_property
    def _pairs(self) -> Float32:
        """Both values of every byte: ndarray [shape=(256, 2), float32]."""
        byte = np.arange(256)
        return np.stack([self.table[byte >> 4], self.table[byte & 15]], axis=1)

    def float_rows(self, start: int, stop: int) -> Float32:
        """Rows [start, stop) as float32."""
        first, last = start * self.row_length, stop * self.row_length
        total = self.n_rows * self.row_length
        begin = first // self.block
        end = -(-last // self.block)
        values_end = min(end * self.block, total)  # the last block may be shorter
        raw = np.frombuffer(self.packed.raw(begin * self.block // 2, (values_end + 1) // 2), np.uint8)
        numbers = self._pairs[raw].reshape(-1)
        padded = np.zeros((end - begin) * self.block, np.float32)
        padded[: len(numbers)] = numbers[: len(padded)]
        values = padded.reshape(-1, self.block) * self.maxima.read(begin, end)[:, None]
        cut = values.reshape(-1)[first - begin * self.block : last - begin * self.block]
        return np.ascontiguousarray(cut.reshape(stop - start, self.row_length))


def assemble(tensors: dict[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Replace the parts of 4-bit matrices with the matrices.

    Raises
    ------
    CheckpointError
        When parts are missing or contradict each other.
    """
    found = [name for name in tensors if STATE in name]
    result = dict(tensors)
    for state in found:
        name, _, kind = state.partition(STATE)
        parts = {part: _stored(tensors, f"{name}.{part}") for part in PARTS if f"{name}.{part}" in tensors}
        result[name] = _matrix(name, kind, _stored(tensors, name), _stored(tensors, state), parts)
        for used in (state, *(f"{name}.{part}" for part in parts)):
            del result[used]
    return result


def _stored(tensors: dict[str, SourceTensor], name: str) -> StoredTensor:
    tensor = tensors.get(name)
    if not isinstance(tensor, StoredTensor):
        raise CheckpointError(f"The 4-bit checkpoint lacks {name}; download the missing shards.")
    return tensor


def _matrix(
    name: str, kind: str, packed: StoredTensor, state: StoredTensor, parts: dict[str, StoredTensor]
) -> FourBitMatrix:
    def broken(what: str) -> CheckpointError:
        return CheckpointError(f"The 4-bit matrix {name} is damaged: {what}; download the checkpoint again.")

    if kind not in KINDS or state.n_bytes > 1 << 16:
        raise broken(f"its kind is {kind[:40]!r}, expected nf4 or fp4")
    settings = _settings(bytes(state.raw(0, state.n_bytes)), broken)
    shape = settings.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 30 for n in shape)):
        raise broken(f"its shape is {str(shape)[:40]}, expected two sizes")
    n_values, block = math.prod(shape), _block_size(settings, "blocksize", broken)
    n_blocks = -(-n_values // block)
    if packed.n_bytes != (n_values + 1) // 2:
        raise broken(f"{packed.n_bytes} bytes for {n_values} values of 4 bits")

    def part(name: str, dtype: str, count: int) -> StoredTensor:
        tensor = parts.get(name)
        if tensor is None or tensor.dtype != dtype or math.prod(tensor.shape) != count:
            has = "nothing" if tensor is None else f"{math.prod(tensor.shape)} of {tensor.dtype}"
            raise broken(f"{name} holds {has}, expected {count} of {dtype}")
        return tensor

    def floats(name: str, count: int) -> Float32:
        values: npt.NDArray[np.float32] = part(name, "F32", count).array().reshape(-1)
        if not np.isfinite(values).all():
            raise broken(f"{name} holds NaN or infinity")
        return values

    table = floats("quant_map", 16)
    if "nested_absmax" in parts:
        per_scale = _block_size(settings, "nested_blocksize", broken)
        offset = settings.get("nested_offset")
        if not isinstance(offset, float | int) or not math.isfinite(offset):
            raise broken(f"nested_offset is {str(offset)[:40]}, expected a number")
        scales, numbers = floats("nested_absmax", -(-n_blocks // per_scale)), floats("nested_quant_map", 256)
        maxima = BlockMaxima(part("absmax", "U8", n_blocks), scales, numbers, float(offset), per_scale)
    else:
        maxima = BlockMaxima(part("absmax", "F32", n_blocks))
    return FourBitMatrix(name, "F16", (shape[0], shape[1]), packed, table, maxima, block)


def _settings(text: bytes, broken: Any) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise broken("its quant_state is no JSON object")
    return settings


def _block_size(settings: dict[str, Any], key: str, broken: Any) -> int:
    size = settings.get(key)
    if type(size) is not int or not 2 <= size <= 1 << 16 or size % 2:
        raise broken(f"{key} is {str(size)[:40]}, expected an even number")
    return size
