"""A file is written under a hidden name and gets its own when it is whole; what killed processes left is removed.

Whoever writes holds a lock on the hidden file, which the system takes back when the process ends, however it ends. So
the next one who comes by can tell what is being worked on from what was abandoned, whatever clocks say. Names are
drawn at random: two containers that share a disk may have one process number. Where locks are not to be had (Windows,
some network drives), the age decides.

What is made here is never writable for others, whatever the umask.
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
"""Without a byte written, where only the age tells."""
MOST_TRIES = 100
FILE_MODE, FOLDER_MODE = 0o644, 0o755
FULL = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
"""No room: on the disk, in what a user may have of it, or in a file of that file system."""
_HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})


def make_folder(path: Path, mode: int = FOLDER_MODE) -> None:
    """Make a folder and what is missing above it, writable for its owner alone.

    Raises
    ------
    OSError
    """
    for parent in [*reversed(path.parents), path]:
        if not parent.is_dir():
            parent.mkdir(mode=mode if parent == path else FOLDER_MODE, exist_ok=True)


def open_for_owner(path: str, flags: int) -> int:
    """Opener for `open`: what is made is readable for all and writable for its owner."""
    return os.open(path, flags, FILE_MODE)


@contextlib.contextmanager
def unfinished(name: Callable[[str], Path], mode: int = FILE_MODE) -> Iterator[Path]:
    """A new and empty file, locked while the block lasts, and then removed if it still has its name.

    Parameters
    ----------
    name : what it is called, made of 16 hexadecimal digits.

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
    for _ in range(MOST_TRIES):
        path = name(secrets.token_hex(8))
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), mode)
        except FileExistsError:
            continue
        if not HAS_LOCKS:  # what is open could not be renamed
            os.close(handle)
            return path, None
        if _lock(handle) is not False and os.fstat(handle).st_nlink:
            return path, handle
        os.close(handle)  # somebody who tidies up was faster than the lock: it is gone, or about to be
    raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))


def _lock(handle: int) -> bool | None:
    """Lock an open file: whether that was to be had; None where nobody can tell."""
    if not HAS_LOCKS:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _HELD else None
    return True


def write_whole(path: Path, data: bytes, mode: int = FILE_MODE) -> None:
    """Write a small file, in one step for whoever reads it; of what was begun and abandoned nothing is left.

    Raises
    ------
    OSError
        The file is as before then.
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
    """Remove those of some unfinished files that nobody writes any more."""
    for path in paths:
        with contextlib.suppress(OSError):
            _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW) if HAS_LOCKS else None
    try:
        is_free = None if handle is None else _lock(handle)
        # In the future: then nothing is known of its age.
        if is_free or (is_free is None and time.time() - path.stat().st_mtime > ABANDONED_S):
            path.unlink()
    finally:
        if handle is not None:
            os.close(handle)


def why_not_written(error: OSError, path: Path) -> str:
    """Beginning of a sentence about a file that cannot be written, with what is free."""
    return f"{path} cannot be written: {reason_of(error, path)}"


def reason_of(error: OSError, path: Path) -> str:
    """Why a file cannot be written, with what is free where that may be it."""
    if error.errno not in FULL:
        return error.strerror or str(error)
    free = ""
    with contextlib.suppress(OSError):
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        free = f" ({shutil.disk_usage(folder).free / 1e6:.1f} MB are free)"
    if error.errno == errno.EFBIG:
        return f"files may not be so large there, by its file system or by a limit (ulimit -f){free}"
    if error.errno == errno.ENOSPC:
        return f"the disk is full{free}"
    return f"the quota on this disk is used up{free}"


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Hold a folder while the block lasts: whether nobody else does so. Leaves no file behind.

    Yields True where nobody can tell.
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
