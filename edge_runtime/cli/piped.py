"""Piped input → a picture, a document or a video as bytes, or text.

`-` is stdin, as everywhere; a named pipe and a shell's `<(...)` are read likewise, once and to their end. The kind
of input is recognised from its first bytes, since a pipe has no suffix.
"""

from __future__ import annotations

import io
import os
import stat
import sys
import warnings
from pathlib import Path

from edge_runtime.errors import ImageError
from edge_runtime.system.text_files import decode_text

STDIN = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
PIPE_LIMIT_BYTES = 1 << 30
"""Limit for pipes; a larger file is named by its path."""

_TEXT_CONTROLS = frozenset("\t\n\r\f\x1b")
_TEXTLIKE_FORMATS = frozenset({"PPM", "XPM", "XBM", "EPS"})  # Pillow's names of formats that may be plain ASCII
_HEAD_BYTES = 1024
_GIT_LFS = b"version https://git-lfs.github.com/spec"


class Piped(bytes):
    """Encoded bytes of a picture, document or video, and what they came from."""

    name: str

    def __new__(cls, data: bytes, name: str) -> Piped:
        """Name the bytes."""
        made = super().__new__(cls, data)
        made.name = name
        return made

    def __str__(self) -> str:
        return self.name


def read_pipe(word: str) -> Piped | str:
    """Read stdin or a named pipe to its end.

    Parameters
    ----------
    word : one of `STDIN`, or the path of a pipe.

    Raises
    ------
    ImageError
        When nothing is piped in, or the input is empty or too large.
    """
    if word in STDIN:
        name, data = "stdin", _read_stdin()
    else:
        name = word
        try:
            with Path(word).open("rb") as pipe:
                data = pipe.read(PIPE_LIMIT_BYTES + 1)
        except OSError as error:
            raise ImageError(f"{word} cannot be read: {error.strerror or error}; name a file.") from None
    if not data:
        raise ImageError(
            f"{name} is empty (0 bytes), expected a picture, a document, a video or text; check what writes it."
        )
    if len(data) > PIPE_LIMIT_BYTES:
        raise ImageError(f"{name} has more than {PIPE_LIMIT_BYTES} bytes; save it as a file and name the file.")
    found = told_apart(data, name)
    if isinstance(found, str) and not found.strip():
        raise ImageError(f"{name} holds only whitespace, expected a picture, a document, a video or text.")
    return found


def _read_stdin() -> bytes:
    stdin = sys.stdin.buffer
    if stdin.isatty():
        raise ImageError("'-' reads what is piped in, but stdin is a terminal; name a file, or pipe one in with '<'.")
    try:
        return stdin.read(PIPE_LIMIT_BYTES + 1)
    except OSError as error:
        raise ImageError(f"stdin cannot be read: {error.strerror or error}; name a file.") from None


def told_apart(data: bytes, name: str) -> Piped | str:
    """Text as a string; everything else as bytes, whose errors are reported where they are decoded."""
    head = data[:_HEAD_BYTES]
    if b"%PDF-" in head or head.startswith(_GIT_LFS) or b"<svg" in head.lower() or _is_textlike_picture(data):
        return Piped(data, name)
    try:
        text = decode_text(data)
    except ValueError:
        return Piped(data, name)
    if any(ord(c) < 32 and c not in _TEXT_CONTROLS for c in text):
        return Piped(data, name)
    return text.strip("\r\n")


def _is_textlike_picture(data: bytes) -> bool:
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=sorted(_TEXTLIKE_FORMATS)):
                return True
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return False


def waits_unread() -> bool:
    """Whether stdin, a file or a pipe, holds something unread."""
    try:
        number = sys.stdin.fileno()
        found = os.fstat(number)
        if stat.S_ISREG(found.st_mode):
            return found.st_size > os.lseek(number, 0, os.SEEK_CUR)
        if not stat.S_ISFIFO(found.st_mode) or os.name == "nt":
            return False
        import select

        return bool(select.select([number], [], [], 0)[0]) and _holds_bytes(number)
    except (OSError, ValueError, AttributeError):  # closed, or not a file
        return False


def _holds_bytes(number: int) -> bool:
    """Whether a readable pipe holds data: at its end it is readable, too."""
    import fcntl
    import struct
    import termios

    return bool(struct.unpack("i", fcntl.ioctl(number, termios.FIONREAD, b"\0\0\0\0"))[0])
