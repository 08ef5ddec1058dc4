"""Which chunks of a step our AMX kernels compute, and how they get into llama.cpp's KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edge_runtime.decoder.amx_prefill import AmxPrefill, PrefillChunk, supports_amx_prefill
from edge_runtime.decoder.kv_rows import Bytes
from edge_runtime.decoder.llama_context import LlamaContext
from edge_runtime.decoder.sequence_chunk import SequenceChunk
from edge_runtime.weights.gguf_file import Float32, GGUFFile

MIN_FILE_BYTES = 1 << 28
"""Of a decoder file; with smaller ones there is nothing to be gained."""
MIN_ROWS = 8
"""Fewer cost less in llama.cpp: from here on it unpacks weights before it multiplies them, too."""
MAX_PAST_BYTES = 1 << 30
"""What the KV cache may hold of a sequence that is continued: it is copied out for it."""
KEPT_BYTES = 1 << 27
"""Of the memory that is copied to, what stays for the next time: 900 positions at full size."""


class PastSpace:
    """Memory for what sequences held before: the same at every call, as fresh memory is dearer than what fills it.

    Some systems give it out page by page when it is written to, at a fifth of a second for 100 MB.
    """

    def __init__(self, n_bytes: int = KEPT_BYTES) -> None:
        self._n_bytes, self._given = n_bytes, 0
        self._kept: Bytes | None = None

    def begin(self) -> None:
        """Take back all that was given."""
        self._given = 0

    def take(self, n_bytes: int) -> Bytes:
        """Give memory until `begin`: ndarray [shape=(n_bytes,), uint8]; fresh one where too little is kept."""
        first = self._given
        if first + n_bytes > self._n_bytes:
            return np.empty(n_bytes, np.uint8)
        if self._kept is None:
            self._kept = np.empty(self._n_bytes, np.uint8)
        self._given += -(-n_bytes // 64) * 64
        return self._kept[first : first + n_bytes]


def uses_amx_prefill(file: GGUFFile, kv_type: str, *, exact: bool, wanted: bool | None = None) -> bool:
    """Whether a decoder's prompts are computed by our AMX kernels.

    Parameters
    ----------
    wanted : whether to, where it is possible; None: where it pays.
    """
    if wanted is None:
        wanted = file.path.stat().st_size >= MIN_FILE_BYTES
    return wanted and not exact and kv_type == "f16" and supports_amx_prefill(file)


def prefill_chunks(context: LlamaContext, prefill: AmxPrefill | None, chunks: Sequence[SequenceChunk]) -> list[int]:
    """Places of those chunks that our kernels compute: prompts, if there is enough of them."""
    if prefill is None:
        return []
    most = MAX_PAST_BYTES // prefill.form.position_bytes
    local = [
        i
        for i, chunk in enumerate(chunks)
        # Through the sequence behind the last one rows are read and written.
        if len(chunk.keys) > 1
        and context.held(chunk.sequence) <= most
        and chunk.sequence != context.n_sequences
        and not chunk.wants_all_logits
    ]
    return local if sum(len(chunks[i].keys) for i in local) >= MIN_ROWS else []


def compute_prefill(
    context: LlamaContext,
    prefill: AmxPrefill,
    space: PastSpace,
    chunks: Sequence[SequenceChunk],
    cancelled: Callable[[], bool],
) -> list[Float32 | None] | None:
    """Compute chunks and append them to their sequences.

    Parameters
    ----------
    space : for what the sequences hold.

    Returns
    -------
    logits : of the last position of each chunk that wants them; None altogether when `cancelled` answered true.

    Raises
    ------
    CacheFull
        When there are no free cells; some chunks may have been appended.
    """
    new = []
    space.begin()
    for chunk in chunks:
        held = context.held(chunk.sequence)
        embeddings = chunk.embeddings
        if embeddings is None:
            embeddings = context.embed(np.asarray(chunk.keys, np.int64))
        past = context.read_rows(chunk.sequence, 0, held, space.take) if held else None
        new.append(PrefillChunk(embeddings, past, chunk.wants_logits))
    results = prefill.compute(new, cancelled)
    if results is None:
        return None
    for chunk, (rows, _) in zip(chunks, results, strict=True):
        context.append_rows(chunk.sequence, chunk.keys, rows)
    return [logits for _, logits in results]
