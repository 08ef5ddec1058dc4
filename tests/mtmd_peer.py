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

from edge_runtime.decoder import llama_cpp as llama

Float32 = npt.NDArray[np.float32]


def encode_with_mtmd(decoder: Path, mmproj: Path, rgb: npt.NDArray[np.uint8]) -> list[Float32]:
    """Embeddings of every slice that mtmd cuts from a picture [shape=(height, width, 3)], overview first.

    Flash attention is off, since it would read keys and values in float16.
    """
    with MtmdPeer(decoder, mmproj) as peer, peer.chunks(peer.marker, rgb) as chunks:
        return peer.encode(chunks)


class MtmdPeer:
    """A model loaded the way llama.cpp's own tools load it.

    Parameters
    ----------
    n_ctx : context of the decoder; 0 when only pictures are encoded.
    """

    def __init__(self, decoder: Path, mmproj: Path, n_ctx: int = 0) -> None:
        import llama_cpp.mtmd_cpp as mtmd

        self.mtmd, self.lib = mtmd, llama.library()
        _quiet_log(mtmd)
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = False  # its code for AMX crashes on matrices as small as the tests' (0.3.36)
        self._free = contextlib.ExitStack()
        self.model = self.lib.llama_model_load_from_file(str(decoder).encode(), params)
        assert self.model, llama.last_errors()
        self._free.callback(self.lib.llama_model_free, self.model)
        options = mtmd.mtmd_context_params_default()
        options.use_gpu = options.warmup = options.print_timings = False
        options.n_threads = 1  # its threads spin: two of them crawl when a core is busy
        options.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = mtmd.mtmd_init_from_file(str(mmproj).encode(), self.model, options)
        assert self.context, llama.last_errors()
        self._free.callback(mtmd.mtmd_free, self.context)
        self.marker = mtmd.mtmd_default_marker().decode()
        if n_ctx:
            context_params = self.lib.llama_context_default_params()
            context_params.n_ctx, context_params.n_threads, context_params.n_threads_batch = n_ctx, 1, 1
            self.decoder = self.lib.llama_init_from_model(self.model, context_params)
            self._free.callback(self.lib.llama_free, self.decoder)

    def __enter__(self) -> MtmdPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self._free.close()

    @contextlib.contextmanager
    def chunks(self, text: str, rgb: npt.NDArray[np.uint8]) -> Iterator[Any]:
        """A prompt with one picture where the marker stands, cut and tokenised by mtmd."""
        mtmd = self.mtmd
        with contextlib.ExitStack() as stack:
            height, width, _ = rgb.shape
            pixels = (ctypes.c_uint8 * rgb.size).from_buffer_copy(np.ascontiguousarray(rgb))
            bitmap = mtmd.mtmd_bitmap_init(width, height, pixels)
            stack.callback(mtmd.mtmd_bitmap_free, bitmap)
            chunks = mtmd.mtmd_input_chunks_init()
            stack.callback(mtmd.mtmd_input_chunks_free, chunks)
            encoded = text.encode()
            entry = mtmd.mtmd_input_text(encoded, len(encoded), False, True)
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
            assert mtmd.mtmd_tokenize(self.context, chunks, ctypes.byref(entry), bitmaps, 1) == 0
            yield chunks

    def encode(self, chunks: Any) -> list[Float32]:
        """Embeddings of every picture chunk: ndarray [shape=(tokens, hidden), float32] each."""
        mtmd, found = self.mtmd, []
        for chunk in (mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))):
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                assert mtmd.mtmd_encode_chunk(self.context, chunk) == 0
                shape = mtmd.mtmd_input_chunk_get_n_tokens(chunk), self.lib.llama_model_n_embd(self.model)
                found.append(np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self.context), shape).copy())
        return found

    def answer(self, chunks: Any, stop_ids: frozenset[int], n_tokens: int) -> list[int]:
        """Greedy continuation of a prompt, without its end token."""
        lib, n_past = self.lib, ctypes.c_int(0)
        lib.llama_memory_clear(lib.llama_get_memory(self.decoder), False)
        evaluate = self.mtmd.mtmd_helper_eval_chunks
        assert evaluate(self.context, self.decoder, chunks, 0, 0, 512, True, ctypes.byref(n_past)) == 0
        ids: list[int] = []
        while len(ids) < n_tokens:
            n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
            token = int(np.argmax(np.ctypeslib.as_array(lib.llama_get_logits_ith(self.decoder, -1), (n_vocab,))))
            if token in stop_ids:
                break
            ids.append(token)
            held = (ctypes.c_int32 * 1)(token)  # the batch only points to it
            assert lib.llama_decode(self.decoder, lib.llama_batch_get_one(held, 1)) == 0
        return ids


@cache
def _quiet_log(mtmd: Any) -> Any:
    """Take mtmd's own log, which goes to stderr otherwise; kept alive by the cache."""
    callback = llama.library().llama_log_callback(lambda level, text, data: None)
    mtmd.mtmd_log_set(callback, ctypes.c_void_p(0))
    return callback
