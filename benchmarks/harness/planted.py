"""Weights that are hard to quantise, planted in an mmproj file while it is read.

`gains`: ten channels of every layer norm have fifty times the gain and bias, and the products that read them a
fiftieth of the weight in those columns; in float32 only rounding changes. `fc2`: five hidden units of every MLP have
thirty times their weights and bias before GELU and a thirtieth after it; the reference is float32 of that changed
model, since GELU is not linear. Trained towers have both kinds of outliers, random ones neither.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from edge_runtime.weights.gguf_file import Float32, GGUFFile

GAIN, CHANNELS = 50.0, 10
UNIT_GAIN, UNITS = 30.0, 5
PLANTS = ("none", "gains", "fc2")


class PlantedFile(GGUFFile):
    """A file whose arrays are changed as `plant` says; see `planted`."""

    plant = "none"

    @cached_property
    def unread(self) -> set[str]:
        """Changed tensors not read yet: if one were read some other way, nothing would be planted in it."""
        return set(self._factors)

    def array(self, name: str, shape: tuple[int, ...] | None = None) -> Float32:  # type: ignore[override]
        """The tensor as float32, with what is planted in it."""
        value = super().array(name, shape)
        factor = self._factors.get(name)
        self.unread.discard(name)
        return value if factor is None else np.ascontiguousarray(value * factor)

    @cached_property
    def _factors(self) -> dict[str, Float32]:
        """Changed tensors by name, with their factors."""
        factors: dict[str, Float32] = {}
        layer = 0
        while self.plant != "none" and f"v.blk.{layer}.ln1.weight" in self.tensors:
            factors |= self._gains(layer) if self.plant == "gains" else self._units(layer)
            layer += 1
        return factors

    def _gains(self, layer: int) -> dict[str, Float32]:
        blk, (fc1, _) = f"v.blk.{layer}", self._mlp(layer)
        factors: dict[str, Float32] = {}
        for norm, readers in (("ln1", [f"{blk}.attn_{part}" for part in "qkv"]), ("ln2", [fc1])):
            width = self.tensor(f"{blk}.{norm}.weight").shape[0]
            factor = _on_some(width, CHANNELS, GAIN, seed=(layer, int(norm[-1])))
            factors |= {f"{blk}.{norm}.{part}": factor for part in ("weight", "bias")}
            factors |= {f"{reader}.weight": np.float32(1) / factor[None] for reader in readers}
        return factors

    def _units(self, layer: int) -> dict[str, Float32]:
        fc1, fc2 = self._mlp(layer)
        factor = _on_some(self.tensor(f"{fc1}.weight").shape[0], UNITS, UNIT_GAIN, seed=(layer, 3))
        return {
            f"{fc1}.weight": factor[:, None],
            f"{fc1}.bias": factor,
            f"{fc2}.weight": np.float32(1) / factor[None],
        }

    def _mlp(self, layer: int) -> tuple[str, str]:
        """Names of (fc1, fc2), which are swapped in MiniCPM-V files."""
        down, up = f"v.blk.{layer}.ffn_down", f"v.blk.{layer}.ffn_up"
        swapped = self.tensor(f"{down}.weight").shape[-1] == self.tensor("v.post_ln.weight").shape[0]
        return (down, up) if swapped else (up, down)


def planted(plant: str) -> type[PlantedFile]:
    """Class that replaces GGUFFile.

    Raises
    ------
    ValueError
        If the plant is unknown.
    """
    if plant not in PLANTS:
        raise ValueError(f"The plant is {plant!r}; expected one of {', '.join(PLANTS)}.")
    return type("Planted", (PlantedFile,), {"plant": plant})


def _on_some(size: int, count: int, factor: float, seed: tuple[int, int]) -> Float32:
    chosen = np.random.default_rng(seed).permutation(size)[:count]
    result: npt.NDArray[np.float32] = np.ones(size, np.float32)
    result[chosen] = factor
    return result


def cosines(a: Float32, b: Float32) -> npt.NDArray[np.float64]:
    """Cosines between the rows of two matrices: ndarray [shape=(M,), float64]."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    result: npt.NDArray[np.float64] = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    return result
