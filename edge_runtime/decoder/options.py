"""How a decoder is set up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

CHUNK_TOKENS = 512
"""Prompt tokens per call of llama.cpp; also its micro-batch size, so that one call is one pass over the weights."""
LOW_MEMORY_UBATCH = 128
"""The same where memory is short: llama.cpp's buffers grow with it."""
DEFAULT_CONTEXT = 8192
N_SEQUENCES = 8


@dataclass(frozen=True)
class DecoderOptions:
    """How the decoder is set up.

    `exact` uses a float32 KV cache and no flash attention: the default float16 cache alone moves logits by 1e-3 to
    1e-2.
    """

    n_ctx: int = DEFAULT_CONTEXT
    exact: bool = False
    n_threads: int = 1
    n_sequences: int = N_SEQUENCES
    """Requests that can be computed in parallel."""
    kv_type: str | None = None
    """One of `kv_types.KV_TYPES`; None: the default of the arithmetic."""
    n_ubatch: int = CHUNK_TOKENS
    """Positions that llama.cpp processes at a time within a call."""
    repack: bool = False
    """Copy the weights into another order when loading; needs their size in memory a second time."""
    adapters: Mapping[str, str | Path] = field(default_factory=dict)
    """LoRA file by name."""
    amx_prefill: bool | None = None
    """Whether our AMX kernels (`amx_prefill`) compute prompts; None: where that pays. Never with `exact`."""
    kernels: bool | None = None
    """Whether our kernels multiply inside llama.cpp (`kernel_products`); None: where that pays."""
