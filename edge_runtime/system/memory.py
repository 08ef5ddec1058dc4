"""Memory of this machine: how much is available, and giving back what was freed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def available_bytes(root: Path = CGROUP) -> int:
    """Memory available without swapping: the machine's, or what the control group has left if that is less."""
    free = int(psutil.virtual_memory().available)
    for folder, limit, used in ((root, "max", "current"), (root / "memory", "limit_in_bytes", "usage_in_bytes")):
        try:
            facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(facts.get("active_file", 0)) + int(facts.get("inactive_file", 0))  # given back when needed
            in_use = int((folder / f"memory.{used}").read_text()) - cached
            free = min(free, int((folder / f"memory.{limit}").read_text()) - in_use)
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return max(0, free)


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
