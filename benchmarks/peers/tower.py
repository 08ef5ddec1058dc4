"""The SigLIP tower's weights and inputs, for peers that build it themselves: NumPy in, NumPy out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness.child import timed
from benchmarks.harness.pictures import cut
from edge_runtime.vision.tower import position_ids
from edge_runtime.weights.config import slicing_config, vision_config
from edge_runtime.weights.gguf_file import GGUFFile

Float32 = npt.NDArray[np.float32]
GRID = (32, 32)
"""Patches of a slice of 448 x 448, the one shape that these peers are built for."""


@dataclass(frozen=True)
class Affine:
    """Weight [N, K] and bias [N] of a product, or gain and bias [E] of a layer norm."""

    weight: Float32
    bias: Float32


@dataclass(frozen=True)
class Layer:
    """One encoder layer."""

    norm1: Affine
    query: Affine
    key: Affine
    value: Affine
    out: Affine
    norm2: Affine
    fc1: Affine
    fc2: Affine


class TowerFile:
    """Reads the tower of an mmproj file, one layer at a time."""

    def __init__(self, path: str | Path) -> None:
        self.file = GGUFFile(path)
        self.config, self.slicing = vision_config(self.file), slicing_config(self.file)
        self.scale = 1 / math.sqrt(self.config.width // self.config.heads)

    def affine(self, name: str) -> Affine:
        """A product or a layer norm."""
        return Affine(self.file.array(f"{name}.weight"), self.file.array(f"{name}.bias"))

    def patches(self) -> Affine:
        """The patch kernel as a product over flattened patches."""
        kernel = self.affine("v.patch_embd")
        return Affine(kernel.weight.reshape(self.config.width, -1), kernel.bias)

    def positions(self) -> Float32:
        """Position embeddings of the patches of a `GRID`: ndarray [shape=(P, width), float32]."""
        table = self.file.array("v.position_embd.weight").reshape(-1, self.config.width)
        return np.ascontiguousarray(table[position_ids(*GRID, self.config.position_side)])

    def layer(self, n: int) -> Layer:
        """One layer's weights."""
        blk = f"v.blk.{n}"
        down, up = f"{blk}.ffn_down", f"{blk}.ffn_up"
        swapped = self.file.tensor(f"{down}.weight").shape[-1] == self.config.width
        fc1, fc2 = (down, up) if swapped else (up, down)
        names = ("ln1", "attn_q", "attn_k", "attn_v", "attn_out", "ln2")
        return Layer(*(self.affine(f"{blk}.{name}") for name in names), self.affine(fc1), self.affine(fc2))

    def pixels(self, width: int, height: int, slices: int) -> list[Float32]:
        """Flattened patches of each slice: ndarrays [shape=(P, 3 · patch²), float32]."""
        items = cut(self.slicing, width, height, slices)
        if any(item.tgt_size != GRID for item in items):
            raise ValueError(f"a slice of {width} x {height} has no {GRID[0]} x {GRID[1]} patches")
        return [item.patches.reshape(len(item.patches), -1) for item in items]


class TowerSide:
    """Base of the sides that build the tower; `run` turns flattened patches into features."""

    file: TowerFile

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self._inputs: dict[tuple[int, int], list[Float32]] = {}

    def run(self, pixels: Float32) -> Float32:
        """Features of one slice."""
        raise NotImplementedError

    def prepare(self, width: int, height: int, slices: int) -> int:
        """Cut a picture."""
        self._inputs[width, height] = self.file.pixels(width, height, slices)
        return slices

    def encode(self, width: int, height: int) -> dict[str, float]:
        """Time the tower over all slices."""
        _, seconds = timed(lambda: [self.run(pixels) for pixels in self._inputs[width, height]])
        return {"tower_s": seconds}

    def output(self, width: int, height: int, path: str) -> None:
        """Write the features of a picture's first slice."""
        np.savez(path, features=self.run(self._inputs[width, height][0]))

    def many(self, count: int, first: int) -> None:
        """Encode one slice again and again; these peers have one shape only."""
        pixels = next(iter(self._inputs.values()))[0]
        for _ in range(count):
            self.run(pixels)
