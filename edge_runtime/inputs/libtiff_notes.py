"""libtiff's notes about damage, kept from stderr.

libtiff writes them there itself, past Python, unless the program gives it another place; Pillow gives none for
errors. What is wrong is told by our own sentence. Its handlers are global, so this holds for the process.
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
    """Have libtiff say nothing; does nothing where the library that Pillow uses is not found."""
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
    """Paths of libtiff as Pillow has loaded it: a wheel brings its own, a system's Pillow uses the system's."""
    maps = Path("/proc/self/maps")
    if sys.platform == "linux" and maps.exists():
        found = (line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "libtiff" in line)
        yield from dict.fromkeys(found)
        return
    package = Path(PIL.__file__).parent
    for folder in (package / ".dylibs", package.parent / "pillow.libs"):
        yield from map(str, folder.glob("*tiff*"))
