"""Where in a JSON text one stands, byte by byte: inside a string or number, and which keys the open objects have.

A grammar knows this too, but does not tell; and it lets an object have the same key twice. Trusts its input to be the
beginning of a JSON text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

QUOTE, BACKSLASH, COMMA, COLON = b'"\\,:'
OPEN_OBJECT, CLOSE_OBJECT, OPEN_ARRAY, CLOSE_ARRAY = b"{}[]"
DIGITS = frozenset(b"0123456789")
NUMBER_BYTES = frozenset(b"0123456789+-.eE")

MOST_DIGITS = 15  # a float tells decimals apart as long as they have no more
MOST_EXPONENT_DIGITS = 2  # 15 digits and e99 are far from overflow
MOST_KEY_BYTES = 64


@dataclass
class JsonPosition:
    """A place in a JSON text; starts before its first byte."""

    in_string: bool = False
    in_number: bool = False
    length: int = 0
    """Bytes so far of the string or number."""
    _objects: tuple[frozenset[str] | None, ...] = ()
    """Open brackets from outside in: the keys so far of an object, None for an array."""
    _is_key: bool = False
    _key_follows: bool = False
    _escaped: bool = False
    _key: bytes = b""
    _digits: int = 0
    _exponent_digits: int = -1
    """-1 before the exponent."""

    def copy(self) -> JsonPosition:
        """Another one at the same place."""
        return replace(self)

    @property
    def number_is_long(self) -> bool:
        """Whether a number has all the digits that make a difference."""
        return self.in_number and (self._digits >= MOST_DIGITS or self._exponent_digits >= MOST_EXPONENT_DIGITS)

    @property
    def is_at_key(self) -> bool:
        """Whether this is inside a key, or where one may begin."""
        return self._is_key if self.in_string else self._key_follows

    @property
    def key_is_long(self) -> bool:
        """Whether this is a key that should end."""
        return self.in_string and self._is_key and len(self._key) >= MOST_KEY_BYTES

    def feed(self, data: bytes) -> bool:
        """Move on over `data`; False when an object gets a key that it has."""
        for byte in data:
            if self.in_string:
                if not self._feed_string(byte):
                    return False
            else:
                self._feed_structure(byte)
        return True

    def _feed_string(self, byte: int) -> bool:
        self.length += 1
        if self._escaped or byte not in (QUOTE, BACKSLASH):
            self._escaped = False
        elif byte == BACKSLASH:
            self._escaped = True
        else:
            self.in_string = False
            return not self._is_key or self._end_key()
        if self._is_key:
            self._key += bytes((byte,))
        return True

    def _end_key(self) -> bool:
        self._key_follows = False
        keys = self._objects[-1] if self._objects else None
        key = json.loads(b'"%b"' % self._key) if b"\\" in self._key else self._key.decode("utf-8", "replace")
        if keys is None or key in keys:
            return keys is None
        self._objects = (*self._objects[:-1], keys | {key})
        return True

    def _feed_structure(self, byte: int) -> None:
        if byte in NUMBER_BYTES and (self.in_number or byte not in b"+.eE"):
            self._feed_number(byte)
            return
        self.in_number = False
        if byte == QUOTE:
            self.in_string, self._is_key, self._key, self.length = True, self._key_follows, b"", 0
        elif byte == OPEN_OBJECT:
            self._objects, self._key_follows = (*self._objects, frozenset()), True
        elif byte == OPEN_ARRAY:
            self._objects, self._key_follows = (*self._objects, None), False
        elif byte in (CLOSE_OBJECT, CLOSE_ARRAY):
            self._objects, self._key_follows = self._objects[:-1], False
        elif byte == COMMA:
            self._key_follows = bool(self._objects) and self._objects[-1] is not None
        elif byte == COLON:
            self._key_follows = False

    def _feed_number(self, byte: int) -> None:
        if not self.in_number:
            self.in_number, self.length, self._digits, self._exponent_digits = True, 0, 0, -1
        self.length += 1
        if byte in b"eE":
            self._exponent_digits = 0
        elif byte in DIGITS and self._exponent_digits >= 0:
            self._exponent_digits += 1
        elif byte in DIGITS:
            self._digits += 1


def without_blanks(text: str) -> str:
    """Leave out the blanks between the parts of a JSON text, which say nothing; one that parts two words stays."""
    kept: list[str] = []
    in_string = escaped = after_blank = False
    for char in text + "\0":
        if not in_string and char in " \t\r\n":
            after_blank = True
            continue
        if after_blank and kept and not {kept[-1], char} & _PUNCTUATION:
            kept.append(" ")
        after_blank = False
        kept.append(char)
        in_string = (char != '"' or escaped) if in_string else char == '"'
        escaped = in_string and char == "\\" and not escaped
    return "".join(kept[:-1])


_PUNCTUATION = frozenset('{}[]:,"')
