"""Giving the processor to others first, for work that may take longer."""

from __future__ import annotations

import logging
import os

import psutil

logger = logging.getLogger("edge_runtime")

MAX_NICENESS = 19


def be_nice(n: int) -> None:
    """Let other processes go first: this one, its threads and processes, as far as they are started from now on.

    Where that is impossible, a line in the log says so, and the work goes on as before.

    Parameters
    ----------
    n : added to the process's niceness, from 0 to `MAX_NICENESS`. On Windows, which has classes instead, 1 to 9 means
        "below normal" and more means "idle".
    """
    if n == 0:
        return
    try:
        if hasattr(os, "nice"):
            os.nice(n)
        else:
            name = "BELOW_NORMAL_PRIORITY_CLASS" if n < 10 else "IDLE_PRIORITY_CLASS"
            psutil.Process().nice(getattr(psutil, name))
    except (OSError, AttributeError, psutil.Error) as error:
        logger.warning("The priority cannot be lowered here (%s); the work goes on with the usual one.", error)
