"""Memory of this machine: how much is available, and giving back what was freed."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil

CGROUP, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class _Version(NamedTuple):
    """What a version of control groups calls things."""

    limits: tuple[str, ...]
    used: str


_FIRST = _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes")
_SECOND = _Version(("memory.max", "memory.high"), "memory.current")  # above "high", everything is slowed down


def available_bytes(root: Path = CGROUP, own: Path = OWN_GROUPS) -> int:
    """Memory available without swapping: the machine's, or what a control group has left if that is less.

    Every group that this process is in counts, up to the outermost one that can be seen.

    Parameters
    ----------
    root : where control groups are mounted.
    own : names the groups of this process, as /proc/self/cgroup does.
    """
    free = int(psutil.virtual_memory().available)
    for folder, version in _groups(root, own):
        try:
            in_use = int((folder / version.used).read_text()) - _cached_bytes(folder)
        except (OSError, ValueError):  # no such group
            continue
        for name in version.limits:
            with contextlib.suppress(OSError, ValueError):  # "max"
                free = min(free, int((folder / name).read_text()) - in_use)
    return max(0, free)


def _groups(root: Path, own: Path) -> Iterator[tuple[Path, _Version]]:
    """Folders of the memory groups of this process, from the outermost to its own.

    In a container the folder that is mounted may be the container's own, and then the path leads nowhere.
    """
    first, second = _paths(own)
    for mounted, path, version in (
        (root, second, _SECOND),
        (root / "unified", second, _SECOND),
        (root / "memory", first, _FIRST),
    ):
        folder = mounted
        yield folder, version
        for part in path.parts:
            folder /= part
            yield folder, version


def _paths(own: Path) -> tuple[PurePosixPath, PurePosixPath]:
    """Paths of this process's groups, of the first version's memory controller and of the second version."""
    first = second = PurePosixPath()
    try:
        lines = own.read_text("utf-8", "replace").splitlines()
    except OSError:  # not Linux
        return first, second
    for _, controllers, path in (parts for line in lines if len(parts := line.split(":", 2)) == 3):
        relative = PurePosixPath(*(part for part in PurePosixPath(path).parts if part not in ("/", "..")))
        if "memory" in controllers.split(","):
            first = relative
        elif not controllers:
            second = relative
    return first, second


def _cached_bytes(folder: Path) -> int:
    """Bytes of files that a group holds in memory, which it gives back when they are needed."""
    facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    prefix = "total_" if "total_inactive_file" in facts else ""  # with the groups inside it, as the usage is
    return int(facts.get(f"{prefix}active_file", 0)) + int(facts.get(f"{prefix}inactive_file", 0))


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library than glibc, which gives memory back by itself
        return None


def give_back() -> None:
    """Return freed memory to the system, where the C library would keep it.

    Batches of slices of varying sizes leave glibc with as much free memory as is in use.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
