"""Slices → patch features: the SigLIP2 tower of an mmproj file, run by `edge_kernels`.

All slices are concatenated along the rows, so every matrix product is one product whatever the shapes; only attention
works slice by slice. Pre-norm layers, no class token, no causal mask, tanh-GELU. The caller chooses the
arithmetic of the products (see `arithmetic`); everything between them is float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge_runtime.errors import ModelFileError
from edge_runtime.inputs.slicing import Slice
from edge_runtime.vision.arithmetic import Affine, Arithmetic, Mlp, Norm, Product, SelfAttention, Weights
from edge_runtime.weights.config import SlicingConfig, VisionConfig
from edge_runtime.weights.gguf_file import Float32, GGUFFile

if TYPE_CHECKING:
    from edge_kernels.linear.dispatch import PackedFloatWeight


OnLayer = Callable[[int, int], None]
"""Called with the number of finished layers and the total."""


def no_report(done: int, total: int) -> None:
    """Report nothing."""


@lru_cache(maxsize=256)
def position_buckets(n: int, side: int) -> npt.NDArray[np.int64]:
    """Learned-position coordinate of each of `n` patches along one axis: ndarray [shape=(n,), int64], 0..side-1.

    Mathematically floor(side * i / n). The official code computes i/n in float32 with torch.arange and counts the
    edges (k+1)/side below it, which gives one less at exact multiples for some n (25 among them, a common
    overview). The code below repeats torch's arithmetic: vectors of 8 whose base is rounded to float32.
    """
    edges = (1 / side + np.arange(side - 1) * (1 / side)).astype(np.float32)
    step = float(np.float32(1 / n))
    index = np.arange(n)
    base = 8 * (index // 8)
    fraction = ((base * step).astype(np.float32).astype(np.float64) + (index - base) * step).astype(np.float32)
    return np.searchsorted(edges, fraction, side="right").astype(np.int64)


def position_ids(rows: int, cols: int, side: int) -> npt.NDArray[np.int64]:
    """Row of the position table for each patch of a grid, row by row: ndarray [shape=(rows * cols,), int64]."""
    return (position_buckets(rows, side)[:, None] * side + position_buckets(cols, side)).ravel()


def offsets_of(lengths: Sequence[int]) -> npt.NDArray[np.int64]:
    """Cumulative starts of consecutive runs: ndarray [shape=(n + 1,), int64]."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@dataclass
class Run:
    """Slices on their way through the tower, one after the other along the rows."""

    offsets: npt.NDArray[np.int64]
    """First row of each slice, and the number of rows: ndarray [shape=(S + 1,), int64]."""
    x: Float32
    """ndarray [shape=(P, width), float32], overwritten by each layer."""
    n_layers: int = 0
    """Layers that it has passed."""


@dataclass(frozen=True)
class Layer:
    """One encoder layer, weights packed for the kernels."""

    norm1: Norm
    attend: SelfAttention
    """Queries, keys and values in one product: one pass over the rows instead of three."""
    out: Product
    norm2: Norm
    mlp: Mlp


class VisionTower:
    """The vision tower of one file; weights are read and packed at the first picture.

    Parameters
    ----------
    file : an mmproj file that passed `config.check_mmproj`.
    """

    def __init__(self, file: GGUFFile, config: VisionConfig, slicing: SlicingConfig, arithmetic: Arithmetic) -> None:
        self._file, self.config, self._patch, self._arithmetic = file, config, slicing.patch_size, arithmetic
        self._loaded: list[Layer] = []
        self._check_tensors()

    def _check_tensors(self) -> None:
        """Check every tensor's shape against the configuration before anything is loaded."""
        width, mlp, patch, file = self.config.width, self.config.mlp, self._patch, self._file
        file.tensor("v.patch_embd.weight", (width, 3, patch, patch))
        file.tensor("v.patch_embd.bias", (width,))
        file.tensor("v.post_ln.weight", (width,))
        file.tensor("v.post_ln.bias", (width,))
        for n in range(self.config.layers):
            for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
                file.tensor(f"v.blk.{n}.{part}.weight", (width, width))
                file.tensor(f"v.blk.{n}.{part}.bias", (width,))
            for part in ("ln1", "ln2"):
                file.tensor(f"v.blk.{n}.{part}.weight", (width,))
                file.tensor(f"v.blk.{n}.{part}.bias", (width,))
            fc1, fc2 = self._mlp_names(n)
            file.tensor(f"{fc1}.weight", (mlp, width))
            file.tensor(f"{fc1}.bias", (mlp,))
            file.tensor(f"{fc2}.weight", (width, mlp))
            file.tensor(f"{fc2}.bias", (width,))

    def _mlp_names(self, layer: int) -> tuple[str, str]:
        """Names of (fc1, fc2). MiniCPM-V files have them swapped, which shows in the row length, as in llama.cpp."""
        down, up = f"v.blk.{layer}.ffn_down", f"v.blk.{layer}.ffn_up"
        swapped = self._file.tensor(f"{down}.weight").shape[-1] == self.config.width
        return (down, up) if swapped else (up, down)

    def _weights(self, *names: str) -> Weights:
        """Weights of a product whose outputs are those of all `names`, one after the other."""
        parts = [[self._file.array(f"{name}.{part}") for name in names] for part in ("weight", "bias")]
        weight, bias = (found[0] if len(names) == 1 else np.concatenate(found) for found in parts)
        return Weights(weight, bias, names[0])

    def _affine(self, name: str) -> Affine:
        return Affine(self._file.array(f"{name}.weight"), self._file.array(f"{name}.bias"))

    @property
    def is_loaded(self) -> bool:
        """Whether layer weights are in memory."""
        return bool(self._loaded)

    def layers(self, on_layer: OnLayer = no_report) -> Iterator[Layer]:
        """Layers in order, read and packed when first needed."""
        for n in range(self.config.layers):
            on_layer(n, self.config.layers)
            if n == len(self._loaded):
                self._loaded.append(self.layer(n))
            yield self._loaded[n]
        on_layer(self.config.layers, self.config.layers)

    def layer(self, n: int) -> Layer:
        """Read and pack a layer, which is not kept here."""
        blk, (fc1, fc2) = f"v.blk.{n}", self._mlp_names(n)
        ln1, ln2 = self._affine(f"{blk}.ln1"), self._affine(f"{blk}.ln2")
        make, heads = self._arithmetic, self.config.heads
        qkv = self._weights(f"{blk}.attn_q", f"{blk}.attn_k", f"{blk}.attn_v")
        layer = Layer(
            norm1=make.norm(ln1, self.config.epsilon),
            attend=make.self_attention(qkv, heads, 1 / math.sqrt(self.config.width // heads), ln1),
            out=make.product(self._weights(f"{blk}.attn_out")),
            norm2=make.norm(ln2, self.config.epsilon),
            mlp=make.mlp(self._weights(fc1), self._weights(fc2), ln2),
        )
        self._file.release_pages()  # packed weights are copies
        return layer

    @cached_property
    def _embedding(self) -> tuple[PackedFloatWeight, Float32]:
        """Patch kernel as a product over flattened patches, and its bias."""
        from edge_kernels.linear.dispatch import pack_float_weight

        kernel = self._file.array("v.patch_embd.weight").reshape(self.config.width, -1)
        return pack_float_weight(kernel), self._file.array("v.patch_embd.bias")

    @cached_property
    def _post_norm(self) -> Affine:
        return self._affine("v.post_ln")

    def load(self) -> None:
        """Read and pack all weights now instead of at the first picture."""
        _ = self._embedding, list(self.layers()), self._post_norm

    def unload(self) -> None:
        """Drop all weights; the next picture loads them again."""
        self._loaded = []
        for name in ("_embedding", "_post_norm"):
            self.__dict__.pop(name, None)

    def encode(self, slices: Sequence[Slice], on_layer: OnLayer = no_report) -> list[Float32]:
        """Patch features of each slice; all slices go through the tower together.

        Parameters
        ----------
        on_layer : called before every layer and after the last with (finished layers, layers), on this thread; an
            exception from it ends the encoding.

        Returns
        -------
        features : one ndarray [shape=(P, width), float32] per slice, after the last layer norm.

        Raises
        ------
        ModelFileError
            When the features are not finite: the weights are damaged.
        """
        run = self.begin(slices)
        for layer in self.layers(on_layer):
            self.advance(run, layer)
        return self.finish(run)

    def begin(self, slices: Sequence[Slice]) -> Run:
        """Embed the patches of slices."""
        from edge_kernels.rows.patch_embed import patch_embed

        kernel, bias = self._embedding
        ids = np.concatenate([position_ids(*s.tgt_size, self.config.position_side) for s in slices])
        pixels = np.concatenate([s.patches.reshape(s.n_patches, -1) for s in slices])
        # Learned positions stay in the file: a slice needs a fifth of the 4,900.
        positions = self._file.rows("v.position_embd.weight", ids)
        x = patch_embed(pixels, kernel, bias, positions, np.arange(len(ids)))
        return Run(offsets_of([s.n_patches for s in slices]), x)

    def advance(self, run: Run, layer: Layer) -> None:
        """Compute one layer."""
        x = run.x
        x = layer.out(layer.attend(layer.norm1(x), run.offsets), residual=x, out=x)
        run.x = layer.mlp(layer.norm2(x), x)
        run.n_layers += 1

    def finish(self, run: Run) -> list[Float32]:
        """Features of each slice of a run that has passed all layers; errors as in `encode`."""
        from edge_kernels.rows.norm import layer_norm

        x = layer_norm(run.x, self._post_norm.gain, self._post_norm.bias, self.config.epsilon)
        if not np.isfinite(x).all():
            raise ModelFileError(
                f"{self._file.path.name}: the vision tower computes values that are not finite; download or "
                "convert it again."
            )
        return [x[first:end] for first, end in pairwise(run.offsets)]
