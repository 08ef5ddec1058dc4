"""Which chunks of a step our AMX kernels compute, and how the results get into llama.cpp's KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edge_runtime.decoder.amx_prefill import AmxPrefill, PrefillChunk, supports_amx_prefill
from edge_runtime.decoder.kv_rows import Bytes
from edge_runtime.decoder.llama_context import LlamaContext
from edge_runtime.decoder.sequence_chunk import SequenceChunk
from edge_runtime.weights.gguf_file import Float32, GGUFFile

MIN_FILE_BYTES = 1 << 28
"""Minimum size of a decoder file; with smaller ones there is nothing to gain."""
MIN_ROWS = 8
"""Fewer rows cost less in llama.cpp: from here on, it too unpacks weights before it multiplies them."""
MAX_PAST_BYTES = 1 << 30
"""Maximum that the KV cache may hold of a continued sequence, which is copied out."""
KEPT_BYTES = 1 << 27
"""Part of the memory for copies that is kept for the next time: 900 positions at full size."""


class PastSpace:
    """Memory for what sequences held before, reused at every call: fresh memory costs more than filling it.

    Some systems allocate it page by page on first write, at 0.2 s per 100 MB.
    """

    def __init__(self, n_bytes: int = KEPT_BYTES) -> None:
        self._n_bytes, self._given = n_bytes, 0
        self._kept: Bytes | None = None

    def begin(self) -> None:
        """Take back everything that was handed out."""
        self._given = 0

    def take(self, n_bytes: int) -> Bytes:
        """Memory to use until the next `begin`: ndarray [shape=(n_bytes,), uint8]; fresh if too little is kept."""
        first = self._given
        if first + n_bytes > self._n_bytes:
            return np.empty(n_bytes, np.uint8)
        if self._kept is None:
            self._kept = np.empty(self._n_bytes, np.uint8)
        self._given += -(-n_bytes // 64) * 64
        return self._kept[first : first + n_bytes]


def uses_amx_prefill(file: GGUFFile, kv_type: str, *, exact: bool, wanted: bool | None = None) -> bool:
    """Whether our AMX kernels compute a decoder's prompts.

    Parameters
    ----------
    wanted : True: if possible; None: if it pays.
    """
    if wanted is None:
        wanted = file.path.stat().st_size >= MIN_FILE_BYTES
    return wanted and not exact and kv_type == "f16" and supports_amx_prefill(file)


def prefill_chunks(context: LlamaContext, prefill: AmxPrefill | None, chunks: Sequence[SequenceChunk]) -> list[int]:
    """Indices of the chunks that our kernels compute: prompts that are long enough."""
    if prefill is None:
        return []
    most = MAX_PAST_BYTES // prefill.form.position_bytes
    local = [
        i
        for i, chunk in enumerate(chunks)
        # Rows are read and written through the sequence after the last one.
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
    space : memory for what the sequences hold.

    Returns
    -------
    logits : for the last position of each chunk that wants them; None in place of the list if `cancelled` was true.

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
