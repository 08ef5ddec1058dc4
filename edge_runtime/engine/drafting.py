"""Drafts of one answer: whose guess is checked, how far it is trusted, and how many tokens of it pay.

Tokens are chosen from the logits of row after row, by the same sampler and in the same order as without a draft, and
only as long as they are the guessed ones. So the answer has exactly the distribution of the model, and with a seed
the same draws. (Of a guess without probabilities of its own, Leviathan et al., 2023, accept as many.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from edge_runtime.engine.step_costs import StepCosts
from edge_runtime.generation.drafts import Draft, Source

MAX_DRAFT = 15
"""Tokens of one draft."""
PRIORS = {"grammar": 0.8, "expected": 0.6, "suffix/long": 0.6, "recent/long": 0.6}
"""How often a guess is right before anything is known; otherwise `PRIOR`."""
PRIOR, PRIOR_WEIGHT = 0.3, 2.0
MEMORY = 0.95
"""What a token leaves of the weight of those before it."""
WORTH = 1.03
"""How many times as fast answers must become."""

END = -1
"""In place of the token that ended an answer."""

Forced = Callable[[int], list[int]]


class Trust:
    """How often a source was right lately."""

    def __init__(self, prior: float) -> None:
        self._right, self._tried = prior * PRIOR_WEIGHT, PRIOR_WEIGHT

    @property
    def share(self) -> float:
        """Probability that its next token is right."""
        return self._right / self._tried

    def record(self, *, is_right: bool) -> None:
        """Learn from a token."""
        self._right = MEMORY * self._right + is_right
        self._tried = MEMORY * self._tried + 1


class Drafting:
    """The sources of one answer.

    Parameters
    ----------
    sources : guesses from texts.
    forced : tokens that the answer's form forces, as far as it does; None: it has no form.
    usual : what was learnt from other answers, where this one begins.
    """

    def __init__(self, sources: Sequence[Source], forced: Forced | None, usual: dict[str, Trust]) -> None:
        self._sources, self._forced = sources, forced
        self._usual, self._trust = usual, dict[str, Trust]()
        self._asked: list[Draft] = []
        """What the sources say of the next tokens."""
        self.at_work = Draft("", [])
        """What the step at hand checks."""
        self._counts: dict[str, tuple[int, int]] = {}

    def best(self, keys: Sequence[Hashable], n: int) -> Draft | None:
        """The guess that is most likely right for the next tokens, at most `n`."""
        self._asked, self.at_work = [], Draft("", [])
        if n < 1:
            return None
        forced = self._forced(n) if self._forced is not None else []
        if forced:
            self._asked.append(Draft("grammar", forced))
        self._asked += [draft for source in self._sources if (draft := source.propose(keys, n)) is not None]
        return max(self._asked, key=lambda draft: gain(self.share(draft.source), len(draft.tokens)), default=None)

    def share(self, source: str) -> float:
        """Probability that the next token of a source is right."""
        return self._of(source, self._trust).share

    def take(self, draft: Draft, n: int) -> list[int]:
        """Put the first `n` tokens of a draft to work."""
        self.at_work = Draft(draft.source, draft.tokens[:n])
        return self.at_work.tokens

    def settle(self, said: Sequence[Hashable]) -> None:
        """Learn from what was said, also about guesses that were not checked: these cost nothing.

        Parameters
        ----------
        said : tokens of the answer since `best`, and `END` after the last one of all.
        """
        n_checked, name = len(self.at_work.tokens), self.at_work.source.partition("/")[0]
        for draft in self._asked:
            for guessed, token in zip(draft.tokens, said, strict=False):
                for trust in (self._trust, self._usual):
                    self._of(draft.source, trust).record(is_right=guessed == token)
                if guessed != token:
                    break
        if n_checked:
            checked, right = self._counts.get(name, (0, 0))
            self._counts[name] = checked + n_checked, right + n_right(self.at_work.tokens, said)
        self._asked, self.at_work = [], Draft("", [])

    def _of(self, source: str, known: dict[str, Trust]) -> Trust:
        found = known.get(source)
        if found is None:
            usual = self._usual.get(source)
            found = known[source] = Trust(PRIORS.get(source, PRIOR) if usual is None else usual.share)
        return found

    @property
    def counts(self) -> Mapping[str, tuple[int, int]]:
        """By source: tokens that were checked, and those of them that were right."""
        return dict(self._counts)


def n_right(draft: Sequence[int], said: Sequence[Hashable]) -> int:
    """How many tokens of a draft were said."""
    n = 0
    for guessed, token in zip(draft, said, strict=False):
        if guessed != token:
            break
        n += 1
    return n


def gain(share: float, n: int) -> float:
    """Tokens that a draft of `n` is expected to give beside the one that a step gives anyway."""
    return sum(share**i for i in range(1, n + 1))


def draft_length(draft: Draft, share: float, n_rows: int, n_tokens: float, costs: StepCosts) -> int:
    """How many tokens of a draft make answers faster.

    Parameters
    ----------
    n_rows, n_tokens : rows of the step without it, and the tokens that it gives.
    """
    best, fastest, expected = 0, WORTH * n_tokens / costs.seconds(n_rows), n_tokens
    for n in range(1, len(draft.tokens) + 1):
        expected += share**n
        rate = expected / costs.seconds(n_rows + n)
        if rate > fastest:
            best, fastest = n, rate
    return best
