"""Drafts for the next step: which answers have guesses checked, and how many tokens of them.

Input: the answers that get a token each. Output: tokens to check for each. Learns from all answers what earlier ones
said, how far sources are right, and what steps cost.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.engine.drafting import MAX_DRAFT, Drafting, Trust, draft_length, gain
from edge_runtime.engine.step_costs import StepCosts
from edge_runtime.engine.task import Task
from edge_runtime.generation.drafts import ExpectedText, OwnText, RecentAnswers, Source


class Drafts:
    """What the drafts of all answers have in common. Used only on the inference thread."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self._recent, self._usual = RecentAnswers(), dict[str, Trust]()
        self.is_paused = False
        """Whether the next step has none, since the KV cache had no cells for them."""

    def choose(self, tasks: Sequence[Task], n_most: int, n_ctx: int) -> list[list[int]]:
        """Tokens to check for each of some answers, which get a token each in any case.

        Parameters
        ----------
        n_most : maximum tokens to check together.
        n_ctx : positions of the KV cache.
        """
        n_rows, n_tokens, chosen = len(tasks), float(len(tasks)), []
        is_paused, self.is_paused = self.is_paused, False
        for task in tasks:
            drafting = self._of(task)
            n = min(
                MAX_DRAFT, n_most, task.request.options.max_tokens - task.n_tokens - 1, n_ctx - len(task.keys) - 1
            )
            draft = None if drafting is None else drafting.best(task.keys, 0 if is_paused else n)
            if drafting is None or draft is None:
                chosen.append(list[int]())
                continue
            share = drafting.share(draft.source)
            n = draft_length(draft, share, n_rows, n_tokens, self.costs)
            n_rows, n_tokens, n_most = n_rows + n, n_tokens + gain(share, n), n_most - n
            chosen.append(drafting.take(draft, n))
        return chosen

    def _of(self, task: Task) -> Drafting | None:
        """The drafts of an answer; None if it may have none, or has not begun."""
        decoding, wanted = task.decoding, task.request.options.draft_sources
        if decoding is None or decoding.sampler is None or not wanted:
            return None
        if decoding.drafting is None:
            sources: list[Source] = []
            if "expected" in wanted:
                sources += [ExpectedText(ids, len(task.request.prompt.ids)) for ids in task.request.expected]
            if "suffix" in wanted:
                sources += [OwnText(), *([self._recent] if task.request.options.reuse else [])]
            forced = decoding.constraint.draft if decoding.constraint is not None and "grammar" in wanted else None
            decoding.drafting = Drafting(sources, forced, self._usual)
        return decoding.drafting

    def remember(self, task: Task) -> None:
        """Take the answer of a task that ends as a guess for later ones."""
        if task.n_tokens and task.request.options.reuse and "suffix" in task.request.options.draft_sources:
            self._recent.add(task.keys[len(task.request.prompt.ids) :])
