"""Embeddings → logits → tokens: the Qwen3 decoder, run by llama.cpp through its low-level API.

A prompt enters as one stream of embeddings, text and visual tokens alike, cut only by chunk size: cutting it at
every picture, as llama.cpp's own multimodal helpers do, costs a decode call per separator token. Knows nothing of
text or pictures.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_runtime import llama
from edge_runtime.config import decoder_config
from edge_runtime.errors import ModelFileError, PromptTooLongError
from edge_runtime.weights import Float32, GGUFFile

CHUNK_TOKENS = 512
"""Prompt tokens per call of llama.cpp; also its micro-batch, so that one call is one pass over the weights."""
DEFAULT_CONTEXT = 8192
ABORTED = 2  # llama_decode's way to say that the abort callback answered true


class Cancelled(Exception):  # noqa: N818 - a request's end, not an error
    """The request was cancelled; raised on the inference thread only."""


@dataclass(frozen=True)
class DecoderOptions:
    """How the decoder is set up.

    `exact` takes a float32 KV cache and no flash attention: the default float16 cache alone moves logits by 1e-3 to
    1e-2.
    """

    n_ctx: int | None = None
    exact: bool = False
    n_threads: int = 1


class Decoder:
    """One decoder file with one KV cache holding one sequence.

    Raises
    ------
    ModelFileError
        When the file is damaged or llama.cpp refuses it.
    """

    def __init__(self, path: str | Path, options: DecoderOptions) -> None:
        self.file = GGUFFile(path)
        self.config = decoder_config(self.file)
        # Every use of these may come after close(), so they must exist before anything can fail.
        self._model = self._context = None
        self._cancelled: Callable[[], bool] = lambda: False
        self._held: list[Hashable] = []
        self._lib = lib = llama.library()
        self._model = self._load_model()
        self.n_ctx = min(options.n_ctx or DEFAULT_CONTEXT, self.config.context_length)
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = (
            self.n_ctx,
            CHUNK_TOKENS,
            CHUNK_TOKENS,
            1,
        )
        params.n_threads = params.n_threads_batch = options.n_threads
        if options.exact:
            params.type_k = params.type_v = lib.GGML_TYPE_F32
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._abort = lib.ggml_abort_callback(lambda _data: self._cancelled())
        params.abort_callback = self._abort
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise ModelFileError(
                f"llama.cpp cannot set up a context of {self.n_ctx} tokens for {self.file.path.name}: "
                f"{llama.last_errors()}; try a smaller --ctx."
            )
        self._embedding_batch = lib.llama_batch_init(CHUNK_TOKENS, self.config.hidden, 1)
        self._token_batch = lib.llama_batch_init(1, 0, 1)

    def _load_model(self) -> Any:
        lib = self._lib
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP
        # Repacked weights cost 3.6 GB and 15 s of loading at full size, and make prefill slower (2 cores measured).
        params.use_extra_bufts = False
        with llama.watch_log(lambda line: None):
            model = lib.llama_model_load_from_file(str(self.file.path).encode(), params)
        if not model:
            raise ModelFileError(
                f"llama.cpp refuses {self.file.path.name}: {llama.last_errors()}; convert or download it again."
            )
        return model

    @property
    def n_past(self) -> int:
        """Positions filled in the KV cache."""
        return len(self._held)

    @property
    def context(self) -> Any:
        """llama.cpp's context, for the samplers."""
        return self._context

    def embed(self, ids: npt.NDArray[np.int64]) -> Float32:
        """Rows of the embedding table: ndarray [shape=(n, hidden), float32], dequantised as llama.cpp does."""
        return self.file.rows("token_embd.weight", ids)

    def check_length(self, n_prompt: int) -> None:
        """Refuse a prompt that leaves no room for an answer.

        Raises
        ------
        PromptTooLongError
            With the numbers.
        """
        if n_prompt + 1 > self.n_ctx:
            raise PromptTooLongError(
                f"The prompt has {n_prompt} tokens, but the context holds {self.n_ctx} (the model was trained for "
                f"{self.config.context_length}), one of them for the answer; "
                "use fewer or smaller pictures (--max-slices), a shorter text, or a larger --ctx."
            )

    def rewind(self, keys: Sequence[Hashable] = ()) -> int:
        """Go back to the longest common beginning of the KV cache and a new prompt.

        Parameters
        ----------
        keys : what stands at each position of the new prompt; equal keys mean equal embeddings. The last one always
            is to be computed again, or there would be no logits.

        Returns
        -------
        n : positions that stay, `n_past` from now on.
        """
        limit = min(len(self._held), max(0, len(keys) - 1))
        n = next((i for i in range(limit) if self._held[i] != keys[i]), limit)
        memory = self._lib.llama_get_memory(self._context)
        # Also when nothing is cut off: an aborted call leaves positions behind that nobody knows of.
        if not self._lib.llama_memory_seq_rm(memory, 0, n, -1):
            self._lib.llama_memory_clear(memory, False)
            n = 0
        del self._held[n:]
        return n

    def prefill(
        self,
        embeddings: Float32,
        keys: Sequence[Hashable] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Append embeddings to the sequence; logits of the last one are then at hand.

        Parameters
        ----------
        embeddings : ndarray [shape=(n, hidden), float32]
        keys : n of them, see `rewind`; None: nothing will ever be equal to these.
        cancelled : asked often, from inside llama.cpp.

        Raises
        ------
        Cancelled
            When `cancelled` answered true.
        PromptTooLongError
            When the prompt does not fit.
        """
        self.check_length(self.n_past + len(embeddings))
        keys = [object() for _ in embeddings] if keys is None else keys
        batch = self._embedding_batch
        for start in range(0, len(embeddings), CHUNK_TOKENS):
            chunk = np.ascontiguousarray(embeddings[start : start + CHUNK_TOKENS], np.float32)
            ctypes.memmove(batch.embd, chunk.ctypes.data, chunk.nbytes)
            self._fill(batch, len(chunk), wants_logits=start + len(chunk) == len(embeddings))
            self._decode(batch, cancelled)
            self._held += keys[start : start + len(chunk)]

    def decode(self, token_id: int, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Append one token; its logits are then at hand."""
        self._token_batch.token[0] = token_id
        self._fill(self._token_batch, 1, wants_logits=True)
        self._decode(self._token_batch, cancelled)
        self._held.append(token_id)

    def logits(self) -> Float32:
        """Logits after the last position: ndarray [shape=(vocabulary,), float32], a copy."""
        pointer = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, (self.config.vocabulary,)).copy()

    def _fill(self, batch: Any, n_tokens: int, *, wants_logits: bool) -> None:
        batch.n_tokens = n_tokens
        for i in range(n_tokens):
            batch.pos[i] = self.n_past + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = False
        batch.logits[n_tokens - 1] = wants_logits

    def _decode(self, batch: Any, cancelled: Callable[[], bool]) -> None:
        self._cancelled = cancelled
        try:
            with llama.watch_log(lambda line: None):
                status = self._lib.llama_decode(self._context, batch)
        finally:
            self._cancelled = lambda: False
        if status == ABORTED or cancelled():
            raise Cancelled
        if status != 0:
            raise ModelFileError(
                f"llama.cpp failed to decode (status {status}): {llama.last_errors()}; the model file may be "
                "damaged: download it again."
            )

    def close(self) -> None:
        """Free the model and its context; further calls do nothing."""
        if self._context:
            self._lib.llama_batch_free(self._embedding_batch)
            self._lib.llama_batch_free(self._token_batch)
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None
