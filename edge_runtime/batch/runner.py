"""Items → items with results, as they come: a bounded number at work, each in a thread of its own.

    items ─ one thread takes at a time ─ [threads: answer(item)] ─ results ─ caller's thread
                                          decode, submit, wait

While a thread waits for its answer, others have theirs queued in the engine, which encodes and computes them
together, and the next pictures are decoded. Knows nothing of models and files.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from edge_runtime.batch.items import Item
from edge_runtime.batch.output import Output

ORDERED_AHEAD = 1024
"""Results that may wait for one before them when order is kept."""
LOOK_S = 0.2
"""Between two moments in which the caller's thread is free for signals and a display."""


def pending(items: Iterable[Item], output: Output, on_done: Callable[[], None] = lambda: None) -> Iterator[Item]:
    """Items without an answer, numbered.

    Parameters
    ----------
    on_done : called for each of the others.

    Raises
    ------
    MessageError
        When there is an answer, but to another question.
    """
    number = 0
    for item in items:
        if output.has(item):
            on_done()
            continue
        yield replace(item, number=number)
        number += 1


def in_order(pairs: Iterable[tuple[Item, Any] | None]) -> Iterator[tuple[Item, Any] | None]:
    """Items and results by the items' numbers; None is passed on."""
    waiting: dict[int, tuple[Item, Any]] = {}
    following = 0
    for pair in pairs:
        if pair is None:
            yield None
            continue
        waiting[pair[0].number] = pair
        while following in waiting:
            yield waiting.pop(following)
            following += 1
    for number in sorted(waiting):  # of a run that was stopped: all before them came, too, or never will
        yield waiting[number]


class Runner:
    """Work on items, which can be stopped.

    Parameters
    ----------
    items : taken by one thread at a time, each when there is a place for it.
    answer : from item to result, called by many threads; it raises nothing but what is to end everything.
    n_at_work : items that are taken and have no result.
    ahead : items that may be taken after the first without a result; None for any number.
    """

    def __init__(
        self, items: Iterable[Item], answer: Callable[[Item], Any], n_at_work: int, ahead: int | None = None
    ) -> None:
        self._items, self._answer, self._ahead = iter(items), answer, ahead
        self._taking = threading.Lock()
        self._changed = threading.Condition()
        self._open: set[int] = set()
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._results: queue.SimpleQueue[tuple[Item, Any] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name="edge-runtime item", daemon=True) for _ in range(n_at_work)
        ]

    @property
    def n_at_work(self) -> int:
        """Items that are taken and have no result yet."""
        return len(self._open)

    def stop(self) -> None:
        """Take no further item; those at work are finished."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()

    def results(self) -> Iterator[tuple[Item, Any] | None]:
        """Items and results as they come; None now and then while none comes.

        Raises
        ------
        Exception
            Whatever `items` or `answer` raised, after the results of all items at work.
        """
        left = len(self._threads)
        for thread in self._threads:
            thread.start()
        try:
            while left:
                try:
                    found = self._results.get(timeout=LOOK_S)
                except queue.Empty:
                    yield None
                    continue
                if found is None:
                    left -= 1
                    continue
                yield found
        finally:
            self.stop()
        if self._error is not None:
            raise self._error

    def _take(self) -> Item | None:
        with self._taking:
            if self._stopping.is_set():
                return None
            try:
                item = next(self._items, None)
            except Exception as error:  # noqa: BLE001 - raised where the results are read
                self._fail(error)
                return None
            if item is None:
                self.stop()
                return None
            with self._changed:
                while self._ahead is not None and self._open and item.number - min(self._open) >= self._ahead:
                    self._changed.wait()
                self._open.add(item.number)
            return item

    def _work(self) -> None:
        """Body of a thread."""
        try:
            while (item := self._take()) is not None:
                result = self._answer(item)
                with self._changed:
                    self._open.discard(item.number)
                    self._changed.notify_all()
                self._results.put((item, result))
        except BaseException as error:  # noqa: BLE001 - raised where the results are read
            self._fail(error)
        finally:
            self._results.put(None)

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self.stop()
