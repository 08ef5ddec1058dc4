"""File, bytes, Pillow picture or page → upright RGB picture, or one clear sentence why not.

The size is checked from the header, before a pixel is decoded. RGB conversion is the official one (palettes looked
up, first frame of an animation) with four deliberate exceptions, all for pictures that the official code gets wrong:
EXIF orientation is applied, transparency is composed onto white (`transparency`), grey of more than 8 bits is scaled
instead of clipped to white (`sample_depths`), and non-square pixels of faxes are squared (`pixel_aspect`).
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from edge_runtime.errors import ImageError, MessageError
from edge_runtime.inputs import pixel_aspect, tiff_directories
from edge_runtime.inputs.file_kinds import SNIFFED_BYTES
from edge_runtime.inputs.libtiff_notes import silence_libtiff
from edge_runtime.inputs.pages import Page
from edge_runtime.inputs.picture_formats import prepare_format, unknown_format
from edge_runtime.inputs.repair import DAMAGE, loaded, open_picture
from edge_runtime.inputs.sample_depths import SIXTEEN_BIT, refuse_hidden_bits, sample_format, to_grey
from edge_runtime.inputs.transparency import colour_key, on_white
from edge_runtime.system import base64_data

PIXEL_LIMIT = 200_000_000
"""Default for the largest picture that is decoded, in pixels."""

EXIF_ORIENTATION = 0x0112
TIFF_WIDTH, TIFF_HEIGHT = 0x0100, 0x0101
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)

ImageSource = Image.Image | str | Path | bytes | IO[bytes] | Page
"""A Pillow picture, a path, a `data:` URI, encoded bytes, a file opened for bytes, or a page of a document."""


class NamedBytes(bytes):
    """Bytes of a file that was read elsewhere, with its name for errors."""

    name: str | None = None


_pillow_lock = threading.Lock()

_PROGRAMS = frozenset({"EPS"})
"""Formats that Pillow renders with another program (Ghostscript): unsafe for untrusted bytes."""

_NAMED_ALONE = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow recognises but cannot read."""


def load_image(source: ImageSource, *, pixel_limit: int = PIXEL_LIMIT) -> Image.Image:
    """Decode a picture and turn it upright.

    Parameters
    ----------
    source : see `ImageSource`.
    pixel_limit : maximum number of pixels; larger pictures are refused before they are decoded.

    Returns
    -------
    picture : mode RGB, upright.

    Raises
    ------
    ImageError
        When there is no file, or it is not a picture, is cut short, or is too large.
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
    """A picture whose header is read, and its name; errors as `load_image`, also for what is done with it."""
    if isinstance(source, Image.Image):
        with explained("The picture", pixel_limit):
            yield source, "The picture"
        return
    data = encoded(source)
    name = name_of(data, "The picture")
    head = data[:HEAD_BYTES] if isinstance(data, bytes) else read_head(data)
    prepare_format(head, name)
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    with explained(name, pixel_limit, data):
        if head.startswith(tiff_directories.HEADS):
            refuse_raw(data, name)
        with open_picture(file) as picture:
            if picture.format in _NAMED_ALONE:
                raise UnidentifiedImageError
            if picture.format == "TIFF":
                tiff_directories.first_page(picture, name)
            yield picture, name


def name_of(source: Path | bytes, otherwise: str) -> str:
    """What errors call a file: its path or name, or `otherwise` if it has none."""
    name = getattr(source, "name", None) if isinstance(source, bytes) else str(source)
    return name or otherwise


def refuse_raw(data: Path | bytes, name: str) -> None:
    """Refuse a TIFF file that is a raw photograph.

    Raises
    ------
    ImageError
        When it is one.
    """
    with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file:
        kind = tiff_directories.raw_kind(file, name)
    if kind is not None:
        what = "a raw photograph" if kind == "raw" else f"a raw photograph ({kind})"
        raise ImageError(
            f"{name} is {what}, which cannot be read; develop it, or export it as JPEG or PNG: the preview inside is "
            "not used."
        )


def ends(source: Path | bytes) -> tuple[bytes, bytes]:
    """The first and last bytes of a file, which show what it is; empty if it cannot be read."""
    if isinstance(source, bytes):
        return source[:SNIFFED_BYTES], source[-SNIFFED_BYTES:]
    try:
        with source.open("rb") as file:
            head = file.read(SNIFFED_BYTES)
            file.seek(max(0, source.stat().st_size - SNIFFED_BYTES))
            return head, file.read(SNIFFED_BYTES)
    except (OSError, ValueError):
        return b"", b""


def encoded(source: ImageSource) -> bytes | Path:
    """Bytes of an encoded picture, or the file that holds them.

    Raises
    ------
    ImageError
        When there is no such file, or it is empty.
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


HEAD_BYTES = 1024 + 8
"""Bytes at the start of a file that show what it is: PDF may start within 1024."""


def read_head(path: str | Path) -> bytes:
    """The first bytes of a file; empty if it cannot be read, which is reported when it is needed."""
    try:
        with Path(path).open("rb") as file:
            return file.read(HEAD_BYTES)
    except (OSError, ValueError):
        return b""


def read_file_object(file: IO[bytes], limit: int = -1) -> bytes:
    """Bytes of an open file, from its start if it is seekable: the next turn reads them again.

    Parameters
    ----------
    limit : maximum number of bytes to read; -1 reads all.

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
    """The path of a file that exists and is not empty.

    Parameters
    ----------
    kind : what is expected, for errors.

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
        When its base64 is invalid.
    """
    try:
        return base64_data.decode_data_uri(uri)
    except ValueError as error:
        raise ImageError(
            f"A data: URI is not valid base64 ({error}); expected 'data:image/png;base64,...'."
        ) from None


def upright_size(picture: Image.Image, name: str, pixel_limit: int) -> tuple[int, int]:
    """(width, height) once upright; refuses what is empty, too large or a program."""
    _check_size(picture, name, pixel_limit)
    size, turn, density = picture.size, _orientation(picture), pixel_aspect.dots(picture)
    if turn in _SIDEWAYS and not _is_turned(picture):
        size = size[::-1]
    return pixel_aspect.squared(size, density[::-1] if density is not None and turn in _SIDEWAYS else density)


def _check_size(picture: Image.Image, name: str, pixel_limit: int) -> None:
    if picture.format in _PROGRAMS:
        raise ImageError(f"{name} is a PostScript drawing, which has no pixels yet; export it as PNG.")
    width, height = picture.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has {width} x {height} pixels; there is nothing to see, use another picture.")
    density = pixel_aspect.dots(picture)
    for size in (picture.size, pixel_aspect.squared(picture.size, density)):
        if size[0] * size[1] > pixel_limit:
            raise ImageError(_over_limit(name, f"{size[0]} x {size[1]} = {size[0] * size[1]}", pixel_limit))


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation of a picture, 1 to 8; 1 if it has none, or a damaged one."""
    if picture.format == "PNG" and "exif" not in picture.info:
        picture = loaded(picture)  # it may come after the pixels, whose damage must not be ignored
    try:
        value = picture.getexif().get(EXIF_ORIENTATION, 1)
        return int(value) if value in _TURNS else 1
    except DAMAGE:
        return 1


def _is_turned(picture: Image.Image) -> bool:
    """Whether Pillow has already turned the size, as its TIFF reader does; it turns the pixels when it loads them."""
    stored = getattr(picture, "tag_v2", {}) if picture.format == "TIFF" else {}
    return bool(stored) and picture.size == (stored.get(TIFF_HEIGHT), stored.get(TIFF_WIDTH))


def to_rgb(picture: Image.Image, name: str, pixel_limit: int) -> Image.Image:
    """The upright RGB version of an opened picture, inside `explained`; errors as `load_image`."""
    _check_size(picture, name, pixel_limit)
    # Facts of the header: most are gone once the pixels are decoded, and a TIFF is turned by then.
    kind, density, form, key = picture.format, pixel_aspect.dots(picture), sample_format(picture), colour_key(picture)
    sample = picture.info.get("transparency")
    is_sideways = kind == "TIFF" and _orientation(picture) in _SIDEWAYS
    picture = loaded(picture)
    if picture.mode == "F":
        raise ImageError(
            f"{name} holds floating-point samples, whose white is not defined; save it with 8 or 16 bits per sample."
        )
    # Pillow's exif_transpose would rewrite the EXIF data, and fail if they are damaged.
    turn = _orientation(picture)
    if picture.mode in SIXTEEN_BIT or (form.signed and picture.mode == "L"):
        grey, alpha = to_grey(picture, form, name, sample)
        rgb = on_white(Image.merge("LA", (grey, alpha)))
    else:
        refuse_hidden_bits(picture, form, name)
        rgb = on_white(picture, key, kind)
    if turn != 1:
        rgb = rgb.transpose(_TURNS[turn])
    if density is None:
        return rgb
    is_sideways = is_sideways or turn in _SIDEWAYS
    size = pixel_aspect.squared(rgb.size, density[::-1] if is_sideways else density)
    return rgb.resize(size, Image.Resampling.BICUBIC)


def _over_limit(name: str, found: str, pixel_limit: int) -> str:
    return (
        f"{name} has {found} pixels, at most {pixel_limit} are decoded; scale it down or raise the limit with "
        "--max-pixels."
    )


@contextmanager
def explained(name: str, pixel_limit: int, source: Path | bytes = b"") -> Iterator[None]:
    """Turn whatever Pillow raises into a sentence, with its guard against decompression bombs set to our limit.

    The guard is a module global, hence the lock; it also covers pictures inside pictures (icons), whose size is in no
    header. Pillow's warnings (lost transparency, odd EXIF) are about what the official code does silently, and
    libtiff's own messages about damage become our sentence. `source` is where the picture is read from.
    """
    with _pillow_lock, warnings.catch_warnings():
        silence_libtiff()
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = pixel_limit
        try:
            yield
        except UnidentifiedImageError:
            raise ImageError(unknown_format(*ends(source), name)) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            found = re.search(r"\d+", str(error))  # "Image size (400000000 pixels) exceeds limit of ..."
            raise ImageError(_over_limit(name, found[0] if found else "too many", pixel_limit)) from None
        except MemoryError:
            raise ImageError(
                f"{name} needs more memory to be decoded than is allowed; it is damaged, or too large: scale it down."
            ) from None
        except DAMAGE as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ImageError(
                f"{name} cannot be decoded ({reason}); it is damaged or cut short: get the file again."
            ) from None
        finally:
            Image.MAX_IMAGE_PIXELS = before
