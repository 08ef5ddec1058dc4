"""File, bytes or Pillow picture → upright RGB picture, or one clear sentence why not.

Size is checked from the header, before a pixel is decoded. RGB conversion is the official one (alpha dropped,
palettes looked up, first frame of an animation) with two wanted departures, both for pictures the official code
gets wrong: EXIF orientation is applied, and 16-bit grey is scaled to 8 bits instead of being clipped to white.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from edge_runtime.errors import ImageError

PIXEL_LIMIT = 200_000_000
"""Default for the largest picture that is decoded, in pixels."""

EXIF_ORIENTATION = 0x0112
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")

ImageSource = Image.Image | str | Path | bytes
"""A Pillow picture, a path, encoded bytes, or a `data:` URI."""

_PILLOW_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, MemoryError, struct.error, zlib.error),
    # Its parsers of rarer formats trip over damaged headers with these (measured on 120,000 damaged files).
    *(RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError),
)

_pillow_lock = threading.Lock()

_PROGRAMS = frozenset({"EPS"})
"""Formats that Pillow has another program draw (Ghostscript): no place for bytes from anybody."""


def load_image(source: ImageSource, *, pixel_limit: int = PIXEL_LIMIT) -> Image.Image:
    """Decode a picture and turn it upright.

    Parameters
    ----------
    source : see `ImageSource`.
    pixel_limit : most pixels; larger pictures are refused before they are decoded.

    Returns
    -------
    picture : mode RGB, upright.

    Raises
    ------
    ImageError
        When there is no file, it is no picture, it is cut short, or it is too large.
    """
    if isinstance(source, Image.Image):
        with explained("The picture", pixel_limit):
            return to_rgb(source, "The picture", pixel_limit)
    if isinstance(source, str) and source.startswith("data:"):
        source = _decode_data_uri(source)
    if isinstance(source, bytes) and not source:
        raise ImageError("The picture is empty (0 bytes), expected an encoded picture; get it again.")
    if not isinstance(source, str | Path | bytes):
        raise ImageError(
            f"The picture is of type {type(source).__name__}; expected a path, bytes, a data: URI or a Pillow "
            "picture."
        )
    name = "The picture" if isinstance(source, bytes) else str(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else _existing_file(source)
    with explained(name, pixel_limit), Image.open(file) as picture:
        return to_rgb(picture, name, pixel_limit)


def _existing_file(path: str | Path) -> Path:
    if str(path).startswith(("http://", "https://")):
        raise ImageError(f"{path} is a web address; expected a file: download it first, nothing is fetched.")
    path = Path(path)
    try:
        if path.is_dir():
            raise ImageError(f"{path} is a folder, expected a picture; name the files inside it.")
        if path.stat().st_size == 0:
            raise ImageError(f"{path} is empty (0 bytes), expected a picture; get the file again.")
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist; check the path.") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"The picture {str(path)[:80]!r} cannot be read: {reason}; check the path.") from None
    return path


def _decode_data_uri(uri: str) -> bytes:
    header, _, body = uri.partition(",")
    try:
        if not header.endswith(";base64"):
            raise ValueError
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error):
        raise ImageError("A data: URI is not valid base64; expected 'data:image/png;base64,...'.") from None


def to_rgb(picture: Image.Image, name: str, pixel_limit: int) -> Image.Image:
    """Turn an opened picture upright and into RGB, as `load_image` does; inside `explained`."""
    if picture.format in _PROGRAMS:
        raise ImageError(f"{name} is a PostScript drawing, which has no pixels yet; export it as PNG.")
    width, height = picture.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has {width} x {height} pixels; there is nothing to see, use another picture.")
    if width * height > pixel_limit:
        raise ImageError(_over_limit(name, f"{width} x {height} = {width * height}", pixel_limit))
    # Pictures without the tag take the official path to the byte: exif_transpose would only copy them.
    if picture.getexif().get(EXIF_ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in _SIXTEEN_BIT:
        return _from_16_bit_grey(picture, name).convert("RGB")
    if picture.mode == "F":
        raise ImageError(
            f"{name} holds floating-point samples, whose white is not defined; save it with 8 or 16 bits per sample."
        )
    return picture.convert("RGB")


def _over_limit(name: str, found: str, pixel_limit: int) -> str:
    return (
        f"{name} has {found} pixels, at most {pixel_limit} are decoded; scale it down or raise the limit with "
        "--max-pixels."
    )


def _from_16_bit_grey(picture: Image.Image, name: str) -> Image.Image:
    """Scale 0..65535 to 0..255, rounding; Pillow's convert would clip at 255."""
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"{name} holds 32-bit samples from {values.min()} to {values.max()}; save it with 8 or 16 bits per "
            "sample."
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8), "L")


@contextmanager
def explained(name: str, pixel_limit: int) -> Iterator[None]:
    """Turn whatever Pillow raises into a sentence, with its guard against decompression bombs set to our limit.

    The guard is a module global, hence the lock; it also covers pictures inside pictures (icons), whose size no
    header tells. Pillow's warnings (lost transparency, odd EXIF) concern what the official code does silently.
    """
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = pixel_limit
        try:
            yield
        except UnidentifiedImageError:
            raise ImageError(
                f"{name} is not a picture in a known format; expected JPEG, PNG, WebP, GIF, BMP, TIFF or another "
                "that Pillow reads."
            ) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            found = re.search(r"\d+", str(error))  # "Image size (400000000 pixels) exceeds limit of ..."
            raise ImageError(_over_limit(name, found[0] if found else "too many", pixel_limit)) from None
        except _PILLOW_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise ImageError(
                f"{name} cannot be decoded ({reason}); it is damaged or cut short: get the file again."
            ) from None
        finally:
            Image.MAX_IMAGE_PIXELS = before
