"""TIFF files written by hand: any tags, samples and directories, also those that Pillow does not write."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Tags = Mapping[int, Any]
_SUB_IFDS, _OFFSETS, _COUNTS = 330, 273, 279


def directory(pixels: npt.NDArray[Any], tags: Tags | None = None) -> tuple[bytes, dict[int, Any]]:
    """Samples of a page in one strip, and its tags: ndarray [shape=(rows, columns[, samples])], by its dtype."""
    shape = (*pixels.shape, 1)[:3]
    stored = pixels.astype(pixels.dtype.newbyteorder("<"))
    found: dict[int, Any] = {256: shape[1], 257: shape[0], 258: [pixels.dtype.itemsize * 8] * shape[2], 259: 1}
    found |= {262: 1 if shape[2] == 1 else 2, 277: shape[2], 278: shape[0]}
    return stored.tobytes(), {**found, **(tags or {})}


def tiff(*pages: tuple[bytes, Tags], subs: Sequence[tuple[bytes, Tags]] = ()) -> bytes:
    """A file of directories in a chain; `subs` lie in SubIFDs of the first."""
    out = bytearray(b"II*\0\0\0\0\0")
    places = [_write(out, data, tags) for data, tags in subs]
    link = 4
    for number, (data, tags) in enumerate(pages):
        extra = {_SUB_IFDS: places} if places and number == 0 else {}
        start = _write(out, data, {**tags, **extra})
        out[link : link + 4] = struct.pack("<I", start)
        (n_tags,) = struct.unpack_from("<H", out, start)
        link = start + 2 + 12 * n_tags
    return bytes(out)


def _write(out: bytearray, data: bytes, tags: Tags) -> int:
    """Append a directory and its samples; returns the directory's place."""
    tags = {**tags, _OFFSETS: len(out), _COUNTS: len(data)}
    out += data + b"\0" * (len(data) % 2)
    entries = []
    for tag, value in sorted(tags.items()):
        kind, count, body = _encoded(value)
        if len(body) > 4:
            place, body = len(out), body + b"\0" * (len(body) % 2)
            out += body
            body = struct.pack("<I", place)
        entries.append(struct.pack("<HHI", tag, kind, count) + body.ljust(4, b"\0"))
    start = len(out)
    out += struct.pack("<H", len(entries)) + b"".join(entries) + b"\0\0\0\0"
    return start


def _encoded(value: Any) -> tuple[int, int, bytes]:
    """Type, count and bytes: text, bytes, a fraction (tuple of two), or whole numbers."""
    if isinstance(value, str):
        return 2, len(value) + 1, value.encode() + b"\0"
    if isinstance(value, bytes):
        return 1, len(value), value
    if isinstance(value, tuple):
        return 5, 1, struct.pack("<II", *value)
    numbers = value if isinstance(value, list) else [value]
    if any(number < 0 for number in numbers):
        return 9, len(numbers), struct.pack(f"<{len(numbers)}i", *numbers)
    if all(number < 65536 for number in numbers):
        return 3, len(numbers), np.asarray(numbers, "<u2").tobytes()
    return 4, len(numbers), struct.pack(f"<{len(numbers)}I", *numbers)
