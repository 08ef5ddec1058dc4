"""What one call of the decoder appends to one sequence, and how a call may end without it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from edge_runtime.weights.gguf_file import Float32


class Cancelled(Exception):  # noqa: N818 - a request's end, not an error
    """The request was cancelled; raised on the inference thread only."""


class CacheFull(Exception):  # noqa: N818 - answered by making room
    """The KV cache has no room for what was to be computed; nothing has changed."""


class Part(NamedTuple):
    """What one call appends to one sequence."""

    sequence: int
    keys: Sequence[Hashable]
    """What stands at the new positions; token ids where there are no embeddings."""
    embeddings: Float32 | None = None
    """ndarray [shape=(n, hidden), float32]"""
    wants_logits: bool = True
    """Of the last position."""
    wants_all_logits: bool = False  # of every position, by llama.cpp then; at most `SCORED_ROWS` together
