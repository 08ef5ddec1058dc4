"""Picture with transparency → RGB on white.

The official recipe drops alpha, which reveals the colours stored in transparent pixels: black letters on a
transparent background become black on black. Pages, browsers and printers show such pictures on white. Opaque pixels
keep their exact values, and a picture without transparent pixels equals `convert("RGB")`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

_UNUSED_ALPHA = ("BMP", "DIB", "ICO", "CUR", "TGA")
"""Formats whose fourth byte is often left at 0; there, alpha without an opaque pixel is ignored."""
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


def on_white(picture: Image.Image, key: Any = None, kind: str | None = None) -> Image.Image:
    """Compose a picture onto white.

    Parameters
    ----------
    picture : 8 bits per sample or fewer; frames of videos as modes RGBA, RGBa, LA or La.
    key : the transparent colour, as from `colour_key`; for pictures without alpha.
    kind : Pillow's name for the original format.

    Returns
    -------
    picture : mode RGB.
    """
    if picture.mode in _ALPHA:
        rgba = picture.convert("LA" if picture.mode == "La" else "RGBA")
        alpha = rgba.getchannel("A")
        colours = rgba.convert("RGB") if picture.mode in ("La", "RGBa") else picture.convert("RGB")
    elif picture.mode == "P" and picture.has_transparency_data:
        alpha = picture.convert("RGBA").getchannel("A")
        colours = picture.convert("RGB")
    elif key is not None and picture.mode in ("1", "L", "RGB"):
        colours = picture.convert("RGB")
        alpha = Image.fromarray(np.where((np.asarray(colours) == key).all(axis=2), np.uint8(0), np.uint8(255)))
    else:
        return picture.convert("RGB")
    low, high = alpha.getextrema()
    if low == 255 or (high == 0 and kind in _UNUSED_ALPHA):
        return colours
    white = Image.new("RGB", picture.size, "white")
    white.paste(colours, mask=alpha)
    return white


def colour_key(picture: Image.Image) -> Any:
    """The transparent colour of an opened picture without alpha and palette, as 8-bit RGB values; None without one.

    Must be called before the pixels are decoded: PNG gives it in the depth of the file.
    """
    key = picture.info.get("transparency")
    tile = getattr(picture, "tile", None)
    rawmode = tile[0][3] if tile else ""
    rawmode = rawmode if isinstance(rawmode, str) else ""
    if picture.mode == "RGB":
        if not isinstance(key, tuple) or len(key) != 3:
            return None  # an animation's index of an earlier frame
        return tuple(value >> 8 if rawmode.startswith("RGB;16") else value for value in key)
    if not isinstance(key, int):
        return None
    if picture.mode == "1":
        return (255 if key else 0,) * 3
    if picture.mode == "L":
        return (key * {"L;2": 85, "L;4": 17}.get(rawmode, 1),) * 3
    return None
