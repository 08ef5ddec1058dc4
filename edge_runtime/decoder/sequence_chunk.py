"""What one call of the decoder appends to one sequence, and how a call may end without it.

A call that lacks free cells raises `errors.CacheFull`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from edge_runtime.weights.gguf_file import Float32


class Cancelled(Exception):  # noqa: N818 - a request's end, not an error
    """The request was cancelled; raised on the inference thread only."""


class SequenceChunk(NamedTuple):
    """What one call appends to one sequence: a chunk of its prompt, or the last token of its answer."""

    sequence: int
    keys: Sequence[Hashable]
    """Keys of the new positions; token ids if there are no embeddings."""
    embeddings: Float32 | None = None
    """ndarray [shape=(n, hidden), float32]"""
    wants_logits: bool = True
    """Whether to compute logits of the last position."""
    wants_all_logits: bool = False
    """Whether llama.cpp computes logits of every position; at most `MAX_SCORED_ROWS` in one call."""
    n_drafted: int = 0
    """The last keys that are guesses, to be checked with the logits before them."""
