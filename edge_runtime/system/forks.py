"""What a process that was forked off must not touch: threads it does not have, processes and files of its parent.

`os.fork`, and multiprocessing where it forks, copy memory and the thread that calls, and no other thread. Whoever
waits for one of those waits for ever, and what ends things at exit would end the parent's.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from edge_runtime.errors import EdgeRuntimeError


class Home:
    """The process in which something was made."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether that is this process."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Refuse the work of a thread that is not here.

        Raises
        ------
        EdgeRuntimeError
        """
        if not self.is_here:
            raise EdgeRuntimeError(
                "The model was loaded by another process, of which this one is a fork, and forks have no threads; "
                "load models after the fork, in each process, or start processes with multiprocessing's 'spawn'."
            )


_loaded_in: Home | None = None


def begin_loading() -> None:
    """Refuse to load a model where the threads of an earlier one's kernels were lost.

    OpenMP ends a fork of a process that has used it, at the first kernel and without an error that could be caught.

    Raises
    ------
    EdgeRuntimeError
    """
    global _loaded_in
    if _loaded_in is not None and not _loaded_in.is_here:
        raise EdgeRuntimeError(
            "This process is a fork of one that had loaded a model, and its kernels' threads were lost; load no "
            "model before the fork, or start processes with multiprocessing's 'spawn'."
        )
    _loaded_in = _loaded_in or Home()


def only_here(function: Callable[..., Any]) -> Callable[..., None]:
    """Wrap what is done at an end so that it is done in this process alone, not in forks of it."""
    home = Home()

    @functools.wraps(function)
    def wrapped(*args: Any) -> None:
        if home.is_here:
            function(*args)

    return wrapped
