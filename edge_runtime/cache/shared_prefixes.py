"""The prefix that chats of one model share: system prompt and tools, held in the KV cache for the next chat.

A client such as Open WebUI sends the same tools with every chat, thousands of tokens before the user's first word.
`Beginnings` finds how long that part of a prompt is; `HeldBeginnings` keeps it in separate sequences, which share
their cells with running chats, so holding costs nothing while those run. It is given up after all idle sequences, and
only where that frees cells.

Two of them are held. Eviction is GreedyDual-Size with frequency (Cao and Irani, 1997; Cherkasova, 1998): each is
worth its length times the number of its uses, counted from a clock that advances to the worth of the last one
evicted. So single chats with system prompts of their own do not drive out a long one that is used again and again,
and nothing stays forever.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from edge_runtime.decoder.decoder import Decoder
from edge_runtime.decoder.llama_context import common_beginning
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.inputs.messages import Message, parse_messages
from edge_runtime.prompt.build import Prompt

MIN_SHARED = 64
"""Positions; fewer are computed as fast as they are looked up."""
QUESTIONS = ("What", "And how")
"""They start differently: after the prefix of their prompts comes the conversation."""
MAX_KNOWN = 32
MAX_USES = 16
"""Maximum count: even what was used for years may be evicted after some days."""


class Beginnings:
    """Finds how long a prompt's prefix is that does not depend on the conversation; from any thread.

    Knows of templates only that they turn messages into a prompt: rendering costs as much as for the prompt itself,
    so it is done once per system prompt with its tools.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, list[int]] = OrderedDict()
        """Digest of what decides the prefix → its ids."""
        self._lock = threading.Lock()

    def length(
        self,
        ids: Sequence[int],
        conversation: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        build: Callable[[Sequence[Message]], Prompt],
        *more: Hashable,
    ) -> int:
        """Length of the prefix that other chats with the same system prompt and tools share; 0 if short.

        Parameters
        ----------
        ids : token ids of the prompt.
        build : builds the prompt of a conversation without pictures.
        more : everything else that affects the prompt.
        """
        opening = [*takewhile(lambda message: message.role == "system", conversation)]
        written = [[str(part) for part in message.parts] for message in opening]
        name = json.dumps([written, [*tools], repr(more)], sort_keys=True, default=str)
        if len(name) < MIN_SHARED:  # no token is shorter than a character
            return 0
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        with self._lock:
            found = self._known.get(digest)
        if found is None:
            try:
                one, other = (build([*opening, *parse_messages(question)]).ids for question in QUESTIONS)
            except EdgeRuntimeError:  # a template that needs more than a question
                return 0
            found = one[: common_beginning(one, other)]
            with self._lock:
                self._known[digest] = found
                while len(self._known) > MAX_KNOWN:
                    self._known.popitem(last=False)
        n = common_beginning(found, ids)  # less than expected if a template looks at the end of the conversation
        return n if n >= MIN_SHARED else 0


@dataclass
class _Held:
    adapter: str | None
    worth: float
    uses: int = 1


class HeldBeginnings:
    """Sequences of the KV cache that hold shared prefixes. Used only on the inference thread."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._held: dict[int, _Held] = {}
        self._clock = 0.0

    def __iter__(self) -> Iterator[int]:
        return iter([*self._held])

    def by_worth(self) -> list[tuple[list[Hashable], str | None]]:
        """Keys and adapter of each, the last to be evicted first."""
        order = sorted(self._held, key=lambda sequence: -self._held[sequence].worth)
        return [(self._decoder.keys(sequence), self._held[sequence].adapter) for sequence in order]

    def hold(self, source: int, n: int, adapter: str | None) -> int | None:
        """Hold the first `n` positions of a sequence, unless others are worth more.

        Returns
        -------
        sequence : the sequence that holds them from now on; None if they were held already or are not held.
        """
        keys = self._decoder.keys(source)[:n]
        if len(keys) < max(n, MIN_SHARED):
            return None
        for sequence, held in self._held.items():
            if held.adapter == adapter and self._decoder.keys(sequence) == keys:
                held.uses = min(held.uses + 1, MAX_USES)
                held.worth = self._clock + held.uses * n
                return None
        free = [sequence for sequence in self._decoder.holding if sequence not in self._held]
        if not free:
            least = min(self._held, key=lambda sequence: self._held[sequence].worth)
            self._clock = min(self._held[least].worth, self._clock + n)
            if self._held[least].worth > self._clock:
                return None
            del self._held[least]
            free = [least]
        self._decoder.share(source, free[0], n)
        self._held[free[0]] = _Held(adapter, self._clock + n)
        return free[0]

    def give_up(self, used: Sequence[int]) -> bool:
        """Give up the one worth least among those that free cells; False if none does.

        Parameters
        ----------
        used : running sequences: cells that they hold, too, are not freed.
        """
        at_work = [self._decoder.keys(sequence) for sequence in used]
        for sequence in sorted(self._held, key=lambda sequence: self._held[sequence].worth):
            keys = self._decoder.keys(sequence)
            if all(common_beginning(keys, other) < len(keys) for other in at_work):
                self._clock = max(self._clock, self._held.pop(sequence).worth)
                self._decoder.rewind(sequence)
                return True
        return False
