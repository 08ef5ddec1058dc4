"""An answer that must be JSON of a schema: which token comes next, and how it comes to its end in time.

The grammar says what may follow, the sampler chooses among that. Before the tokens run out the answer is brought to
its end on the shortest way the grammar has, so it is whole JSON in any case in which that fits at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edge_runtime.errors import MessageError
from edge_runtime.structured_output.compiling import too_complex
from edge_runtime.structured_output.effort import AnswerEffort, TooMuchWorkError
from edge_runtime.structured_output.grammar import Grammar, allowed_ids
from edge_runtime.structured_output.json_position import without_blanks
from edge_runtime.structured_output.shortest_completion import has_new_item, has_new_key, is_end, shortest_end

DEFAULT_BUDGET = 1024
"""Tokens of an answer whose schema leaves open how long it gets; more where it requires more."""
LOOK_EVERY = 32  # tokens between two looks at the shortest way, while the end is far

Ids = npt.NDArray[np.int64]
Choose = Callable[[Ids], int]


@dataclass(frozen=True)
class AnswerForm:
    """What an answer must look like, from its first token behind the reasoning to its last."""

    grammar: Grammar
    budget: int | None = None
    """Tokens after which the answer is brought to its end; None: as many as the request allows."""
    before: tuple[int, ...] = ()
    """Tokens ahead of the JSON text."""
    after: tuple[int, ...] = ()
    """Tokens behind the JSON text."""
    separator: tuple[int, ...] = ()
    """Tokens between the reasoning and the answer."""
    call: AnswerForm | None = None
    """What the answer may be instead, known by its first token: a call of a tool."""
    begun: tuple[int, ...] = ()
    """Beginning of the JSON text that the prompt holds already."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the schemas is left out or read in another way, in sentences."""
        return (*self.grammar.notes, *(self.call.notes if self.call is not None else ()))

    @property
    def n_shortest(self) -> int:
        """Tokens of the shortest answer, with what stands around the JSON text."""
        own = len(self.before) + self.grammar.n_shortest + len(self.after)
        return own if self.call is None else max(own, self.call.n_shortest)

    def limit_reasoning(self, budget: int | None, room: int) -> int:
        """Tokens of reasoning that leave the answer its own: its budget, or half of the room where that is less.

        The shortest answer always has its place, as long as it fits at all.

        Parameters
        ----------
        budget : tokens of reasoning that are wished for; None: no limit.
        room : tokens that reasoning and answer may have together.
        """
        least = 1 + len(self.separator) + self.n_shortest  # 1: the token that ends the reasoning
        most = max(0, room - max(least, min(self.budget or DEFAULT_BUDGET, room // 2)))
        return most if budget is None else min(budget, most)

    def behind(self, text: str) -> AnswerForm:
        """The form of an answer that goes on with a text.

        Blanks between the parts of JSON in it are no part of what is matched. A call begins on a new line behind it.

        Raises
        ------
        MessageError
            When no answer of this form begins with the text.
        """
        if not text:
            return self
        if self.before:
            newline = self.before[1:]
            return self if text.endswith("\n") else replace(self, before=(*newline, *self.before))
        ids = self.grammar.vocabulary(without_blanks(text))
        matcher, position = self.grammar.matcher(), self.grammar.position()
        if not ids or (matcher.try_consume_tokens(ids) == len(ids) and position.feed(self._bytes(ids))):
            return replace(self, begun=tuple(ids), call=None if ids else self.call)
        raise MessageError(
            f"The answer goes on with the last message, but no JSON of its form begins with {text[:60]!r}; correct "
            "that message, or leave it out."
        )

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.grammar.vocabulary.token_bytes[i] for i in ids)

    def start(self, *, thinking: bool = False) -> Constraint:
        """A new answer, behind reasoning or not."""
        return Constraint(self, self.separator if thinking else ())


class Constraint:
    """One answer on its way; see `AnswerForm`."""

    def __init__(self, form: AnswerForm, separator: Sequence[int] = ()) -> None:
        self._forced = deque(separator)
        self._first_way: list[int] = []
        """Where nothing is written yet: the shortest way to the end."""
        self._take(form)
        self._call = form.call
        """As long as it is open whether the answer is one."""
        self._is_complete = False
        """Whether nothing but what is forced is to come."""
        self._way: list[int] | None = None
        """Once the end is near: the shortest way to it, which still fits."""
        self._look_at: int | None = None
        """So many tokens ahead of the last the shortest way is looked for next; None: at once."""
        self.shortened = False
        """Whether the answer was brought to its end because tokens ran out."""
        self._effort = AnswerEffort()
        if form.begun:
            self._matcher.consume_tokens([*form.begun])
            self._position.feed(b"".join(self._vocabulary.token_bytes[i] for i in form.begun))
            self._first_way = []
            self._end_if_complete()

    def _take(self, form: AnswerForm) -> None:
        self._grammar, self._vocabulary, self._after = form.grammar, form.grammar.vocabulary, form.after
        self._forced.extend(form.before)
        self._left = form.budget
        self._matcher, self._position = form.grammar.matcher(), form.grammar.position()
        self._first_way = [*form.grammar.shortest]

    @property
    def ended(self) -> bool:
        """Whether the answer is complete; nothing may follow then."""
        return self._is_complete and not self._forced

    def next_token(self, remaining: int, choose: Choose) -> int:
        """Choose the next token, or an end token.

        Parameters
        ----------
        remaining : tokens that the answer may still have, this one included.
        choose : picks one of the token ids it is given: ndarray [shape=(n,), int64].

        Raises
        ------
        MessageError
            When the schema turns out to ask for too much: of the grammar, or of work (`TooMuchWorkError`).
        """
        with self._effort.step():
            return self._next_token(remaining, choose)

    def _next_token(self, remaining: int, choose: Choose) -> int:
        if self.ended:  # the prompt held the whole of it
            return min(self._vocabulary.stop_ids)
        if self._call is not None and not self._forced:
            call, self._call = self._call, None
            if self._is_call(call, remaining, choose):
                self._take(call)
        wanted = remaining if self._left is None else min(remaining, self._left)
        if self._left is not None:
            self._left -= 1
        if not self._forced:
            token = self._choose(wanted - len(self._after), remaining - len(self._after), choose)
            if token is not None:
                return token
        return self._forced.popleft() if self._forced else min(self._vocabulary.stop_ids)

    def _is_call(self, call: AnswerForm, remaining: int, choose: Choose) -> bool:
        """Whether a call begins here rather than the answer itself."""
        if call.n_shortest > remaining:
            return False
        ids = allowed_ids(self._matcher, len(self._vocabulary.continues_number))
        return choose(np.sort(np.append(ids, call.before[0]))) == call.before[0]

    def _choose(self, wanted: int, remaining: int, choose: Choose) -> int | None:
        """A token that the grammar allows; None when the way to the end must be taken instead.

        Parameters
        ----------
        wanted, remaining : tokens that the answer should, and can, still have.
        """
        way = self._way_to_the_end(wanted, remaining)
        if way is not None and len(way) >= wanted:
            self._close(way)
            return None
        try:
            token = self._sampled(choose)
            if token in self._vocabulary.stop_ids:
                return token
            rest = self._way_behind(token, way) if way is not None else None
        except TooMuchWorkError:
            if way is None:
                raise
            rest = None
        if way is not None:
            if rest is None or len(rest) >= wanted:
                self._close(way)  # one token further on, no way to the end would fit, or be found: it is not taken
                return None
            self._way = rest
        self._end_if_complete()
        return token

    def _end_if_complete(self) -> None:
        if self._matcher.is_stopped():
            self._forced.extend(self._after)
            self._is_complete = True

    def _sampled(self, choose: Choose) -> int:
        """A token that the sampler takes from what the grammar allows, and go over it unless it is an end token."""
        ids = allowed_ids(self._matcher, len(self._vocabulary.continues_number))
        if self._matcher.is_error():
            raise MessageError(too_complex(self._matcher.get_error()))
        for group in self._preferred(ids):
            while len(group):
                token = choose(group)
                if token in self._vocabulary.stop_ids or self._leads_on(token):
                    return token
                group = group[group != token]
        raise MessageError(
            "The schema asks for more different keys, or more different items of an array, than it allows; "
            "correct it."
        )

    def _leads_on(self, token: int) -> bool:
        """Go over a token; false where an object would get a key, or an array an item, twice: nothing moves then."""
        position = self._position.copy()
        if not position.feed(self._vocabulary.token_bytes[token]):
            return False
        if not self._matcher.consume_token(token):
            raise MessageError(too_complex(self._matcher.get_error()))
        place = (self._matcher, position, self._vocabulary, self._effort)
        runs_out = self._grammar.limits_keys and position.is_at_key
        if (position.may_repeat and not has_new_item(*place)) or (runs_out and not has_new_key(*place)):
            self._matcher.rollback(1)
            return False
        self._position = position
        return True

    def _way_to_the_end(self, wanted: int, remaining: int) -> list[int] | None:
        """The shortest way to the end, when it is so near that it must be known; None too where it does not fit."""
        if self._way is None and (self._look_at is None or wanted <= self._look_at):
            known, self._first_way = self._first_way, []
            way = known or shortest_end(self._matcher, self._position, self._vocabulary, self._effort)
            self._look_at = wanted - LOOK_EVERY
            if way is not None and len(way) <= remaining:
                near = len(way) + self._grammar.most_forced
                if wanted <= near:
                    self._way = way
                else:
                    self._look_at = max(near, self._look_at)
        return self._way

    def _way_behind(self, token: int, way: list[int]) -> list[int] | None:
        """The way to the end behind a token that was just taken; inside a string it mostly stays the same."""
        if way[:1] == [token]:
            return way[1:]
        if is_end(way, self._matcher, self._position, self._vocabulary):
            return way
        return shortest_end(self._matcher, self._position, self._vocabulary, self._effort)

    def _close(self, way: Sequence[int]) -> None:
        self._forced.extend([*way, *self._after])
        self._is_complete = self.shortened = True

    def _preferred(self, ids: Ids) -> list[Ids]:
        """Tokens in groups, the better ones first: what lengthens a long number or key comes last."""
        if self._position.number_is_long:
            is_late = self._vocabulary.continues_number[ids]
        elif self._position.key_is_long:
            is_late = ~self._vocabulary.starts_with_quote[ids]
        else:
            return [ids]
        return [ids[~is_late], ids[is_late]]
