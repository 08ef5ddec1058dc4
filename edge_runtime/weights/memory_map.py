"""A file in memory without reading it: mapped, with a sentence for everything that may be wrong with it."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edge_runtime.errors import ModelFileError
from edge_runtime.system.bus_errors import RESTORE, watch_memory

Bytes = npt.NDArray[np.uint8]


class _Mapped(NamedTuple):
    """A file that is mapped."""

    handle: int
    """Of the file itself, which may have another name by now, or none."""
    size: int
    changed_ns: int
    forget: Callable[[], None]


_own: dict[int, _Mapped] = {}
"""What `map_file` has mapped and is still there, by its address."""
_one_at_a_time = threading.Lock()


def map_file(path: Path) -> Bytes:
    """Map a file read-only, with a sentence for everything that may be wrong with the path."""
    try:
        if path.is_dir():
            raise ModelFileError(f"{path} is a folder, expected a GGUF file; name the file inside it.")
        size = path.stat().st_size
        if size < 24:  # magic, version, two counts
            raise ModelFileError(
                f"{path.name} has {size} bytes, too few for a GGUF file; download or convert it again."
            )
        with path.open("rb") as file:
            mapped = np.memmap(file, dtype=np.uint8, mode="r")
            address, status = mapped.ctypes.data, os.fstat(file.fileno())
            forget = watch_memory(address, mapped.size, path)
            _own[address] = _Mapped(os.dup(file.fileno()), mapped.size, status.st_mtime_ns, forget)
        weakref.finalize(mapped, _forget, address)
        return mapped.view(np.ndarray)
    except FileNotFoundError:
        raise ModelFileError(f"The model file {path} does not exist; check the path.") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise ModelFileError(
            f"The model file {str(path)!r} cannot be read: {reason}; check the path and its permissions."
        ) from None


def _forget(address: int) -> None:
    mapped = _own.pop(address)
    mapped.forget()
    os.close(mapped.handle)


def check_unchanged(data: Bytes, path: Path) -> None:
    """Refuse a mapped file that was written to since: what is in memory is neither the old file nor the new one.

    A file that has taken its name is another one, and changes nothing here.

    Parameters
    ----------
    data : from `map_file`.
    path : named in the error.

    Raises
    ------
    ModelFileError
    """
    mapped = _own[data.ctypes.data]
    status = os.fstat(mapped.handle)
    if (status.st_size, status.st_mtime_ns) != (mapped.size, mapped.changed_ns):
        raise ModelFileError(
            f"{path.name} was written to since it was loaded ({status.st_size} bytes now, {mapped.size} then), which "
            f"ruins what is computed with it; load the model again. {RESTORE}"
        )


def let_go(data: Bytes) -> None:
    """Take the pages of a mapped file out of this process, where the system can; the file stays in its cache.

    Parameters
    ----------
    data : from `map_file`.
    """
    mapped = getattr(data.base, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def let_go_of_region(region: Region, first: int, end: int) -> None:
    """Take the pages of bytes `first` to `end` - 1 of the file whose region this is out of this process.

    They stay in the system's cache, and come back when they are read. What else is in a page stays too.
    """
    page = mmap.PAGESIZE
    begin = -(-(region.begin + first - region.offset) // page) * page
    stop = (region.begin + end - region.offset) // page * page
    if region.begin <= begin < stop <= region.end:
        # Regions are found on Linux only. A refusal (of pages that are locked) changes nothing.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(stop - begin), mmap.MADV_DONTNEED)


class Region(NamedTuple):
    """Where a part of a file lies in this process's memory."""

    begin: int
    end: int
    offset: int
    """Of its first byte in the file."""


def foreign_regions(path: Path) -> set[Region]:
    """Where others in this process than `map_file` have mapped a file; nothing where the system does not tell."""
    try:
        inode = path.stat().st_ino
        lines = Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
    except OSError:  # not Linux
        return set()
    found = set()
    for line in lines:
        addresses, access, offset, _, number, *_ = line.split(maxsplit=5)
        begin, end = (int(address, 16) for address in addresses.split("-"))
        if int(number) == inode and access.startswith("r") and begin not in _own:
            found.add(Region(begin, end, int(offset, 16)))
    return found


@contextmanager
def watched(path: Path) -> Iterator[list[Region]]:
    """Find out what is mapped of a file while the block lasts: the list holds it afterwards, if it is one region.

    Two mappings of a file are one in memory, but each page of each is a fault to bring in, and counts again in what
    the system tells of this process. So we read weights where llama.cpp has mapped them. Which mapping is its, and
    will be there for as long as its model is, only the moment tells at which it appears; where two do, none is taken.
    """
    found: list[Region] = []
    with _one_at_a_time:
        before = {region.begin for region in foreign_regions(path)}
        yield found
        found += [region for region in foreign_regions(path) if region.begin not in before]
        if len(found) > 1:
            found.clear()


def region_bytes(region: Region, first: int, end: int) -> Bytes | None:
    """Bytes `first` to `end` - 1 of the file whose region this is; None where they are not all in it.

    Returns
    -------
    data : ndarray [shape=(end - first,), uint8], not to be written to, nor to be used once the region is unmapped.
    """
    place = region.begin + first - region.offset
    if first < region.offset or place + end - first > region.end:
        return None
    found: Bytes = np.ctypeslib.as_array((ctypes.c_uint8 * (end - first)).from_address(place))
    found.flags.writeable = False
    return found
