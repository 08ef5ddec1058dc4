"""A conversation that has outgrown the context → the same without its oldest turns.

Only done on request, and before anything is computed: turns are dropped whole, with their pictures, and the rest is
a prompt like any other. System messages stay, wherever they are. Shifting positions inside the KV cache instead, as
llama.cpp can, would be cheaper when an answer reaches the end, but what remains would still have been computed with
the dropped turns in view, and positions that several sequences share have one number each. So an answer that reaches
the end of the context ends.

More is dropped than necessary, a quarter of the context at a time: then the same turns stay dropped for a while, and
the KV cache serves the prompts in between. Where the conversation is too long to be counted, the number of dropped
turns is the roundest that leaves between three quarters and all of the space; it stays the same for a while, too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from edge_runtime.errors import PromptTooLongError
from edge_runtime.inputs.clips import Clip
from edge_runtime.inputs.messages import ImagePart, Message
from edge_runtime.inputs.slice_groups import Group
from edge_runtime.prompt.build import ImageLayout, Prompt

STEPS = 4
"""Parts of the context; one of them is kept free for the answer, or less if the answer is limited to less."""


@dataclass(frozen=True)
class Placed:
    """What replaces one placeholder: a picture, or a group of video frames."""

    layout: ImageLayout
    groups: list[Group]
    sizes: list[list[int]]
    """[width, height] of every slice."""
    clip: Clip | None = None
    """The video that the frames belong to."""


Build = Callable[[Sequence[Message], Sequence[Placed]], Prompt]


def turns(conversation: Sequence[Message], placed: Sequence[Placed] = ()) -> list[int]:
    """First message of every turn: a question and everything after it until the next one.

    Leading system messages belong to no turn; frames of one group are never in different turns.
    """
    roles = [message.role for message in conversation]
    opening = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    starts = [i for i in range(opening, len(roles)) if i == opening or (roles[i] == "user" != roles[i - 1])]
    return _between_groups(starts, conversation, placed)


def cuts(conversation: Sequence[Message], placed: Sequence[Placed] = ()) -> list[int]:
    """The `turns`, and the further messages of a user who starts the last turn with several.

    All but the last of these can be dropped, too, when the last turn does not fit otherwise.
    """
    starts = turns(conversation, placed)
    end = starts[-1] + 1 if starts else 0
    while end < len(conversation) and conversation[end].role == "user":
        end += 1
    return [*starts, *_between_groups(range(starts[-1] + 1, end), conversation, placed)] if starts else []


def _between_groups(starts: Iterable[int], conversation: Sequence[Message], placed: Sequence[Placed]) -> list[int]:
    pictures = [0]  # before each message
    for message in conversation:
        pictures.append(pictures[-1] + sum(isinstance(part, ImagePart) for part in message.parts))
    inside = {n for item in placed for n in range(item.layout.index + 1, item.layout.index + item.layout.frames)}
    return [start for start in starts if pictures[start] not in inside]


def without_oldest(
    conversation: Sequence[Message], placed: Sequence[Placed], n_turns: int, starts: Sequence[int] = ()
) -> tuple[list[Message], list[Placed]]:
    """The conversation without its first turns, and the remaining pictures, renumbered.

    Parameters
    ----------
    starts : its `cuts`, if they are known.
    """
    starts = starts or cuts(conversation, placed)
    dropped = conversation[starts[0] : starts[n_turns]]
    system = [message for message in dropped if message.role == "system"]
    n = sum(isinstance(part, ImagePart) for message in dropped for part in message.parts)
    left = [replace(p, layout=replace(p.layout, index=p.layout.index - n)) for p in placed if p.layout.index >= n]
    return [*conversation[: starts[0]], *system, *conversation[starts[n_turns] :]], left


def fit(
    build: Build, conversation: Sequence[Message], placed: Sequence[Placed], n_ctx: int, reserve_tokens: int
) -> tuple[Prompt, Sequence[Placed], int]:
    """Build the prompt, without the oldest turns if it does not fit with them.

    Parameters
    ----------
    n_ctx : positions of the context.
    reserve_tokens : positions to keep free for the answer.

    Returns
    -------
    prompt, placed, n_turns : the prompt, its pictures, and the number of turns that were dropped. The last turn is
        never dropped, or at least not the user's last message in it: where that does not fit alone, the prompt is
        too long.
    """
    limit, step = n_ctx - min(reserve_tokens, n_ctx // STEPS), max(1, n_ctx // STEPS)
    shorter = _Shorter(build, conversation, placed)
    n_whole, n_cuts = len(turns(conversation, placed)), shorter.n_cuts
    if shorter.fits(0, limit) or n_cuts < 2:
        return shorter.result(0)
    n_turns = shorter.first(1, n_cuts - 1, limit)
    if n_turns >= n_whole:  # a turn is split only where nothing else helps
        return shorter.result(n_turns)
    whole = shorter.without(0)
    if whole is None:
        return shorter.result(_roundest(n_turns, shorter.first(n_turns, n_whole - 1, limit - step)))
    n_tokens = len(whole[0].ids)
    n_more = shorter.first(n_turns, n_whole, n_tokens - -(-(n_tokens - limit) // step) * step)
    return shorter.result(n_more if n_more < n_whole else n_turns)


class _Shorter:
    """The prompts of a conversation without its oldest turns; each is built once."""

    def __init__(self, build: Build, conversation: Sequence[Message], placed: Sequence[Placed]) -> None:
        self._build, self._conversation, self._placed = build, conversation, placed
        self._built: dict[int, tuple[Prompt, Sequence[Placed]] | None] = {}
        self._starts = cuts(conversation, placed)
        self.n_cuts = len(self._starts)

    def without(self, n_turns: int) -> tuple[Prompt, Sequence[Placed]] | None:
        """The prompt without so many turns, and its pictures; None if it is too long to be counted."""
        if n_turns not in self._built:
            messages, left = self._conversation, self._placed
            if n_turns:
                messages, left = without_oldest(messages, left, n_turns, self._starts)
            try:
                self._built[n_turns] = self._build(messages, left), left
            except PromptTooLongError:
                if n_turns >= self.n_cuts - 1:  # nothing can be dropped any more
                    raise
                self._built[n_turns] = None
        return self._built[n_turns]

    def fits(self, n_turns: int, n_tokens: int) -> bool:
        """Whether the prompt without so many turns has at most so many tokens."""
        found = self.without(n_turns)
        return found is not None and len(found[0].ids) <= n_tokens

    def first(self, start: int, end: int, n_tokens: int) -> int:
        """The fewest turns, from `start`, without which the rest fits; `end` if there are none.

        More turns are never fewer tokens. Few turns are tried first: prompts of many take long to build.
        """
        high, stride = end, 1
        while high > start and self.fits(max(start, high - stride), n_tokens):
            high = max(start, high - stride)
            stride *= 2
        low = max(start, high - stride + 1)
        return bisect_left(range(low, high), True, key=lambda n: self.fits(n, n_tokens)) + low

    def result(self, n_turns: int) -> tuple[Prompt, Sequence[Placed], int]:
        """The prompt, its pictures, and the number of turns."""
        found = self.without(n_turns)
        assert found is not None
        return *found, n_turns


def _roundest(low: int, high: int) -> int:
    """The number from `low` to `high` that is divisible by the largest power of two."""
    while high & (high - 1) >= max(1, low):
        high &= high - 1
    return high
