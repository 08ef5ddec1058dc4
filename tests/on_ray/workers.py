"""What workers of a cluster compute in tests; they import it by this name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

POISON = 13
"""Ends the process that works on it."""
WORK_S = 0.02


def doubling() -> Callable[[int], tuple[int, str]]:
    """Twice the item, and the node where."""
    import ray

    node = ray.get_runtime_context().get_node_id()

    def double(item: int) -> tuple[int, str]:
        time.sleep(WORK_S)
        return 2 * item, node

    return double


def poisoned() -> Callable[[int], int]:
    """As `doubling`, but `POISON` is not survived."""

    def double(item: int) -> int:
        if item == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * item

    return double


def broken() -> Callable[[int], int]:
    """Fails before the first item."""
    raise RuntimeError("no model here")
