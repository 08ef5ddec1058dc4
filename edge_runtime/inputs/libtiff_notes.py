"""Keeps libtiff's messages about damage off stderr.

libtiff writes them there itself, bypassing Python, unless the program sets a handler; Pillow sets none for errors.
Our own sentence says what is wrong. Its handlers are global, so this affects the whole process.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import PIL


@cache
def silence_libtiff() -> None:
    """Make libtiff silent; does nothing if the library that Pillow uses is not found."""
    from PIL import features

    if not features.check("libtiff"):
        return
    for path in _libraries():
        try:
            library = ctypes.CDLL(path)
            for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
                handler = getattr(library, name)
                handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
                handler(None)
        except (OSError, AttributeError):
            continue


def _libraries() -> Iterator[str]:
    """Paths of the libtiff that Pillow has loaded: a wheel brings its own, a system's Pillow uses the system's."""
    maps = Path("/proc/self/maps")
    if sys.platform == "linux" and maps.exists():
        found = (line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "libtiff" in line)
        yield from dict.fromkeys(found)
        return
    package = Path(PIL.__file__).parent
    for folder in (package / ".dylibs", package.parent / "pillow.libs"):
        yield from map(str, folder.glob("*tiff*"))
