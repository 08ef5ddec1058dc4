"""Which task computes what, and when: encoding, prefill and decoding of many requests on one thread.

A step encodes at most one batch of slices and computes at most one batch of the decoder (`call_plan`). Queued tasks
are admitted in order, as soon as there are sequences for them; a task whose prefix another task is computing waits
for it. When the KV cache is full, idle sequences are given up first (`sequences`); after that the youngest task is
preempted, and recomputed later. Tasks that give way wait for all others (`giving_way`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from edge_runtime.cache.caches import Caches
from edge_runtime.decoder.decoder import Decoder
from edge_runtime.decoder.sequence_chunk import Cancelled
from edge_runtime.engine.call_plan import CallPlan, CallPlanner
from edge_runtime.engine.encoding import PictureEncoding
from edge_runtime.engine.events import Activity, FinishReason
from edge_runtime.engine.giving_way import first_to_leave, in_turn
from edge_runtime.engine.next_token import advance, finish_beam_search
from edge_runtime.engine.sequences import Sequences
from edge_runtime.engine.slice_batches import await_frames, next_batch
from edge_runtime.engine.task import Task, TaskState
from edge_runtime.engine.task_lists import TaskLists
from edge_runtime.engine.warm_up import WarmUp
from edge_runtime.errors import CacheFull
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.vision.encoder import ImageEncoder


class Scheduler(TaskLists):
    """Tasks and what they share: encoder, decoder, visual tokens. Used only on the inference thread."""

    def __init__(self, encoder: ImageEncoder, decoder: Decoder, tokenizer: Tokenizer, caches: Caches) -> None:
        super().__init__(Sequences(decoder, caches.prefixes), WarmUp())
        self._decoder, self._tokenizer = decoder, tokenizer
        self.encoding, self._low_memory = PictureEncoding(encoder, caches), caches.low_memory
        self.planner = CallPlanner(decoder)
        self.has_arrivals: Callable[[], bool] = lambda: False
        """Whether tasks that do not give way are about to be added; asked in the middle of steps."""

    @property
    def activity(self) -> Activity:
        """Current load; from any thread, where it is only a snapshot."""
        tokens, slots = self.encoding.visual_tokens, self._decoder.n_sequences
        n_bytes = self.encoding.kept_bytes
        return Activity(len(self.waiting), len(self.active), slots, tokens.lookups, tokens.hits, n_bytes)

    @property
    def waiting_s(self) -> float:
        """Estimated time for the prompts of queued tasks, without what the KV cache holds of them."""
        return self.planner.row_s * sum(len(task.keys) - self.remembered(task) for task in self.waiting)

    def add(self, task: Task) -> None:
        """Queue a new task."""
        task.keys = task.keys or task.request.keys()
        self.encoding.record(task.request)
        self.waiting.append(task)

    def end(self, task: Task, reason: FinishReason) -> None:
        """End a task whose answer is whole, or is not wanted."""
        self.planner.drafts.remember(task)
        super().end(task, reason)

    def remembered(self, task: Task) -> int:
        """Positions of a task's prefix that the KV cache holds now; from any thread, where it is only a hint."""
        return self.sequences.remembered(task)

    def step(self) -> None:
        """Do one step: end cancelled tasks, admit queued ones, encode one batch, compute one batch."""
        for task in [*self.waiting, *self.active]:
            if task.is_cancelled():
                self.end(task, "cancelled")
        turn = in_turn([*self.waiting, *self.active])
        for task in [task for task in self.waiting if task in turn]:
            at_work = [other for other in self.active if other in turn]
            if (self.admission_paused and at_work) or not self._find_sequences(task):
                break
            if task.is_scoring or not self.sequences.waits_for_prefix(task):
                self._alone(self._admit, task)
        at_work = [task for task in self.active if task in turn]
        if self._encode(at_work) and all(task.gives_way for task in at_work) and self._is_encoding(turn):
            return  # nobody waits for a token: all pictures first, then each call serves all answers
        self._compute([task for task in self.active if task in turn])

    def _is_encoding(self, tasks: Sequence[Task]) -> bool:
        return any(task.state is TaskState.ENCODING for task in self.active if task in tasks)

    def _find_sequences(self, task: Task) -> bool:
        """Whether there are sequences for a task; those of tasks that give way to it are taken away."""
        n = task.request.options.n_beams
        while not self.sequences.can_give(n):
            giving_way = [other for other in self.active if other.gives_way and not task.gives_way]
            if not giving_way:
                return False
            # What its sequences hold stays, unless this task needs them all.
            self._preempt(first_to_leave(giving_way), self.sequences.release)
        return True

    def _must_leave(self, tasks: Sequence[Task]) -> bool:
        """Whether a step of these tasks is interrupted: all of them give way, and have to."""
        return all(task.gives_way for task in tasks) and (self.has_arrivals() or any(task.is_held for task in tasks))

    def expected_task(self, is_asked: Callable[[], bool]) -> Task | None:
        """A task that computes a prefix in advance, if one is expected; it ends as soon as a request comes."""
        return self.warm_up.next_task(lambda: is_asked() or self.n_urgent > 1)

    def release_idle_memory(self) -> None:
        """While idle: free the memory that pictures have left behind."""
        self.encoding.release_idle_memory()

    def save_more(self) -> bool:
        """Queue prompts to be written to disk that could not be before; returns whether to call again."""
        return self.sequences.saver.save_more()

    # --- admission -----------------------------------------------------------------------------------------------

    def _alone(self, do: Callable[..., None], task: Task, *more: Any) -> None:
        """Do something for one task; an error fails this task only."""
        try:
            do(task, *more)
        except Exception as error:  # noqa: BLE001 - reported to the task's caller
            if task in self.waiting or task in self.active:
                self.fail(task, error)

    def _admit(self, task: Task) -> None:
        """Give a task sequences with as much of its prefix as is held, and find out which pictures are missing."""
        task.laps.restart()
        n = self.sequences.take(task)
        self.waiting.remove(task)  # only now: always in one of the two lists, so that no error loses it
        self.active.append(task)
        n = self.sequences.restore(task, n)
        if not task.n_tokens:
            task.n_cached = n
            task.prompt_scores.clear()  # of a task that was preempted in the middle of its prompt
        task.pictures = self.encoding.look_up(task.request, n)
        if not task.pictures.missing:
            self._begin_prefill(task)
        elif task.request.is_prefetch:
            self.end(task, "cancelled")  # what the KV cache held was given up meanwhile
        else:
            task.enter(TaskState.ENCODING)
            task.encoded_slices += task.pictures.n_slices
            task.report("encode", 0, task.pictures.n_slices)

    # --- encoding ------------------------------------------------------------------------------------------------

    def _encode(self, tasks: Sequence[Task]) -> bool:
        """Encode one batch of slices for as many tasks as fit; a single group while somebody waits for tokens.

        Returns
        -------
        has_encoded : whether there was anything to encode.
        """
        is_brief = any(task.n_tokens and not task.gives_way for task in tasks)
        batch = next_batch(tasks, self.encoding.batch_patches(is_brief=is_brief))
        for task, error in batch.failed.items():
            self.fail(task, error)
        if not batch.groups:
            await_frames(batch.waiting, idle=len(batch.waiting) == len(tasks))
            return False
        wanting = [task for task in tasks if batch.groups.keys() & task.pictures.missing.keys()]
        if self._low_memory:
            self._decoder.release_pages()  # it takes turns with the vision part
        try:
            found = self.encoding.encode(batch.groups, wanting, lambda: self._must_leave(wanting), is_brief=is_brief)
        except Cancelled:
            return False  # the next step ends them, is another task's, or goes on with them
        except Exception as error:  # noqa: BLE001 - reported to the tasks that need these pictures
            for task in wanting:
                self.fail(task, error)
            return False
        for task in [*self.active]:
            if task.pictures.put(found):
                task.report_encode()
                if not task.pictures.missing:
                    self._alone(self._begin_prefill, task)
        if not any(task.state is TaskState.ENCODING for task in self.active):
            self.encoding.release_memory()
        return True

    def _begin_prefill(self, task: Task) -> None:
        task.enter(TaskState.PREFILL)
        task.laps.end("encode")
        self._report_prefill(task)

    def _report_prefill(self, task: Task) -> None:
        task.report_prefill(self._decoder.held(task.sequence))

    # --- prefill and decoding ------------------------------------------------------------------------------------

    def _compute(self, tasks: Sequence[Task]) -> None:
        """Compute one batch of the decoder: the last token of every running answer, and chunks of prompts."""
        plan = self.planner.plan([task for task in tasks if task in self.active])
        if not plan.tasks:
            return
        started = time.perf_counter()
        try:
            rows = self._decoder.step(
                plan.chunks,
                lambda: self._must_leave(plan.tasks) or plan.is_worth_leaving(started, self.planner.row_s),
                plan.adapter,
            )
        except Cancelled:
            return  # a later step ends the cancelled tasks and recomputes the others' chunks
        except CacheFull:
            self._free_cells(plan)
            return
        except Exception as error:  # noqa: BLE001 - reported to the tasks in the batch
            for task in dict.fromkeys(plan.tasks):
                self.fail(task, error)
            return
        self.planner.record(plan, time.perf_counter() - started)
        for task, own in self._rows_of_answers(plan, rows).items():
            try:
                if (reason := advance(task, own, self._decoder, self._tokenizer)) is not None:
                    self.end(task, reason)
            except Exception as error:  # noqa: BLE001 - reported to the task whose token it is
                self.fail(task, error)

    def _rows_of_answers(self, plan: CallPlan, rows: Sequence[int]) -> dict[Task, list[int]]:
        """Report what a step has computed; returns the rows that give tasks their next tokens."""
        found: dict[Task, list[int]] = {}
        for task, chunk, row in zip(plan.tasks, plan.chunks, rows, strict=True):
            if not task.n_tokens:
                self._alone(self._report_prefill, task)
            if chunk.wants_all_logits and not chunk.n_drafted and task in self.active:
                self._alone(Task.score_prompt, task, self._decoder, len(chunk.keys), row)
            if task not in self.active:
                continue  # failed in this loop
            is_whole = self._decoder.held(task.sequence) == len(task.keys) + chunk.n_drafted
            if task.request.is_prefetch and is_whole:
                self.sequences.hold_shared(task)
                self.end(task, "stop")
            elif not task.request.options.max_tokens and is_whole:
                task.laps.end("prefill")
                self.end(task, "length")  # only the prompt was requested
            elif chunk.wants_logits and not task.is_cancelled():
                if not task.n_tokens:
                    self.sequences.hold_shared(task)
                found.setdefault(task, []).extend(range(row - chunk.n_drafted, row + 1))
            elif chunk.n_drafted:  # cancelled: what was guessed is not part of its answer
                self._decoder.rewind(task.sequence, len(task.keys))
        return found

    def _free_cells(self, plan: CallPlan) -> None:
        """Make room for a step in the full KV cache: give up what is idle, or preempt the youngest task."""
        if plan.n_drafted:
            self.planner.drafts.is_paused = True
        elif plan.tasks[0].request.is_prefetch:
            self.warm_up.give_up()
            self.end(plan.tasks[0], "cancelled")
        elif self.sequences.give_up_one():
            return
        elif len(self.active) > 1:
            self._preempt(leaving := first_to_leave(self.active), self.sequences.preempt)
            self.admission_paused = leaving.gives_way == plan.tasks[0].gives_way
        elif (beams := self.active[0].beams) is not None:
            beams.search.stop()  # beams that have diverged need more cells than the context has tokens
            self.end(self.active[0], finish_beam_search(self.active[0], self._tokenizer))
        else:
            self.fail(self.active[0], CacheFull())

    def _preempt(self, task: Task, take_away: Callable[[Task], None]) -> None:
        """Take a task's sequences away; it is the first to be admitted when another task has ended."""
        self.active.remove(task)
        take_away(task)
        task.preempt()
        self.waiting.appendleft(task)
