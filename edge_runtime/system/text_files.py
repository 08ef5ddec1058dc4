"""Text and JSON that a person wrote: bytes in, text or values out, with or without a byte order mark.

Windows editors and shells write byte order marks: UTF-8 with one, or UTF-16 (PowerShell's `>`). Both are read
wherever this project reads a hand-written file.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

_MARKS = (  # the longer ones first: UTF-32's mark starts with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_text(raw: bytes) -> str:
    """Decode UTF-8, or the encoding that the byte order mark names; the mark itself is removed.

    Raises
    ------
    ValueError
        When the bytes are not text in that encoding.
    """
    return raw.decode(next((encoding for mark, encoding in _MARKS if raw.startswith(mark)), "utf-8"))


def read_text(path: Path, max_bytes: int | None = None) -> str:
    """Text of a file, see `decode_text`, with newlines as line ends; OSError when it cannot be read.

    Parameters
    ----------
    max_bytes : limit for untrusted files, which may be endless and must be files, not pipes or devices.

    Raises
    ------
    ValueError
        When it is not text, or too long.
    """
    return decode_text(_read(path, max_bytes)).replace("\r\n", "\n").replace("\r", "\n")


def _read(path: Path, max_bytes: int | None) -> bytes:
    if max_bytes is None:
        return path.read_bytes()
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    return data


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, with or without a byte order mark.

    Raises
    ------
    ValueError, RecursionError
        When it is not JSON, or nested too deeply.
    """
    return json.loads((decode_text(text) if isinstance(text, bytes) else text).removeprefix("\ufeff"))


def read_json(path: Path, max_bytes: int | None = None) -> Any:
    """The value of a JSON file, see `read_text`; OSError when it cannot be read, else the errors of `parse_json`."""
    return parse_json(_read(path, max_bytes))
