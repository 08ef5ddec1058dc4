"""Importance matrices: what an error in each column of the decoder's weights costs; read from llama.cpp's files.

An entry is the mean square of the column's inputs over some text. Quantizers below eight bits use it to choose
scales. llama-imatrix writes GGUF files with sums and counts; its older files are a binary list of means times calls.

Source of the formats: llama.cpp `common/imatrix-loader.cpp`. Its float32 arithmetic is kept, so a file quantized here
equals llama-quantize's.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_converters.plan.planned_tensor import PlannedTensor
from edge_converters.sources.safetensors import Float32
from edge_runtime.errors import CheckpointError, ModelFileError
from edge_runtime.weights.gguf_file import GGUFFile

SUMS, COUNTS = ".in_sum2", ".counts"
MAX_LEGACY_BYTES = 1 << 30  # that of an 8-billion-parameter model has 5 MB
_INT = struct.Struct("<i")


@dataclass(frozen=True)
class Importance:
    """Mean squares by GGUF tensor name, and their origin."""

    squares: Mapping[str, Float32]
    """Tensor name → ndarray [shape=(columns,), float32]."""
    name: str
    """Name of the file or folder, without its path."""
    dataset: str = ""
    n_chunks: int = 0
    """Number of pieces of text seen."""

    def check(self, plan: list[PlannedTensor]) -> None:
        """Check the matrix against the tensors to be quantized.

        Raises
        ------
        CheckpointError
            When it was made from another model, or holds no numbers.
        """
        wanted = {tensor.name: tensor.shape[-1] for tensor in plan if len(tensor.shape) == 2}
        for name, squares in self.squares.items():
            if len(squares) != wanted.get(name, len(squares)):
                raise CheckpointError(
                    f"{self.name} has {len(squares)} values for {name}, whose rows have {wanted[name]}; use the "
                    "importance matrix of this model."
                )
            if not np.isfinite(squares).all() or (squares < 0).any():
                raise CheckpointError(f"{self.name} holds values for {name} that are no mean squares; make it again.")
        if not wanted.keys() & self.squares.keys():
            raise CheckpointError(
                f"{self.name} knows none of the decoder's tensors; use the importance matrix of this model."
            )


def read_importance(path: Path) -> Importance:
    """Read one of llama.cpp's importance matrices, in either format.

    Raises
    ------
    CheckpointError
        When the file is missing, damaged, or not an importance matrix.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"The importance matrix {path} is no file; check the path.")
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(
            f"The importance matrix {path} cannot be read: {error.strerror}; check the path."
        ) from None
    return _read_gguf(path) if magic == b"GGUF" else _read_legacy(path)


def _read_gguf(path: Path) -> Importance:
    try:
        file = GGUFFile(path)
        names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
        squares = {name: _means(file, name) for name in names}
        datasets = file.strings("imatrix.datasets")
        n_chunks = file.get("imatrix.chunk_count", int)
    except ModelFileError as error:
        raise CheckpointError(f"{path} is no importance matrix: {error}") from None
    if not squares:
        raise CheckpointError(f"{path} holds no {SUMS} tensor; expected an importance matrix of llama-imatrix.")
    return Importance(squares, path.name, datasets[0] if datasets else "", n_chunks)


def _means(file: GGUFFile, name: str) -> Float32:
    sums, counts = file.array(name + SUMS), np.rint(file.array(name + COUNTS)).reshape(-1)
    if len(counts) != 1:  # one per expert; the decoder has none
        raise ModelFileError(
            f"{name} has {len(counts)} counts, expected one; use the importance matrix of this model."
        )
    if not 0 <= counts[0] < np.inf:
        raise ModelFileError(f"{name} has the count {counts[0]}; make the importance matrix again.")
    values = sums.reshape(-1)
    return values / np.float32(counts[0]) if counts[0] > 0 else np.ones_like(values)


def _read_legacy(path: Path) -> Importance:
    broken = CheckpointError(
        f"{path} is no importance matrix; expected a file of llama-imatrix (GGUF, or the older .dat), whole."
    )
    with path.open("rb") as file:
        data = file.read(MAX_LEGACY_BYTES + 1)
    if len(data) > MAX_LEGACY_BYTES:
        raise broken
    squares: dict[str, Float32] = {}
    try:
        (n_entries,), place = _INT.unpack_from(data), 4
        if not 0 < n_entries <= len(data):
            raise broken
        for _ in range(n_entries):
            length = _INT.unpack_from(data, place)[0]
            if not 0 < length <= 256:
                raise broken
            name = data[place + 4 : place + 4 + length].decode("utf-8")
            n_calls, n_values = struct.unpack_from("<2i", data, place + 4 + length)
            place += 12 + length
            if n_values < 1 or n_calls < 0 or name in squares:
                raise broken
            values: Float32 = np.frombuffer(data, "<f4", n_values, place)
            place += 4 * n_values
            squares[name] = values / np.float32(max(1, n_calls))
        n_chunks = _INT.unpack_from(data, place)[0] if place < len(data) else 0
        length = _INT.unpack_from(data, place + 4)[0] if place + 4 < len(data) else 0
        dataset = data[place + 8 : place + 8 + max(0, length)].decode("utf-8", "replace")
    except (struct.error, ValueError):
        raise broken from None
    return Importance(squares, path.name, dataset.rstrip("\0"), max(0, n_chunks))
