"""Base64 and `data:` URIs, as clients write them → bytes, or a ValueError that says what is wrong.

The only decoder, for the library and all servers. Clients wrap lines (MIME, `base64 FILE`, Java's and Python's
encoders), omit the padding, or use the URL-safe alphabet; none of that makes the bytes ambiguous. What does is
refused: other characters, both alphabets in one text, padding in the middle, an impossible length.

Knows nothing about pictures, files or addresses.
"""

from __future__ import annotations

import binascii
import re
from typing import TypeGuard
from urllib.parse import unquote_to_bytes

MIN_BASE64 = 16
"""Characters of base64 without a `data:` prefix: every file has more, and anything shorter is a name."""

_BLANKS = b" \t\r\n\f\v"
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_"
_FOR_URLS = bytes.maketrans(b"-_", b"+/")
_MAX_HEADER = 1024  # characters of a data: URI before its comma
_HEADER = re.compile(r'data:((?:"[^"]*"|[^,"])*),', re.IGNORECASE)
"""What describes the data, up to the first comma that is not quoted (RFC 2397)."""
_IS_BASE64 = re.compile(r".*; *base64 *", re.IGNORECASE | re.DOTALL)


def decode_base64(text: str | bytes) -> bytes:
    """Decode base64 (RFC 4648, sections 4 and 5).

    Blanks and line ends are ignored, the alphabet may be the URL-safe one, and padding may be missing.

    Raises
    ------
    ValueError
        When it is anything else; its text is the end of a sentence about the data.
    """
    try:
        data = (text.encode("ascii") if isinstance(text, str) else text).translate(None, _BLANKS)
    except UnicodeEncodeError:
        raise ValueError("it holds characters that are not base64") from None
    if b"-" in data or b"_" in data:
        if b"+" in data or b"/" in data:
            raise ValueError("it mixes the two alphabets of base64")
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
    """Whether a text without a `data:` prefix is written like base64, and too long to be a name.

    Decoding may still fail; this is for callers that pass the text on.
    """
    if not isinstance(text, str) or len(text) < MIN_BASE64 or not text.isascii():
        return False
    return text.encode().translate(None, _ALPHABET + _BLANKS) in (b"", b"=", b"==")


def is_data_uri(value: object) -> TypeGuard[str]:
    """Whether a value is a text that starts with `data:`, in capitals or not."""
    return isinstance(value, str) and value[:5].lower() == "data:"


def decode_data_uri(uri: str) -> bytes:
    """Bytes of a `data:` URI (RFC 2397): base64, or characters escaped with `%`.

    Raises
    ------
    ValueError
        When there is no comma, or the base64 is invalid.
    """
    body, is_base64 = _cut(uri)
    if not is_base64:
        if looks_like_base64(body):
            raise ValueError("it lacks ';base64' before its comma")
        return unquote_to_bytes(body)
    return decode_base64(unquote_to_bytes(body) if "%" in body else body)


def data_uri_head(uri: str, n_bytes: int) -> bytes:
    """The first bytes of a `data:` URI, without decoding the rest; empty if it is damaged."""
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
    """Size in bytes of the data in a `data:` URI, or a few more, without decoding it."""
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
    header = _HEADER.match(uri[:_MAX_HEADER])
    if header is None:
        raise ValueError("it has no comma between its media type and its data")
    return uri[header.end() :], _IS_BASE64.fullmatch(header[1]) is not None
