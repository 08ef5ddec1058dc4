"""An item → its answer by a model, here or on a server; what fails is tried again if it may pass, and told if not."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from edge_runtime.answers import Answer, AnswerStream
from edge_runtime.batch.items import Failure, Item
from edge_runtime.errors import CacheFull, EdgeRuntimeError, EngineBusy, NotEnoughMemoryError

RETRY_S = (0.5, 2.0, 8.0)
"""Pauses before an item is tried again."""
LASTING = frozenset({errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG})
"""Errors of files that do not pass by waiting."""
N_PREPARING = 2
"""Items whose files are read and decoded at the same time: more would only hold more pictures in memory."""


class Submits(Protocol):
    """What a batch needs of a model: `Model` has it, and so has a model on a server."""

    @property
    def submit(self) -> Callable[..., list[AnswerStream]]:
        """As `Model.submit`."""


class Answering:
    """Answers items; called by many threads.

    Parameters
    ----------
    hooks : options of every request that change no answer, such as `decoders`.
    n_preparing : items that are prepared at the same time. A model on a server sends its request meanwhile.
    """

    def __init__(
        self, model: Submits, hooks: Mapping[str, Any] | None = None, n_preparing: int = N_PREPARING
    ) -> None:
        self._model, self._hooks = model, dict(hooks or {})
        self._preparing = threading.Semaphore(n_preparing)
        self._streams: set[AnswerStream] = set()
        self._lock = threading.Lock()
        self._cancelled = threading.Event()

    def __call__(self, item: Item) -> Answer | Failure:
        """The answer, or why there is none."""
        if item.failure is not None:
            return item.failure
        for seconds in (*RETRY_S, None):
            found = self._tried(item)
            if isinstance(found, Answer) or not found.may_pass or seconds is None or self._cancelled.wait(seconds):
                break
        return found

    def cancel(self) -> None:
        """End the answers at work; what comes of them is of no use."""
        self._cancelled.set()
        with self._lock:
            for stream in self._streams:
                stream.cancel()

    def _tried(self, item: Item) -> Answer | Failure:
        try:
            with self._preparing:
                (stream,) = self._model.submit(item.messages, **{**item.options, **self._hooks})
            with self._lock:
                self._streams.add(stream)
            try:
                if self._cancelled.is_set():
                    stream.cancel()
                return stream.result()
            finally:
                with self._lock:
                    self._streams.discard(stream)
        except Exception as error:  # noqa: BLE001 - one item's failure is no other's
            return Failure.of(error, may_pass=may_pass(error))


def may_pass(error: BaseException) -> bool:
    """Whether the same item may succeed a little later."""
    if isinstance(found := getattr(error, "may_pass", None), bool):
        return found
    if isinstance(error, EngineBusy | CacheFull | NotEnoughMemoryError | MemoryError):
        return True
    cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
    if isinstance(cause, OSError):
        return cause.errno is not None and cause.errno not in LASTING
    return not isinstance(error, EdgeRuntimeError | OSError | TypeError | ValueError)


def never() -> bool:
    """For `gives_way`: nobody else is here.

    The engine then knows that nobody waits for the next token, and encodes and computes as much as it can at a time.
    """
    return False
