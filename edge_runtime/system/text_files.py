"""Text and JSON that a person wrote: bytes in, text or values out, whatever mark of their encoding they begin with.

Editors and shells of Windows write byte order marks: UTF-8 with one, or UTF-16 (PowerShell's `>`). Both are read
wherever this project reads a file that somebody made by hand.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

_MARKS = (  # the longer ones first: UTF-32's mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_text(raw: bytes) -> str:
    """Text of bytes: UTF-8, or what their byte order mark says; the mark itself is left out.

    Raises
    ------
    ValueError
        When they are not text in that encoding.
    """
    return raw.decode(next((encoding for mark, encoding in _MARKS if raw.startswith(mark)), "utf-8"))


def read_text(path: Path, most_bytes: int | None = None) -> str:
    """Text of a file, see `decode_text`, its lines ending in a newline; OSError when it cannot be read.

    Parameters
    ----------
    most_bytes : for files of others, which may have no end; they must be files, no pipes and devices.

    Raises
    ------
    ValueError
        When it is no text, or too long.
    """
    return decode_text(_read(path, most_bytes)).replace("\r\n", "\n").replace("\r", "\n")


def _read(path: Path, most_bytes: int | None) -> bytes:
    if most_bytes is None:
        return path.read_bytes()
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it has more than {most_bytes} bytes")
    return data


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, with or without a byte order mark.

    Raises
    ------
    ValueError, RecursionError
        When it is none, or nested too deeply.
    """
    return json.loads((decode_text(text) if isinstance(text, bytes) else text).removeprefix("\ufeff"))


def read_json(path: Path, most_bytes: int | None = None) -> Any:
    """The value of a JSON file, see `read_text`; OSError when it cannot be read, else errors as of `parse_json`."""
    return parse_json(_read(path, most_bytes))
