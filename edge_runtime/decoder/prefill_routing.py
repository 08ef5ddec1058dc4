"""Which parts of a call our own prefill computes, and how they get into llama.cpp's KV cache."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edge_runtime.decoder.amx_prefill import Prefill, Stretch, can_fill
from edge_runtime.decoder.kv_rows import Bytes, KVRows
from edge_runtime.decoder.sequence_chunk import Part
from edge_runtime.weights.gguf_file import Float32, GGUFFile

LEAST_BYTES = 1 << 28
"""Of a decoder file; with smaller ones there is nothing to be gained."""
LEAST_ROWS = 8
"""Fewer cost less in llama.cpp: from here on it unpacks weights before it multiplies them, too."""
MOST_PAST_BYTES = 1 << 30
"""What the KV cache may hold of a sequence that is gone on with: it is copied out for it."""
KEPT_BYTES = 1 << 27
"""Of the memory that is copied to, what stays for the next time: 900 positions at full size."""


class Context(Protocol):
    """What is asked of the decoder: what its sequences hold, and rows in and out of them."""

    n_sequences: int

    def held(self, sequence: int) -> int:
        """Positions of a sequence."""

    def embed(self, ids: npt.NDArray[np.int64]) -> Float32:
        """Rows of the embedding table."""

    def read_rows(self, sequence: int, first: int, end: int, memory: Callable[[int], Bytes]) -> KVRows:
        """Keys and values of positions, copied into what `memory` gives."""

    def append_rows(self, sequence: int, keys: Sequence[Hashable], rows: KVRows) -> None:
        """Lengthen a sequence."""


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


def is_ours(file: GGUFFile, kv_type: str, *, exact: bool, wanted: bool | None = None) -> bool:
    """Whether a decoder's prompts are computed by our kernels.

    Parameters
    ----------
    wanted : whether to, where it is possible; None: where it pays.
    """
    if wanted is None:
        wanted = file.path.stat().st_size >= LEAST_BYTES
    return wanted and not exact and kv_type == "f16" and can_fill(file)


def own_parts(decoder: Context, prefill: Prefill | None, parts: Sequence[Part]) -> list[int]:
    """Places of those parts that are computed by our kernels: prompts, if there is enough of them."""
    if prefill is None:
        return []
    most = MOST_PAST_BYTES // prefill.form.position_bytes
    own = [
        i
        for i, part in enumerate(parts)
        # Through the sequence behind the last one rows are read and written.
        if len(part.keys) > 1
        and decoder.held(part.sequence) <= most
        and part.sequence != decoder.n_sequences
        and not part.wants_all_logits
    ]
    return own if sum(len(parts[i].keys) for i in own) >= LEAST_ROWS else []


def fill(
    decoder: Context, prefill: Prefill, space: PastSpace, parts: Sequence[Part], cancelled: Callable[[], bool]
) -> list[Float32 | None] | None:
    """Compute parts and append them to their sequences.

    Parameters
    ----------
    space : for what the sequences hold.

    Returns
    -------
    logits : of the last position of each part that wants them; None altogether when `cancelled` answered true.

    Raises
    ------
    CacheFull
        When there is no room; some parts may have been appended.
    """
    stretches = []
    space.begin()
    for part in parts:
        held = decoder.held(part.sequence)
        embeddings = part.embeddings
        if embeddings is None:
            embeddings = decoder.embed(np.asarray(part.keys, np.int64))
        past = decoder.read_rows(part.sequence, 0, held, space.take) if held else None
        stretches.append(Stretch(embeddings, past, part.wants_logits))
    filled = prefill.compute(stretches, cancelled)
    if filled is None:
        return None
    for part, (rows, _) in zip(parts, filled, strict=True):
        decoder.append_rows(part.sequence, part.keys, rows)
    return [logits for _, logits in filled]
