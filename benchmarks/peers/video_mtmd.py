"""llama.cpp's way to answer about a video: every frame is a picture (mtmd), encoded and read one by one."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import numpy as np

from benchmarks.harness.child import serve, timed
from benchmarks.peers.mtmd import Mtmd
from benchmarks.peers.video_ours import QUESTION

N_BATCH = 2048  # as llama-mtmd-cli has it


class VideoMtmd(Mtmd):
    """An mmproj file and a decoder that reads its visual tokens.

    The decoder's weights stay as they are in the file, as on our side: both read prompts with the same code.

    Options: decoder, mmproj, threads, n_ctx, video.
    """

    def load(self) -> dict[str, Any]:
        """Load both, decode the video's frames and cut them; none of this counts as part of the answer's time."""
        facts = super().load()
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_batch = self._options["n_ctx"], N_BATCH
        params.n_threads = params.n_threads_batch = self._options["threads"]
        self.decoder = self.lib.llama_init_from_model(self.model, params)
        if not self.decoder:
            raise RuntimeError(f"llama.cpp has no memory for a context of {params.n_ctx} tokens")
        self._prompt, self._tokens = self._cut(self._frames())
        return facts | {"n_ctx": params.n_ctx}

    def _frames(self) -> list[Any]:
        from edge_runtime.inputs.video.frame_choice import VideoLimits
        from edge_runtime.inputs.video.open import open_video

        source = open_video(self._options["video"], VideoLimits())
        cursor = source.open()
        try:
            return [np.asarray(cursor.read(i, lambda share: None)) for i in range(len(source.times))]
        finally:
            cursor.close()

    def _cut(self, frames: list[Any]) -> tuple[list[Any], int]:
        """Chunks of the whole prompt, and its number of tokens."""
        mtmd = self.mtmd
        marker = mtmd.mtmd_default_marker().decode()
        text = f"<|im_start|>user\n{chr(10).join([marker] * len(frames))}\n{QUESTION}<|im_end|>\n"
        encoded = f"{text}<|im_start|>assistant\n<think>\n\n</think>\n\n".encode()
        with contextlib.ExitStack() as stack:
            bitmaps = (mtmd.mtmd_bitmap_p_ctypes * len(frames))()
            for i, pixels in enumerate(frames):
                buffer = (ctypes.c_uint8 * pixels.size).from_buffer_copy(np.ascontiguousarray(pixels))
                bitmaps[i] = mtmd.mtmd_bitmap_init(pixels.shape[1], pixels.shape[0], buffer)
                stack.callback(mtmd.mtmd_bitmap_free, bitmaps[i])
            self._chunks_of_video = mtmd.mtmd_input_chunks_init()  # owns the chunks
            entry = mtmd.mtmd_input_text(encoded, len(encoded), False, True)
            if mtmd.mtmd_tokenize(self.context, self._chunks_of_video, ctypes.byref(entry), bitmaps, len(frames)):
                raise RuntimeError("mtmd cannot cut the frames")
        n = mtmd.mtmd_input_chunks_size(self._chunks_of_video)
        chunks = [mtmd.mtmd_input_chunks_get(self._chunks_of_video, i) for i in range(n)]
        return chunks, sum(mtmd.mtmd_input_chunk_get_n_tokens(chunk) for chunk in chunks)

    def _is_image(self, chunk: Any) -> bool:
        return bool(self.mtmd.mtmd_input_chunk_get_type(chunk) == self.mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE)

    def encode_frames(self, first: int, count: int) -> dict[str, Any]:
        """Time the encoding of some of the frames."""
        images = [chunk for chunk in self._prompt if self._is_image(chunk)][first : first + count]
        _, seconds = timed(lambda: self._encode(images))
        return {"seconds": seconds, "frames": len(images)}

    def prefill(self) -> dict[str, Any]:
        """Time reading the whole prompt; every frame has the visual tokens of the last encoded one.

        Their values make no difference to the time.
        """
        mtmd, lib = self.mtmd, self.lib
        image = next(chunk for chunk in self._prompt if self._is_image(chunk))
        self._encode([image])
        n_values = mtmd.mtmd_input_chunk_get_n_tokens(image) * lib.llama_model_n_embd(self.model)
        tokens = (ctypes.c_float * n_values)()
        ctypes.memmove(tokens, mtmd.mtmd_get_output_embd(self.context), ctypes.sizeof(tokens))
        lib.llama_memory_clear(lib.llama_get_memory(self.decoder), True)
        _, seconds = timed(lambda: self._read(tokens))
        return {"seconds": seconds, "prompt_tokens": self._tokens}

    def _read(self, tokens: Any) -> None:
        mtmd, past = self.mtmd, ctypes.c_int(0)
        nothing = mtmd.mtmd_helper_post_decode_callback()
        for i, chunk in enumerate(self._prompt):
            last = i == len(self._prompt) - 1
            if self._is_image(chunk):
                failed = mtmd.mtmd_helper_decode_image_chunk(
                    self.context,
                    self.decoder,
                    chunk,
                    tokens,
                    past.value,
                    0,
                    N_BATCH,
                    ctypes.byref(past),
                    nothing,
                    None,
                )
            else:
                failed = mtmd.mtmd_helper_eval_chunk_single(
                    self.context, self.decoder, chunk, past.value, 0, N_BATCH, last, ctypes.byref(past)
                )
            if failed:
                raise RuntimeError(f"llama.cpp cannot read chunk {i} of {len(self._prompt)} at {past.value}")


if __name__ == "__main__":
    serve(VideoMtmd)
