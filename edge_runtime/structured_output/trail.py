"""A path through a grammar that is tried and rolled back: the position of a text in the grammar and in its JSON.

The grammar's matcher is moved and rolled back rather than copied: copies take a millisecond once its automaton is
large. Does not know what is searched for; see `shortest_completion`.
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
"""Bytes of one check against the grammar that count as one step of an effort."""
STEPS_OF_MASK = 8
"""Steps that a mask of the whole vocabulary counts for."""


class Trail:
    """A place in an answer, and the tokens that led there from the start of the trail.

    Parameters
    ----------
    matcher, position : the start. The matcher is moved; `rolled_back` leaves it where it was.
    effort : limits the work.
    """

    def __init__(
        self, matcher: LLMatcher, position: JsonPosition, vocabulary: GrammarVocabulary, effort: Effort
    ) -> None:
        self.position, self.ids = position, list[int]()
        self._matcher, self._vocabulary, self._effort = matcher, vocabulary, effort
        self._before: list[tuple[int, JsonPosition]] = []
        """For every step: the number of tokens and the position before it."""

    def __len__(self) -> int:
        """Steps so far."""
        return len(self._before)

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        return bool(self._matcher.is_accepting())

    def allows(self, *data: int) -> bool:
        """Whether the grammar allows these bytes to follow."""
        self._effort.spend(1 + len(data) // BYTES_A_STEP)
        return self._allows([self._vocabulary.byte_tokens[byte] for byte in data])

    def n_allowed(self, *data: int) -> int:
        """How many of these bytes the grammar allows to follow."""
        self._effort.spend(1 + len(data) // BYTES_A_STEP)
        return int(self._matcher.validate_tokens([self._vocabulary.byte_tokens[byte] for byte in data]))

    def may_end_after(self, byte: int) -> bool:
        """Whether the grammar allows a byte, and then the end of the text."""
        self._effort.spend()
        return self._allows([self._vocabulary.byte_tokens[byte], self._vocabulary.eos_token_id])

    def allowed_among(self, order: bytes) -> list[int]:
        """The bytes of an order that the grammar allows to follow. For more than a few, faster than checking each."""
        self._effort.spend(STEPS_OF_MASK)
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            self._raise_too_complex()
        ids = self._vocabulary.ids_of_bytes[np.frombuffer(order, np.uint8)]
        return [order[i] for i in np.flatnonzero(mask[ids >> 3] >> (ids & 7) & 1)]

    def _allows(self, ids: Sequence[int]) -> bool:
        allowed = self._matcher.validate_tokens([*ids]) == len(ids)
        if not allowed and self._matcher.is_error():
            self._raise_too_complex()
        return allowed

    def _raise_too_complex(self) -> None:
        raise MessageError(too_complex(self._matcher.get_error()))

    def forced(self) -> list[int]:
        """Tokens that must follow."""
        self._effort.spend()
        ids: list[int] = self._matcher.compute_ff_tokens()
        return ids

    def step(self, ids: Sequence[int]) -> bool:
        """Move over tokens; false, without moving, if an object would get a key, or an array an item, twice.

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
            self._raise_too_complex()
        self._before.append((len(self.ids), self.position))
        self.ids += ids
        self.position = position
        return True

    def ids_of(self, byte: int) -> list[int]:
        """A byte as a token."""
        return [self._vocabulary.byte_tokens[byte]]

    def step_bytes(self, data: bytes) -> bool:
        """Move over bytes, each as a token; otherwise like `step`."""
        return self.step([self._vocabulary.byte_tokens[byte] for byte in data])

    def step_byte(self, byte: int) -> bool:
        """Move over one byte; otherwise like `step`."""
        return self.step(self.ids_of(byte))

    def rollback_to(self, n_steps: int) -> None:
        """Roll back all steps but the first `n_steps`."""
        if n_steps < len(self._before):
            n_ids, position = self._before[n_steps]
            if not self._matcher.rollback(len(self.ids) - n_ids):
                self._raise_too_complex()
            del self._before[n_steps:], self.ids[n_ids:]
            self.position = position

    @contextmanager
    def rolled_back(self) -> Iterator[Trail]:
        """Roll back all steps taken inside the block."""
        n_steps = len(self)
        try:
            yield self
        finally:
            if not self._matcher.is_error():
                self.rollback_to(n_steps)
