"""Pictures that depend on their size alone, so that all sides see the same, and the slices we cut them into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

if TYPE_CHECKING:
    from edge_runtime.inputs.slicing import Slice
    from edge_runtime.weights.config import SlicingConfig


def picture(width: int, height: int) -> npt.NDArray[np.uint8]:
    """Half coarse shapes, half noise: ndarray [shape=(height, width, 3), uint8]."""
    random = np.random.default_rng([width, height])
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = random.integers(0, 256, (height, width, 3), np.uint16)
    pixels: npt.NDArray[np.uint8] = ((np.asarray(coarse, np.uint16) + noise) // 2).astype(np.uint8)
    return pixels


def cut(config: SlicingConfig, width: int, height: int, expected: int | None = None) -> list[Slice]:
    """Slices of `picture`; their number is checked against the scenario's."""
    from edge_runtime.inputs.slicing import plan_slices, slice_image

    plan = plan_slices(width, height, config)
    if expected is not None and plan.n_slices != expected:
        raise ValueError(f"{width} x {height} is cut into {plan.n_slices} slices, the scenario says {expected}")
    return slice_image(Image.fromarray(picture(width, height)), plan, config)


def shapes(count: int, largest: int = 448, unit: int = 14) -> list[tuple[int, int]]:
    """Widths and heights of many pictures that are one slice each, the same in every run."""
    random = np.random.default_rng(0)
    sides: Any = random.integers(largest // 2 // unit, largest // unit + 1, (count, 2)) * unit
    return [(int(width), int(height)) for width, height in sides]
