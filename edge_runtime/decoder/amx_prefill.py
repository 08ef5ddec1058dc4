"""Embeddings → rows for the KV cache and logits, by our AMX kernels: the alternative to llama.cpp's prefill.

llama.cpp multiplies prompts on vector units only, and unpacks weights for every call; AMX takes a third of the time.
So if the processor has it, prompts are computed here and llama.cpp continues with the answer: its KV cache gets the
rows computed here (`kv_rows`). Weights are read in place from the mapped file.

The layers are those of Qwen3 (reference implementation: transformers' modeling_qwen3). Positions computed together
may belong to several sequences; they share every product, and each attends to its own past.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from edge_runtime.decoder.kv_rows import Bytes, KVForm, KVRows
from edge_runtime.weights.gguf_file import Float32, GGUFFile
from edge_runtime.weights.memory_map import Region

if TYPE_CHECKING:
    from edge_kernels.linear.gguf_blocks import BlockWeight

_HALF = int(GGMLQuantizationType.F16)
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_NORMS = ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm")


@dataclass(frozen=True)
class PrefillChunk:
    """New positions of one sequence."""

    embeddings: Float32
    """ndarray [shape=(n, hidden), float32]"""
    past: KVRows | None = None
    """What the sequence holds before them, from its first position on; None if it is empty."""
    wants_logits: bool = True
    """Whether to compute logits of the last position."""


class PrefillResult(NamedTuple):
    """Result for one chunk."""

    rows: KVRows
    logits: Float32 | None


class _Layer(NamedTuple):
    attn_q: BlockWeight
    attn_k: BlockWeight
    attn_v: BlockWeight
    attn_output: BlockWeight
    ffn_gate: BlockWeight
    ffn_up: BlockWeight
    ffn_down: BlockWeight
    attn_norm: Float32
    attn_q_norm: Float32
    attn_k_norm: Float32
    ffn_norm: Float32


def supports_amx_prefill(file: GGUFFile) -> bool:
    """Whether this machine can compute a decoder's prompts here, judging by its file.

    Its matrices must have types that can be unpacked, and the file must contain nothing that is not computed here.
    """
    from edge_kernels.linear.gguf_blocks import IS_POSSIBLE
    from edge_kernels.simd.amx import SIDE

    layers = range(file.get("qwen3.block_count", int))
    matrices = [f"blk.{n}.{name}.weight" for n in layers for name in _MATRICES]
    known = {f"blk.{n}.{name}.weight" for n in layers for name in (*_MATRICES, *_NORMS)}
    known |= {"token_embd.weight", "output_norm.weight", "output.weight"}
    return (
        IS_POSSIBLE
        and set(file.tensors) <= known
        and all(name in file.tensors and _is_readable(file, name) for name in (*matrices, _head_name(file)))
        and file.get("qwen3.attention.key_length", int, 1) % SIDE == 0
        and file.get("qwen3.rope.scaling.type", str, "none") == "none"
    )


def _head_name(file: GGUFFile) -> str:
    return "output.weight" if "output.weight" in file.tensors else "token_embd.weight"


def _is_readable(file: GGUFFile, name: str) -> bool:
    from edge_kernels.linear.gguf_blocks import BLOCK, BLOCK_BYTES

    info = file.tensors[name]
    return info.type.name in BLOCK_BYTES and info.shape[-1] % BLOCK == 0 and not info.padding


class AmxPrefill:
    """The layers of a decoder file for which `supports_amx_prefill` holds.

    Parameters
    ----------
    region : where llama.cpp has mapped the file, to read weights from; do not use this object after that model is
    freed. None reads them from our own mapping.
    """

    def __init__(self, file: GGUFFile, region: Region | None = None) -> None:
        from edge_kernels.linear.gguf_blocks import BlockWeight

        data, first = file.tensor_bytes(region)

        def weight(name: str) -> BlockWeight:
            info = file.tensors[name]
            start = info.offset - first
            return BlockWeight(data[start : start + info.n_bytes], info.type.name, *info.shape)

        def layer(n: int) -> _Layer:
            parts: dict[str, Any] = {name: weight(f"blk.{n}.{name}.weight") for name in _MATRICES}
            parts |= {name: file.array(f"blk.{n}.{name}.weight") for name in _NORMS}
            return _Layer(**parts)

        self._layers = [layer(n) for n in range(file.get("qwen3.block_count", int))]
        self._head, self._head_norm = weight(_head_name(file)), file.array("output_norm.weight")
        self._eps = file.get("qwen3.attention.layer_norm_rms_epsilon", float, 1e-6)
        self._base = file.get("qwen3.rope.freq_base", float, 1e4)
        self._dims = len(self._layers[0].attn_q_norm)
        width = 2 * self._layers[0].attn_k.n
        self.form = KVForm(len(self._layers), _HALF, width, _HALF, width, transposed=False)
        """Form of the computed rows: float16."""

    def compute(
        self, chunks: Sequence[PrefillChunk], cancelled: Callable[[], bool] = lambda: False
    ) -> list[PrefillResult] | None:
        """Compute new positions of some sequences.

        Parameters
        ----------
        cancelled : called before every layer; returns whether to stop.

        Returns
        -------
        results : one per chunk, in order; None if `cancelled` returned true.
        """
        from edge_kernels.linear.gguf_blocks import linear_blocks, pack_gated, pack_rows
        from edge_kernels.rows.decoder_rows import rms_norm

        ends = np.cumsum([len(chunk.embeddings) for chunk in chunks])
        bounds = [*zip([0, *ends[:-1]], ends, strict=True)]
        x = np.concatenate([chunk.embeddings for chunk in chunks]).astype(np.float32, copy=False)
        angles = self._angles(chunks)
        kept: tuple[list[list[Bytes]], list[list[Bytes]]] = [[] for _ in chunks], [[] for _ in chunks]
        space = _Space(len(x), self._layers[0])
        for n, layer in enumerate(self._layers):
            if cancelled():
                return None
            self._attend(layer, n, x, angles, chunks, bounds, kept, space)
            rows = pack_rows(rms_norm(x, layer.ffn_norm, self._eps))
            gate = linear_blocks(rows, layer.ffn_gate, out=space.gate)
            up = linear_blocks(rows, layer.ffn_up, out=space.up)
            linear_blocks(pack_gated(gate, up), layer.ffn_down, residual=x, out=x)
        logits = iter(
            self._logits(x, [end - 1 for (_, end), s in zip(bounds, chunks, strict=True) if s.wants_logits])
        )
        return [
            PrefillResult(KVRows(self.form, *rows), next(logits) if chunk.wants_logits else None)
            for chunk, *rows in zip(chunks, *kept, strict=True)
        ]

    def _angles(self, chunks: Sequence[PrefillChunk]) -> tuple[Float32, Float32]:
        """Cosines and sines of the positions: ndarray [shape=(n, dims / 2), float32] each."""
        firsts = [0 if chunk.past is None else len(chunk.past) for chunk in chunks]
        positions = np.concatenate(
            [np.arange(first, first + len(s.embeddings)) for first, s in zip(firsts, chunks, strict=True)]
        )
        turns = self._base ** (-np.arange(0, self._dims, 2) / self._dims)
        angles = positions[:, None] * turns
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def _attend(
        self,
        layer: _Layer,
        n: int,
        x: Float32,
        angles: tuple[Float32, Float32],
        chunks: Sequence[PrefillChunk],
        bounds: Sequence[tuple[int, int]],
        kept: tuple[list[list[Bytes]], list[list[Bytes]]],
        space: _Space,
    ) -> None:
        """Add a layer's attention to x; keep the keys and values of the new positions."""
        from edge_kernels.attention.causal import attention_causal
        from edge_kernels.linear.gguf_blocks import linear_blocks, pack_rows
        from edge_kernels.rows.decoder_rows import norm_and_rotate, rms_norm

        rows = pack_rows(rms_norm(x, layer.attn_norm, self._eps))
        queries = linear_blocks(rows, layer.attn_q, out=space.queries)
        new_keys, new_values = linear_blocks(rows, layer.attn_k), linear_blocks(rows, layer.attn_v)
        norm_and_rotate(queries, layer.attn_q_norm, self._eps, *angles)
        norm_and_rotate(new_keys, layer.attn_k_norm, self._eps, *angles)
        for i, (chunk, (first, end)) in enumerate(zip(chunks, bounds, strict=True)):
            keys, values = _kept(new_keys[first:end], kept[0][i]), _kept(new_values[first:end], kept[1][i])
            past = None if chunk.past is None else chunk.past.halves(n)
            attention_causal(
                queries[first:end], keys, values, self._dims, past=past, out=space.attended[first:end]
            )  # fmt: skip
        linear_blocks(pack_rows(space.attended), layer.attn_output, residual=x, out=x)

    def _logits(self, x: Float32, rows: Sequence[int]) -> Float32:
        from edge_kernels.linear.gguf_blocks import linear_blocks, pack_rows
        from edge_kernels.rows.decoder_rows import rms_norm

        if not rows:
            return np.empty((0, self._head.n), np.float32)
        return linear_blocks(pack_rows(rms_norm(x[[*rows]], self._head_norm, self._eps)), self._head)


def _kept(new: Float32, kept: list[Bytes]) -> npt.NDArray[np.uint16]:
    """Keep new rows as float16."""
    halves = new.astype(np.float16)
    kept.append(halves.view(np.uint8))
    return halves.view(np.uint16)


class _Space:
    """Memory that every layer overwrites: fresh memory costs more than filling it."""

    def __init__(self, n: int, layer: _Layer) -> None:
        self.queries, self.attended = (np.empty((n, layer.attn_q.n), np.float32) for _ in range(2))
        self.gate, self.up = (np.empty((n, layer.ffn_gate.n), np.float32) for _ in range(2))
