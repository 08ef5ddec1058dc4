"""Pictures with damage that does not affect their pixels → opened and decoded; others fail as in Pillow.

Two kinds are repaired, in a copy in memory. Metadata (EXIF, XMP, profiles, comments) may be damaged so that Pillow
does not open the file: it is left out. And the end may be missing: a JPEG's end marker, a GIF's trailer, the padding
of WebP. Whether all pixels are there is then tested: the file is decoded with two different continuations, and the
results differ if a pixel is missing. So a picture with missing rows is still refused, including a JPEG that ends in
zeros, like unfinished downloads, or with an end marker after the cut; Pillow fills those rows with grey.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path
from typing import IO

from PIL import Image

MAX_BYTES = 1 << 30
"""Larger files are not repaired."""

DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, MemoryError, struct.error, zlib.error),
    # Its parsers of rarer formats trip over damaged headers with these (measured on 120,000 damaged files).
    *(RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError),
)
"""What Pillow raises on damage."""

_FILLS = (b"\0", b"\xaa")
_FILL_BYTES = 1024
_JPEG, _PNG, _GIF = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"GIF8"
_END_OF_IMAGE = b"\xff\xd9"
_EXIF_ITEM = re.compile(rb"(infe.{8})Exif", re.DOTALL)
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # inside a scan, zeros and restarts are not markers
_KEPT_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"pHYs", b"acTL", b"fcTL", b"fdAT")
_GREY = range(96, 161)  # libjpeg leaves 128 where blocks are missing, and values near it next to others


def open_picture(file: Path | IO[bytes]) -> Image.Image:
    """`Image.open`, tried again without damaged metadata or with a missing end; its errors if that does not help."""
    try:
        return Image.open(file)
    except DAMAGE as error:
        data = _data(file)
        for mended in (_without_notes(data), _padded_webp(data)):
            if mended is None:
                continue
            try:
                return Image.open(io.BytesIO(mended))
            except DAMAGE:
                continue
        raise error


def loaded(picture: Image.Image) -> Image.Image:
    """The picture with its pixels decoded: itself, or if its end is missing, another one with the same pixels.

    Raises
    ------
    OSError and others
        What Pillow raises on damage; OSError also when rows are missing.
    """
    is_jpeg = picture.format in ("JPEG", "MPO") and picture.tell() == 0
    suspect = _jpeg_data(picture) if is_jpeg else None
    file = getattr(picture, "fp", None)
    try:
        picture.load()
    except DAMAGE:
        data = suspect if suspect is not None else _data(file)
        found = _whole_jpeg(data) if is_jpeg else _whole(data, picture.tell())
        if not data or found is None:
            raise
        return found
    if suspect is not None or (is_jpeg and file is not None and _ends_grey(picture)):
        data = suspect if suspect is not None else _data(getattr(picture, "filename", "") or file)
        if data.startswith(_JPEG) and _whole_jpeg(data) is None:
            raise OSError("image file is truncated: rows are missing")
    return picture


def _data(file: Path | str | IO[bytes] | None) -> bytes:
    """A file's bytes; empty if there are too many, or it is closed."""
    try:
        if file is None:
            return b""
        if isinstance(file, str | Path):
            with Path(file).open("rb") as opened:
                return _data(opened)
        place = file.tell()
        file.seek(0)
        data = file.read(MAX_BYTES + 1)
        file.seek(place)
    except (OSError, ValueError):
        return b""
    return data if len(data) <= MAX_BYTES else b""


# --- missing end -----------------------------------------------------------------------------------------------


def _whole(data: bytes, frame: int) -> Image.Image | None:
    """The picture in a file with damaged metadata or a missing end; None if pixels are missing, too."""
    bare = _without_notes(data)
    found = None if bare is None else _if_same([bare], frame)
    if found is not None:
        return found
    endings = [fill * _FILL_BYTES + (b"\0;" if data.startswith(_GIF) else b"") for fill in _FILLS]
    return _if_same([data + ending for ending in endings], frame)


def _if_same(files: list[bytes], frame: int = 0) -> Image.Image | None:
    """The picture in all files, if they show the same one."""
    found: list[Image.Image] = []
    for data in files:
        try:
            with Image.open(io.BytesIO(data)) as picture:
                if frame:
                    picture.seek(frame)
                picture.load()
        except DAMAGE:
            return None
        found.append(picture)
    first, *others = found
    return first if all(other.tobytes() == first.tobytes() for other in others) else None


def _padded_webp(data: bytes) -> bytes | None:
    """A WebP file with the zero after a last chunk of odd length, which some writers omit."""
    if not data.startswith(b"RIFF") or data[8:12] != b"WEBP" or len(data) % 2 == 0:
        return None
    place = 12
    while place + 8 <= len(data):
        place += 8 + int.from_bytes(data[place + 4 : place + 8], "little")
        if place == len(data):
            return data[:4] + (len(data) + 1 - 8).to_bytes(4, "little") + data[8:] + b"\0"
        place += place % 2
    return None


# --- JPEG ------------------------------------------------------------------------------------------------------


def _jpeg_data(picture: Image.Image) -> bytes | None:
    """Bytes of a JPEG that may lack its end; None if its end marker is there."""
    file = getattr(picture, "fp", None)
    if file is None:
        return None
    place = file.tell()
    file.seek(0, io.SEEK_END)
    file.seek(max(0, file.tell() - 4096))
    end = file.read()
    file.seek(place)
    if end.endswith(_END_OF_IMAGE):
        return None
    data = _data(file)
    found = _scans(data)
    return None if not data.startswith(_JPEG) or (found is not None and found[1]) else data


def _ends_grey(picture: Image.Image) -> bool:
    """Whether the last pixel may be the grey of missing ones, which only means that the file must be checked."""
    last = picture.getpixel((picture.width - 1, picture.height - 1))
    return all(value in _GREY for value in (last if isinstance(last, tuple) else (last,)))


def _whole_jpeg(data: bytes) -> Image.Image | None:
    """The picture of a JPEG whose end is missing or in doubt; None if scans or rows are missing."""
    found = _scans(data)
    if found is not None:
        end, has_marker, is_complete = found
        if not has_marker and not is_complete:
            return None
    else:
        end, has_marker = len(data), False
    starts = [data[:end]] if has_marker else _without_filling(data[:end])
    for start in starts:
        rest = [start + fill * _FILL_BYTES + _END_OF_IMAGE for fill in _FILLS]
        picture = _if_same(rest)
        if picture is not None:
            return picture
    return None


def _without_filling(data: bytes) -> list[bytes]:
    """Possible contents of a JPEG without end marker that ends in zeros or half a marker."""
    if data.endswith(b"\xff"):
        return [data[:-1], data + b"\0"]
    start = data.rstrip(b"\0")
    # A scan may end with a few zeros; more of them come from an unfinished download.
    return [start + b"\0" * n for n in range(min(len(data) - len(start), 4) + 1)]


def _scans(data: bytes) -> tuple[int, bool, bool] | None:
    """Walk through a JPEG's first picture.

    Returns
    -------
    end : where the data of the last scan ends.
    has_marker : whether the end marker is there.
    is_complete : whether the scans hold every coefficient of every component in full.
    """
    place, end = 2, 0
    left: dict[int, list[int]] = {}  # bits still to come, for each component and coefficient
    is_progressive = False
    while True:
        marker = _MARKER.search(data, place)
        if marker is None:
            break
        kind = marker[1][0]
        if kind == 0xD9:
            return marker.start(), True, not any(map(any, left.values()))
        if kind in (0xD8, 0x01):
            place = marker.end()
            continue
        length = int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        segment = data[marker.end() + 2 : marker.end() + length]
        if length < 2 or len(segment) < length - 2:
            return None if not end else (end, False, False)
        place = marker.end() + length
        if kind in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA):
            is_progressive = kind in (0xC2, 0xCA)
            left = {component: [14] * 64 for component in segment[6::3]}
        elif kind == 0xDA:
            n_components = segment[0] if segment else 0
            if len(segment) < 4 + 2 * n_components or not left:
                return None
            first, last, bits = segment[-3:]
            for component in segment[1 : 1 + 2 * n_components : 2]:
                if component in left:
                    places = range(first, min(last, 63) + 1) if is_progressive else range(64)
                    for k in places:
                        left[component][k] = bits & 15 if is_progressive else 0
            following = _MARKER.search(data, place)
            end = len(data) if following is None else following.start()
    return None if not end else (end, False, not any(map(any, left.values())))


# --- damaged metadata ------------------------------------------------------------------------------------------


def _without_notes(data: bytes) -> bytes | None:
    """A file without its metadata; None for formats that are not known here."""
    if data.startswith(_JPEG):
        return _jpeg_without_notes(data)
    if data.startswith(_PNG):
        return _png_without_notes(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp_without_notes(data)
    if data[4:8] == b"ftyp":  # HEIC, AVIF: the item of EXIF data is given an unknown name
        return _EXIF_ITEM.sub(rb"\1note", data, count=1)
    return None


def _jpeg_without_notes(data: bytes) -> bytes | None:
    """Without APP1 to APP13, APP15 and comments: JFIF and Adobe's APP14 say how colours are stored."""
    kept, place = [_JPEG], 2
    while data[place : place + 1] == b"\xff":
        kind = data[place + 1]
        if kind == 0xFF:
            place += 1
            continue
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        if kind == 0xDA or length < 2:
            break
        is_note = 0xE1 <= kind <= 0xED or kind in (0xEF, 0xFE) or length < {0xE0: 16, 0xEE: 14}.get(kind, 0)
        if not is_note:
            kept.append(data[place : place + 2 + length])
        place += 2 + length
    return b"".join(kept) + data[place:]


def _png_without_notes(data: bytes) -> bytes:
    kept, place = [_PNG], len(_PNG)
    while place + 8 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        name, chunk = data[place + 4 : place + 8], data[place:end]
        # Only the pixels' own chunks; those that refine them (tRNS, pHYs) only if they are intact.
        is_sound = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if name in _KEPT_CHUNKS and (is_sound or name[:1].isupper()):
            kept.append(chunk)
        place = end
    return b"".join(kept)


def _webp_without_notes(data: bytes) -> bytes:
    kept, place = [], 12
    while place + 8 <= len(data):
        n_bytes = int.from_bytes(data[place + 4 : place + 8], "little")
        chunk = data[place : place + 8 + n_bytes + n_bytes % 2]
        if chunk.startswith(b"VP8X") and len(chunk) > 8:
            chunk = chunk[:8] + bytes([chunk[8] & ~0x2C]) + chunk[9:]  # no profile, EXIF, XMP
        if not chunk.startswith((b"ICCP", b"EXIF", b"XMP ")):
            kept.append(chunk + b"\0" * (len(chunk) % 2))
        place += 8 + n_bytes + n_bytes % 2
    body = b"".join(kept)
    return b"RIFF" + (len(body) + 4).to_bytes(4, "little") + b"WEBP" + body
