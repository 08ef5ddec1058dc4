"""Plan the decoder's next step from the tasks that have their pictures: next tokens, and chunks of prompts.

All running answers get their next token, and waiting prompts share the rest of the batch (chunked prefill): so
answers keep flowing while a long prompt is computed, and tokens of many answers cost one pass over the weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.decoder.decoder import Decoder
from edge_runtime.decoder.embedding import embed
from edge_runtime.decoder.llama_context import MAX_SCORED_ROWS
from edge_runtime.decoder.options import CHUNK_TOKENS
from edge_runtime.decoder.sequence_chunk import SequenceChunk
from edge_runtime.engine.batch_width import BatchWidth
from edge_runtime.engine.drafts import Drafts
from edge_runtime.engine.task import Task, TaskState
from edge_runtime.weights.gguf_file import Float32

MAX_PREFILL_S = 0.25
"""How long a prompt may hold up running answers in one step."""
MIN_CHUNK = 16
"""Tokens of a prompt per step, even on the slowest machine."""
MIN_AMX_CHUNK = 128
"""The same with AMX kernels: fewer take nearly as long."""
PREFETCH_CHUNK = 64
"""Tokens per step of a prefetch: this many are lost when a request comes meanwhile."""


@dataclass(frozen=True)
class CallPlan:
    """What one step computes; a task with beams is listed once per beam."""

    tasks: list[Task]
    chunks: list[SequenceChunk]
    """One for each of `tasks`."""

    @property
    def adapter(self) -> str | None:
        """The LoRA adapter that all of them use."""
        return self.tasks[0].request.options.adapter

    @property
    def n_rows(self) -> int:
        """Positions to compute."""
        return sum(len(chunk.keys) for chunk in self.chunks)

    @property
    def n_drafted(self) -> int:
        """Of these, guesses."""
        return sum(chunk.n_drafted for chunk in self.chunks)

    def is_worth_leaving(self, started: float, row_s: float) -> bool:
        """Whether to abandon the call because some of its tasks were cancelled.

        Leaving loses what the call has done for the others; staying computes the rest for nobody. So the call is left
        while the share of time passed is smaller than the share of rows that nobody wants any more: then the others
        finish sooner, too. Otherwise, what remains is shorter than the others' part.

        Parameters
        ----------
        started : when the call started, by `time.perf_counter`.
        row_s : seconds per row.
        """
        sizes = [(len(chunk.keys), task.is_cancelled()) for task, chunk in zip(self.tasks, self.chunks, strict=True)]
        unwanted, n_rows = sum(n for n, is_cancelled in sizes if is_cancelled), sum(n for n, _ in sizes)
        if unwanted in (0, n_rows):
            return unwanted > 0
        return time.perf_counter() - started < unwanted * row_s


class CallPlanner:
    """Plans steps by how long the last ones took. Used only on the inference thread."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._last_adapter: str | None = None
        """Of the last step."""
        self._batch_width = BatchWidth()
        self.drafts = Drafts()
        self.row_s = MAX_PREFILL_S / 64
        """Seconds that a position of a prompt took recently."""

    def record(self, plan: CallPlan, seconds: float) -> None:
        """Learn from a step: of prompts, or of next tokens and guesses only."""
        if plan.n_rows > len(plan.tasks) + plan.n_drafted:
            self.row_s = seconds / plan.n_rows
            return
        self.drafts.costs.record(plan.n_rows, seconds)
        if not plan.n_drafted:
            self._batch_width.record(plan.n_rows, seconds)

    def plan(self, active: Sequence[Task]) -> CallPlan:
        """Tasks of the next step and what each appends; no tasks if none is ready."""
        able = [task for task in active if task.state is not TaskState.ENCODING]
        pending = {task: len(task.keys) - self._decoder.held(task.sequence) for task in able}
        is_flowing = any(
            not task.gives_way and (task.beams or (task.n_tokens and pending[task] == 1)) for task in able
        )
        able = self._of_one_adapter(able)
        searching, ready = [task for task in able if task.beams], [task for task in able if not task.beams]
        running = [task for task in ready if pending[task] == 1 and not task.request.is_prefetch]
        if len(running) == len(able):  # only next tokens: who has waited longest comes first
            n = self._batch_width.choose(len(running))
            running = sorted(running, key=lambda task: task.laps.last)[:n]
            drafts = self.drafts.choose(running, MAX_SCORED_ROWS, self._decoder.n_ctx)
        else:
            drafts = [[] for _ in running]
        tasks, chunks = [*running], [_next_chunk(*pair) for pair in zip(running, drafts, strict=True)]
        for task in searching:
            assert task.beams is not None
            beams = task.beams.chunks()
            tasks += [task] * len(beams)
            chunks += beams
        n_left, n_scored = self._prompt_budget(len(chunks), is_flowing=is_flowing), MAX_SCORED_ROWS
        for task in ready:
            n = min(n_left, pending[task], PREFETCH_CHUNK if task.request.is_prefetch else n_left)
            n = min(n, n_scored) if task.is_scoring else n
            if (pending[task] > 1 or task.request.is_prefetch) and n > 0:
                tasks.append(task)
                chunks.append(self._prompt_chunk(task, n, whole=n == pending[task]))
                n_left, n_scored = n_left - n, n_scored - n * task.is_scoring
        return CallPlan(tasks, chunks)

    def _prompt_budget(self, n_taken: int, *, is_flowing: bool) -> int:
        """Positions of prompts in a step with `n_taken` next tokens.

        Parameters
        ----------
        is_flowing : whether answers are running, which must not be held up for long.
        """
        n_left = min(CHUNK_TOKENS, self._decoder.n_batch) - n_taken
        if not is_flowing:
            return n_left
        least = MIN_AMX_CHUNK if self._decoder.uses_amx_prefill else MIN_CHUNK
        return min(n_left, max(least, int(MAX_PREFILL_S / self.row_s)))

    def _of_one_adapter(self, ready: list[Task]) -> list[Task]:
        """Tasks that one step can compute together: adapters alternate."""
        names = [*dict.fromkeys(task.request.options.adapter for task in ready)]
        if len(names) < 2:
            return ready
        at = names.index(self._last_adapter) + 1 if self._last_adapter in names else 0
        self._last_adapter = names[at % len(names)]
        return [task for task in ready if task.request.options.adapter == self._last_adapter]

    def _prompt_chunk(self, task: Task, n: int, *, whole: bool) -> SequenceChunk:
        first = self._decoder.held(task.sequence)
        keys = task.keys[first : first + n]
        embeddings = self._embeddings(task, first, first + n)
        wants_logits = whole and not task.request.is_prefetch
        return SequenceChunk(task.sequence, keys, embeddings, wants_logits, task.is_scoring)

    def _embeddings(self, task: Task, start: int, stop: int) -> Float32 | None:
        """Embeddings of positions of a prompt; None if there is only text."""
        prompt, digests = task.request.prompt, task.request.digests
        places = [(i, *bound) for i, bound in enumerate(prompt.bounds) if bound[1] > start and bound[0] < stop]
        if not places:
            return None
        ids = [*prompt.ids, *task.keys[len(prompt.ids) :]]  # a preempted task has part of an answer after its prompt
        return embed(
            self._decoder,
            np.array(ids[start:stop], np.int64),
            {(first - start, end - start): task.pictures.tokens[digests[i]] for i, first, end in places},
        )


def _next_chunk(task: Task, draft: Sequence[int]) -> SequenceChunk:
    """The last token of an answer, and guesses of those after it."""
    keys = [*task.keys[-1:], *draft]
    return SequenceChunk(task.sequence, keys, wants_all_logits=bool(draft), n_drafted=len(draft))
