"""Patch features → visual tokens: the 3D resampler, one cross-attention of learned queries.

A group is what one set of queries looks at: a single slice, or the same slice of several video frames. Positions in
the picture and in time are added to the keys only; values have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from edge_runtime.config import ResamplerConfig
from edge_runtime.sine import sine
from edge_runtime.vision import offsets_of
from edge_runtime.weights import Float32, GGUFFile

if TYPE_CHECKING:
    from edge_kernels.linear import PackedWeight

STILL = -1  # temporal id of a picture without time


@lru_cache(maxsize=32)
def pos2d_table(dim: int, rows: int, cols: int) -> Float32:
    """Positions of a patch grid, row by row: ndarray [shape=(rows * cols, dim), float32].

    The first half of an embedding encodes the **column**, the second the row.
    """
    by_col, by_row = (sine(dim // 2, np.arange(n)) for n in (cols, rows))
    table = np.empty((rows, cols, dim), np.float32)
    table[:, :, : dim // 2] = by_col[None]
    table[:, :, dim // 2 :] = by_row[:, None]
    return table.reshape(rows * cols, dim)


def time_embedding(dim: int, temporal_id: int) -> Float32:
    """Embedding of one temporal id, zeros for a still picture: ndarray [shape=(dim,), float32]."""
    if temporal_id == STILL:
        return np.zeros(dim, np.float32)
    embedding: Float32 = sine(dim, [temporal_id])[0]
    return embedding


@dataclass(frozen=True)
class GroupItem:
    """One slice inside a group."""

    features: Float32
    """ndarray [shape=(P, width), float32] from the vision tower"""
    tgt_size: tuple[int, int]
    temporal_id: int = STILL


@dataclass(frozen=True)
class _Weights:
    """Everything the resampler reads from the file, packed for the kernels."""

    kv: PackedWeight
    key: PackedWeight
    key_bias: Float32
    value: PackedWeight
    value_bias: Float32
    out: PackedWeight
    out_bias: Float32
    projection: PackedWeight
    norm_kv: tuple[Float32, Float32]
    norm_post: tuple[Float32, Float32]
    queries: Float32
    """Queries normed and multiplied by Wq already: they are the same for every group."""


class Resampler:
    """The resampler of one file; weights are read at the first picture.

    Parameters
    ----------
    width : width of the patch features.
    """

    def __init__(self, file: GGUFFile, config: ResamplerConfig, width: int) -> None:
        self._file, self.config = file, config
        e = config.hidden
        file.tensor("resampler.kv.weight", (e, width))
        for name in ("attn.q", "attn.k", "attn.v", "attn.out"):
            file.tensor(f"resampler.{name}.weight", (e, e))
            file.tensor(f"resampler.{name}.bias", (e,))
        file.tensor("resampler.proj.weight", (e, e))
        for name in ("ln_q", "ln_kv", "ln_post"):
            file.tensor(f"resampler.{name}.weight", (e,))
            file.tensor(f"resampler.{name}.bias", (e,))

    def _norm(self, name: str) -> tuple[Float32, Float32]:
        return self._file.array(f"resampler.{name}.weight"), self._file.array(f"resampler.{name}.bias")

    @cached_property
    def _weights(self) -> _Weights:
        from edge_kernels.linear import linear, pack_weight
        from edge_kernels.norm import layer_norm

        def packed(name: str) -> PackedWeight:
            return pack_weight(self._file.array(f"resampler.{name}.weight"))

        def bias(name: str) -> Float32:
            return self._file.array(f"resampler.{name}.bias")

        queries = layer_norm(self._file.array("resampler.query"), *self._norm("ln_q"), self.config.epsilon)
        return _Weights(
            kv=packed("kv"),
            key=packed("attn.k"),
            key_bias=bias("attn.k"),
            value=packed("attn.v"),
            value_bias=bias("attn.v"),
            out=packed("attn.out"),
            out_bias=bias("attn.out"),
            projection=packed("proj"),
            norm_kv=self._norm("ln_kv"),
            norm_post=self._norm("ln_post"),
            queries=linear(queries, packed("attn.q"), bias("attn.q")),
        )

    def load(self) -> None:
        """Read and pack all weights now rather than at the first picture."""
        _ = self._weights

    def resample(self, groups: Sequence[Sequence[GroupItem]]) -> list[Float32]:
        """Visual tokens of each group.

        Returns
        -------
        tokens : one ndarray [shape=(queries, hidden), float32] per group.
        """
        from edge_kernels.attention import attention
        from edge_kernels.linear import linear
        from edge_kernels.norm import layer_norm

        if not groups:
            return []
        config, w = self.config, self._weights
        items = [item for group in groups for item in group]
        features = np.concatenate([item.features for item in items])
        positions = np.concatenate([self._positions(item) for item in items])  # (P, hidden), P over all groups
        kv_offsets = offsets_of([sum(len(item.features) for item in group) for group in groups])
        q_offsets = offsets_of([config.queries] * len(groups))

        values = layer_norm(linear(features, w.kv, None), *w.norm_kv, config.epsilon)
        k = linear(values + positions, w.key, w.key_bias)
        v = linear(values, w.value, w.value_bias)
        q = np.tile(w.queries, (len(groups), 1))
        scale = 1 / math.sqrt(config.hidden // config.heads)
        out = linear(attention(q, k, v, config.heads, scale, q_offsets, kv_offsets), w.out, w.out_bias)
        tokens = linear(layer_norm(out, *w.norm_post, config.epsilon), w.projection, None)
        return [tokens[q_offsets[i] : q_offsets[i + 1]] for i in range(len(groups))]

    def _positions(self, item: GroupItem) -> Float32:
        table = pos2d_table(self.config.hidden, *item.tgt_size)
        return table if item.temporal_id == STILL else table + time_embedding(self.config.hidden, item.temporal_id)
