"""A way through a grammar that is tried and taken back: where a text stands, in the grammar and in its JSON.

The grammar's matcher is moved and moved back rather than copied: copies take a millisecond once its automaton is
large. Knows nothing of what is looked for; see `ending`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from edge_runtime.errors import MessageError
from edge_runtime.structured_output.compiling import too_complex
from edge_runtime.structured_output.effort import Effort
from edge_runtime.structured_output.json_position import JsonPosition

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from edge_runtime.structured_output.vocabulary import GrammarVocabulary

BYTES_A_STEP = 32
"""Of one look into the grammar, which count as one step of an effort."""
STEPS_OF_MASK = 8
"""What a look at the whole vocabulary counts for."""


class Trail:
    """A place in an answer, and the tokens that led there from where it began.

    Parameters
    ----------
    matcher, position : where it begins. The matcher is moved; `taking_back` leaves it where it was.
    effort : what may be done on the way.
    """

    def __init__(
        self, matcher: LLMatcher, position: JsonPosition, vocabulary: GrammarVocabulary, effort: Effort
    ) -> None:
        self.position, self.ids = position, list[int]()
        self._matcher, self._vocabulary, self._effort = matcher, vocabulary, effort
        self._before: list[tuple[int, JsonPosition]] = []
        """For every step: how many tokens there were, and the place."""

    def __len__(self) -> int:
        """Steps so far."""
        return len(self._before)

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        return bool(self._matcher.is_accepting())

    def allows(self, *data: int) -> bool:
        """Whether the grammar lets these bytes follow."""
        self._effort.spend(1 + len(data) // BYTES_A_STEP)
        return self._allows([self._vocabulary.byte_tokens[byte] for byte in data])

    def n_allowed(self, *data: int) -> int:
        """How many of these bytes the grammar lets follow."""
        self._effort.spend(1 + len(data) // BYTES_A_STEP)
        return int(self._matcher.validate_tokens([self._vocabulary.byte_tokens[byte] for byte in data]))

    def may_end_behind(self, byte: int) -> bool:
        """Whether the grammar lets a byte follow, and then the end of the text."""
        self._effort.spend()
        return self._allows([self._vocabulary.byte_tokens[byte], self._vocabulary.eos_token_id])

    def allowed_among(self, order: bytes) -> list[int]:
        """The bytes of an order that the grammar lets follow. For more than a few, quicker than to ask for each."""
        self._effort.spend(STEPS_OF_MASK)
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            self._complain()
        ids = self._vocabulary.ids_of_bytes[np.frombuffer(order, np.uint8)]
        return [order[i] for i in np.flatnonzero(mask[ids >> 3] >> (ids & 7) & 1)]

    def _allows(self, ids: Sequence[int]) -> bool:
        allowed = self._matcher.validate_tokens([*ids]) == len(ids)
        if not allowed and self._matcher.is_error():
            self._complain()
        return allowed

    def _complain(self) -> None:
        raise MessageError(too_complex(self._matcher.get_error()))

    def forced(self) -> list[int]:
        """Tokens that must follow."""
        self._effort.spend()
        ids: list[int] = self._matcher.compute_ff_tokens()
        return ids

    def step(self, ids: Sequence[int]) -> bool:
        """Go over some tokens; false where an object would get a key, or an array an item, twice: nothing moves then.

        Raises
        ------
        MessageError
            When the grammar has become too complex.
        """
        data = b"".join(self._vocabulary.token_bytes[i] for i in ids)
        self._effort.spend(1 + len(data) // BYTES_A_STEP)
        position = self.position.copy()
        if not self._allows(ids) or not position.feed(data):
            return False
        if not self._matcher.consume_tokens([*ids]):
            self._complain()
        self._before.append((len(self.ids), self.position))
        self.ids += ids
        self.position = position
        return True

    def ids_of(self, byte: int) -> list[int]:
        """A byte as a token."""
        return [self._vocabulary.byte_tokens[byte]]

    def step_bytes(self, data: bytes) -> bool:
        """Go over bytes, each as a token; otherwise as `step`."""
        return self.step([self._vocabulary.byte_tokens[byte] for byte in data])

    def step_byte(self, byte: int) -> bool:
        """Go over one byte; otherwise as `step`."""
        return self.step(self.ids_of(byte))

    def back_to(self, n_steps: int) -> None:
        """Take back all steps but the first so many."""
        if n_steps < len(self._before):
            n_ids, position = self._before[n_steps]
            if not self._matcher.rollback(len(self.ids) - n_ids):
                self._complain()
            del self._before[n_steps:], self.ids[n_ids:]
            self.position = position

    @contextmanager
    def taking_back(self) -> Iterator[Trail]:
        """Whatever is done inside is taken back."""
        n_steps = len(self)
        try:
            yield self
        finally:
            if not self._matcher.is_error():
                self.back_to(n_steps)
