"""Pixels that are no squares → how large the picture is once they are.

Fax machines scan 204 dots per inch across and 98 or 196 down, and TIFF says so. PNG and JPEG are squared only where
they name an aspect of pixels (units 0 of pHYs and JFIF): densities in dots per inch or metre are about paper there,
no viewer applies them, and many writers leave nonsense in them. The side with fewer dots grows, so nothing is lost.
"""

from __future__ import annotations

import math
from typing import Any

from PIL import Image

_X_RESOLUTION, _Y_RESOLUTION = 282, 283
LEAST, MOST = 1.01, 5.0
"""Aspects that are taken; below it is rounding, above it is an error of the writer."""


def dots(picture: Image.Image) -> tuple[float, float] | None:
    """Dots of an opened picture per length, as stored (across, down); None where its pixels are squares."""
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
    return (across, down) if math.isfinite(aspect) and min(across, down) > 0 and LEAST <= aspect <= MOST else None


def squared(size: tuple[int, int], density: tuple[float, float] | None) -> tuple[int, int]:
    """(width, height) of a picture once its pixels are squares."""
    if density is None:
        return size
    (width, height), (across, down) = size, density
    if across > down:
        return width, max(1, round(height * across / down))
    return max(1, round(width * down / across)), height
