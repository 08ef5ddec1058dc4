"""Embeddings → logits: the Qwen3 decoder. Prompts use AMX kernels where that pays, all else goes through llama.cpp.

A prompt is one stream of embeddings, text and visual tokens alike, cut only by chunk size (chunked prefill): cutting
it at every picture, as llama.cpp's own multimodal helpers do, costs a call per separator token. `prefill_routing`
decides which chunks of a call go which way; `llama_context` knows what sequences hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edge_runtime.decoder.amx_prefill import AmxPrefill
from edge_runtime.decoder.kv_rows import KVRows, UnknownState
from edge_runtime.decoder.llama_context import LlamaContext
from edge_runtime.decoder.options import CHUNK_TOKENS, DecoderOptions
from edge_runtime.decoder.prefill_routing import PastSpace, compute_prefill, prefill_chunks, uses_amx_prefill
from edge_runtime.decoder.sequence_chunk import Cancelled, SequenceChunk
from edge_runtime.errors import CacheFull, PromptTooLongError
from edge_runtime.weights.gguf_file import Float32, GGUFFile


class Decoder(LlamaContext):
    """One decoder file with one KV cache that several sequences share; parameters and errors as in `LlamaContext`."""

    def __init__(self, file: str | Path | GGUFFile, options: DecoderOptions) -> None:
        super().__init__(file, options)
        self._local_logits: dict[int, Float32] = {}
        """By row of the last step, for those not computed by llama.cpp."""
        self._last_row = -1
        self._prefill, self._space = self._choose_prefill(options), PastSpace()

    def _choose_prefill(self, options: DecoderOptions) -> AmxPrefill | None:
        """Prefill with AMX kernels, if wanted and if llama.cpp accepts their rows."""
        wanted = False if options.repack else options.amx_prefill
        if not uses_amx_prefill(self.file, self.kv_type, exact=options.exact, wanted=wanted):
            return None
        found = AmxPrefill(self.file, self._region)
        nothing = np.zeros((1, found.form.key_bytes), np.uint8)
        try:
            self.append_rows(0, [0], KVRows(found.form, *[[nothing] * found.form.layers] * 2))
            return found if self.read_rows(0, 0, 1).form == found.form else None
        except (CacheFull, UnknownState):
            return None
        finally:
            self.rewind(0)

    @property
    def uses_amx_prefill(self) -> bool:
        """Whether our AMX kernels compute prompts."""
        return self._prefill is not None

    def check_length(self, n_prompt: int) -> None:
        """Refuse a prompt that leaves no position for an answer.

        Raises
        ------
        PromptTooLongError
            With both numbers.
        """
        if n_prompt + 1 > self.n_ctx:
            raise PromptTooLongError(
                f"The prompt has {n_prompt} tokens, but the context holds {self.n_ctx} (the model was trained for "
                f"{self.config.context_length}), one of them for the answer; use fewer or smaller pictures "
                "(--max-slices), less of a video (--packing, --max-frames), a shorter text, or a larger --ctx.",
                *(n_prompt, self.n_ctx),
            )

    def step(
        self,
        chunks: Sequence[SequenceChunk],
        cancelled: Callable[[], bool] = lambda: False,
        adapter: str | None = None,
    ) -> list[int]:
        """Append chunks to their sequences in one step; at most `n_batch` positions together.

        Parameters
        ----------
        cancelled : called often, from inside llama.cpp; returns whether to abandon the step and forget what it did.
        adapter : name of the LoRA adapter to compute with.

        Returns
        -------
        rows : row of the last position of each chunk, to get logits with; the position before it is one less.

        Raises
        ------
        Cancelled
            When `cancelled` returned true before the step was done; the sequences stay unchanged.
        CacheFull
            When there are no free cells; the sequences stay unchanged.
        """
        local = [] if adapter is not None else prefill_chunks(self, self._prefill, chunks)
        before = [self.held(chunk.sequence) for chunk in chunks]
        self._local_logits.clear()
        rows = [0] * len(chunks)
        try:
            others = [i for i in range(len(chunks)) if i not in local]
            for i, row in zip(others, self.compute([chunks[i] for i in others], cancelled, adapter), strict=True):
                rows[i] = row
            if local and self._prefill is not None:
                found = compute_prefill(self, self._prefill, self._space, [chunks[i] for i in local], cancelled)
                if found is None:
                    raise Cancelled
                for i, logits in zip(local, found, strict=True):
                    rows[i] = -2 - i  # llama.cpp also counts from -1 downwards
                    if logits is not None:
                        self._local_logits[rows[i]] = logits
        except BaseException:
            for chunk, n in zip(chunks, before, strict=True):
                self.rewind(chunk.sequence, n)
            raise
        self._last_row = rows[-1]
        return rows

    def prefill(self, embeddings: Float32, adapter: str | None = None) -> None:
        """Compute embeddings in a separate sequence, outside any request; `decode` continues it.

        Parameters
        ----------
        embeddings : ndarray [shape=(n, hidden), float32]
        """
        self.check_length(len(embeddings))
        self.rewind(self.n_sequences)
        for start in range(0, len(embeddings), CHUNK_TOKENS):
            rows = embeddings[start : start + CHUNK_TOKENS]
            self.step([SequenceChunk(self.n_sequences, [object() for _ in rows], rows)], adapter=adapter)

    def decode(self, token_id: int, adapter: str | None = None) -> None:
        """Append one token after `prefill`."""
        self.step([SequenceChunk(self.n_sequences, [token_id])], adapter=adapter)

    def logits(self, row: int | None = None) -> Float32:
        """Logits of a row of the last step, by default the last: ndarray [shape=(vocabulary,), float32], a copy."""
        return self.logits_view(self._last_row if row is None else row).copy()

    def logits_view(self, row: int) -> Float32:
        """As `logits`, but in memory that the next step may overwrite; do not write to it."""
        if row in self._local_logits:
            return self._local_logits[row]
        return super().logits_view(row)

    def is_local(self, row: int) -> bool:
        """Whether a row of the last step was computed by our kernels, so that llama.cpp's samplers cannot see it."""
        return row in self._local_logits
