"""Qwen3's layers in NumPy and float64, from the definition: what our AMX prefill and llama.cpp are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edge_runtime.decoder.amx_prefill import PrefillChunk, PrefillResult
from edge_runtime.decoder.kv_rows import KVForm, KVRows
from edge_runtime.weights.gguf_file import GGUFFile


class PlainDecoder:
    """As `edge_runtime.decoder.amx_prefill.AmxPrefill`, slowly."""

    def __init__(self, file: GGUFFile, region: object = None) -> None:
        self._file = file
        self.n_layers = file.get("qwen3.block_count", int)
        self._dims = file.get("qwen3.attention.key_length", int)
        width = 2 * self._weight(0, "attn_k").shape[0]
        self.form = KVForm(self.n_layers, 1, width, 1, width, transposed=False)

    def _weight(self, n: int, name: str) -> Any:
        return self._file.array(f"blk.{n}.{name}.weight").astype(np.float64)

    def _normed(self, x: Any, weight: Any) -> Any:
        eps = self._file.get("qwen3.attention.layer_norm_rms_epsilon", float)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight

    def _heads(self, x: Any, norm: Any, first: int) -> Any:
        """Heads of rows, normed and turned: [n, heads, dims]."""
        heads = self._normed(x.reshape(len(x), -1, self._dims), norm)
        half = self._dims // 2
        turns = self._file.get("qwen3.rope.freq_base", float) ** (-np.arange(half) / half)
        angles = (first + np.arange(len(x)))[:, None, None] * turns
        one, other = heads[..., :half], heads[..., half:]
        cosines, sines = np.cos(angles), np.sin(angles)
        return np.concatenate([one * cosines - other * sines, one * sines + other * cosines], -1)

    def _attended(self, queries: Any, keys: Any, values: Any) -> Any:
        n, shared = len(queries), queries.shape[1] // keys.shape[1]
        keys, values = (np.repeat(rows, shared, axis=1) for rows in (keys, values))
        scores = np.einsum("qhd,khd->hqk", queries, keys) / np.sqrt(self._dims)
        scores += np.where(np.arange(len(keys))[None] > np.arange(len(keys) - n, len(keys))[:, None], -np.inf, 0)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), values).reshape(n, -1)

    def compute_one(self, chunk: PrefillChunk, rounded: bool = True) -> PrefillResult:
        """Compute one chunk; keys and values are rounded to float16 before they are used, as in a KV cache."""
        x = chunk.embeddings.astype(np.float64)
        first = 0 if chunk.past is None else len(chunk.past)
        kept: tuple[list[Any], list[Any]] = [], []
        for n in range(self.n_layers):
            h = self._normed(x, self._weight(n, "attn_norm"))
            queries = self._heads(h @ self._weight(n, "attn_q").T, self._weight(n, "attn_q_norm"), first)
            keys = self._heads(h @ self._weight(n, "attn_k").T, self._weight(n, "attn_k_norm"), first)
            new = keys, (h @ self._weight(n, "attn_v").T).reshape(keys.shape)
            both = []
            for rows, keep, past in zip(
                new,
                kept,
                ((None, None) if chunk.past is None else (chunk.past.keys, chunk.past.values)),
                strict=True,
            ):
                halves = rows.astype(np.float16)
                keep.append(halves.reshape(len(x), -1).view(np.uint8))
                before = [] if past is None else [past[n].view(np.float16).reshape(first, *rows.shape[1:])]
                both.append(np.concatenate([*before, halves if rounded else rows]).astype(np.float64))
            x = x + self._attended(queries, *both) @ self._weight(n, "attn_output").T
            h = self._normed(x, self._weight(n, "ffn_norm"))
            gate = h @ self._weight(n, "ffn_gate").T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ self._weight(n, "ffn_up").T)) @ self._weight(n, "ffn_down").T
        head = "output.weight" if "output.weight" in self._file.tensors else "token_embd.weight"
        last = self._normed(x[-1], self._file.array("output_norm.weight"))
        logits = (self._file.array(head).astype(np.float64) @ last).astype(np.float32)
        return PrefillResult(KVRows(self.form, *kept), logits if chunk.wants_logits else None)

    def compute(self, chunks: Sequence[PrefillChunk], cancelled: Callable[[], bool]) -> list[PrefillResult] | None:
        """Compute chunks one after the other."""
        found: list[PrefillResult] = []
        for chunk in chunks:
            if cancelled():
                return None
            found.append(self.compute_one(chunk))
        return found
