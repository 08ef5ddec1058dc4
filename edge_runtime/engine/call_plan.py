"""Tasks that have their pictures → what the next call of llama.cpp computes: next tokens, and parts of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.decoder.decoder import SCORED_ROWS, Decoder
from edge_runtime.decoder.embedding import embed
from edge_runtime.decoder.options import CHUNK_TOKENS
from edge_runtime.decoder.sequence_chunk import Part
from edge_runtime.engine.batch_width import CallWidth
from edge_runtime.engine.task import Task
from edge_runtime.weights.gguf_file import Float32

TURN_S = 0.25
"""How long a prompt may hold up running answers at a time."""
LEAST_CHUNK = 16  # tokens of a prompt per turn, however slow the machine
LEAST_OWN_CHUNK = 128  # the same where our prefill computes them: fewer take nearly as long
AHEAD_CHUNK = 64
"""Tokens read ahead per call: as many are lost when somebody asks meanwhile."""


class CallPlanner:
    """Plans calls by how long the last ones took. Used by the inference thread alone."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._served: str | None = None
        """Adapter of the last call."""
        self._width = CallWidth()
        self.row_s = TURN_S / 64
        """Seconds that a position of a prompt took lately."""

    def note(self, n_rows: int, n_tasks: int, seconds: float) -> None:
        """Learn from a call: of prompts, or of next tokens alone, one row for each task."""
        if n_rows > n_tasks:
            self.row_s = seconds / n_rows
        else:
            self._width.note(n_rows, seconds)

    def plan(self, active: Sequence[Task]) -> tuple[list[Task], list[Part]]:
        """Tasks of the next call and what each appends; a task with beams stands there once for each."""
        able = [task for task in active if not task.missing]
        left = {task: len(task.keys) - self._decoder.held(task.sequence) for task in able}
        is_flowing = any(task.beam_run or (task.n_tokens and left[task] == 1) for task in able)
        able = self._of_one_adapter(able)
        searching, ready = [task for task in able if task.beam_run], [task for task in able if not task.beam_run]
        running = [task for task in ready if left[task] == 1 and not task.request.reads_ahead]
        if len(running) == len(able):  # nothing but next tokens: who has waited for longest comes first
            running = sorted(running, key=lambda task: task.lap)[: self._width.choose(len(running))]
        tasks, parts = [*running], [Part(task.sequence, task.keys[-1:]) for task in running]
        for task in searching:
            assert task.beam_run is not None
            beams = task.beam_run.parts()
            tasks += [task] * len(beams)
            parts += beams
        room = min(CHUNK_TOKENS, self._decoder.chunk) - len(parts)
        if is_flowing:
            least = LEAST_OWN_CHUNK if self._decoder.fills_itself else LEAST_CHUNK
            room = min(room, max(least, int(TURN_S / self.row_s)))
        scored = SCORED_ROWS
        for task in ready:
            n = min(room, left[task], AHEAD_CHUNK if task.request.reads_ahead else room)
            n = min(n, scored) if task.is_scoring else n
            if (left[task] > 1 or task.request.reads_ahead) and n > 0:
                tasks.append(task)
                parts.append(self._prompt_part(task, n, whole=n == left[task]))
                room, scored = room - n, scored - n * task.is_scoring
        return tasks, parts

    def _of_one_adapter(self, ready: list[Task]) -> list[Task]:
        """Tasks that one call can compute together: adapters take turns."""
        names = [*dict.fromkeys(task.request.options.adapter for task in ready)]
        if len(names) < 2:
            return ready
        at = names.index(self._served) + 1 if self._served in names else 0
        self._served = names[at % len(names)]
        return [task for task in ready if task.request.options.adapter == self._served]

    def _prompt_part(self, task: Task, n: int, *, whole: bool) -> Part:
        first = self._decoder.held(task.sequence)
        keys = task.keys[first : first + n]
        embeddings = self._embeddings(task, first, first + n)
        wants_logits = whole and not task.request.reads_ahead
        return Part(task.sequence, keys, embeddings, wants_logits, task.is_scoring)

    def _embeddings(self, task: Task, start: int, stop: int) -> Float32 | None:
        """Embeddings of positions of a prompt; None where there is only text."""
        prompt, digests = task.request.prompt, task.request.digests
        places = [(i, *bound) for i, bound in enumerate(prompt.bounds) if bound[1] > start and bound[0] < stop]
        if not places:
            return None
        ids = [*prompt.ids, *task.keys[len(prompt.ids) :]]  # a task that had to step back has an answer behind
        return embed(
            self._decoder,
            np.array(ids[start:stop], np.int64),
            {(first - start, end - start): task.tokens[digests[i]] for i, first, end in places},
        )
