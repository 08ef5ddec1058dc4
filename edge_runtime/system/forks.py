"""What a forked process must not touch: threads it does not have, and its parent's processes and files.

`os.fork`, and multiprocessing where it forks, copy memory and the calling thread, but no other thread. Waiting for
one of those never ends, and clean-up at exit would clean up what belongs to the parent.
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
        """Whether it is this process."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Refuse work that needs a thread of another process.

        Raises
        ------
        EdgeRuntimeError
        """
        if not self.is_here:
            raise EdgeRuntimeError(
                "The model was loaded before this process was forked, and a fork does not have the model's threads; "
                "load models after the fork, in each process, or start processes with multiprocessing's 'spawn'."
            )


_loaded_in: Home | None = None


def begin_loading() -> None:
    """Refuse to load a model in a fork of a process that had loaded one, as its kernels' threads are lost.

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
    """Wrap a clean-up function so that it runs only in this process, not in forks of it."""
    home = Home()

    @functools.wraps(function)
    def wrapped(*args: Any) -> None:
        if home.is_here:
            function(*args)

    return wrapped
