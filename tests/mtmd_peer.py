"""llama.cpp's own multimodal encoder (mtmd), as a second opinion on the mmproj files the converter writes."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_runtime import llama

Float32 = npt.NDArray[np.float32]


def encode_with_mtmd(decoder: Path, mmproj: Path, rgb: npt.NDArray[np.uint8]) -> list[Float32]:
    """Embeddings of every slice that mtmd cuts from a picture [shape=(height, width, 3)], overview first.

    Flash attention is off, since it would read keys and values in float16.
    """
    import llama_cpp.mtmd_cpp as mtmd

    with _context(mtmd, decoder, mmproj) as (context, n_embd), contextlib.ExitStack() as stack:
        height, width, _ = rgb.shape
        pixels = (ctypes.c_uint8 * rgb.size).from_buffer_copy(np.ascontiguousarray(rgb))
        bitmap = mtmd.mtmd_bitmap_init(width, height, pixels)
        stack.callback(mtmd.mtmd_bitmap_free, bitmap)
        chunks = mtmd.mtmd_input_chunks_init()
        stack.callback(mtmd.mtmd_input_chunks_free, chunks)
        marker = mtmd.mtmd_default_marker()
        text = mtmd.mtmd_input_text(marker, len(marker), False, True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1) == 0
        return [
            _encode_chunk(mtmd, context, chunk, n_embd)
            for chunk in (mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks)))
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE
        ]


@cache
def _quiet_log(mtmd: Any) -> Any:
    """Take mtmd's own log, which goes to stderr otherwise; kept alive by the cache."""
    callback = llama.library().llama_log_callback(lambda level, text, data: None)
    mtmd.mtmd_log_set(callback, ctypes.c_void_p(0))
    return callback


@contextlib.contextmanager
def _context(mtmd: Any, decoder: Path, mmproj: Path) -> Iterator[tuple[Any, int]]:
    lib = llama.library()
    _quiet_log(mtmd)
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(str(decoder).encode(), params)
    assert model, llama.last_errors()
    try:
        options = mtmd.mtmd_context_params_default()
        options.use_gpu = options.warmup = options.print_timings = False
        options.n_threads = 1  # its threads spin: two of them crawl when a core is busy
        options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = mtmd.mtmd_init_from_file(str(mmproj).encode(), model, options)
        assert context, llama.last_errors()
        try:
            yield context, lib.llama_model_n_embd(model)
        finally:
            mtmd.mtmd_free(context)
    finally:
        lib.llama_model_free(model)


def _encode_chunk(mtmd: Any, context: Any, chunk: Any, n_embd: int) -> Float32:
    assert mtmd.mtmd_encode_chunk(context, chunk) == 0
    n_tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
    pointer = mtmd.mtmd_get_output_embd(context)
    return np.ctypeslib.as_array(pointer, (n_tokens, n_embd)).copy()
