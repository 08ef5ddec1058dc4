"""Picture → slices, exactly as the official preprocessing: plan, resize, cut, normalise.

A picture of any size becomes an overview (`source`) and, when its area exceeds one slice, `cols x rows` cells of a
refined picture. Knows neither files nor models: sizes come in a `SlicingConfig`.

Source: the slicing of LLaVA-UHD as in MiniCPM-V's image_processing_minicpmv.py; all arithmetic in double precision,
`int()` truncates and `round()` rounds ties to even, because the official code is Python, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from edge_runtime.errors import ImageError
from edge_runtime.weights.config import SlicingConfig

MAX_SLICE_PATCHES = 16_384
"""More patches than this in one slice are refused: attention over them takes minutes and gigabytes."""

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class SlicePlan:
    """How a picture is cut; (0, 0) for sizes that do not apply."""

    grid: Size
    """(columns, rows) of cells."""
    source: Size
    """Size of the overview."""
    refine: Size
    """Size of the refined picture that the cells are cut from."""
    cell: Size

    @property
    def n_slices(self) -> int:
        """Overview and cells together."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def sizes(self) -> list[Size]:
        """Size of every slice, overview first."""
        return [self.source, *[self.cell] * (self.n_slices - 1)]


@dataclass(frozen=True)
class Slice:
    """One slice, ready for the vision tower."""

    pixels: npt.NDArray[np.uint8]
    """ndarray [shape=(height, width, 3), uint8]"""
    config: SlicingConfig

    @property
    def tgt_size(self) -> tuple[int, int]:
        """Patch grid (rows, columns)."""
        return self.pixels.shape[0] // self.config.patch_size, self.pixels.shape[1] // self.config.patch_size

    @property
    def n_patches(self) -> int:
        """P, rows times columns."""
        return self.tgt_size[0] * self.tgt_size[1]

    @property
    def patches(self) -> npt.NDArray[np.float32]:
        """Normalised pixels: ndarray [shape=(P, 3, patch_size, patch_size), float32], row by row over the slice.

        Made on demand: they are four times as large as the pixels, and useless if the visual tokens are cached.
        """
        (rows, cols), p = self.tgt_size, self.config.patch_size
        mean, std = np.asarray(self.config.mean, np.float32), np.asarray(self.config.std, np.float32)
        values = (self.pixels.astype(np.float32) / np.float32(255) - mean) / std
        patches = values.reshape(rows, p, cols, p, 3).transpose(0, 2, 4, 1, 3).reshape(rows * cols, 3, p, p)
        return np.ascontiguousarray(patches)

    def pixel_values(self) -> npt.NDArray[np.float32]:
        """The official layout of the patches: ndarray [shape=(3, patch_size, patch_size * P), float32]."""
        p = self.config.patch_size
        return np.ascontiguousarray(self.patches.transpose(1, 2, 0, 3)).reshape(3, p, -1)


def _snap(value: float, unit: int) -> int:
    return max(round(value / unit) * unit, unit)


def _fit(width: float, height: float, config: SlicingConfig, enlarge: bool) -> Size:
    """Size of the same aspect and the area of one slice, in whole patches; small pictures grow only on request."""
    if enlarge or width * height > config.scale_resolution**2:
        ratio = width / height
        height = int(config.scale_resolution / math.sqrt(ratio))
        width = int(height * ratio)
    return _snap(width, config.patch_size), _snap(height, config.patch_size)


def _best_grid(width: int, height: int, config: SlicingConfig, max_slices: int) -> Size | None:
    ideal = min(math.ceil(width * height / config.scale_resolution**2), max_slices)
    if ideal <= 1:
        return None
    best, best_error = (1, 1), math.inf
    for count in (ideal - 1, ideal, ideal + 1):
        if count == 1 or count > max_slices:
            continue
        for cols in range(1, count + 1):
            if count % cols:
                continue
            error = abs(math.log(width / height) - math.log(cols / (count // cols)))
            if error < best_error:
                best, best_error = (cols, count // cols), error
    return best


def plan_slices(width: int, height: int, config: SlicingConfig, max_slices: int | None = None) -> SlicePlan:
    """Decide how a picture of `width` x `height` pixels is cut.

    Parameters
    ----------
    max_slices : maximum number of cells; None takes the model's own limit, 1 never cuts (as for video frames).
    """
    grid = _best_grid(width, height, config, config.max_slice_nums if max_slices is None else max_slices)
    if grid is None:
        return SlicePlan((0, 0), _fit(width, height, config, enlarge=True), (0, 0), (0, 0))
    cols, rows = grid
    cell = _fit(_snap(width, cols) / cols, _snap(height, rows) / rows, config, enlarge=True)
    source = _fit(width, height, config, enlarge=False)
    return SlicePlan(grid, source, (cell[0] * cols, cell[1] * rows), cell)


def check_plan(width: int, height: int, plan: SlicePlan, config: SlicingConfig) -> None:
    """Refuse pictures whose slices would be absurdly long, before anything is resized.

    Raises
    ------
    ImageError
        When a slice has more than `MAX_SLICE_PATCHES` patches, or the picture is so narrow that the official
        arithmetic shrinks its short side to nothing (it would then be squeezed into one patch, and the answer would
        be about noise).
    """
    largest = max(w * h for w, h in plan.sizes) // config.patch_size**2
    if largest > MAX_SLICE_PATCHES:
        raise ImageError(
            f"The picture of {width} x {height} pixels is so narrow that one slice would have {largest} patches, "
            f"at most {MAX_SLICE_PATCHES} are encoded; crop it or split it into parts."
        )
    narrowness = max(width, height) / min(width, height)
    if narrowness > config.scale_resolution**2:
        raise ImageError(
            f"The picture of {width} x {height} pixels has an aspect ratio of {narrowness:.0f} to 1, at most "
            f"{config.scale_resolution**2} to 1 leaves anything to see; crop it or split it into parts."
        )


def cut_whole(picture: Image.Image, config: SlicingConfig, max_slices: int | None) -> list[npt.NDArray[np.uint8]]:
    """Pixels of the slices of an RGB picture, as in `cut_picture`, with the plan for its size.

    Raises
    ------
    ImageError
        As `check_plan`.
    """
    plan = plan_slices(*picture.size, config, max_slices)
    check_plan(*picture.size, plan, config)
    return cut_picture(picture, plan)


def slice_image(picture: Image.Image, plan: SlicePlan, config: SlicingConfig) -> list[Slice]:
    """Cut an RGB picture as planned.

    Returns
    -------
    slices : the overview, then the cells row by row.
    """
    return [Slice(pixels, config) for pixels in cut_picture(picture, plan)]


def cut_picture(picture: Image.Image, plan: SlicePlan) -> list[npt.NDArray[np.uint8]]:
    """Pixels of the slices of an RGB picture: ndarray [shape=(height, width, 3), uint8] each, overview first."""
    crops = [_resize(picture, plan.source)]
    if plan.n_slices > 1:
        refined, (w, h) = _resize(picture, plan.refine), plan.cell
        crops += [
            refined[row * h : (row + 1) * h, col * w : (col + 1) * w]
            for row in range(plan.grid[1])
            for col in range(plan.grid[0])
        ]
    return crops


def _resize(picture: Image.Image, size: Size) -> npt.NDArray[np.uint8]:
    """Stretch to `size` with Pillow's bicubic filter, columns first.

    Pillow 13 chooses the axis order by size, which changes bytes by up to 21; one axis per call gives the official
    ones with every version.
    """
    for step in ((size[0], picture.height), size):
        if picture.size != step:  # Pillow would copy it
            picture = picture.resize(step, Image.Resampling.BICUBIC)
    return np.asarray(picture)
