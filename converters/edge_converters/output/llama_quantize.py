"""Values → blocks, through llama.cpp's own code: `ggml_quantize_chunk` for rows, `llama_model_quantize` for files.

gguf-py writes the simple block types but only reads K-quants, and is slower; the C functions come with
llama-cpp-python anyway, and by definition write the bytes that llama.cpp's tools write.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGMLQuantizationType, LlamaFileType

from edge_converters.plan.encode_rows import FULL_BYTES
from edge_runtime.decoder import llama_cpp as llama
from edge_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from edge_converters.calibration.importance import Importance

# Upper bound for the slabs that llama.cpp's quantizer works in; its default of 1 GiB would dominate our memory.
QUANTIZER_BUFFER_BYTES = 256 << 20
KEY_VALUE_BYTES = 127  # text that fits into llama.cpp's structure for keys
_PROGRESS = re.compile(r"^\[ *(\d+)/ *(\d+)\]")


def quantize_gguf(
    source: Path,
    target: Path,
    file_type: LlamaFileType,
    on_progress: Callable[[int, int], None],
    importance: Importance | None = None,
    types: Mapping[str, GGMLQuantizationType] | None = None,
) -> None:
    """Quantize a whole GGUF file as `llama-quantize` does; for a mix it picks the type of each tensor.

    Parameters
    ----------
    on_progress : called with (tensor number, number of tensors); parsed from llama.cpp's log, its only report.
    importance : what an error in each column costs.
    types : tensors that get a type of their own.

    Raises
    ------
    CheckpointError
        When llama.cpp refuses, with the last lines of its log.
    OSError
        When the disk is full.
    KeyboardInterrupt, or what `on_progress` raised
        As soon as the current tensor is done.
    """
    lib = llama.library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = int(file_type)
    params.max_buf_size = QUANTIZER_BUFFER_BYTES
    if importance is not None:
        _add_importance(lib, params, importance)
    if types:
        # Exact names: the patterns were resolved before, and the regular expression dialect here may differ.
        patterns = [(f"^{re.escape(name)}$".encode(), int(kind)) for name, kind in types.items()]
        params.tt_overrides = (lib.llama_model_tensor_override * (len(types) + 1))(
            *patterns, (None, lib.GGML_TYPE_COUNT)
        )

    failures: list[BaseException] = []

    def stop(error: BaseException) -> None:
        # No exception can cross llama.cpp, and it cannot be stopped. But it reads dry_run before every tensor, and
        # then only counts the rest instead of quantizing it.
        failures.append(error)
        params.dry_run = True

    def on_line(line: str) -> None:
        if (match := _PROGRESS.match(line)) and not failures:
            try:
                on_progress(int(match[1]), int(match[2]))
            except BaseException as error:  # noqa: BLE001 - raised again below
                stop(error)

    with llama.watch_log(on_line), _on_interrupt(lambda: stop(KeyboardInterrupt())):
        status = lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
        if failures:
            raise failures[0]
        if status != 0:
            if shutil.disk_usage(target.parent).free < FULL_BYTES:  # llama.cpp says only "iostream error"
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise CheckpointError(
                f"llama.cpp could not quantize to {file_type.name.removeprefix('MOSTLY_')}: {llama.last_errors()}; "
                "free disk space or choose another --type."
            )


def _add_importance(lib: Any, params: Any, importance: Importance) -> None:
    """Pass an importance matrix, and record its origin under llama-quantize's keys."""
    float_pointer = ctypes.POINTER(ctypes.c_float)
    entries = [
        (name.encode(), values.ctypes.data_as(float_pointer), values.size)
        for name, values in importance.squares.items()
    ]
    params.imatrix = (lib.llama_model_imatrix_data * (len(entries) + 1))(*entries, (None, None, 0))
    facts: dict[str, str | int] = {"file": importance.name}
    if importance.dataset:
        facts["dataset"] = importance.dataset
    facts["entries_count"] = len(entries)
    if importance.n_chunks:
        facts["chunks_count"] = importance.n_chunks
    keys = (lib.llama_model_kv_override * (len(facts) + 1))()
    for override, (name, value) in zip(keys, facts.items(), strict=False):
        override.key = f"quantize.imatrix.{name}".encode()
        if isinstance(value, str):
            override.tag = lib.LLAMA_KV_OVERRIDE_TYPE_STR
            override.value.val_str = value.encode()[:KEY_VALUE_BYTES]
        else:
            override.tag = lib.LLAMA_KV_OVERRIDE_TYPE_INT
            override.value.val_i64 = value
    params.kv_overrides = keys


@contextlib.contextmanager
def _on_interrupt(react: Callable[[], None]) -> Iterator[None]:
    """Call `react` on Ctrl-C: a KeyboardInterrupt would be raised inside a C callback and get lost."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: react())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
