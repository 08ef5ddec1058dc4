"""Pictures → smoothing factors and float32 exceptions for the int8 path: `edge-runtime convert --calibrate`.

The file's tower and resampler run in float32 on real pictures. For every product without a layer norm before it, the
largest magnitude of each input column and some rows are kept. The product is then repeated in int8 with factors of
several strengths between the columns of input and weight; those with the least error are taken. A product whose error
stays above `WORST_ERROR` remains in float32. Where factors gain little, none are written.

Source of the factors: Xiao et al., "SmoothQuant" (2022); the strength is chosen here for each product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGMLQuantizationType

from edge_converters.plan.planned_tensor import PlannedTensor
from edge_runtime.errors import CheckpointError, ImageError
from edge_runtime.inputs.image import load_image
from edge_runtime.inputs.slicing import Slice, plan_slices, slice_image
from edge_runtime.vision.arithmetic import Affine, FloatArithmetic, Int8Arithmetic, Product, Weights
from edge_runtime.vision.calibration import SMOOTH_PREFIX, Calibration
from edge_runtime.vision.resampler import GroupItem, Resampler
from edge_runtime.vision.tower import VisionTower
from edge_runtime.weights.config import resampler_config, slicing_config, vision_config
from edge_runtime.weights.gguf_file import Float32, GGUFFile

if TYPE_CHECKING:
    from edge_runtime.vision.arithmetic import Rows

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_SLICES = 32  # a slice takes seconds in float32, and column magnitudes settle within a few
ROWS_PER_SLICE = 8
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
WORTH = 0.9  # factors are taken if they leave at most this share of the error
WORST_ERROR = 0.03  # of a product's output, root mean square; rounding normal rows and weights gives 0.01


@dataclass
class Seen:
    """The inputs of one product."""

    magnitudes: Float32
    """ndarray [shape=(K,), float32], largest of each column"""
    rows: list[Float32]

    def add(self, x: Float32) -> None:
        """Add a batch of rows."""
        np.maximum(self.magnitudes, np.abs(x).max(axis=0), out=self.magnitudes)
        self.rows.append(x[:: max(1, len(x) // ROWS_PER_SLICE)].copy())


class Recorder(FloatArithmetic):
    """float32 arithmetic that records the inputs of products without a layer norm before them."""

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}

    def product(self, weights: Weights, after: Affine | None = None) -> Product:
        """Pack a product that records its input."""
        inner = super().product(weights, after)
        if after is not None or not weights.name:
            return inner
        seen = self.seen[weights.name] = Seen(np.zeros(weights.weight.shape[1], np.float32), [])

        def watched(
            x: Rows, *, gelu: bool = False, residual: Float32 | None = None, out: Float32 | None = None
        ) -> Float32:
            assert isinstance(x, np.ndarray)
            seen.add(x)
            return inner(x, gelu=gelu, residual=residual, out=out)

        return watched


def calibrate(path: Path, pictures: Path, progress: Callable[[str, int, int], None]) -> Calibration:
    """Find factors and exceptions for an mmproj file.

    Parameters
    ----------
    pictures : folder of pictures like those the model will be asked about.
    progress : called with the name of the step, units done and units in all.

    Raises
    ------
    CheckpointError
        When the folder holds no picture that can be read.
    """
    file, recorder = GGUFFile(path), Recorder()
    slicing, config = slicing_config(file), vision_config(file)
    slices = _slices(pictures, lambda picture: _cut(picture, file))
    tower = VisionTower(file, config, slicing, recorder)
    resampler = Resampler(file, resampler_config(file), config.width, recorder)
    for done, one in enumerate(slices):
        progress("calibrate", done, len(slices))
        (features,) = tower.encode([one])
        resampler.resample([[GroupItem(features, one.tgt_size)]])
    smooth, in_float = {}, set()
    for name, seen in recorder.seen.items():
        factor, error = best_factor(file.array(f"{name}.weight"), np.concatenate(seen.rows), seen.magnitudes)
        if error > WORST_ERROR:
            in_float.add(name)
        elif factor is not None:
            smooth[name] = factor
    progress("calibrate", len(slices), len(slices))
    return Calibration(smooth, frozenset(in_float))


def best_factor(weight: Float32, rows: Float32, magnitudes: Float32) -> tuple[Float32 | None, float]:
    """Return the factors with the least int8 error (None where they gain too little), and the error that is left.

    Parameters
    ----------
    weight : ndarray [shape=(N, K), float32]
    rows : ndarray [shape=(M, K), float32], some inputs.
    magnitudes : ndarray [shape=(K,), float32], largest of each column of all inputs.
    """
    exact = FloatArithmetic().product(Weights(weight))(rows)
    inputs, outputs = _floored(magnitudes), _floored(np.abs(weight).max(axis=0))
    plain = _int8_error(weight, rows, exact, Calibration())
    best, least = None, WORTH * plain
    for strength in STRENGTHS:
        factor = inputs**strength / outputs ** (1 - strength)
        factor = (factor / np.exp(np.log(factor).mean())).astype(np.float32)
        error = _int8_error(weight, rows, exact, Calibration({"": factor}))
        if error < least:
            best, least = factor, error
    return best, plain if best is None else least


def _floored(magnitudes: Float32) -> Float32:
    """Magnitudes with zeros replaced, so that they can divide; a column of zeros needs no precision."""
    floored: Float32 = np.maximum(magnitudes, 1e-4 * magnitudes.max() + np.finfo(np.float32).tiny)
    return floored


def _int8_error(weight: Float32, rows: Float32, exact: Float32, calibration: Calibration) -> float:
    """Root mean square error of the int8 product, as a share of the exact one's."""
    found = Int8Arithmetic(calibration).product(Weights(weight))(rows)
    return float(np.linalg.norm(found - exact) / max(np.linalg.norm(exact), np.finfo(np.float32).tiny))


def smoothing_tensors(calibration: Calibration) -> list[PlannedTensor]:
    """Plan the tensors that carry the factors."""
    return [
        PlannedTensor(
            SMOOTH_PREFIX + name,
            factor.shape,
            GGMLQuantizationType.F32,
            lambda start, stop, factor=factor: factor.reshape(1, -1),  # type: ignore[misc]
        )
        for name, factor in calibration.smooth.items()
    ]


def _cut(picture: Path, file: GGUFFile) -> list[Slice]:
    slicing = slicing_config(file)
    image = load_image(picture)
    return slice_image(image, plan_slices(*image.size, slicing), slicing)


def _slices(folder: Path, cut: Callable[[Path], Sequence[Slice]]) -> list[Slice]:
    """Slices of the folder's pictures, taken in turns so that every picture counts."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; --calibrate takes a folder of pictures.")
    found: list[Sequence[Slice]] = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and len(found) < MAX_SLICES:
            try:
                found.append(cut(path))
            except ImageError:
                continue
    if not found:
        raise CheckpointError(
            f"{folder} holds no picture that can be read ({', '.join(SUFFIXES)}); put some pictures like those the "
            "model will see into it."
        )
    turns = [group[i] for i in range(max(map(len, found))) for group in found if i < len(group)]
    return turns[:MAX_SLICES]
