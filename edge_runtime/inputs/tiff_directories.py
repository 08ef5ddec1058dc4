"""Directories of a TIFF file → which of them are pages, and whether the file is a raw photograph.

A file may hold previews, masks and overviews besides its pages, marked by NewSubfileType (254) or, in old files,
SubfileType (255); overviews may also be in SubIFDs (330), which never count as pages. Raw photographs are TIFF files,
too: their first directory is a small preview, and the sensor's values are elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import IO, Any

from PIL import Image, TiffImagePlugin

from edge_runtime.errors import ImageError

HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of TIFF and BigTIFF."""
DIRECTORY_LIMIT = 1 << 16
"""Pages and everything between them: TIFF numbers pages (tag 297) with 16 bits."""
_NEW_SUBFILE_TYPE, _SUBFILE_TYPE, _COMPRESSION, _PHOTOMETRIC, _MAKE, _SUB_IFDS = 254, 255, 259, 262, 271, 330
_PLANES, _DNG_VERSION, _CR2_SLICES = 284, 50706, 50752
_TAGS_READ = (_NEW_SUBFILE_TYPE, _SUBFILE_TYPE, _COMPRESSION, _PHOTOMETRIC, _MAKE, _DNG_VERSION, _CR2_SLICES)
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType
_OLD_REDUCED = 2
_SENSOR = (32803, 34892)  # photometric: colour filter array, linear raw
_SENSOR_COMPRESSION = (32767, 32769, 32770, 34713, 65000, 65535)  # Sony, packed, Samsung, Nikon, Kodak, Pentax
_MAX_DIRECTORIES = 64  # searched for signs of raw photographs
_RAW_SUFFIXES = (
    *(".3fr", ".ari", ".arw", ".cr2", ".dcr", ".dng", ".erf", ".fff", ".gpr", ".iiq", ".k25", ".kdc", ".mef"),
    *(".mos", ".nef", ".nrw", ".pef", ".raw", ".rwl", ".sr2", ".srf", ".srw"),
)
_MAKES = {
    "canon": "CR2",
    "nikon": "NEF",
    "sony": "ARW",
    "pentax": "PEF",
    "ricoh": "PEF",
    "samsung": "SRW",
    "hasselblad": "3FR",
    "epson": "ERF",
    "phase one": "IIQ",
    "kodak": "DCR",
    "mamiya": "MEF",
    "leaf": "MOS",
}
_DAMAGE = (OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError)


def raw_kind(file: IO[bytes], name: str) -> str | None:
    """The kind of raw photograph that a TIFF file is ("DNG"), or "raw" if unknown; None if it is not raw.

    Parameters
    ----------
    file : at any position, which is kept.
    name : the file's name, whose suffix counts.
    """
    suffix = PurePath(name).suffix.lower()
    place = file.tell()
    try:
        found = [*_directories(file)]
    except _DAMAGE:
        found = []
    finally:
        file.seek(place)
    make = str(found[0].get(_MAKE, "")).lower() if found else ""
    named = suffix[1:].upper() if suffix in _RAW_SUFFIXES else next((_MAKES[m] for m in _MAKES if m in make), "raw")
    if any(_DNG_VERSION in tags for tags in found):
        return "DNG"
    if suffix in _RAW_SUFFIXES and found:
        return named
    for tags in found:
        if _first(tags, _PHOTOMETRIC) in _SENSOR or _first(tags, _COMPRESSION) in _SENSOR_COMPRESSION:
            return named
        if _CR2_SLICES in tags:
            return "CR2"
    return None


def first_page(picture: Image.Image, name: str) -> None:
    """Go to the first page of an opened file, past everything that is not a page.

    Raises
    ------
    ImageError
        When only a preview of a picture in a SubIFD can be read.
    """
    if is_page(picture):
        read_planes(picture)
        return
    if any(is_page(tags) for tags in _sub_directories(picture)):
        raise ImageError(
            f"{name} starts with a preview, and its picture is in a SubIFD, which cannot be read; save it as a plain "
            "TIFF or PNG."
        )
    page = next(pages(picture, name))
    picture.seek(page)
    read_planes(picture)


def pages(picture: Image.Image, name: str) -> Iterator[int]:
    """Positions of an opened file's pages, found one by one; the first directory if none is a page.

    Moves to other directories; between two pages the caller may do so, too.

    Raises
    ------
    ImageError
        When a file has more directories than allowed.
    """
    any_found = False
    for index in range(DIRECTORY_LIMIT):
        try:
            picture.seek(index)
        except EOFError:
            break
        if is_page(picture):
            any_found = True
            yield index
    else:
        raise ImageError(f"{name} has more than {DIRECTORY_LIMIT} directories, which is the limit; split it.")
    if not any_found:
        yield 0


def is_page(holder: Any) -> bool:
    """Whether a directory, or a picture's current one, is a page and not a preview, mask or overview."""
    tags = getattr(holder, "tag_v2", holder)
    kind = _first(tags, _NEW_SUBFILE_TYPE)
    if isinstance(kind, int):
        return not kind & (_REDUCED | _MASK)
    return bool(_first(tags, _SUBFILE_TYPE) != _OLD_REDUCED)


def read_planes(picture: Image.Image) -> None:
    """Let libtiff read colours stored in planes: Pillow itself takes 16 bits of one sample for 8 bits of two."""
    tile = getattr(picture, "tile", None)
    if not tile or tile[0][0] != "raw" or _first(getattr(picture, "tag_v2", {}), _PLANES) != 2:
        return
    before = TiffImagePlugin.READ_LIBTIFF
    TiffImagePlugin.READ_LIBTIFF = True
    try:
        picture._setup()  # type: ignore[attr-defined]
    finally:
        TiffImagePlugin.READ_LIBTIFF = before


def _sub_directories(picture: Image.Image) -> list[Any]:
    file = getattr(picture, "fp", None)
    if file is None:
        return []
    place = file.tell()
    try:
        return [*_directories(file, sub_only=True)]
    except _DAMAGE:
        return []
    finally:
        file.seek(place)


def _directories(file: IO[bytes], *, sub_only: bool = False) -> Iterator[Any]:
    """Directories of a file: those of the chain, each followed by its SubIFDs; or only the first one's SubIFDs."""
    file.seek(0)
    head = file.read(16)
    tags = TiffImagePlugin.ImageFileDirectory_v2(head if 43 in head[2:4] else head[:8])
    waiting: list[int] = [tags.next or 0]
    seen: set[int] = set()
    while waiting and len(seen) < _MAX_DIRECTORIES:
        offset = waiting.pop(0)
        if not offset or offset in seen:
            continue
        seen.add(offset)
        file.seek(offset)
        tags.load(file)
        found = {tag: value for tag in _TAGS_READ if (value := _first(tags, tag)) is not None}
        if not sub_only or len(seen) > 1:
            yield found
        following, subs = tags.next, tags.get(_SUB_IFDS, ())
        waiting = [sub for sub in (subs if isinstance(subs, tuple) else (subs,)) if isinstance(sub, int)] + waiting
        if not sub_only:
            waiting.append(following or 0)


def _first(tags: Any, tag: int) -> Any:
    """A tag's value, or its first one; None if it is absent or damaged."""
    try:
        value = tags.get(tag)
    except _DAMAGE:
        return None
    return value[0] if isinstance(value, tuple) and value else value
