"""How much work the form of an answer may take: steps of a search, and seconds of processor time.

A schema of a hundred bytes can ask for a search of hours. All that is done for the form of one request shares one
effort; later, every step of its answer has a small one. Steps are the same on every machine; seconds, of the thread
that works, are for what cannot be counted: a single call of llguidance. Knows nothing of schemas.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edge_runtime.errors import MessageError

MOST_STEPS = 100_000
"""Of one request, before its answer begins; a step takes about 20 µs."""
MOST_SECONDS = 5.0
LOOK_EVERY = 64
"""Steps between two looks at the clock, and at whether anybody waits."""
PAUSE_S = 0.0002
"""At each look: the interpreter's lock is left to others, who wait 5 ms for it otherwise."""

ANSWER_SAVED_S, ANSWER_STEP_S = 0.5, 0.04
"""Processor time that the form of an answer may take in one step at most, and may take for every token on average."""


class TooMuchWorkError(MessageError):
    """A form of an answer that takes more work than it may."""


class Effort:
    """What may still be done for the form of one request.

    Parameters
    ----------
    steps, seconds : of work that it may take.
    check : called often; what it raises ends the work.
    """

    def __init__(
        self, steps: int = MOST_STEPS, seconds: float = MOST_SECONDS, check: Callable[[], None] = lambda: None
    ) -> None:
        self._steps, self._seconds, self._check = steps, seconds, check
        self._left, self._unseen = steps, 0
        self._began = time.thread_time()

    def spend(self, steps: int = 1) -> None:
        """Note work that is about to be done.

        Raises
        ------
        TooMuchWorkError
            When there is more than may be done.
        """
        self._left -= steps
        self._unseen += steps
        if self._left < 0:
            raise TooMuchWorkError(
                f"The schema takes too much work: more than {self._steps} steps, which is the limit, to find out "
                "whether its answers end. Ask for shorter texts, for fewer different keys or unique items, and for "
                "fewer branches."
            )
        if self._unseen >= LOOK_EVERY:
            self._unseen = 0
            time.sleep(PAUSE_S)
            self.look()

    def look(self) -> None:
        """Look at the clock, and whether the work is still wanted; before and after what takes long.

        Raises
        ------
        TooMuchWorkError
            When the time is over.
        """
        self._check()
        if time.thread_time() - self._began > self._seconds:
            raise TooMuchWorkError(
                f"The schema takes too much work: more than {self._seconds:g} s of processor time, which is the "
                "limit, to compile it. Use fewer properties, branches and values, and patterns without large "
                "repetitions inside one another."
            )


class AnswerEffort(Effort):
    """What may be done in the steps of one answer, on the thread that all answers share.

    What steps do not use is saved for later ones, up to `ANSWER_SAVED_S`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._saved_s = ANSWER_SAVED_S

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step of the answer; `spend` and `look` raise inside when it, and those before it, took too long."""
        self._saved_s = min(ANSWER_SAVED_S, self._saved_s + ANSWER_STEP_S)
        self._began = time.thread_time()
        try:
            yield
        finally:
            self._saved_s -= time.thread_time() - self._began

    def spend(self, steps: int = 1) -> None:
        """Note work that is about to be done; otherwise as `look`."""
        self._unseen += steps
        if self._unseen >= LOOK_EVERY:
            self._unseen = 0
            self.look()

    def look(self) -> None:
        """Look at the clock.

        Raises
        ------
        TooMuchWorkError
            When the step, and those before it, took too long.
        """
        if time.thread_time() - self._began > self._saved_s:
            raise TooMuchWorkError(
                f"The schema takes too much work while the answer is written: more than {ANSWER_STEP_S * 1000:g} ms "
                "of processor time for every token, which is the limit. Ask for fewer unique items, different keys "
                "and branches, and for plainer patterns."
            )
