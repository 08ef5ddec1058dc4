"""Memory-mapped model files, with an error sentence for everything that may be wrong with one."""

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
    """A mapped file."""

    handle: int
    """Descriptor of the file itself, which may have another name by now, or none."""
    size: int
    changed_ns: int
    forget: Callable[[], None]


_own: dict[int, _Mapped] = {}
"""What `map_file` has mapped and is still mapped, by address."""
_one_at_a_time = threading.Lock()


def map_file(path: Path) -> Bytes:
    """Map a file read-only, with an error sentence for everything that may be wrong with the path."""
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
    """Refuse a mapped file that was written to: what is in memory is neither the old file nor the new one.

    A new file under the same name is another file, and changes nothing here.

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


def release_pages(data: Bytes) -> None:
    """Drop the pages of a mapped file from this process, where the system can; they stay in the page cache.

    Parameters
    ----------
    data : from `map_file`.
    """
    mapped = getattr(data.base, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def release_region(region: Region, first: int, end: int) -> None:
    """Drop the pages of bytes `first` to `end` - 1 of the file that this region maps from this process.

    They stay in the page cache, and come back when they are read. Pages that hold other bytes too are kept.
    """
    page = mmap.PAGESIZE
    begin = -(-(region.begin + first - region.offset) // page) * page
    stop = (region.begin + end - region.offset) // page * page
    if region.begin <= begin < stop <= region.end:
        # Regions are found on Linux only. A refusal (locked pages) changes nothing.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(stop - begin), mmap.MADV_DONTNEED)


class Region(NamedTuple):
    """Where a part of a file lies in this process's memory."""

    begin: int
    end: int
    offset: int
    """Of the region's first byte in the file."""


def foreign_regions(path: Path) -> set[Region]:
    """Where code other than `map_file` has mapped a file in this process; empty where the system does not say."""
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
    """Find which region of a file is mapped while the block runs: the list holds it afterwards, if it is exactly one.

    Two mappings of a file share memory, but every page of each costs a page fault and counts again in what the system
    reports for this process. So we read weights where llama.cpp has mapped them. Only the moment at which a mapping
    appears shows that it is llama.cpp's and lasts as long as its model; where two appear, neither is used.
    """
    found: list[Region] = []
    with _one_at_a_time:
        before = {region.begin for region in foreign_regions(path)}
        yield found
        found += [region for region in foreign_regions(path) if region.begin not in before]
        if len(found) > 1:
            found.clear()


def region_bytes(region: Region, first: int, end: int) -> Bytes | None:
    """Bytes `first` to `end` - 1 of the file that this region maps; None if the region does not hold them all.

    Returns
    -------
    data : ndarray [shape=(end - first,), uint8], read-only, not to be used once the region is unmapped.
    """
    place = region.begin + first - region.offset
    if first < region.offset or place + end - first > region.end:
        return None
    found: Bytes = np.ctypeslib.as_array((ctypes.c_uint8 * (end - first)).from_address(place))
    found.flags.writeable = False
    return found
