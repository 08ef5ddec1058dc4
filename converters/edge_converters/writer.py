"""Planned tensors → one GGUF file, in chunks of rows and under a temporary name until it is complete.

Memory stays at a few chunks whatever the size of the checkpoint. A file under its final name is always a whole file.
"""

from __future__ import annotations

import contextlib
import glob
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from edge_converters.checkpoint import Checkpoint
from edge_converters.quantize import encode_rows
from edge_converters.safetensors import StoredTensor
from edge_runtime.errors import CheckpointError
from edge_runtime.system.atomic_files import (
    FULL,
    alone_in,
    make_folder,
    remove_abandoned,
    unfinished,
    why_not_written,
)
from edge_runtime.weights.gguf_file import KEY_ROW_LENGTH

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
    """(start, stop) → values and dtype as stored, where rows may be copied as they are."""
    importance: Callable[[], npt.NDArray[np.float32]] | None = None
    """() → what an error in each column costs [shape=(columns,), float32]; see `encode_rows`."""
    blocks: Callable[[int, int], npt.NDArray[np.uint8]] | None = None
    """(start, stop) → rows as blocks of `type`, where the source has their integers."""

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
    if isinstance(tensor, StoredTensor):  # of all others, rows are made anew in any case
        plain = tensor

        def stored(start: int, stop: int) -> tuple[npt.NDArray[Any], str]:
            return plain.rows(*((start, stop) if rows_are_vectors else (0, plain.n_rows)))

    blocks = tensor.blocks if kind == tensor.block_type else None
    return PlannedTensor(name, tensor.shape, kind, rows, stored, blocks=blocks)


def write_gguf(
    path: Path,
    architecture: str,
    add_metadata: Callable[[GGUFWriter], None],
    tensors: list[PlannedTensor],
    on_bytes: Callable[[int], None],
) -> None:
    """Write a GGUF file at `path`, which should be a temporary name (see `replacing`).

    Parameters
    ----------
    on_bytes : called with the number of bytes after each chunk.
    """
    _check_space(path.parent, sum(t.n_bytes for t in tensors))
    writer = GGUFWriter(path, architecture)
    add_metadata(writer)
    for tensor in tensors:
        columns = GGML_QUANT_SIZES[tensor.type]
        shape = (*tensor.shape[:-1], (tensor.shape[-1] + tensor.padding) // columns[0] * columns[1])
        if tensor.padding:
            writer.add_uint32(KEY_ROW_LENGTH + tensor.name, tensor.shape[-1])
        # Quantised tensors are announced by their bytes: gguf-py then converts the last axis back to values.
        if columns[0] > 1:
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.n_bytes, tensor.type)
        else:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, tensor.type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        for tensor in tensors:
            writer.write_padding(file, file.tell())
            for chunk in tensor.encoded_chunks():
                file.write(chunk.data)
                on_bytes(chunk.nbytes)
        writer.write_padding(file, file.tell())
        writer.flush()
    finally:
        writer.close()


@contextlib.contextmanager
def replacing(paths: Sequence[Path], *, force: bool) -> Iterator[list[Path]]:
    """Temporary files that become `paths` when the block ends well, together, and vanish when it does not.

    Parameters
    ----------
    paths : in one folder, which no other conversion may write to meanwhile; the decoder first.

    Raises
    ------
    CheckpointError
        When one of them exists and `force` is false, or when the disk is full or not writable.
    """
    names = [path.name for path in paths]
    with contextlib.ExitStack() as stack, storing(paths[0].parent):
        for path in paths:
            _check_place(path, force=force)
        folder = paths[0].parent
        make_folder(folder)
        if not stack.enter_context(alone_in(folder)):
            raise CheckpointError(
                f"Another conversion is writing to {folder}; wait for its end, or choose another folder with -o."
            )
        for name in names:  # what killed conversions left: up to 17 GB each
            remove_abandoned(folder.glob(f".{glob.escape(name)}.incomplete-*"))
        temporaries = [stack.enter_context(beside(path)) for path in paths]
        yield temporaries
        for temporary in temporaries:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        for path in paths:
            _check_place(path, force=force)  # another program may have been there meanwhile
        paths[0].unlink(missing_ok=True)  # killed between two replacements, there is no model rather than a mixed one
        for temporary, path in reversed([*zip(temporaries, paths, strict=True)]):
            temporary.replace(path)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A hidden file in the folder of `path` to be written to, gone when the block ends unless it was renamed."""
    with unfinished(lambda token: path.with_name(f".{path.name}.incomplete-{token}")) as temporary:
        yield temporary


def _check_place(path: Path, *, force: bool) -> None:
    if path.exists() and not force:
        raise CheckpointError(f"{path} exists already; choose another folder with -o, or pass --force to replace it.")
    if path.is_dir():  # found only after the work otherwise, when the other file is in place already
        raise CheckpointError(f"{path} is a folder, expected a file or nothing; choose another folder with -o.")


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Say in one sentence what a disk refuses: `CheckpointError`."""
    try:
        yield
    except OSError as error:
        what = why_not_written(error, path)
        advice = "free some space and convert again, or " if error.errno in FULL else ""
        raise CheckpointError(f"{what}; {advice}choose another folder with -o.") from None


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder} has {free / 1e9:.1f} GB free, the file needs {needed / 1e9:.1f} GB; free some space or "
            "choose another folder with -o."
        )
