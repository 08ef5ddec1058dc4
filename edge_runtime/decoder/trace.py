"""Logits and the greedy continuation for the embeddings of a prompt, outside any request.

For comparison with the official code; knows nothing of sampling or of requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_runtime.decoder.decoder import Decoder
from edge_runtime.weights.gguf_file import Float32


@dataclass(frozen=True)
class Trace:
    """What the decoder computed for a prompt, for comparison with the official code."""

    logits: Float32
    """ndarray [shape=(vocabulary,), float32] after the prompt"""
    greedy: list[int]
    """The most probable continuation; end tokens do not stop it."""


def trace(decoder: Decoder, embeddings: Float32, n_tokens: int, adapter: str | None = None) -> Trace:
    """Prefill, then take the most probable token `n_tokens` times.

    Parameters
    ----------
    embeddings : ndarray [shape=(n, hidden), float32]
    adapter : name of the LoRA adapter to compute with.
    """
    decoder.prefill(embeddings, adapter)
    first = decoder.logits()
    logits, greedy = first, []
    for _ in range(n_tokens):
        greedy.append(int(np.argmax(logits)))
        decoder.decode(greedy[-1], adapter)
        logits = decoder.logits()
    return Trace(first, greedy)
