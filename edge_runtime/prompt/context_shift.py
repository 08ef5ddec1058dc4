"""A conversation that has outgrown the context → the same without its oldest turns.

Only done on request, and before anything is computed: turns are dropped whole, with their pictures, and the rest is
a prompt like any other. System messages stay, wherever they are. Shifting positions inside the KV cache instead, as
llama.cpp can, would be cheaper when an answer reaches the end, but what remains would still have been computed with
the dropped turns in view, and positions that several sequences share have one number each. So an answer that reaches
the end of the context ends.

More is dropped than necessary, a quarter of the context at a time: then the same turns stay dropped for a while, and
the KV cache serves the prompts in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

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
    conversation: Sequence[Message], placed: Sequence[Placed], n_turns: int
) -> tuple[list[Message], list[Placed]]:
    """The conversation without its first turns (or `cuts`), and the remaining pictures, renumbered."""
    starts = cuts(conversation, placed)
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
    prompt = build(conversation, placed)
    limit, step = n_ctx - min(reserve_tokens, n_ctx // STEPS), max(1, n_ctx // STEPS)
    excess = len(prompt.ids) - limit
    if excess <= 0:
        return prompt, placed, 0
    goal = len(prompt.ids) - -(-excess // step) * step
    found: tuple[Prompt, Sequence[Placed], int] = prompt, placed, 0
    n_whole = len(turns(conversation, placed))
    for n_turns in range(1, len(cuts(conversation, placed))):
        if n_turns >= n_whole and len(found[0].ids) <= limit:
            break  # a turn is split only where nothing else helps
        messages, left = without_oldest(conversation, placed, n_turns)
        shorter = build(messages, left)
        if len(found[0].ids) > limit:
            found = shorter, left, n_turns
        if len(shorter.ids) <= goal:
            return shorter, left, n_turns
    return found
