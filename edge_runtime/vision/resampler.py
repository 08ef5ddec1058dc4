"""Patch features → visual tokens: the 3D resampler, one cross-attention of learned queries.

A group is what one set of queries attends to: a single slice, or the same slice of several video frames. Keys
include positions in the picture and in time; values do not. Wk (x + position) is computed as Wk x + Wk position, the
second term always in float32 from the file's own weights: it is a small product, the same for all slices of a size,
and its last digits are what lets the queries distinguish places and times. Only the content uses the arithmetic of
the products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np

from edge_runtime.inputs.slice_groups import STILL
from edge_runtime.vision.arithmetic import Affine, Arithmetic, FloatArithmetic, Norm, Product, Weights
from edge_runtime.vision.sine_positions import sine
from edge_runtime.vision.tower import offsets_of
from edge_runtime.weights.config import ResamplerConfig
from edge_runtime.weights.gguf_file import Float32, GGUFFile

BLOCK_OUTPUTS = 512
"""Outputs of a float32 weight that are in memory at a time: 8 MB at full size, where all of them are 67 MB."""


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
    """One slice of a group."""

    features: Float32
    """ndarray [shape=(P, width), float32] from the vision tower"""
    tgt_size: tuple[int, int]
    temporal_id: int = STILL


class PositionKeys:
    """Wk times the embeddings of places and times, in float32; cached, since all slices of a size share them.

    Parameters
    ----------
    multiply : float32 product of rows with some columns of Wk.
    """

    MAX_TIMES = 1024  # cached at once; 16 MB at full size

    def __init__(self, multiply: Callable[[Float32, slice], Float32], hidden: int) -> None:
        self._multiply, self._hidden = multiply, hidden
        self._columns = self._rows = np.empty((0, hidden), np.float32)
        self._times: dict[int, Float32] = {STILL: np.zeros(hidden, np.float32)}
        self._last: tuple[list[tuple[tuple[int, int], int]], Float32] = ([], np.empty((0, hidden), np.float32))

    def of(self, items: Sequence[GroupItem]) -> Float32:
        """Keys of the positions of all patches of all items: ndarray [shape=(P, hidden), float32]."""
        wanted = [(item.tgt_size, item.temporal_id) for item in items]
        if wanted == self._last[0]:  # usual: all cells of a picture have one size
            return self._last[1]
        side = max(max(item.tgt_size) for item in items)
        times = {item.temporal_id for item in items}
        if side > len(self._rows) or not times <= self._times.keys():
            self._extend(side, times)
        keys = []
        for item in items:
            (rows, cols), time = item.tgt_size, self._times[item.temporal_id]
            by_row = self._rows[:rows] + time
            keys.append((by_row[:, None] + self._columns[:cols]).reshape(rows * cols, -1))
        self._last = wanted, np.concatenate(keys)
        return self._last[1]

    def forget(self) -> None:
        """Drop the last result."""
        self._last = [], np.empty((0, self._hidden), np.float32)

    def _extend(self, side: int, times: set[int]) -> None:
        project, half = self._multiply, self._hidden // 2
        if side > len(self._rows):
            places = sine(half, np.arange(side))  # the first half of an embedding encodes the column
            self._columns, self._rows = project(places, slice(half)), project(places, slice(half, None))
        if len(self._times | dict.fromkeys(times)) > self.MAX_TIMES:
            self._times = {STILL: self._times[STILL]}
        new = sorted(times - self._times.keys())
        if new:
            self._times |= zip(new, project(sine(self._hidden, new), slice(None)), strict=True)


def _multiply_in_blocks(file: GGUFFile, name: str, rows: Float32, columns: slice) -> Float32:
    """Multiply rows with some columns of a weight in float32, with a block of its outputs in memory at a time.

    Returns
    -------
    products : ndarray [shape=(len(rows), N), float32, C-contiguous].
    """
    n_outputs = file.tensors[name].shape[0]
    found = np.empty((len(rows), n_outputs), np.float32)
    for first in range(0, n_outputs, BLOCK_OUTPUTS):
        block = slice(first, min(first + BLOCK_OUTPUTS, n_outputs))
        found[:, block] = FloatArithmetic().product(Weights(file.rows(name, block)[:, columns]))(rows)
    return found


@dataclass(frozen=True)
class _Weights:
    """Everything the resampler reads from the file, packed for the kernels."""

    kv: Product
    norm_kv: Norm
    key: Product
    value: Product
    out: Product
    norm_post: Norm
    projection: Product
    queries: Float32
    """Queries, already normed and multiplied by Wq: they are the same for every group."""


class Resampler:
    """The resampler of one file; weights are loaded at the first picture.

    Parameters
    ----------
    width : width of the patch features.
    """

    def __init__(self, file: GGUFFile, config: ResamplerConfig, width: int, arithmetic: Arithmetic) -> None:
        self._file, self.config, self._arithmetic = file, config, arithmetic
        e = config.hidden
        self._position_keys = PositionKeys(partial(_multiply_in_blocks, file, "resampler.attn.k.weight"), e)
        file.tensor("resampler.kv.weight", (e, width))
        for name in ("attn.q", "attn.k", "attn.v", "attn.out"):
            file.tensor(f"resampler.{name}.weight", (e, e))
            file.tensor(f"resampler.{name}.bias", (e,))
        file.tensor("resampler.proj.weight", (e, e))
        for name in ("ln_q", "ln_kv", "ln_post"):
            file.tensor(f"resampler.{name}.weight", (e,))
            file.tensor(f"resampler.{name}.bias", (e,))

    def _affine(self, name: str) -> Affine:
        return Affine(self._file.array(f"resampler.{name}.weight"), self._file.array(f"resampler.{name}.bias"))

    @cached_property
    def _weights(self) -> _Weights:
        from edge_kernels.rows.norm import layer_norm

        def weights(name: str, *, with_bias: bool = True) -> Weights:
            name = f"resampler.{name}"
            bias = self._file.array(f"{name}.bias") if with_bias else None
            return Weights(self._file.array(f"{name}.weight"), bias, name)

        arithmetic, epsilon = self._arithmetic, self.config.epsilon
        norm_q, norm_kv, norm_post = (self._affine(name) for name in ("ln_q", "ln_kv", "ln_post"))
        queries = layer_norm(self._file.array("resampler.query"), norm_q.gain, norm_q.bias, epsilon)
        queries = _multiply_in_blocks(self._file, "resampler.attn.q.weight", queries, slice(None))
        queries += self._file.array("resampler.attn.q.bias")
        return _Weights(
            kv=arithmetic.product(weights("kv", with_bias=False)),
            norm_kv=arithmetic.norm(norm_kv, epsilon),
            key=arithmetic.product(weights("attn.k"), norm_kv),
            value=arithmetic.product(weights("attn.v"), norm_kv),
            out=arithmetic.product(weights("attn.out")),
            norm_post=arithmetic.norm(norm_post, epsilon),
            projection=arithmetic.product(weights("proj", with_bias=False), norm_post),
            queries=queries,
        )

    def load(self) -> None:
        """Read and pack all weights now instead of at the first picture."""
        _ = self._weights

    def unload(self) -> None:
        """Drop the weights; the next picture loads them again."""
        self.__dict__.pop("_weights", None)

    def release_idle_memory(self) -> None:
        """Drop the keys of the last positions."""
        self._position_keys.forget()

    def resample(self, groups: Sequence[Sequence[GroupItem]]) -> list[Float32]:
        """Compute the visual tokens of each group.

        Returns
        -------
        tokens : one ndarray [shape=(queries, hidden), float32] per group.
        """
        if not groups:
            return []
        config, w = self.config, self._weights
        items = [item for group in groups for item in group]
        features = np.concatenate([item.features for item in items])
        positions = self._position_keys.of(items)  # (P, hidden), P over all groups
        kv_offsets = offsets_of([sum(len(item.features) for item in group) for group in groups])
        q_offsets = offsets_of([config.queries] * len(groups))

        content = w.norm_kv(w.kv(features))
        k, v = w.key(content, residual=positions), w.value(content)
        q = np.tile(w.queries, (len(groups), 1))
        scale = 1 / math.sqrt(config.hidden // config.heads)
        attended = self._arithmetic.attention(q, k, v, config.heads, scale, q_offsets, kv_offsets, fine_scores=True)
        tokens = w.projection(w.norm_post(w.out(attended)))
        return [tokens[q_offsets[i] : q_offsets[i + 1]] for i in range(len(groups))]
