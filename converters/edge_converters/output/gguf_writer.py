"""Planned tensors → one GGUF file, in chunks of rows and under a temporary name until it is complete.

Memory stays at a few chunks whatever the checkpoint's size. A file under its final name is always complete.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter

from edge_converters.plan.planned_tensor import PlannedTensor
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
    on_bytes : called after each chunk with its number of bytes.
    """
    _check_space(path.parent, sum(t.n_bytes for t in tensors))
    writer = GGUFWriter(path, architecture)
    add_metadata(writer)
    for tensor in tensors:
        columns = GGML_QUANT_SIZES[tensor.type]
        shape = (*tensor.shape[:-1], (tensor.shape[-1] + tensor.padding) // columns[0] * columns[1])
        if tensor.padding:
            writer.add_uint32(KEY_ROW_LENGTH + tensor.name, tensor.shape[-1])
        # Quantised tensors are declared with their shape in bytes: gguf-py converts the last axis back to values.
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
    """Yield temporary files; all become `paths` together if the block succeeds, and are deleted if it fails.

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
        for name in names:  # left by killed conversions: up to 17 GB each
            remove_abandoned(folder.glob(f".{glob.escape(name)}.incomplete-*"))
        temporaries = [stack.enter_context(beside(path)) for path in paths]
        yield temporaries
        for temporary in temporaries:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        for path in paths:
            _check_place(path, force=force)  # another program may have written it meanwhile
        paths[0].unlink(missing_ok=True)  # if killed between two renames, no model is left rather than a mixed one
        for temporary, path in reversed([*zip(temporaries, paths, strict=True)]):
            temporary.replace(path)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a hidden file beside `path` to write to; it is deleted when the block ends unless it was renamed."""
    with unfinished(lambda token: path.with_name(f".{path.name}.incomplete-{token}")) as temporary:
        yield temporary


def _check_place(path: Path, *, force: bool) -> None:
    if path.exists() and not force:
        raise CheckpointError(f"{path} exists already; choose another folder with -o, or pass --force to replace it.")
    if path.is_dir():  # otherwise found only after the work, with the other file in place already
        raise CheckpointError(f"{path} is a folder, expected a file or nothing; choose another folder with -o.")


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn a disk's refusal into a `CheckpointError` of one sentence."""
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
