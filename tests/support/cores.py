"""Test processes side by side, each on a core of its own.

Threads of numba and llama.cpp spin at barriers until the last of them arrives. Where two test processes compute on
all cores, each spins for threads that wait for a core the other one spins on, and both take longer than one after the
other. So every worker of pytest-xdist keeps to one core, and so does what it starts (Linux only; elsewhere the
operating system decides).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_CAN_PIN = sys.platform == "linux"
_all_cpus: set[int] = set(os.sched_getaffinity(0)) if _CAN_PIN else set()
_own_cpus = _all_cpus


def pin_worker() -> None:
    """In a worker of pytest-xdist, keep to one core from now on. Call this before numpy and numba are imported."""
    global _own_cpus
    # A pytest that a test starts is no worker, though it inherits the environment.
    worker = os.environ.pop("PYTEST_XDIST_WORKER", None)
    if worker is None or not _CAN_PIN:
        return
    cores = _cores(_all_cpus)
    _own_cpus = cores[int(worker.removeprefix("gw")) % len(cores)]
    os.environ.setdefault("NUMBA_NUM_THREADS", str(len(_all_cpus)))  # by default those it could use now
    _set_affinity(_own_cpus)


@contextmanager
def every_core() -> Iterator[None]:
    """Let this process, all its threads, and what it starts use every core while the block lasts."""
    if _own_cpus == _all_cpus:
        yield
        return
    _set_affinity(_all_cpus)
    _count_threads_anew()
    try:
        yield
    finally:
        _set_affinity(_own_cpus)
        _count_threads_anew()


def _cores(cpus: set[int]) -> list[set[int]]:
    """Group logical CPUs by the physical core they belong to."""
    groups: dict[str, set[int]] = {}
    for cpu in sorted(cpus):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        name = str(cpu)  # where a sandbox hides them
        with suppress(OSError):
            name = siblings.read_text().strip()
        groups.setdefault(name, set()).add(cpu)
    return list(groups.values())


def _set_affinity(cpus: set[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread.name), cpus)


def _count_threads_anew() -> None:
    """Kernels keep the number of cores that they found at their first use."""
    if (threads := sys.modules.get("edge_kernels.threads")) is not None:
        threads.set_threads(None)
