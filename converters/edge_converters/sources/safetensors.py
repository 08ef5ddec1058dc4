"""Tensors of a checkpoint: the interface that the plan uses, and plain ones, read lazily from safetensors files.

Files are read in chunks of rows, never mapped, so that a 17 GB checkpoint costs a few megabytes of memory. The header
is parsed here because the safetensors library hands bfloat16 to torch only. Everything in it is checked against the
file's length before anything is allocated.

Source of the format: the safetensors README (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

import abc
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from edge_runtime.errors import CheckpointError

Float32 = npt.NDArray[np.float32]

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMS, MAX_SIZE = 8, 1 << 60
FLOATS = ("F32", "F16", "BF16")
STORED_DTYPES: dict[str, tuple[str, int]] = {  # NumPy's name and bytes
    "F32": ("<f4", 4),
    "F16": ("<f2", 2),
    "BF16": ("<u2", 2),
    "I32": ("<i4", 4),  # these two are parts of quantised tensors
    "U8": ("u1", 1),
}


@dataclass(frozen=True, eq=False)
class SourceTensor(abc.ABC):
    """A tensor under its official name, however its values are stored; compared by identity."""

    name: str
    dtype: str
    """Type of the values, F32, F16 or BF16; an intermediate file keeps it."""
    shape: tuple[int, ...]

    @property
    def n_rows(self) -> int:
        """Length of the first axis (1 for a scalar)."""
        return self.shape[0] if self.shape else 1

    @property
    def row_length(self) -> int:
        """Values per entry of the first axis."""
        return math.prod(self.shape[1:])

    @abc.abstractmethod
    def float_rows(self, start: int, stop: int) -> Float32:
        """Rows [start, stop): ndarray [shape=(stop - start, row_length), float32]."""

    @property
    def block_type(self) -> GGMLQuantizationType | None:
        """Type whose blocks can be made from the stored integers, or None."""
        return None

    def blocks(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows [start, stop) as blocks of `block_type`: ndarray [shape=(stop - start, bytes per row), uint8]."""
        raise NotImplementedError(self.name)


@dataclass(frozen=True, eq=False)
class StoredTensor(SourceTensor):
    """A tensor of a safetensors file; its `dtype` may also be an integer type."""

    file: Path
    offset: int
    """Bytes from the start of the file."""

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * STORED_DTYPES[self.dtype][1]

    def raw(self, start: int, stop: int) -> bytearray:
        """Bytes [start, stop) of the tensor.

        Raises
        ------
        CheckpointError
            When the file cannot be read or has shrunk.
        """
        raw = bytearray(stop - start)
        view, done = memoryview(raw), 0
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset + start)
                while done < len(raw):  # one read returns at most 2 GiB
                    if not (n := file.readinto(view[done:])):
                        raise CheckpointError(f"{self.file.name} ends inside {self.name}; download it again.")
                    done += n
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read: {error.strerror}; check the disk.") from None
        return raw

    def rows(self, start: int, stop: int) -> tuple[npt.NDArray[Any], str]:
        """Rows [start, stop) as stored.

        Returns
        -------
        values : ndarray [shape=(stop - start, row_length), float32, float16, or the bits of bfloat16 as uint16].
        dtype : F32, F16 or BF16.
        """
        kind, size = STORED_DTYPES[self.dtype]
        row_bytes = self.row_length * size
        raw = self.raw(start * row_bytes, stop * row_bytes)
        return np.frombuffer(raw, kind).reshape(stop - start, self.row_length), self.dtype

    def float_rows(self, start: int, stop: int) -> Float32:
        """Rows [start, stop) as float32."""
        values, dtype = self.rows(start, stop)
        if dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)

    def array(self) -> npt.NDArray[Any]:
        """All values as stored: ndarray [shape=shape]."""
        return np.frombuffer(self.raw(0, self.n_bytes), STORED_DTYPES[self.dtype][0]).reshape(self.shape)


def float_array(tensor: SourceTensor) -> Float32:
    """All values of a tensor: ndarray [shape=shape, float32]."""
    return tensor.float_rows(0, tensor.n_rows).reshape(tensor.shape)


def read_index(files: list[Path]) -> dict[str, StoredTensor]:
    """Index the tensors of files that belong together.

    Raises
    ------
    CheckpointError
        When a file is damaged, or when two of them hold the same tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_header(file):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{tensor.name} is in {tensors[tensor.name].file.name} and in {file.name}; keep only the files "
                    "of one checkpoint in the folder."
                )
            tensors[tensor.name] = tensor
    return tensors


def read_header(file: Path) -> list[StoredTensor]:
    """Parse and check the header of one safetensors file.

    Raises
    ------
    CheckpointError
        When it is not a safetensors file, or an incomplete one.
    """

    def broken(what: str) -> CheckpointError:
        return CheckpointError(f"{file.name} is not a usable safetensors file: {what}; download it again.")

    try:
        if not file.is_file():  # a pipe has no end, and even opening it may block
            raise broken("it is no file")
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise broken(f"its header claims {length} of {size} bytes")
            header = json.loads(opened.read(length), object_pairs_hook=_without_repetitions)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; check its permissions.") from None
    except (ValueError, RecursionError):
        raise broken("its header is no JSON, or has a name twice") from None
    if not isinstance(header, dict):
        raise broken("its header is no JSON object")
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        if not name.isprintable():  # messages quote it, and a terminal would obey it
            raise broken(f"the name {name[:80]!r} holds control characters")
        tensors.append(_entry(file, name, entry, 8 + length, size, broken))
    in_order = sorted((tensor for tensor in tensors if tensor.n_bytes), key=lambda tensor: tensor.offset)
    for one, other in itertools.pairwise(in_order):
        if other.offset < one.offset + one.n_bytes:
            raise broken(f"{one.name[:80]} and {other.name[:80]} share bytes")
    return tensors


def _without_repetitions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entry(file: Path, name: str, entry: Any, data_start: int, size: int, broken: Any) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise broken(f"the entry of {name} is incomplete") from None
    # Bounds first: multiplying thousands of numbers of thousands of digits takes minutes.
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        raise broken(f"the entry of {name} has no usable shape")
    if not all(type(n) is int and abs(n) < MAX_SIZE for n in (*shape, begin, end)):
        raise broken(f"the entry of {name} holds sizes that are no whole numbers below 2^60")
    if not isinstance(dtype, str) or dtype not in STORED_DTYPES:
        raise CheckpointError(
            f"{file.name}: {name} is stored as {str(dtype)[:40]}; expected F32, F16 or BF16, as in the checkpoint "
            "openbmb/MiniCPM-V-4_5."
        )
    n_bytes = math.prod(shape) * STORED_DTYPES[dtype][1]
    if min((*shape, begin), default=0) < 0 or end - begin != n_bytes or data_start + end > size:
        raise broken(f"{name} of shape {str(tuple(shape))[:80]} does not lie inside the file")
    return StoredTensor(name, dtype, tuple(shape), file, data_start + begin)
