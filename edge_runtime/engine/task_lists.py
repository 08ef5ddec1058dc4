"""Tasks queued and running, and their end.

What ends a task gives back its sequences, so that others can be admitted. Knows nothing of what is computed when.
"""

from __future__ import annotations

from collections import deque

from edge_runtime.engine.events import FinishReason
from edge_runtime.engine.sequences import Sequences
from edge_runtime.engine.task import Task
from edge_runtime.engine.warm_up import WarmUp


class TaskLists:
    """The tasks of one inference thread, and the sequences they have."""

    def __init__(self, sequences: Sequences, warm_up: WarmUp) -> None:
        self.sequences, self.warm_up = sequences, warm_up
        self.waiting: deque[Task] = deque()
        """Queued, without sequences, in the order of admission."""
        self.active: list[Task] = []
        """Admitted, with sequences."""
        self.admission_paused = False
        """Whether a task was preempted and none has ended since: one admitted now would be preempted next."""

    @property
    def n_tasks(self) -> int:
        """Tasks queued or running."""
        return len(self.waiting) + len(self.active)

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to do now."""
        return any(not task.is_held or task.is_cancelled() for task in [*self.waiting, *self.active])

    @property
    def n_urgent(self) -> int:
        """Tasks that do not give way."""
        return sum(not task.gives_way for task in [*self.waiting, *self.active])

    def end(self, task: Task, reason: FinishReason) -> None:
        """End a task whose answer is whole, or is not wanted."""
        sequence = task.sequence if task.sequences else None
        self._drop(task)
        task.finish(reason)
        self.warm_up.ended(task, reason)
        # Those that give way, thousands that are asked once, would displace what is kept.
        if sequence is not None and not task.gives_way:
            self.sequences.save_prompt(task, sequence)

    def fail(self, task: Task, error: Exception) -> None:
        """End a task with an error."""
        self._drop(task)
        task.fail(error)

    def _drop(self, task: Task) -> None:
        self.admission_paused = False
        if task in self.active:
            self.active.remove(task)
            self.sequences.release(task)
        else:
            self.waiting.remove(task)
        task.close()

    def fail_all(self, error: Exception) -> None:
        """Fail all tasks with an unexpected error; the thread continues."""
        for task in [*self.waiting, *self.active]:
            self.fail(task, error)

    def close(self) -> None:
        """End all tasks; the decoder may be closed afterwards."""
        for task in [*self.waiting, *self.active]:
            self.end(task, "cancelled")
        self.sequences.saver.save_all()
