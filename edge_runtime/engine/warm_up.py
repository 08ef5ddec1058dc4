"""What chats shared before the last end: computed while nobody asks, so that the first chat need not wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from edge_runtime.cache.prefixes import Saved, SavedPrefixes
from edge_runtime.engine.events import FinishReason
from edge_runtime.engine.request import Request
from edge_runtime.engine.task import Task
from edge_runtime.options import GenerationOptions
from edge_runtime.prompt.build import Prompt


@dataclass(frozen=True)
class Expected:
    """A prefix that will probably be asked for."""

    request: Request
    """A prefetch of it."""
    saved: Saved = field(default_factory=Saved)
    """What lies on disk of it."""


def expected_prefixes(prefixes: SavedPrefixes, adapters: Mapping[bytes, str | None], n_ctx: int) -> list[Expected]:
    """Prefixes that were recorded on disk, as far as this model can compute them; from any thread.

    Parameters
    ----------
    adapters : identity to name.
    """
    expected = []
    for each in prefixes.recorded():
        if each.adapter in adapters and 1 < len(each.ids) < n_ctx:
            request = Request(
                Prompt("", each.ids, []),
                groups=[],
                digests=[],
                options=GenerationOptions(max_tokens=0, adapter=adapters[each.adapter]),
                is_prefetch=True,
                shared=len(each.ids),
            )
            expected.append(Expected(request, prefixes.find(request.keys(), each.adapter)))
    return expected


class WarmUp:
    """The prefixes that are still to be computed, one after the other. Used by the inference thread alone."""

    def __init__(self) -> None:
        self.expected: deque[Expected] = deque()
        self._at_work: tuple[Task, Expected] | None = None

    def add(self, expected: Sequence[Expected]) -> None:
        """Take in what is to be computed when nobody asks."""
        self.expected += expected

    def next_task(self, is_asked: Callable[[], bool]) -> Task | None:
        """A task that computes the next prefix, if there is one; it ends as soon as `is_asked`."""
        if not self.expected:
            return None
        expected = self.expected.popleft()
        task = Task(expected.request, is_asked, keys=expected.request.keys(), saved=expected.saved)
        self._at_work = task, expected
        return task

    def give_up(self) -> None:
        """What is at work has no place in the KV cache: it is not tried again."""
        self._at_work = None

    def ended(self, task: Task, reason: FinishReason) -> None:
        """Take note of the end of any task; one of these that somebody interrupted comes first the next time."""
        if self._at_work is not None and task is self._at_work[0]:
            if reason == "cancelled":
                self.expected.appendleft(self._at_work[1])
            self._at_work = None
