"""How long OpenMP's threads spin for work before they sleep. Imports nothing, since it must come before OpenMP."""

from __future__ import annotations

import os

SPINS = 10_000
"""Turns of GNU OpenMP's waiting loop, 0.1 to 0.4 ms by processor; it would take 300,000."""


def spin_briefly() -> None:
    """Let waiting threads sleep soon; no effect once OpenMP is loaded, or where the user has set how it waits.

    A thread that spins keeps its core. If another program is at work on one of the cores, the thread that everybody
    waits for stands behind that program, while the core it could have had is spinning, for as long as the scheduler
    lets it: several milliseconds for each of hundreds of products.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
