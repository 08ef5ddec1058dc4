"""How much work the form of an answer may take: steps of a search, and seconds of CPU time.

A schema of a hundred bytes can ask for a search of hours. All work for the form of one request shares one budget;
later, every step of its answer has a small one. Steps are the same on every machine; seconds of the working thread
limit what cannot be counted: a single call of llguidance. Knows nothing about schemas.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edge_runtime.errors import MessageError

MAX_STEPS = 100_000
"""Per request, before its answer starts; a step takes about 20 µs."""
MAX_SECONDS = 5.0
CHECK_EVERY = 64
"""Steps between two checks of the clock, and of whether the work is still wanted."""
PAUSE_S = 0.0002
"""At each check: releases the GIL, for which other threads wait 5 ms otherwise."""

ANSWER_SAVED_S, ANSWER_STEP_S = 0.5, 0.04
"""CPU time that the form of an answer may take in one step at most, and per token on average."""


class TooMuchWorkError(MessageError):
    """A form of an answer that takes too much work."""


class Effort:
    """The work that is left for the form of one request.

    Parameters
    ----------
    steps, seconds : limits of the work.
    check : called often; what it raises ends the work.
    """

    def __init__(
        self, steps: int = MAX_STEPS, seconds: float = MAX_SECONDS, check: Callable[[], None] = lambda: None
    ) -> None:
        self._steps, self._seconds, self._check = steps, seconds, check
        self._left, self._unseen = steps, 0
        self._began = time.thread_time()

    def spend(self, steps: int = 1) -> None:
        """Record work that is about to be done.

        Raises
        ------
        TooMuchWorkError
            When it exceeds the limit.
        """
        self._left -= steps
        self._unseen += steps
        if self._left < 0:
            raise TooMuchWorkError(
                f"The schema takes too much work: more than {self._steps} steps, which is the limit, to find out "
                "whether its answers end. Ask for shorter texts, for fewer different keys or unique items, and for "
                "fewer branches."
            )
        if self._unseen >= CHECK_EVERY:
            self._unseen = 0
            time.sleep(PAUSE_S)
            self.check_time()

    def check_time(self) -> None:
        """Check the clock, and whether the work is still wanted; before and after long operations.

        Raises
        ------
        TooMuchWorkError
            When time is up.
        """
        self._check()
        if time.thread_time() - self._began > self._seconds:
            raise TooMuchWorkError(
                f"The schema takes too much work: more than {self._seconds:g} s of CPU time, which is the "
                "limit, to compile it. Use fewer properties, branches and values, and patterns without large "
                "repetitions inside one another."
            )


class AnswerEffort(Effort):
    """The work that is left for the steps of one answer, on the thread that all answers share.

    Time that steps do not use is saved for later ones, up to `ANSWER_SAVED_S`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._saved_s = ANSWER_SAVED_S

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step of the answer; `spend` and `check_time` raise inside it if it took too long, with those before."""
        self._saved_s = min(ANSWER_SAVED_S, self._saved_s + ANSWER_STEP_S)
        self._began = time.thread_time()
        try:
            yield
        finally:
            self._saved_s -= time.thread_time() - self._began

    def spend(self, steps: int = 1) -> None:
        """Record work that is about to be done; otherwise like `check_time`."""
        self._unseen += steps
        if self._unseen >= CHECK_EVERY:
            self._unseen = 0
            self.check_time()

    def check_time(self) -> None:
        """Check the clock.

        Raises
        ------
        TooMuchWorkError
            When this step took too long, with those before it.
        """
        if time.thread_time() - self._began > self._saved_s:
            raise TooMuchWorkError(
                f"The schema takes too much work while the answer is written: more than {ANSWER_STEP_S * 1000:g} ms "
                "of CPU time for every token, which is the limit. Ask for fewer unique items, different keys and "
                "branches, and for simpler patterns."
            )
