"""The position in a JSON text, byte by byte: inside a string or number, and which keys the open objects have.

A grammar knows this too, but does not expose it; it allows duplicate keys in objects, and duplicate items in arrays
of unique items. Trusts its input to be the start of a JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from edge_runtime.structured_output.places import Place, canonical

QUOTE, BACKSLASH, COMMA, COLON = b'"\\,:'
OPEN_OBJECT, CLOSE_OBJECT, OPEN_ARRAY, CLOSE_ARRAY = b"{}[]"
DIGITS = frozenset(b"0123456789")
NUMBER_BYTES = frozenset(b"0123456789+-.eE")

MAX_DIGITS = 15  # a float distinguishes decimals of up to this many digits
MAX_EXPONENT_DIGITS = 2  # 15 digits and e99 are far from overflow
MAX_KEY_BYTES = 64


@dataclass(frozen=True)
class _Open:
    """An open bracket, where schemas are followed."""

    place: Place
    start: int
    """Where the current item starts in the recorded text; for arrays with unique items."""
    n_items: int = 0
    """Complete items of an array."""
    key: str = ""
    """The last key of an object."""
    seen: frozenset[str] | None = None
    """For an array with unique items: its complete items, each in canonical spelling."""
    written: tuple[bytes, ...] = ()
    """The same items without blanks."""
    number: int = 0
    """Number of brackets that were opened before it."""


@dataclass
class JsonPosition:
    """A position in a JSON text; starts before its first byte.

    Parameters
    ----------
    root : what is known about the schema of the whole text; None if the grammar enforces all of it.
    """

    root: Place | None = None
    in_string: bool = False
    in_number: bool = False
    length: int = 0
    """Bytes so far of the string or number."""
    _objects: tuple[frozenset[bytes] | None, ...] = ()
    """Open brackets, outermost first: the keys so far of an object, None for an array."""
    _is_key: bool = False
    _key_follows: bool = False
    _escaped: bool = False
    _key: bytes = b""
    _digits: int = 0
    _exponent_digits: int = -1
    """-1 before the exponent."""
    _opened: tuple[_Open, ...] = ()
    """Open brackets, outermost first, where schemas are followed."""
    _n_unique: int = 0
    """How many of them are arrays with unique items."""
    _n_opened: int = 0
    """Brackets so far, where schemas are followed."""
    _text: bytes = b""
    """What was written since the outermost of those arrays was opened, without blanks."""

    def copy(self) -> JsonPosition:
        """A copy, at the same position."""
        other = object.__new__(JsonPosition)  # a third of the time that `copy.copy` takes
        other.__dict__.update(self.__dict__)
        return other

    @property
    def number_is_long(self) -> bool:
        """Whether a number has all the digits that make a difference."""
        return self.in_number and (self._digits >= MAX_DIGITS or self._exponent_digits >= MAX_EXPONENT_DIGITS)

    @property
    def is_at_key(self) -> bool:
        """Whether this is inside a key, or where one may start."""
        return self._is_key if self.in_string else self._key_follows

    @property
    def key_is_long(self) -> bool:
        """Whether this is a key that should end."""
        return self.in_string and self._is_key and len(self._key) >= MAX_KEY_BYTES

    @property
    def key_may_repeat(self) -> bool:
        """Whether a key could become one that its object has already."""
        keys = self._objects[-1] or () if self._objects else ()
        if not self.in_string or b"\\" in self._key:  # a character has several spellings
            return bool(keys)
        return any(key.startswith(self._key) for key in keys)

    @property
    def next_of_keys(self) -> set[int]:
        """Bytes that would continue this like a key that its object already has."""
        keys = self._objects[-1] or () if self._objects else ()
        return _next_bytes(keys, self._key, QUOTE)

    @property
    def n_unique(self) -> int:
        """Open arrays whose items must be unique."""
        return self._n_unique

    @property
    def may_repeat(self) -> bool:
        """Whether the item of an open array could become a duplicate."""
        if not self._n_unique:
            return False
        if any(opened.seen is not None and opened.place.is_scarce for opened in self._opened):
            return True
        return any(  # numbers have several spellings: -0 and 0.0 are 0
            self.in_number or written.startswith(self._text[opened.start :])
            for opened in self._opened
            for written in opened.written
        )

    @property
    def next_of_items(self) -> set[int]:
        """Bytes that would continue this like an item that an open array already has."""
        opened = self._outer
        return set() if opened is None else _next_bytes(opened.written, self._text[opened.start :], COMMA)

    @property
    def outer_item(self) -> tuple[int, int, bytes]:
        """The item of the outermost open array whose items must be unique: array, schema and text so far.

        Where these are the same, the same items may follow.
        """
        opened = self._outer
        if opened is None:
            return self._n_opened, 0, self._key
        return opened.number, min(opened.n_items, opened.place.n_first), self._text[opened.start :]

    @property
    def _outer(self) -> _Open | None:
        return next((opened for opened in self._opened if opened.seen is not None), None)

    @property
    def n_outer_items(self) -> int:
        """Complete items of the outermost open array whose items must be unique; 0 where there is none."""
        opened = self._outer
        return 0 if opened is None else len(opened.written)

    def feed(self, data: bytes) -> bool:
        """Move over `data`; False when an object gets a duplicate key, or an array of unique items a duplicate."""
        for byte in data:
            if self.root is not None and not self._follow(byte):
                return False
            if self.in_string:
                if not self._feed_string(byte):
                    return False
            else:
                self._feed_structure(byte)
            if self.root is not None and byte in b'"}]' and not self.in_string and self._repeats_item():
                return False
        return True

    def _follow(self, byte: int) -> bool:
        """Follow the schemas over a byte, before anything else."""
        if not self.in_string and self._opened:
            innermost = self._opened[-1]
            if byte in (COMMA, CLOSE_ARRAY) and innermost.seen is not None:
                if not self._end_item(innermost) or (byte == COMMA and self._leaves_none()):
                    return False
            elif byte == COMMA:
                self._opened = (*self._opened[:-1], replace(innermost, n_items=innermost.n_items + 1))
            if byte in (CLOSE_OBJECT, CLOSE_ARRAY):
                self._n_unique -= self._opened[-1].seen is not None
                self._opened = self._opened[:-1]
        is_blank = not self.in_string and byte in b" \t\r\n"
        if self._n_unique and not is_blank:
            self._text += bytes((byte,))
        if not self.in_string and byte == COMMA and self._opened and self._opened[-1].seen is not None:
            self._opened = (*self._opened[:-1], replace(self._opened[-1], start=len(self._text)))
        if not self.in_string and byte in (OPEN_OBJECT, OPEN_ARRAY):
            self._open(is_array=byte == OPEN_ARRAY)
        return True

    def _open(self, *, is_array: bool) -> None:
        place = self.root
        assert place is not None
        if self._opened:
            outer, keys = self._opened[-1], self._objects[-1]
            place = outer.place.item(outer.n_items) if keys is None else outer.place.value(outer.key)
        is_unique = is_array and place.has_unique_items
        if is_unique and not self._n_unique:
            self._text = b""
        self._n_unique += is_unique
        seen = frozenset[str]() if is_unique else None
        self._opened = (*self._opened, _Open(place, len(self._text), seen=seen, number=self._n_opened))
        self._n_opened += 1

    def _end_item(self, array: _Open) -> bool:
        """Record a complete item; False if it is a duplicate."""
        item = self._text[array.start :]
        if not item:
            return True
        spelled = canonical(item)
        assert array.seen is not None
        if spelled in array.seen:
            return False
        ended = replace(array, n_items=array.n_items + 1, seen=array.seen | {spelled}, written=(*array.written, item))
        self._opened = (*self._opened[:-1], ended)
        return True

    def _leaves_none(self) -> bool:
        """Whether an array that continues with a comma has used up a value that a later item needs."""
        array = self._opened[-1]
        return array.seen is not None and not array.place.leaves_enough(array.n_items, array.seen)

    def _repeats_item(self) -> bool:
        """Whether a string, object or array that has just ended duplicates an item of its array."""
        if not self._opened or self._opened[-1].seen is None:
            return False
        array = self._opened[-1]
        item = self._text[array.start :]
        return bool(item) and canonical(item) in (array.seen or ())

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
        key = self._key
        if b"\\" in key:
            key = json.loads(b'"%b"' % key).encode("utf-8", "surrogatepass")
        if self._opened:
            named = replace(self._opened[-1], key=key.decode("utf-8", "replace"))
            self._opened = (*self._opened[:-1], named)
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


def _next_bytes(texts: Iterable[bytes], prefix: bytes, after: int) -> set[int]:
    """Next bytes of the texts that start with a prefix; `after` for one that is the prefix itself."""
    n = len(prefix)
    return {text[n] if len(text) > n else after for text in texts if text.startswith(prefix)}


def without_blanks(text: str) -> str:
    """Drop the meaningless blanks between the parts of a JSON text; one that separates two words stays."""
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
