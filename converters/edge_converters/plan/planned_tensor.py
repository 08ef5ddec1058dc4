"""A tensor of the file to be written: its name, type and shape, and how its rows are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from edge_converters.plan.encode_rows import encode_rows
from edge_converters.sources.checkpoint import Checkpoint
from edge_converters.sources.safetensors import StoredTensor
from edge_runtime.errors import CheckpointError

CHUNK_VALUES = 8 << 20  # values per chunk: 32 MiB as float32


_SAME_BITS = {
    "F32": GGMLQuantizationType.F32,
    "F16": GGMLQuantizationType.F16,
    "BF16": GGMLQuantizationType.BF16,
}


Rows = Callable[[int, int], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: its place in the file and where its rows come from."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    rows: Rows
    """(start, stop) → ndarray [shape=(stop - start, columns), float32]."""
    stored: Callable[[int, int], tuple[npt.NDArray[Any], str]] | None = None
    """(start, stop) → values and dtype as stored, where rows may be copied unchanged."""
    importance: Callable[[], npt.NDArray[np.float32]] | None = None
    """() → what an error in each column costs [shape=(columns,), float32]; see `encode_rows`."""
    blocks: Callable[[int, int], npt.NDArray[np.uint8]] | None = None
    """(start, stop) → rows as blocks of `type`, where the source stores the blocks' integers."""

    @property
    def n_rows(self) -> int:
        """Rows of blocks: every axis but the last, or the first axis for a convolution kernel."""
        return self.shape[0] if len(self.shape) != 1 else 1

    @property
    def n_columns(self) -> int:
        """Values per row."""
        return math.prod(self.shape) // self.n_rows

    @property
    def padding(self) -> int:
        """Zeros after each row's values, up to the end of its last block."""
        return int(-self.n_columns % GGML_QUANT_SIZES[self.type][0])

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return int(self.n_rows * (self.n_columns + self.padding) // block * block_bytes)

    def encoded_chunks(self) -> Iterator[npt.NDArray[np.uint8]]:
        """The tensor's bytes, a chunk of rows at a time."""
        step = max(1, CHUNK_VALUES // self.n_columns)
        for start in range(0, self.n_rows, step):
            yield self._encode(start, min(start + step, self.n_rows))

    def _encode(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        if self.stored is not None:
            values, dtype = self.stored(start, stop)
            if _SAME_BITS[dtype] == self.type:
                self._check_finite(_finite(values, dtype))
                return np.ascontiguousarray(values).view(np.uint8)
        if self.blocks is not None:
            return self.blocks(start, stop)
        rows = self.rows(start, stop)
        self._check_finite(bool(np.isfinite(rows).all()))
        importance = self.importance() if self.importance is not None else None
        if self.padding:
            rows = np.pad(rows, ((0, 0), (0, self.padding)))
            importance = None if importance is None else np.pad(importance, (0, self.padding))
        return encode_rows(rows, self.type, importance)

    def _check_finite(self, finite: bool) -> None:
        if not finite:
            raise CheckpointError(
                f"The checkpoint's values for {self.name} hold NaN or infinity; a damaged download or a broken "
                "training run: use another checkpoint."
            )


def _finite(values: npt.NDArray[Any], dtype: str) -> bool:
    if dtype == "BF16":  # all exponent bits set: NaN or infinity
        return not bool(((values & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(values).all())


def copied(checkpoint: Checkpoint, source: str, name: str, kind: GGMLQuantizationType) -> PlannedTensor:
    """Plan a tensor whose rows are those of the checkpoint's `source`."""
    tensor = checkpoint.tensors[source]
    rows_are_vectors = len(tensor.shape) != 1

    def rows(start: int, stop: int) -> npt.NDArray[np.float32]:
        if rows_are_vectors:
            return checkpoint.float_rows(source, start, stop)
        return checkpoint.float_rows(source, 0, tensor.n_rows).reshape(1, -1)

    stored = None
    if isinstance(tensor, StoredTensor):  # rows of all others are computed in any case
        plain = tensor

        def stored(start: int, stop: int) -> tuple[npt.NDArray[Any], str]:
            return plain.rows(*((start, stop) if rows_are_vectors else (0, plain.n_rows)))

    blocks = tensor.blocks if kind == tensor.block_type else None
    return PlannedTensor(name, tensor.shape, kind, rows, stored, blocks=blocks)
