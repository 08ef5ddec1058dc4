"""Atomic writes: a file is written under a hidden name, then renamed; leftovers of killed processes are removed.

The writer holds a lock on the hidden file, which the system releases when the process ends, however it ends. So the
next process can distinguish files in progress from abandoned ones, whatever clocks say. Names are random: two
containers that share a disk may have the same process number. Where there are no locks (Windows, some network
drives), age decides.

What is made here is never writable by others, whatever the umask.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nobody can remove what is open
    HAS_LOCKS = False
else:
    HAS_LOCKS = True

ABANDONED_S = 3600.0
"""Since the last byte was written, where only age decides."""
MAX_TRIES = 100
FILE_MODE, FOLDER_MODE = 0o644, 0o755
FULL = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
"""No space: on the disk, in the user's quota, or because the file would be too large."""
_HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})


def make_folder(path: Path, mode: int = FOLDER_MODE) -> None:
    """Make a folder and its missing parents, writable by their owner only.

    Raises
    ------
    OSError
    """
    for parent in [*reversed(path.parents), path]:
        if not parent.is_dir():
            parent.mkdir(mode=mode if parent == path else FOLDER_MODE, exist_ok=True)


def open_for_owner(path: str, flags: int) -> int:
    """Opener for `open`: new files are readable by all and writable by their owner."""
    return os.open(path, flags, FILE_MODE)


@contextlib.contextmanager
def unfinished(name: Callable[[str], Path], mode: int = FILE_MODE) -> Iterator[Path]:
    """A new, empty file, locked while the block runs, then removed unless it was renamed.

    Parameters
    ----------
    name : makes its path from 16 random hexadecimal digits.

    Raises
    ------
    OSError
    """
    path, handle = _made(name, mode)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def _made(name: Callable[[str], Path], mode: int) -> tuple[Path, int | None]:
    for _ in range(MAX_TRIES):
        path = name(secrets.token_hex(8))
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), mode)
        except FileExistsError:
            continue
        if not HAS_LOCKS:  # an open file could not be renamed
            os.close(handle)
            return path, None
        if _lock(handle) is not False and os.fstat(handle).st_nlink:
            return path, handle
        os.close(handle)  # a process that cleans up was faster than the lock: the file is gone, or about to be
    raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))


def _lock(handle: int) -> bool | None:
    """Try to lock an open file; None where the file system has no locks."""
    if not HAS_LOCKS:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _HELD else None
    return True


def write_whole(path: Path, data: bytes, mode: int = FILE_MODE) -> None:
    """Write a small file atomically, and remove abandoned attempts to write it.

    Raises
    ------
    OSError
        The file is unchanged.
    """
    make_folder(path.parent)
    remove_abandoned(path.parent.glob(f".{glob.escape(path.name)}.*.unfinished"))
    with unfinished(lambda token: path.with_name(f".{path.name}.{token}.unfinished"), mode) as temporary:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def remove_abandoned(paths: Iterable[Path]) -> None:
    """Remove those unfinished files that no process is writing any more."""
    for path in paths:
        with contextlib.suppress(OSError):
            _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW) if HAS_LOCKS else None
    try:
        is_free = None if handle is None else _lock(handle)
        # A time in the future says nothing about its age.
        if is_free or (is_free is None and time.time() - path.stat().st_mtime > ABANDONED_S):
            path.unlink()
    finally:
        if handle is not None:
            os.close(handle)


def why_not_written(error: OSError, path: Path) -> str:
    """Start of a sentence about a file that cannot be written, with the free space."""
    return f"{path} cannot be written: {reason_of(error, path)}"


def reason_of(error: OSError, path: Path) -> str:
    """Why a file cannot be written, with the free space where that may be the reason."""
    if error.errno not in FULL:
        return error.strerror or str(error)
    free = ""
    with contextlib.suppress(OSError):
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        free = f" ({shutil.disk_usage(folder).free / 1e6:.1f} MB are free)"
    if error.errno == errno.EFBIG:
        return f"the file system or a limit (ulimit -f) does not allow files of this size{free}"
    if error.errno == errno.ENOSPC:
        return f"the disk is full{free}"
    return f"the quota on this disk is used up{free}"


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Lock a folder while the block runs; yields whether nobody else holds it. Leaves no file behind.

    Yields True where the file system has no locks.
    """
    handle = None
    if HAS_LOCKS:
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle is None or _lock(handle) is not False
    finally:
        if handle is not None:
            os.close(handle)
