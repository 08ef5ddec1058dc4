"""A shared library → the libraries and the version of glibc that it needs; its bytes are read, nothing is loaded.

Source: System V ABI, Edition 4.1, Dynamic Linking; Linux Standard Base, Symbol Versioning.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

Version = tuple[int, ...]

MAGIC = b"\x7fELF"
_PT_LOAD, _PT_DYNAMIC = 1, 2
_NEEDED, _STRTAB, _RPATH, _RUNPATH, _VERNEED, _VERNEEDNUM = 1, 5, 15, 29, 0x6FFFFFFE, 0x6FFFFFFF
MAX_ENTRIES = 10_000
"""Of any list in a file: libraries have a few dozen."""


class Needs(NamedTuple):
    """What the dynamic loader must find."""

    libraries: tuple[str, ...] = ()
    """File names, such as libgomp.so.1."""
    folders: str = ""
    """RUNPATH or RPATH: where they are looked for first, `$ORIGIN` for the library's own folder."""
    glibc: Version = ()
    """Empty: none."""


def needs(data: bytes) -> Needs | None:
    """What a library needs; None when it is no 64-bit little-endian ELF file, or a damaged one."""
    if data[:6] != MAGIC + b"\x02\x01":
        return None
    try:
        return _read(data)
    except (struct.error, ValueError, IndexError, OverflowError):
        return None


def _read(data: bytes) -> Needs:
    segments = _segments(data)
    entries: list[tuple[int, int]] = []
    for kind, offset, _, size in segments:
        if kind == _PT_DYNAMIC:
            entries = [struct.unpack_from("<QQ", data, offset + i) for i in range(0, min(size, 16 * MAX_ENTRIES), 16)]
    values = dict(reversed(entries))  # the first of each kind
    if _STRTAB not in values:
        return Needs()
    strings = _offset(segments, values[_STRTAB])

    def text(at: int) -> str:
        return data[strings + at : data.index(b"\0", strings + at)].decode()

    paths = [text(values[kind]) for kind in (_RUNPATH, _RPATH) if kind in values]
    glibc: Version = ()
    if _VERNEED in values:
        at = _offset(segments, values[_VERNEED])
        names = _version_names(data, at, values.get(_VERNEEDNUM, 0))
        found = (re.fullmatch(r"GLIBC_(\d+(?:\.\d+)+)", text(name)) for name in names)
        glibc = max((tuple(map(int, match[1].split("."))) for match in found if match), default=())
    return Needs(tuple(text(value) for kind, value in entries if kind == _NEEDED), "".join(paths[:1]), glibc)


def _segments(data: bytes) -> list[tuple[int, int, int, int]]:
    """Kind, offset in the file, address and size of each segment."""
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    found = []
    for i in range(count):
        kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", data, table + i * size)
        found.append((kind, offset, address, length))
    return found


def _offset(segments: list[tuple[int, int, int, int]], address: int) -> int:
    for kind, offset, start, size in segments:
        if kind == _PT_LOAD and start <= address < start + size:
            return offset + address - start
    raise ValueError


def _version_names(data: bytes, at: int, count: int) -> list[int]:
    """Places of the names of all versions needed of all libraries."""
    names = []
    for _ in range(min(count, MAX_ENTRIES)):
        _, n_versions, _, first, after = struct.unpack_from("<HHIII", data, at)
        entry = at + first
        for _ in range(min(n_versions, MAX_ENTRIES)):
            _, _, _, name, following = struct.unpack_from("<IHHII", data, entry)
            names.append(name)
            entry += following
        at += after
    return names
