"""Named entries in a folder of bounded size: written completely or not at all, checked when read, multi-process.

One file per entry, `NAME.entry`, NAME being 32 hexadecimal digits that identify everything the content depends on:

    magic 8 bytes | version u32 | bytes of facts u32 | bytes of content u64 | digest 32 bytes | facts | content

with BLAKE2b over lengths, name, facts (JSON) and content. A file with the wrong content is deleted and treated as
missing. A separate thread writes to a temporary file in the same folder and renames it; readers map files, so one
that is deleted or replaced meanwhile stays whole for them. The least recently used entries are deleted first (by
modification time, which every use renews). Knows nothing of pictures and sequences.

A folder that is broken, full, read-only or gone costs its entries and one warning; once a cache is open, nothing here
raises.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import mmap
import os
import queue
import re
import stat
import struct
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edge_runtime.errors import MessageError
from edge_runtime.system.atomic_files import make_folder, reason_of, remove_abandoned, unfinished
from edge_runtime.system.bus_errors import watch_memory

Bytes = npt.NDArray[np.uint8]

MAGIC, VERSION = b"EDGECACH", 1
_HEAD = struct.Struct("<8sIIQ32s")
SUFFIX = ".entry"
_NAME = re.compile(r"[0-9a-f]{32}\.entry")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f.]+\.tmp")
ADVICE = "Delete it, or choose another --cache-dir."
MAX_FACTS_BYTES = 1 << 20
DEFAULT_LIMIT_BYTES = 4 << 30
QUEUE_BYTES = 256 << 20
"""Maximum waiting to be written; more is dropped."""

logger = logging.getLogger("edge_runtime")


class Entry(NamedTuple):
    """What was stored under a name."""

    facts: dict[str, Any]
    content: Bytes
    """ndarray [shape=(n,), uint8], mapped, read-only"""


class DiskCache:
    """A folder of entries; safe for several threads and processes.

    Parameters
    ----------
    folder : created if it does not exist.
    limit_bytes : maximum size of all entries together.

    Raises
    ------
    MessageError
        When the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.folder, self._limit = usable_folder(folder), limit_bytes
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting_bytes = 0
        self._written = self._total = 0
        """Bytes this process has written since it last scanned the folder, and the size that it found then."""
        self._latest_ns = 0
        """Newest modification time seen: if the clock is set back, entries in use must not look old."""
        self._is_broken = False
        self._total = self._shrink(0)
        self._writer = threading.Thread(
            target=_write_jobs, args=(self._jobs,), name="edge-runtime cache", daemon=True
        )
        self._writer.start()

    def path(self, name: str) -> Path:
        """File of an entry, whether it exists or not."""
        return self.folder / f"{name}{SUFFIX}"

    def has(self, name: str) -> bool:
        """Whether such an entry seems to exist; it is not checked."""
        try:
            self.path(name).stat()
        except FileNotFoundError:
            return False
        except OSError as error:  # the folder's permissions were changed, or its drive is gone
            self._give_up("read", error)
            return False
        return True

    def get(self, name: str) -> Entry | None:
        """Return an intact entry; None if there is none, or if it was damaged and is now deleted."""
        path = self.path(name)
        try:
            with open(path, "rb", opener=_open_entry) as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            data = np.frombuffer(mapped, np.uint8)
            weakref.finalize(mapped, watch_memory(data.ctypes.data, data.size, path, ADVICE))
            entry = _checked(name, data)
        except FileNotFoundError:
            return None
        except _Foreign:
            return None
        except MemoryError:  # the entry is intact, but there is too little memory now
            return None
        except (OSError, ValueError):  # unreadable, or empty, which cannot be mapped
            self.forget(name)
            return None
        if entry is None:
            logger.warning("The entry %s in the cache is damaged; it is deleted and will be computed again.", path)
            self.forget(name)
        return entry

    def touch(self, names: Sequence[str]) -> None:
        """Mark entries as used; the first one as the latest, so that it stays longest."""
        now = self._now_ns(len(names))
        for i, name in enumerate(names):
            with contextlib.suppress(OSError):
                os.utime(self.path(name), ns=(now - i, now - i))

    def _now_ns(self, n: int = 1) -> int:
        """The last of `n` timestamps later than all seen in the folder."""
        with self._lock:
            self._latest_ns = max(time.time_ns(), self._latest_ns + n)
            return self._latest_ns

    def forget(self, name: str) -> None:
        """Delete an entry if it exists."""
        with contextlib.suppress(OSError):
            self.path(name).unlink()

    def put(
        self,
        name: str,
        facts: dict[str, Any],
        content: Callable[[], bytes],
        n_bytes: int,
        *,
        replace: bool = False,
    ) -> None:
        """Queue an entry for writing, if there is room in the queue.

        Parameters
        ----------
        content : returns `n_bytes` bytes; called on the writing thread.
        replace : replace an entry of this name; otherwise that one stays, as its content is the same.
        """
        with self._lock:
            if self._is_broken or n_bytes > self._limit or self._waiting_bytes + n_bytes > QUEUE_BYTES:
                return
            self._waiting_bytes += n_bytes
        self._jobs.put(lambda: self._write(name, facts, content, n_bytes, replace=replace))

    @property
    def is_broken(self) -> bool:
        """Whether nothing is stored any more."""
        return self._is_broken or not self._writer.is_alive()

    @property
    def has_room(self) -> bool:
        """Whether more would be accepted now."""
        return not self.is_broken and self._waiting_bytes < QUEUE_BYTES // 2

    def flush(self) -> None:
        """Wait until everything is written."""
        done = threading.Event()
        self._jobs.put(done.set)
        while not done.wait(0.2) and self._writer.is_alive():
            pass

    def close(self) -> None:
        """Write what is queued and stop."""
        self._jobs.put(None)
        self._writer.join()

    # --- on the writing thread -----------------------------------------------------------------------------------

    def _write(
        self, name: str, facts: dict[str, Any], content: Callable[[], bytes], n_bytes: int, *, replace: bool
    ) -> None:
        try:
            if not self._is_broken and (replace or not self.has(name)):
                self._write_file(name, facts, content())
        except MemoryError:
            logger.warning("There is too little memory to write the entry %s of the cache; it is left out.", name)
        except Exception as error:  # noqa: BLE001 - the caller already has its answer, and the thread must continue
            self._give_up("written to", error)
        finally:
            with self._lock:
                self._waiting_bytes -= n_bytes

    def _give_up(self, what: str, error: Exception) -> None:
        """Store nothing more, and warn once."""
        with self._lock:
            was_broken, self._is_broken = self._is_broken, True
        if not was_broken:
            logger.warning(
                "The cache folder %s cannot be %s any more (%s); nothing further is kept there.",
                self.folder,
                what,
                reason_of(error, self.folder / "entry") if isinstance(error, OSError) else error,
            )

    def _write_file(self, name: str, facts: dict[str, Any], content: bytes) -> None:
        header = json.dumps(facts).encode()
        size = _HEAD.size + len(header) + len(content)
        if size > self._limit:
            return
        if self._total + self._written + size > self._limit or self._written > self._limit // 16:
            # Scanned again now and then: other processes write here too.
            self._total, self._written = self._shrink(size), 0
        digest = _digest(name, header, content)
        make_folder(self.folder, 0o700)  # users may empty the cache by deleting the folder
        try:
            with unfinished(lambda token: self.folder / f".{name}.{token}.tmp", 0o600) as temporary:
                with temporary.open("wb") as stream:
                    stream.write(_HEAD.pack(MAGIC, VERSION, len(header), len(content), digest))
                    stream.write(header)
                    stream.write(content)
                now = self._now_ns()
                os.utime(temporary, ns=(now, now))
                temporary.replace(self.path(name))
        except OSError:
            # Else another process was faster and reads it (some systems refuse to replace it), or the folder was
            # deleted just now.
            if self.folder.is_dir() and not self.has(name):
                raise
        self._written += size

    def _shrink(self, wanted: int) -> int:
        """Delete the least recently used entries until `wanted` bytes fit; returns the bytes that are left."""
        found, left = [], []
        with contextlib.suppress(OSError), os.scandir(self.folder) as files:
            for file in files:
                with contextlib.suppress(OSError):  # deleted by another process meanwhile
                    status = file.stat(follow_symlinks=False)
                    if _NAME.fullmatch(file.name):
                        found.append((status.st_mtime_ns, status.st_size, file.name))
                    elif _TEMPORARY.fullmatch(file.name):
                        left.append(self.folder / file.name)
        remove_abandoned(left)
        self._latest_ns = max(self._latest_ns, *(changed for changed, _, _ in found), 0)
        total = sum(size for _, size, _ in found)
        for _, size, name in sorted(found):
            if total + wanted <= self._limit:
                break
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
                total -= size
        return total


def usable_folder(folder: str | Path) -> Path:
    """Return a folder that entries can be written to; created, for its owner alone, if it does not exist.

    Raises
    ------
    MessageError
        When it cannot be created or written to.
    """
    try:
        path = Path(folder).expanduser()
        make_folder(path, 0o700)  # it will hold what people asked
        with unfinished(lambda token: path / f".{token}{token}.0.tmp", 0o600):
            pass
        next(path.iterdir(), None)  # a folder can be writable but not readable
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home for `~`
        reason = getattr(error, "strerror", None) or error
        raise MessageError(
            f"The cache folder {str(folder)!r} cannot be used ({reason}); choose another --cache-dir."
        ) from None
    return path


class _Foreign(Exception):  # noqa: N818 - not reported
    """An entry that somebody else put there."""


def _open_entry(path: str, flags: int) -> int:
    """Open an entry if it is a regular file of the current user: no link to elsewhere, no pipe that never answers.

    Raises
    ------
    OSError
        When it is not a file.
    """
    handle = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    status = os.fstat(handle)
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        os.close(handle)
        raise _Foreign
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return handle


def _write_jobs(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()


def _digest(name: str, header: bytes | Bytes, content: bytes | Bytes) -> bytes:
    digest = hashlib.blake2b(f"{name} {len(header)} {len(content)} ".encode(), digest_size=32)
    for part in (header, content):
        digest.update(part if isinstance(part, bytes) else part.data)
    return digest.digest()


def _checked(name: str, data: Bytes) -> Entry | None:
    """Parse a file; None unless every byte is as it was written."""
    if len(data) < _HEAD.size:
        return None
    magic, version, n_header, n_content, digest = _HEAD.unpack(data[: _HEAD.size].tobytes())
    if (magic, version) != (MAGIC, VERSION) or n_header > MAX_FACTS_BYTES:
        return None
    if _HEAD.size + n_header + n_content != len(data):
        return None
    header, content = data[_HEAD.size : _HEAD.size + n_header], data[_HEAD.size + n_header :]
    if _digest(name, header, content) != digest:
        return None
    return Entry(json.loads(header.tobytes()), content)
