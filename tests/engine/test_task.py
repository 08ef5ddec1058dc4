"""What a task goes through, and what it lets go of on the way."""

from __future__ import annotations

import threading
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from edge_runtime.engine.events import EventQueue
from edge_runtime.engine.request import Request
from edge_runtime.engine.task import Decoding, Pictures, Task, TaskState
from edge_runtime.inputs.slice_groups import LazyGroup
from edge_runtime.options import GenerationOptions
from edge_runtime.prompt.build import Prompt

WAYS = [
    "WAITING PREFILL DECODING FINISHED",
    "WAITING ENCODING PREFILL DECODING PREEMPTED PREFILL DECODING FINISHED",
    "WAITING ENCODING PREEMPTED ENCODING PREFILL PREEMPTED PREFILL FINISHED",
    "WAITING FINISHED",
    "WAITING ENCODING FINISHED",
    "WAITING PREFILL PREEMPTED FINISHED",
]


def task_of(state: str = "WAITING") -> Task:
    task = Task(Request(Prompt("", [1, 2], []), [], [], GenerationOptions(max_tokens=1)), lambda: False)
    task.state = TaskState[state]
    return task


@pytest.mark.parametrize("way", WAYS)
def test_ways_through_the_scheduler(way):
    task, (first, *states) = task_of(), [TaskState[name] for name in way.split()]
    assert task.state is first
    for state in states:
        task.enter(state)
        assert task.state is state


def test_there_are_no_other_ways():
    known = {pair for way in WAYS for pair in zip(way.split(), way.split()[1:], strict=False)}
    known.add(("DECODING", "FINISHED"))
    for one, other in product([state.name for state in TaskState], repeat=2):
        if (one, other) not in known:
            with pytest.raises(RuntimeError, match=f"{one} cannot become {other}"):
                task_of(one).enter(TaskState[other])


def test_a_preempted_search_begins_anew_and_an_answer_continues():
    for beams, n_tokens in ((None, 7), (SimpleNamespace(), 0)):
        task = task_of("DECODING")
        stream: Any = SimpleNamespace()
        task.decoding = Decoding(stream, beams=beams, n_tokens=7)  # type: ignore[arg-type]
        task.preempt()
        assert (task.state, task.n_tokens, task.beams) == (TaskState.PREEMPTED, n_tokens, None)


def test_the_end_frees_sampler_and_pictures():
    class Frame(LazyGroup):
        n_patches, digest, reading, released = 10, b"", (0, 1), 0

        def __len__(self) -> int:
            return 1

        def ask(self) -> bool:
            return False

        def wait(self, timeout_s: float) -> None:
            """Nothing comes."""

        def load(self) -> Any:
            raise AssertionError

        def release(self) -> None:
            self.released += 1

    task, frame, closed = task_of("PREFILL"), Frame(), []
    task.pictures = Pictures(missing={b"1": frame, b"2": []}, n_slices=3)
    sampler: Any = SimpleNamespace(close=lambda: closed.append(1))
    task.decoding = Decoding(SimpleNamespace(), sampler=sampler)  # type: ignore[arg-type]
    task.close()
    assert (task.state, frame.released, closed) == (TaskState.FINISHED, 1, [1])
    assert task.pictures == Pictures()


def test_there_is_one_last_event_however_many_threads_end_it():
    for _ in range(20):
        queue, ready = EventQueue(), threading.Barrier(8)

        def end(number: int, queue: EventQueue = queue, ready: threading.Barrier = ready) -> None:
            ready.wait(10)
            queue.put_last(number)

        threads = [threading.Thread(target=end, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert queue.is_closed
        assert queue.get() in range(8)
        assert queue._queue.empty()
