"""File, bytes, Pillow picture or page → upright RGB picture, or one clear sentence why not.

Size is checked from the header, before a pixel is decoded. RGB conversion is the official one (alpha dropped,
palettes looked up, first frame of an animation) with two wanted departures, both for pictures the official code
gets wrong: EXIF orientation is applied, and 16-bit grey is scaled to 8 bits instead of being clipped to white.
"""

from __future__ import annotations

import io
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from edge_runtime import base64_data
from edge_runtime.errors import ImageError, MessageError
from edge_runtime.pages import Page
from edge_runtime.picture_formats import prepare_format, unknown_format

PIXEL_LIMIT = 200_000_000
"""Default for the largest picture that is decoded, in pixels."""

EXIF_ORIENTATION = 0x0112
TIFF_WIDTH, TIFF_HEIGHT = 0x0100, 0x0101
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")

ImageSource = Image.Image | str | Path | bytes | IO[bytes] | Page
"""A Pillow picture, a path, a `data:` URI, encoded bytes, a file opened for bytes, or a page of a document."""

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
    if isinstance(source, Page):
        return source.render(pixel_limit)
    with opened_picture(source, pixel_limit) as (picture, name):
        return to_rgb(picture, name, pixel_limit)


def picture_size(source: ImageSource, *, pixel_limit: int = PIXEL_LIMIT) -> tuple[int, int]:
    """(width, height) that `load_image` will give, from the header alone; parameters and errors as there."""
    if isinstance(source, Page):
        return source.size(pixel_limit)
    with opened_picture(source, pixel_limit) as (picture, name):
        return upright_size(picture, name, pixel_limit)


@contextmanager
def opened_picture(source: ImageSource, pixel_limit: int) -> Iterator[tuple[Image.Image, str]]:
    """A picture whose header is read, and its name; errors as of `load_image`, of what is done with it, too."""
    if isinstance(source, Image.Image):
        with explained("The picture", pixel_limit):
            yield source, "The picture"
        return
    data = encoded(source)
    name = "The picture" if isinstance(data, bytes) else str(data)
    head = data[:HEAD_BYTES] if isinstance(data, bytes) else read_head(data)
    prepare_format(head, name)
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    with explained(name, pixel_limit, head), Image.open(file) as picture:
        yield picture, name


def encoded(source: ImageSource) -> bytes | Path:
    """Bytes of an encoded picture, or the file they lie in.

    Raises
    ------
    ImageError
        When there is no such file, or nothing in it.
    """
    if base64_data.is_data_uri(source):
        source = decode_data_uri(source)
    elif not isinstance(source, Image.Image | str | Path | bytes | Page) and hasattr(source, "read"):
        source = read_file_object(source)
    if not isinstance(source, str | Path | bytes):
        raise ImageError(
            f"The picture is of type {type(source).__name__}; expected a path, bytes, a data: URI, an open file or a "
            "Pillow picture."
        )
    if isinstance(source, bytes) and not source:
        raise ImageError("The picture is empty (0 bytes), expected an encoded picture; get it again.")
    return source if isinstance(source, bytes) else existing_file(source)


HEAD_BYTES = 1024
"""Bytes at the beginning of a file that tell what it is."""


def read_head(path: str | Path) -> bytes:
    """The first bytes of a file; none where it cannot be read, which is told when it must be."""
    try:
        with Path(path).open("rb") as file:
            return file.read(HEAD_BYTES)
    except (OSError, ValueError):
        return b""


def read_file_object(file: IO[bytes], limit: int = -1) -> bytes:
    """Bytes of an open file, from its beginning where it can be wound back: the next turn asks for them again.

    Parameters
    ----------
    limit : most bytes to be read; -1 reads all.

    Raises
    ------
    MessageError
        When it is open for text, closed, or cannot be read.
    """
    try:
        if file.seekable():
            file.seek(0)
        data = file.read(limit)
    except (OSError, ValueError, AttributeError) as error:
        raise MessageError(f"A file in the messages cannot be read ({error}); open it with mode 'rb'.") from None
    if not isinstance(data, bytes):
        raise MessageError("A file in the messages was opened for text; open it with mode 'rb'.")
    return data


def existing_file(path: str | Path, kind: str = "picture") -> Path:
    """The path of a file that is there and holds something.

    Parameters
    ----------
    kind : what is expected of it, for errors.

    Raises
    ------
    ImageError
        When it is an address, a folder, empty, or cannot be read.
    """
    if str(path).startswith(("http://", "https://")):
        raise ImageError(f"{path} is a web address; expected a file: download it first, nothing is fetched.")
    path = Path(path)
    try:
        if path.is_dir():
            raise ImageError(f"{path} is a folder, expected a {kind}; name the files inside it.")
        if path.stat().st_size == 0:
            raise ImageError(f"{path} is empty (0 bytes), expected a {kind}; get the file again.")
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist; check the path.") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"The {kind} {str(path)[:80]!r} cannot be read: {reason}; check the path.") from None
    return path


def decode_data_uri(uri: str) -> bytes:
    """Bytes of a `data:` URI.

    Raises
    ------
    ImageError
        When its base64 is none.
    """
    try:
        return base64_data.decode_data_uri(uri)
    except ValueError as error:
        raise ImageError(
            f"A data: URI is not valid base64 ({error}); expected 'data:image/png;base64,...'."
        ) from None


def upright_size(picture: Image.Image, name: str, pixel_limit: int) -> tuple[int, int]:
    """(width, height) once turned upright; refuses what is empty, too large or a program."""
    if picture.format in _PROGRAMS:
        raise ImageError(f"{name} is a PostScript drawing, which has no pixels yet; export it as PNG.")
    width, height = picture.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has {width} x {height} pixels; there is nothing to see, use another picture.")
    if width * height > pixel_limit:
        raise ImageError(_over_limit(name, f"{width} x {height} = {width * height}", pixel_limit))
    if picture.getexif().get(EXIF_ORIENTATION, 1) not in (5, 6, 7, 8):
        return width, height
    # Pillow's TIFF reader has turned the size already, and turns the pixels when it loads them.
    stored = getattr(picture, "tag_v2", {}) if picture.format == "TIFF" else {}
    if stored and (width, height) == (stored.get(TIFF_HEIGHT), stored.get(TIFF_WIDTH)):
        return width, height
    return height, width


def to_rgb(picture: Image.Image, name: str, pixel_limit: int) -> Image.Image:
    """The upright RGB picture of an opened one, inside `explained`; errors as of `load_image`."""
    upright_size(picture, name, pixel_limit)
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
def explained(name: str, pixel_limit: int, head: bytes = b"") -> Iterator[None]:
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
            raise ImageError(unknown_format(head, name)) from None
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
