"""AutoAWQ's 4-bit matrices (GEMM layout) as tensors of a checkpoint.

A matrix W [o, i] is cut into groups of (usually) 128 inputs. With scale s and zero point z of its group and output,
a value is (q - z)·s; q and z are 0 to 15, there is no +1 on z:

    W.qweight  int32 [i, o/8]      nibble k of word c is q of output 8c + ORDER[k]
    W.qzeros   int32 [i/128, o/8]  z, packed in the same way
    W.scales   float16 [i/128, o]

**As Q4_1** the integers are kept: a group is four blocks of 32 with value = d·q + m, where d = s exactly and m = -z·s
rounded to float16. z·s has up to 15 significant bits, float16 has 11, so m is off by at most 2⁻¹¹ of itself: 0.0073
steps of the 4-bit grid, and nothing where z is 0, 1, 2, 4 or 8. Any other 4-bit type would round to a second grid.

For other types the values are float32. AutoAWQ computes (q - z)·s in float16, so an intermediate file keeps float16.
Source of the layout: AutoAWQ `utils/packing_utils.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from edge_converters.sources.safetensors import Float32, SourceTensor, StoredTensor
from edge_runtime.errors import CheckpointError

PARTS = ("qweight", "qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PER_WORD = 8
BLOCK = 32  # values of a Q4_1 block


@dataclass(frozen=True, eq=False)
class AwqMatrix(SourceTensor):
    """A matrix of 4-bit integers with a scale and a zero point per group."""

    qweight: StoredTensor
    qzeros: StoredTensor
    scales: StoredTensor
    group: int
    """Inputs that share scale and zero point."""

    def float_rows(self, start: int, stop: int) -> Float32:
        """Rows [start, stop) as float32."""
        integers, zeros, scales = self._parts(start, stop)
        groups = integers.astype(np.float32).reshape(len(zeros), self.group, -1)
        groups -= zeros[:, None]
        with np.errstate(invalid="ignore"):  # infinite scales; the writer detects the result
            groups *= scales[:, None]
        return np.ascontiguousarray(groups.reshape(len(integers), -1).T)

    @property
    def block_type(self) -> GGMLQuantizationType | None:
        """Q4_1, if groups consist of whole blocks."""
        return None if self.group % BLOCK else GGMLQuantizationType.Q4_1

    def blocks(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows as Q4_1 blocks with the stored integers."""
        integers, zeros, scales = self._parts(start, stop)
        with np.errstate(over="ignore"):
            minima = (-(zeros * scales)).astype(np.float16)
        if not (np.isfinite(scales).all() and np.isfinite(minima).all()):
            raise CheckpointError(
                f"The scales of {self.name} are too large for blocks of Q4_1 or no numbers; convert to another "
                "--type."
            )
        per_group = self.group // BLOCK
        n_blocks = self.row_length // BLOCK
        blocks = np.empty((stop - start, n_blocks, 4 + BLOCK // 2), np.uint8)
        for place, values in ((0, scales.astype(np.float16)), (2, minima)):
            spread = np.ascontiguousarray(np.repeat(values, per_group, axis=0).T)
            blocks[:, :, place : place + 2] = spread.view(np.uint8).reshape(stop - start, n_blocks, 2)
        halves = integers.T.reshape(stop - start, n_blocks, 2, BLOCK // 2)  # byte j: value j low, value j + 16 high
        blocks[:, :, 4:] = halves[:, :, 0] | halves[:, :, 1] << 4
        return blocks.reshape(stop - start, -1)

    def _parts(self, start: int, stop: int) -> tuple[npt.NDArray[np.uint8], Float32, Float32]:
        """Integers [i, rows], zero points and scales [groups, rows] of some rows (outputs)."""
        first, last = start // PER_WORD, -(-stop // PER_WORD)
        cut = slice(start - first * PER_WORD, stop - first * PER_WORD)
        qweight, qzeros, scales = _stored(self)
        integers = _unpack(qweight[:, first:last])[:, cut]
        zeros = _unpack(qzeros[:, first:last])[:, cut].astype(np.float32)
        return integers, zeros, scales[:, start:stop].astype(np.float32)


@lru_cache(maxsize=1)
def _stored(matrix: AwqMatrix) -> tuple[npt.NDArray[Any], ...]:
    """The three parts of the current matrix, read whole and once: an output's values are spread all over them.

    25 MB at full size. The cache key is the object itself, so it never returns another checkpoint's matrix.
    """
    return matrix.qweight.array(), matrix.qzeros.array(), matrix.scales.array()


def _unpack(words: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """Nibbles of words [n, w] in the order of the outputs: ndarray [shape=(n, 8 w), uint8]."""
    bits = np.ascontiguousarray(words).view(np.uint32)
    nibbles = np.empty((*bits.shape, PER_WORD), np.uint8)
    for k, place in enumerate(ORDER):
        nibbles[:, :, place] = bits >> np.uint32(4 * k) & np.uint32(15)
    return nibbles.reshape(len(bits), -1)


def assemble(tensors: dict[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Replace the parts of AWQ matrices with the matrices.

    Raises
    ------
    CheckpointError
        When parts are missing or contradict each other.
    """
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    result = dict(tensors)
    for module in modules:
        if f"{module}.g_idx" in tensors:
            raise CheckpointError(
                f"{module} is quantised by GPTQ, expected AutoAWQ's GEMM layout; use the bfloat16 or AWQ checkpoint."
            )
        qweight, qzeros, scales = (_part(tensors, f"{module}.{part}") for part in PARTS)
        result[f"{module}.weight"] = _matrix(f"{module}.weight", qweight, qzeros, scales)
        for part in PARTS:
            del result[f"{module}.{part}"]
    return result


def _part(tensors: dict[str, SourceTensor], name: str) -> StoredTensor:
    tensor = tensors.get(name)
    wanted = "F16" if name.endswith(".scales") else "I32"
    if not isinstance(tensor, StoredTensor) or tensor.dtype != wanted or len(tensor.shape) != 2:
        found = "missing" if not isinstance(tensor, StoredTensor) else f"{tensor.dtype} of shape {tensor.shape}"
        raise CheckpointError(
            f"{name} is {found}, expected a matrix of {wanted} as AutoAWQ's GEMM layout has it; download the "
            "checkpoint again, or use the bfloat16 one."
        )
    return tensor


def _matrix(name: str, qweight: StoredTensor, qzeros: StoredTensor, scales: StoredTensor) -> AwqMatrix:
    (inputs, words), groups = qweight.shape, scales.shape[0]
    outputs = words * PER_WORD
    fits = groups and not inputs % groups and qzeros.shape == (groups, words) and scales.shape == (groups, outputs)
    if not fits:
        raise CheckpointError(
            f"The parts of {name} do not fit each other: qweight {qweight.shape}, qzeros {qzeros.shape}, scales "
            f"{scales.shape}; expected AutoAWQ's GEMM layout with 4 bits: download the checkpoint again."
        )
    return AwqMatrix(name, "F16", (outputs, inputs), qweight, qzeros, scales, inputs // groups)
