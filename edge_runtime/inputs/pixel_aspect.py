"""Non-square pixels → the size of the picture once they are square.

Fax machines scan 204 dots per inch across and 98 or 196 down, and TIFF says so. PNG and JPEG are squared only if they
give an aspect of pixels (units 0 of pHYs and JFIF): densities in dots per inch or metre are about paper there, no
viewer applies them, and many writers leave nonsense in them. The side with fewer dots grows, so nothing is lost.
"""

from __future__ import annotations

import math
from typing import Any

from PIL import Image

_X_RESOLUTION, _Y_RESOLUTION = 282, 283
MIN_ASPECT, MAX_ASPECT = 1.01, 5.0
"""Aspects that are applied; less is rounding, more is an error of the writer."""


def dots(picture: Image.Image) -> tuple[float, float] | None:
    """Dots per length of an opened picture, as stored (across, down); None if its pixels are square."""
    found: Any = None
    if picture.format == "TIFF":
        tags = getattr(picture, "tag_v2", {})
        found = tags.get(_X_RESOLUTION), tags.get(_Y_RESOLUTION)
    elif picture.format == "PNG":
        found = picture.info.get("aspect")
    elif picture.format in ("JPEG", "MPO") and picture.info.get("jfif_unit") == 0:
        found = picture.info.get("jfif_density")
        if found == picture.size:  # written there by mistake
            return None
    try:
        across, down = (float(value) for value in found)
        aspect = max(across, down) / min(across, down)
    except (TypeError, ValueError, ArithmeticError):
        return None
    return (
        (across, down)
        if math.isfinite(aspect) and min(across, down) > 0 and MIN_ASPECT <= aspect <= MAX_ASPECT
        else None
    )


def squared(size: tuple[int, int], density: tuple[float, float] | None) -> tuple[int, int]:
    """(width, height) of a picture once its pixels are square."""
    if density is None:
        return size
    (width, height), (across, down) = size, density
    if across > down:
        return width, max(1, round(height * across / down))
    return max(1, round(width * down / across)), height
