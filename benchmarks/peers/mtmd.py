"""llama.cpp's multimodal encoder (mtmd) from llama-cpp-python: tower and resampler, slice by slice."""

from __future__ import annotations

import contextlib
import ctypes
import re
from typing import Any

import numpy as np

from benchmarks.harness.child import require, serve, timed
from benchmarks.harness.pictures import picture, shapes


class Mtmd:
    """An mmproj file and a decoder, which mtmd needs for its vocabulary.

    Options: decoder, mmproj, threads.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        require("llama_cpp.mtmd_cpp")
        self._options = options
        self._chunks: dict[tuple[int, int], Any] = {}
        self._log: list[str] = []

    def load(self) -> dict[str, Any]:
        """Load as llama.cpp's own tools do: flash attention where available, one warm-up of its own."""
        import llama_cpp.mtmd_cpp as mtmd

        from edge_runtime.decoder import llama_cpp as llama

        self.mtmd, self.lib = mtmd, llama.library()
        self._callback = self.lib.llama_log_callback(lambda level, text, data: self._log.append(text.decode()))
        mtmd.mtmd_log_set(self._callback, ctypes.c_void_p(0))
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers, params.use_extra_bufts = 0, False  # the decoder is not used: it stays in the file
        self.model = self.lib.llama_model_load_from_file(str(self._options["decoder"]).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {self._options['decoder']}")
        options = mtmd.mtmd_context_params_default()
        options.use_gpu = options.print_timings = False
        options.n_threads = self._options["threads"]
        options.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_AUTO
        mmproj = str(self._options["mmproj"]).encode()
        self.context, load_s = timed(lambda: mtmd.mtmd_init_from_file(mmproj, self.model, options))
        if not self.context:
            raise RuntimeError(f"mtmd cannot load {self._options['mmproj']}")
        said = re.search(r"flash attention is (\w+)", "".join(self._log))
        return {"load_s": load_s, "flash_attention": said.group(1) if said else "unknown"}

    def _tokenise(self, width: int, height: int) -> tuple[Any, list[Any]]:
        """Tokenise a prompt that is one picture; return the chunks (to be freed), and those with a slice."""
        mtmd = self.mtmd
        pixels = picture(width, height)
        with contextlib.ExitStack() as stack:
            buffer = (ctypes.c_uint8 * pixels.size).from_buffer_copy(pixels.tobytes())
            bitmap = mtmd.mtmd_bitmap_init(width, height, buffer)
            stack.callback(mtmd.mtmd_bitmap_free, bitmap)
            chunks = mtmd.mtmd_input_chunks_init()
            marker = mtmd.mtmd_default_marker()
            entry = mtmd.mtmd_input_text(marker, len(marker), False, True)
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
            if mtmd.mtmd_tokenize(self.context, chunks, ctypes.byref(entry), bitmaps, 1):
                raise RuntimeError(f"mtmd cannot cut a picture of {width} x {height}")
        every = [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
        kind = mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE
        return chunks, [chunk for chunk in every if mtmd.mtmd_input_chunk_get_type(chunk) == kind]

    def prepare(self, width: int, height: int, slices: int) -> int:
        """Cut a picture; mtmd cuts some sizes differently, so the number of slices is checked."""
        chunks, found = self._tokenise(width, height)
        if len(found) != slices:
            raise RuntimeError(f"mtmd cuts {width} x {height} into {len(found)} slices, the scenario says {slices}")
        self._chunks[width, height] = (chunks, found)
        return len(found)

    def _encode(self, chunks: list[Any]) -> None:
        for chunk in chunks:
            if self.mtmd.mtmd_encode_chunk(self.context, chunk):
                raise RuntimeError("mtmd cannot encode a slice")

    def encode(self, width: int, height: int) -> dict[str, float]:
        """Time the encoding of all slices."""
        _, seconds = timed(lambda: self._encode(self._chunks[width, height][1]))
        return {"seconds": seconds}

    def output(self, width: int, height: int, path: str) -> None:
        """Write the visual tokens of a picture's first slice."""
        chunk = self._chunks[width, height][1][0]
        self._encode([chunk])
        shape = self.mtmd.mtmd_input_chunk_get_n_tokens(chunk), self.lib.llama_model_n_embd(self.model)
        tokens = np.ctypeslib.as_array(self.mtmd.mtmd_get_output_embd(self.context), shape)
        np.savez(path, tokens=tokens)

    def many(self, count: int, first: int) -> None:
        """Encode one-slice pictures of many shapes."""
        for width, height in shapes(first + count)[first:]:
            chunks, found = self._tokenise(width, height)
            self._encode(found)
            self.mtmd.mtmd_input_chunks_free(chunks)


if __name__ == "__main__":
    serve(Mtmd)
