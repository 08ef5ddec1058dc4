"""Who holds what in the KV cache: in a decoder's bookkeeping alone, without a model."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_runtime.cache.prefixes import BLOCK, Saved
from edge_runtime.decoder.kv_rows import KVForm, KVRows
from edge_runtime.decoder.llama_context import common_beginning
from edge_runtime.engine.request import Request
from edge_runtime.engine.sequences import WORTH_WAITING, Sequences
from edge_runtime.engine.task import Task
from edge_runtime.errors import CacheFull
from edge_runtime.options import GenerationOptions
from edge_runtime.prompt.build import Prompt

FORM = KVForm(1, 1, 2, 1, 2, transposed=False)


class Cells:
    """What sequences hold, with a limit; nothing is computed."""

    n_sequences = 4
    holding = range(5, 7)
    adapters = SimpleNamespace(identities={None: b""})

    def __init__(self, n_cells: int = 10_000) -> None:
        self.n_cells = n_cells
        self.rows: list[list[Hashable]] = [[] for _ in range(7)]

    def keys(self, sequence: int) -> list[Hashable]:
        return [*self.rows[sequence]]

    def held(self, sequence: int) -> int:
        return len(self.rows[sequence])

    def common(self, sequence: int, keys: Sequence[Hashable]) -> int:
        return common_beginning(self.rows[sequence], keys[:-1])

    def rewind(self, sequence: int, n: int = 0) -> None:
        del self.rows[sequence][n:]

    def share(self, source: int, sequence: int, n: int) -> None:
        self.rows[sequence] = self.rows[source][:n]

    def append_rows(self, sequence: int, keys: Sequence[Hashable], rows: KVRows) -> None:
        assert len(keys) == len(rows)
        if sum(map(len, self.rows)) + len(keys) > self.n_cells:
            raise CacheFull
        self.rows[sequence] += keys


def sequences_of(cells: Cells) -> Sequences:
    decoder: Any = cells
    return Sequences(decoder, None)


def task_of(ids: Sequence[int], **options: Any) -> Task:
    rest = {name: options.pop(name) for name in ("prompt", "scores_prompt", "shared") if name in options}
    beams = options.pop("n_beams", None)
    request = Request(Prompt("", [*ids], []), [], [], GenerationOptions(max_tokens=1, beams=beams, **options))
    request = replace(request, **rest)
    return Task(request, lambda: False, keys=request.keys())


def saved(n_blocks: int) -> Saved:
    """A prefix on disk."""
    return Saved([KVRows(FORM, *[[np.zeros((BLOCK, 2), np.uint8)]] * 2) for _ in range(n_blocks)])


def run(sequences: Sequences, cells: Cells, ids: Sequence[int], **options: Any) -> Task:
    """Take sequences, and hold the whole prompt there, as if it were computed."""
    task = task_of(ids, **options)
    sequences.take(task)
    cells.rows[task.sequence] = [*task.keys]
    return task


def test_the_same_prefix_continues_in_place_and_another_conversation_keeps_its_own():
    cells = Cells()
    sequences = sequences_of(cells)
    first = run(sequences, cells, range(100))
    place = first.sequence
    sequences.release(first)
    longer = task_of([*range(100), 7, 8])
    assert sequences.remembered(longer) == 100
    assert (sequences.take(longer), longer.sequence) == (100, place)
    sequences.release(longer)
    other = task_of([*range(30), 7, 8])  # less than half of what the sequence holds: that is not destroyed
    assert sequences.take(other) == 30
    assert other.sequence != place
    assert cells.held(place) == 100


def test_a_prefix_that_is_at_work_is_shared():
    cells = Cells()
    sequences = sequences_of(cells)
    first = run(sequences, cells, range(100))
    second = task_of([*range(90), 1])
    assert sequences.take(second) == 90
    assert cells.keys(second.sequence) == [*range(90)]
    assert cells.held(first.sequence) == 100


def test_nothing_is_taken_from_another_adapter_or_where_logits_are_wanted():
    cells = Cells()
    sequences = sequences_of(cells)
    sequences.release(run(sequences, cells, range(100)))
    for options in ({"adapter": "one"}, {"scores_prompt": True}, {"reuse": False}):
        assert sequences.remembered(task_of(range(120), **options)) == 0


def test_without_reuse_other_answers_to_the_same_prompt_are_taken_from_nevertheless():
    cells = Cells()
    sequences = sequences_of(cells)
    first = run(sequences, cells, range(100), reuse=False)
    second, stranger = task_of(range(100), reuse=False, prompt=first.request.prompt), task_of(range(100), reuse=False)
    assert (sequences.remembered(second), sequences.remembered(stranger)) == (99, 0)
    sequences.release(first)
    assert sequences.remembered(second) == 0


def test_beams_have_a_sequence_each_and_all_come_back():
    cells = Cells()
    sequences = sequences_of(cells)
    task = run(sequences, cells, range(10), n_beams=3)
    assert len(set(task.sequences)) == 3
    assert len(sequences.idle) == 1
    sequences.release(task)
    assert (task.sequences, sorted(sequences.idle)) == ([], [0, 1, 2, 3])


def test_an_error_while_a_sequence_is_taken_loses_none(monkeypatch):
    cells = Cells()
    sequences, task = sequences_of(cells), task_of(range(10), n_beams=2)

    def fail(sequence: int, n: int = 0) -> None:
        raise RuntimeError("unexpected")

    monkeypatch.setattr(cells, "rewind", fail)
    with pytest.raises(RuntimeError):
        sequences.take(task)
    assert (task.sequences, sorted(sequences.idle)) == ([], [0, 1, 2, 3])


def test_what_was_idle_for_longest_is_given_up_first_and_what_is_shared_last():
    cells = Cells()
    sequences = sequences_of(cells)
    tasks = [run(sequences, cells, range(100 * n, 100 * n + 80), shared=70) for n in range(3)]
    sequences.hold_shared(tasks[0])
    places = [task.sequence for task in tasks]
    for task in (tasks[1], tasks[0]):
        sequences.release(task)
    cells.rows[cells.n_sequences] = [1]  # of a trace
    (held,) = sequences.shared
    order = []
    while sequences.give_up_one():
        order.append([place for place in (4, *places, held) if not cells.held(place)])
    assert order == [[4], [4, places[1]], [4, *places[:2]], [4, *places[:2], held]]
    assert cells.held(places[2]) == 80  # it is at work


def test_preempted_it_leaves_its_cells():
    cells = Cells()
    sequences = sequences_of(cells)
    task = run(sequences, cells, range(50), n_beams=2)
    places = task.sequences
    sequences.preempt(task)
    assert [cells.held(place) for place in places] == [0, 0]
    assert (task.sequences, sorted(sequences.idle)) == ([], [0, 1, 2, 3])


def test_a_task_waits_for_the_prefix_that_another_one_computes():
    cells = Cells()
    sequences = sequences_of(cells)
    first, ids = task_of(range(200)), [*range(WORTH_WAITING + 1), 999]
    sequences.take(first)
    assert sequences.waits_for_prefix(task_of(ids))
    assert not sequences.waits_for_prefix(task_of(ids[1:]))
    assert not sequences.waits_for_prefix(task_of([*ids[:WORTH_WAITING], 999]))
    assert not sequences.waits_for_prefix(task_of(ids, adapter="one"))
    waiting = task_of(ids)
    assert sequences.waits_for_prefix(waiting)
    assert waiting.prefix_owner is first
    sequences.release(first)
    assert not sequences.waits_for_prefix(waiting)
    assert waiting.prefix_owner is None


@pytest.mark.parametrize("n_cells", [10_000, 160])
def test_a_prefix_on_disk_is_restored_and_idle_sequences_are_given_up_for_it(n_cells):
    cells = Cells(n_cells)
    sequences = sequences_of(cells)
    sequences.release(run(sequences, cells, range(500, 580)))
    task = task_of(range(100))
    task.saved = saved(3)
    n = sequences.restore(task, sequences.take(task))
    assert (n, cells.keys(task.sequence)) == (96, [*range(96)])
    assert task.saved == Saved()
    assert sum(cells.held(sequence) for sequence in sequences.idle) == (80 if n_cells == 10_000 else 0)


def test_a_prefix_on_disk_that_finds_no_cells_is_computed():
    cells = Cells(100)
    sequences = sequences_of(cells)
    run(sequences, cells, range(500, 580))  # at work
    task = task_of(range(100))
    task.saved = saved(3)
    assert sequences.restore(task, sequences.take(task)) == 0
