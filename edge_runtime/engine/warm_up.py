"""Prefixes that chats shared in the last run, computed while idle so that the first chat need not wait for them."""

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
    """A prefix that will probably be requested."""

    request: Request
    """A request that prefetches it."""
    saved: Saved = field(default_factory=Saved)
    """What is on disk of it."""


def expected_prefixes(prefixes: SavedPrefixes, adapters: Mapping[bytes, str | None], n_ctx: int) -> list[Expected]:
    """Prefixes recorded on disk, as far as this model can compute them; from any thread.

    Parameters
    ----------
    adapters : name by identity.
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
    """The prefixes still to be computed, one after the other. Used only on the inference thread."""

    def __init__(self) -> None:
        self.expected: deque[Expected] = deque()
        self._at_work: tuple[Task, Expected] | None = None

    def add(self, expected: Sequence[Expected]) -> None:
        """Add prefixes to compute while idle."""
        self.expected += expected

    def next_task(self, is_asked: Callable[[], bool]) -> Task | None:
        """A task that computes the next prefix, if there is one; it ends as soon as `is_asked` returns true."""
        if not self.expected:
            return None
        expected = self.expected.popleft()
        task = Task(expected.request, is_asked, keys=expected.request.keys(), saved=expected.saved)
        self._at_work = task, expected
        return task

    def give_up(self) -> None:
        """Do not retry the running prefix: the KV cache has no room for it."""
        self._at_work = None

    def ended(self, task: Task, reason: FinishReason) -> None:
        """Record the end of any task; if it was one of these and was interrupted, it is next again."""
        if self._at_work is not None and task is self._at_work[0]:
            if reason == "cancelled":
                self.expected.appendleft(self._at_work[1])
            self._at_work = None
