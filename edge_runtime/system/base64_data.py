"""Base64 and `data:` URIs, as clients write them → bytes, or a ValueError that says what is wrong.

The one decoder for all doors. Clients wrap lines (MIME, `base64 FILE`, Java's and Python's encoders), leave the
padding off, or write the alphabet for URLs; none of that makes the bytes ambiguous. What does is refused: other
characters, both alphabets in one text, padding in the middle, a length that no bytes have.

Knows nothing of pictures, files or addresses.
"""

from __future__ import annotations

import binascii
import re
from typing import TypeGuard
from urllib.parse import unquote_to_bytes

LEAST_BASE64 = 16
"""Characters of base64 without a `data:` in front: any file has more, and a shorter word is a name of something."""

_BLANKS = b" \t\r\n\f\v"
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_"
_FOR_URLS = bytes.maketrans(b"-_", b"+/")
_LONGEST_HEADER = 1024  # characters of a data: URI before its comma
_HEADER = re.compile(r'data:((?:"[^"]*"|[^,"])*),', re.IGNORECASE)
"""What describes the data, up to the first comma that is not quoted (RFC 2397)."""
_IS_BASE64 = re.compile(r".*; *base64 *", re.IGNORECASE | re.DOTALL)


def decode_base64(text: str | bytes) -> bytes:
    """Bytes that base64 stands for (RFC 4648, sections 4 and 5).

    Blanks and line ends are passed over, the alphabet may be the one for URLs, and padding may be left off.

    Raises
    ------
    ValueError
        Otherwise; its text is the end of a sentence about the data.
    """
    try:
        data = (text.encode("ascii") if isinstance(text, str) else text).translate(None, _BLANKS)
    except UnicodeEncodeError:
        raise ValueError("it holds characters that are not base64") from None
    if b"-" in data or b"_" in data:
        if b"+" in data or b"/" in data:
            raise ValueError("it mixes both alphabets of base64")
        data = data.translate(_FOR_URLS)
    body = data.rstrip(b"=")
    padding = -len(body) % 4
    if padding == 3:
        raise ValueError(f"it has {len(body)} characters of base64, which is cut short")
    if len(data) - len(body) not in (0, padding):
        raise ValueError(f"it ends with {len(data) - len(body)} '=', where base64 has {padding}")
    try:
        return binascii.a2b_base64(body + b"=" * padding, strict_mode=True)
    except binascii.Error as error:
        raise ValueError(f"it is not base64 ({error})") from None


def looks_like_base64(text: object) -> TypeGuard[str]:
    """Whether a text without `data:` in front is written as base64 is, and long enough to be more than a name.

    Decoding may still fail; this is for doors that hand the text on.
    """
    if not isinstance(text, str) or len(text) < LEAST_BASE64 or not text.isascii():
        return False
    return text.encode().translate(None, _ALPHABET + _BLANKS) in (b"", b"=", b"==")


def is_data_uri(value: object) -> TypeGuard[str]:
    """Whether something is a text that begins with `data:`, in capitals or not."""
    return isinstance(value, str) and value[:5].lower() == "data:"


def decode_data_uri(uri: str) -> bytes:
    """Bytes of a `data:` URI (RFC 2397): base64, or characters escaped with `%`.

    Raises
    ------
    ValueError
        When there is no comma, or the base64 is none.
    """
    body, is_base64 = _cut(uri)
    if not is_base64:
        if looks_like_base64(body):
            raise ValueError("it lacks ';base64' before its comma")
        return unquote_to_bytes(body)
    return decode_base64(unquote_to_bytes(body) if "%" in body else body)


def data_uri_head(uri: str, n_bytes: int) -> bytes:
    """The first bytes of a `data:` URI, without decoding the rest; none where it is damaged."""
    try:
        body, is_base64 = _cut(uri)
        if not is_base64:
            return unquote_to_bytes(body[: 3 * n_bytes])[:n_bytes]
        start = body[: 6 * n_bytes]
        characters = (unquote_to_bytes(start) if "%" in start else start.encode("ascii")).translate(None, _BLANKS)
        if len(body) > len(start):
            characters = characters[: len(characters) // 4 * 4]
        return decode_base64(characters)[:n_bytes]
    except ValueError:
        return b""


def data_uri_size(uri: str) -> int:
    """Bytes that a `data:` URI holds, before it is decoded, or a few more."""
    try:
        body, is_base64 = _cut(uri)
    except ValueError:
        return len(uri)
    if not is_base64:
        return len(body) - 2 * body.count("%")
    n_characters = len(body) - sum(body.count(chr(blank)) for blank in b" \r\n\t") - 2 * body.count("%")
    return n_characters * 3 // 4 - body.endswith("=") - body.endswith("==")


def as_data_uri(text: str, kind: str = "application/octet-stream") -> str:
    """A `data:` URI around base64; `kind` is its media type."""
    return f"data:{kind};base64,{text}"


def _cut(uri: str) -> tuple[str, bool]:
    """What follows the comma of a `data:` URI, and whether it is base64."""
    header = _HEADER.match(uri[:_LONGEST_HEADER])
    if header is None:
        raise ValueError("it has no comma between what it is and its bytes")
    return uri[header.end() :], _IS_BASE64.fullmatch(header[1]) is not None
